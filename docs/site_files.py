"""What the site is made of, for mkdocs: the documents at the paths that they have in the repository, and what they link to.

So README.md is the first page, and every link is right in the repository and on the site alike.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs with the files of docs/ and of the theme; those of the theme stay."""
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    paths = {*documents, ROOT / "docs/site.css"}.union(*map(linked_files, documents))
    names = sorted(str(path.relative_to(ROOT)) for path in paths)
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*of_theme, *(File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names)])


def linked_files(document: Path) -> list[Path]:
    """The files of the repository that a document links to or shows."""
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    paths = [(document.parent / link).resolve() for link in links if "://" not in link]
    return [path for path in paths if path.is_file() and path.is_relative_to(ROOT)]
