"""PRM under its name in the tools that people train with: one module a tool, each a few lines around its own hooks."""
