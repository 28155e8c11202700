"""What all pages of the package share: their look, and what makes HTML a page. Nothing is asked of a network."""

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --quiet: #5a6067; --page: #fff; --card: #f5f6f8; --line: #dfe2e6;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --quiet: #a3aab2; --page: #15171a; --card: #1e2126;
  --line: #33383f; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 1rem 1.5rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.25rem; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
p, li { max-width: 100ch; margin: .25rem 0; }
.quiet, figcaption, caption { color: var(--quiet); font-size: .875rem; max-width: none; }
.verdict { padding: .6rem 1rem; background: var(--card); border-left: 4px solid var(--accent); }
.verdict p { max-width: none; }
.screen { display: grid; grid-template-columns: 3fr 2fr; gap: 1.5rem; margin: .8rem 0; align-items: start; }
.screen > section { min-width: 0; }
.chart { width: 100%; }
.plain { list-style: none; padding: 0; }
button { font: inherit; font-size: .8125rem; padding: .2rem .7rem; color: var(--text); background: var(--page);
  border: 1px solid var(--quiet); border-radius: 4px; cursor: pointer; white-space: nowrap; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
pre { white-space: pre-wrap; font-size: .8125rem; }
details { border-top: 1px solid var(--line); padding: .5rem 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 760px) {
  body { padding: .5rem .75rem 3rem; font-size: 14px; line-height: 1.35; }
  h1 { font-size: 1rem; margin: 0 0 .3rem; }
  .screen { grid-template-columns: minmax(0, 1fr); gap: .4rem; margin: .4rem 0; }
  .verdict { padding: .4rem .6rem; }
}
"""


def whole_page(title: str, style: str, body: str, head: str = "", scripts: str = "") -> str:
    """The text of a page; all arguments are HTML, but `style`, which is CSS. The scripts come last."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{head}'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{style}</style>\n'
        f"</head>\n<body>\n<main>\n{body}\n</main>\n{scripts}\n</body>\n</html>\n"
    )
