"""Hooks of mkdocs: the README is the first page, linked files are part of the site, the commands document themselves.

In: pages with links that also work in the repository. Out: pages with links that work in the site.
Invariant: a link to a file that does not exist is left alone, so that the strict build reports it.
"""

import os
import posixpath
import re
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from pipelines.__main__ import SCALEKD

ROOT = Path(__file__).parents[2]
OPTIONS = "<!-- options -->"
"""Where a page shows the help of all commands."""
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the first page, and every file outside docs/ that a page links to."""
    home = "---\nhide: [navigation]\n---\n" + (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=home))
    pages = [file for file in files if file.is_documentation_page()]
    for link in {link for page in pages for link in _outside(page)}:
        # A Markdown file would become a page; as text it is shown as it is.
        uri = f"repository/{link}" + (".txt" if link.endswith((".md", ".py", ".yaml", ".jsonl", ".cff")) else "")
        files.append(File.generated(config, uri, content=(ROOT / link).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links of the repository to links of the site, and fill in the options of the commands."""

    def rewritten(match: re.Match[str]) -> str:
        path = _in_repository(page.file.src_uri, match[2])
        for uri in (path.removeprefix("docs/"), f"repository/{path}", f"repository/{path}.txt"):
            if files.get_file_from_path(uri) and (uri.startswith("repository/") or path.startswith("docs/")):
                return match[1] + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + match[3]
        return match[0]

    return LINK.sub(rewritten, markdown).replace(OPTIONS, "\n\n".join(map(_help, SCALEKD.commands.values())))


def _help(command: click.Command) -> str:
    """The help of a command, as a section."""
    title = f"scalekd {command.name}"
    text = command.get_help(click.Context(command, info_name=title, max_content_width=88, terminal_width=88))
    return f"### {title}\n\n```text\n{text}\n```"


def _in_repository(page: str, link: str) -> str:
    """The path, in the repository, that a link of a page points to. The first page is the README."""
    folder = "" if page == "index.md" else posixpath.dirname(f"docs/{page}")
    return posixpath.normpath(posixpath.join(folder, link))


def _outside(page: File) -> list[str]:
    """Paths in the repository, outside docs/, of the existing files that a page links to."""
    found = [_in_repository(page.src_uri, match[2]) for match in LINK.finditer(page.content_string)]
    return [path for path in found if not path.startswith(("docs/", "..", os.sep)) and (ROOT / path).is_file()]
