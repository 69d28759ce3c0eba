"""HTML that untrusted text cannot break: everything is escaped, and data is a block of JSON."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence

from trl_grpo_ext.report.markdown import visible

# What would end the script element or begin another; the rest is ASCII.
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}


def text(value: object) -> str:
    r"""Return a value as HTML text, control characters spelt out, a real in four digits.

    Example:
        >>> text("<b>\u202e"), text(0.123456), text(None)
        ('&lt;b&gt;\\u202e', '0.1235', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return html.escape(visible(shown))


def prose(sentence: object) -> str:
    """Return a sentence as HTML, with what stands between backquotes as code.

    Example:
        >>> prose("Set `beta` < 1.")
        'Set <code>beta</code> &lt; 1.'
    """
    return re.sub("`([^`]+)`", r"<code>\1</code>", text(sentence))


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, kind: str = "") -> str:
    """Return a table in a box that scrolls by itself; the first column heads the rows."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{text(first)}</th>'
        + "".join(f"<td>{text(value)}</td>" for value in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def told_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of sentences, whose rows stand below each other on a phone."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{text(first)}</th>'
        + "".join(
            f'<td data-label="{text(name)}">{prose(value)}</td>'
            for name, value in zip(header[1:], rest, strict=True)
        )
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table class="told"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def paragraphs(sentences: Iterable[str], *, kind: str = "") -> str:
    """Return a list of sentences; nothing for none."""
    items = "".join(f"<li>{prose(sentence)}</li>" for sentence in sentences)
    return f'<ul class="{kind}">{items}</ul>' if items else ""


def folded(title: str, body: str) -> str:
    """Return what opens on a click."""
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def section(key: str, title: str, body: str) -> str:
    """Return a part of the page that a link can name; nothing for an empty one."""
    if not body:
        return ""
    return f'<section id="{key}"><h2>{text(title)}</h2>{body}</section>'


def data_block(key: str, data: object) -> str:
    r"""Return data for the script: JSON in ASCII, in which no tag can begin or end.

    Example:
        >>> data_block("d", "</script>\u2028")
        '<script type="application/json" id="d">"\\u003c/script\\u003e\\u2028"</script>'
    """
    shown = json.dumps(data, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    return f'<script type="application/json" id="{key}">{shown}</script>'


def document(title: str, body: str, *, style: str, script: str) -> str:
    """Return the page: it may run this script, use this style, and fetch nothing at all."""
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _hash(source: str) -> str:
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return f"sha256-{digest}"
