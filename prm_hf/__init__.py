"""Population Risk Minimization for the Hugging Face fine-tuning stack."""
