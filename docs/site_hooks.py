"""What mkdocs needs beyond its settings: pages from outside docs/, their links, and mathematics without a script."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
OTHER_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/**/*.md", "benchmarks/*.md", "results/**/*")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
FORMULA = re.compile(r"<(span|div) class=\"arithmatex\">\\[(\[](.*?)\\[)\]]</\1>", re.DOTALL)
INTERVAL = re.compile(r"\[[-+]?[\d.]+, [-+]?[\d.]+\]|[\d.]+ ± [\d.]+")


def on_files(files, config):
    """Adds the pages and pictures of other folders, at the places that they have in the repository."""
    for pattern in OTHER_PAGES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the repository become links of the site; to what is no page, links into the repository or none."""
    source = Path(page.file.abs_src_path)
    depth = page.file.src_uri.count("/")

    def to_site(match: re.Match) -> str:
        target = (source.parent / match[1]).resolve().relative_to(ROOT).as_posix()
        uri = target.removeprefix("docs/")
        if uri in files.src_uris:
            return "../" * depth + uri
        return f"{(config.repo_url or '').rstrip('/')}/blob/HEAD/{target}" if config.repo_url else f"no-page:{target}"

    return re.sub(r"\[([^\]]*)\]\(no-page:[^)]*\)", r"\1", LINK.sub(to_site, markdown))


def on_page_content(content, page, config, files):
    """Formulas become MathML, which a browser sets by itself, and intervals stay on one line."""

    def to_mathml(match: re.Match) -> str:
        return convert(html.unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline")

    return INTERVAL.sub(r'<span class="interval">\g<0></span>', FORMULA.sub(to_mathml, content))
