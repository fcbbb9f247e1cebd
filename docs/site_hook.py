"""Takes documents that live outside of docs/ into the web site (mkdocs hooks, see mkdocs.yml)."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Page of the site -> its file in the repository.
OUTSIDE = {
    "READ_ME.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "RESULTS.md": "benchmarks/RESULTS.md",
}


def on_files(files, config):
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of a repository file, written relative to it, lead to the page of the site."""
    source = ROOT / OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {(ROOT / path).resolve(): name for name, path in OUTSIDE.items()}

    def to_page(match):
        target, anchor = match[1], match[2] or ""
        path = (source.parent / target).resolve()
        if path == ROOT / "docs":
            path /= "README.md"
        if path in pages:
            return f"]({pages[path]}{anchor})"
        if path.is_relative_to(ROOT / "docs"):
            return f"]({path.relative_to(ROOT / 'docs')}{anchor})"
        return match[0]

    return re.sub(r"\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)", to_page, markdown)
