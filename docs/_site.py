"""What the site needs beside its pages: hooks of mkdocs, and an extension for the API pages.

- A link that leaves docs/, such as ../recipes/grpo.py, leads to a page made of that file, so that
  it works in the site as it does in the repository.
- Formulas become MathML when the site is built: no script, nothing to fetch.
- Docstrings in reStructuredText's roles become Markdown.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
SOURCE = "source/"  # where the pages of files outside docs/ stand
LANGUAGES = {".py": "python", ".yaml": "yaml"}

_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_MATH_BLOCK = re.compile(r"^\.\. math::[ \t]*(.*(?:\n(?=[ \t]+\S).*)*)", re.MULTILINE)
_MATH = re.compile(r":math:`([^`]*)`")
_REFERENCES = re.compile(r"^References:((?:\n[ \t]+\S.*)+)", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that a page links to."""
    pages = {file.src_uri: file.content_string for file in files if file.src_uri.endswith(".md")}
    while pages:
        linked = {target for page, text in pages.items() for target in _links(page, text)}
        pages = {}
        for path in sorted(linked):
            page = _page_of(path)
            if (ROOT / path).is_file() and files.get_file_from_path(page) is None:
                files.append(File.generated(config, page, content=_shown(path)))
                pages |= {page: _shown(path)} if path.endswith(".md") else {}
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Lead links that leave docs/ to the pages made of their targets."""
    here = page.file.src_uri

    def led(match: re.Match[str]) -> str:
        path = _target(here, match[1])
        if not (ROOT / path).is_file():
            return match[0]
        return f"]({posixpath.relpath(_page_of(path), posixpath.dirname(here) or '.')}"

    return _LINK.sub(led, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    return _FORMULA.sub(formula, content)


class PlainDocstrings(griffe.Extension):
    """Docstrings as Markdown: formulas between dollar signs, other roles as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """Return a docstring without reStructuredText, with sections that griffe knows."""
    text = _MATH_BLOCK.sub(lambda match: f"$$\n{' '.join(match[1].split())}\n$$", docstring)
    text = _MATH.sub(r"$\1$", text)
    text = _ROLE.sub(r"`\1`", text)
    text = _REFERENCES.sub(lambda match: f"**References:** {' '.join(match[1].split())}", text)
    return re.sub(r"^Example:", "Examples:", text, flags=re.MULTILINE)


def _links(page: str, text: str) -> set[str]:
    return {_target(page, link) for link in _LINK.findall(text)}


def _target(page: str, link: str) -> str:
    """The path in the repository of what a page of the site links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_file_of(page)), link))


def _file_of(page: str) -> str:
    if not page.startswith(SOURCE):
        return f"docs/{page}"
    path = page.removeprefix(SOURCE)
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def _page_of(path: str) -> str:
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return SOURCE + (path if path.endswith(".md") else f"{path}.md")


def _shown(path: str) -> str:
    """A file as Markdown."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        return "\n\n".join(map(_cell, json.loads(text)["cells"]))
    return f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}````\n"


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
