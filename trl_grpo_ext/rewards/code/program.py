"""The program in a completion."""

from __future__ import annotations

import ast
import re

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$")
_PYTHON = frozenset({"python", "python3", "py"})


def program_text(completion: str) -> str | None:
    r"""Return the Python program in a completion.

    It is the last block that is fenced as Python; if there is none, the last block fenced without
    a language; if nothing is fenced, the completion as a whole.

    Returns:
        The code; ``None`` if all blocks are of other languages, or the last fence is not closed, as
        in a completion that was cut off.

    Example:
        >>> program_text("So:\n```python\nprint(4)\n```\nIt prints:\n```\n4\n```")
        'print(4)'
        >>> program_text("    return 4")
        '    return 4'
        >>> program_text("```python\nprint(") is None
        True
    """
    blocks = fenced_blocks(completion)
    if blocks is None:
        return None
    if not blocks:
        return completion
    for languages in (_PYTHON, {""}):
        fitting = [code for language, code in blocks if language in languages]
        if fitting:
            return fitting[-1]
    return None


def fenced_blocks(text: str) -> list[tuple[str, str]] | None:
    r"""Return language and content of each fenced block; ``None`` if the last one is not closed.

    Example:
        >>> fenced_blocks("```py\na\n```")
        [('py', 'a')]
    """
    blocks: list[tuple[str, str]] = []
    fence, language, lines = "", "", list[str]()
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if not fence and match:
            fence, language, lines = match[1], match[2].lower(), []
        elif match and match[1].startswith(fence) and line.strip() == match[1]:
            blocks.append((language, "\n".join(lines)))
            fence = ""
        elif fence:
            lines.append(line)
    return None if fence else blocks


def given_code(prompt: str) -> str:
    r"""Return the code in a prompt that a program continues, as in HumanEval; empty if none.

    It is the prompt as a whole where that is Python, else its last fenced block where that is.

    Example:
        >>> given_code("Complete:\n```python\ndef f():\n    'One.'\n```")
        "def f():\n    'One.'"
        >>> given_code("Write a function.")
        ''
    """
    blocks = fenced_blocks(prompt) or []
    for code in (prompt, *(code for _, code in blocks[-1:])):
        if code.strip() and _is_python(code):
            return code
    return ""


def _is_python(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True
