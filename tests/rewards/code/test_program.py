from __future__ import annotations

import pytest

from trl_grpo_ext.rewards.code.program import fenced_blocks, given_code, program_text


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("print(4)", "print(4)"),
        ("    return 4\n", "    return 4\n"),
        ("", ""),
        ("```python\na\n```", "a"),
        ("```py\na\n```\nor\n```python3\nb\n```", "b"),
        ("```Python\na\n```", "a"),
        ("```\na\n```", "a"),
        ("```python\na\n```\noutput:\n```\n4\n```", "a"),
        ("```bash\npip install x\n```", None),
        ("```bash\npip install x\n```\n```\na\n```", "a"),
        ("```python\na\n```\n```python\nb", None),  # cut off
        ("````python\n```\na\n```\n````", "```\na\n```"),
        ("~~~python\na\n~~~", "a"),
        ("  ```python\n  a\n  ```", "  a"),
        ("use `x` and ``y``", "use `x` and ``y``"),
        ("```python title=x\na\n```", "a"),
        ("```python\nx = '''\n```text\n'''\n```", "x = '''\n```text\n'''"),
    ],
)
def test_program_text_is_the_last_python_block_else_the_whole(
    completion: str, program: str | None
) -> None:
    assert program_text(completion) == program


def test_fenced_blocks_are_read_in_linear_time_when_the_text_is_junk() -> None:
    assert fenced_blocks("`" * 200_000) is None
    assert fenced_blocks("` " * 100_000) == []


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("def f():\n    '''One.'''\n", "def f():\n    '''One.'''\n"),
        ("Complete this:\n```python\ndef f():\n    'One.'\n```\n", "def f():\n    'One.'"),
        ("Write a function that adds.", ""),
        ("Complete:\n```python\ndef f(\n```", ""),
        ("", ""),
    ],
)
def test_given_code_is_the_prompt_or_its_last_block_where_that_is_python(
    prompt: str, code: str
) -> None:
    assert given_code(prompt) == code
