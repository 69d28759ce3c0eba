"""Runs reasoning-gym's scorers in a worker process: see ``worker_script.py``.

Scorers of reasoning-gym 0.1.25 pass answers to Python's ``eval``, some of them by sympy. Here they
get :func:`checked_eval`, so that nothing in an answer is run.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

_NODES = (
    *(ast.Expression, ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Load),
    *(ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.Name, ast.Call),
)
_FUNCTIONS = frozenset({"sqrt", "cbrt", "root"})  # of sympy, which are no classes


def verdict(row: str, answer: str | None) -> float | str:
    """Return the score of an answer, or which of the two the scorer fails on.

    Args:
        row: What the data set holds: a Python literal with ``task``, ``options`` and ``entry``.
        answer: That the model gave; ``None`` for the row's own.

    Returns:
        The score; ``"refused"`` if the scorer fails on this answer, but not on the row's own;
        ``"broken"`` if it fails on both.
    """
    try:
        return _score(row, answer)
    except (Exception, RecursionError, MemoryError):  # noqa: BLE001 - scorers raise anything
        pass
    try:
        _score(row, None)
    except (Exception, RecursionError, MemoryError):  # noqa: BLE001
        return "broken"
    return "broken" if answer is None else "refused"


def create_task(task: str, options: Mapping[str, Any]) -> Any:
    """Return reasoning-gym's data set.

    Args:
        task: Its name.
        options: Of its configuration. The ``datasets`` of ``composite`` are mappings with ``name``,
            ``weight`` and ``config``, as a YAML has them.
    """
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    if task == "composite":
        parts = [DatasetSpec(**{"config": {}, **part}) for part in options.get("datasets", [])]
        options = {**options, "datasets": parts}
    return reasoning_gym.create_dataset(task, **options)


def prepare() -> None:
    """Give :func:`checked_eval` to all modules of reasoning-gym, and to sympy's parser."""
    import reasoning_gym  # noqa: F401
    from sympy.parsing import sympy_parser

    tasks = [module for name, module in sys.modules.items() if name.startswith("reasoning_gym.")]
    for module in [*tasks, sympy_parser]:
        vars(module)["eval"] = checked_eval


def checked_eval(
    source: str | bytes,
    names: Mapping[str, Any] | None = None,
    local_names: Mapping[str, Any] | None = None,
    /,
) -> Any:
    """Return the value of an expression of literals, operators, and sympy's classes of expressions.

    Args:
        source: Untrusted.
        names: What it may name; nothing, not even a built-in function, if not given.
        local_names: More of that, which come first.

    Raises:
        ValueError: there is anything else in it, such as an attribute or a call of a function.

    Example:
        >>> checked_eval("[[1, 2 + 3], (4,)]")
        [[1, 5], (4,)]
        >>> checked_eval("__import__('os')")
        Traceback (most recent call last):
            ...
        ValueError: a call is not allowed
    """
    known = {**(names or {}), **(local_names or {}), "__builtins__": {}}
    tree = ast.parse(source.strip(), mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            raise ValueError(f"{type(node).__name__} is not allowed")
        if isinstance(node, ast.Call) and not _makes_an_expression(node, known):
            raise ValueError("a call is not allowed")
    return builtins.eval(compile(tree, "<answer>", "eval"), known)


def _makes_an_expression(call: ast.Call, names: Mapping[str, Any]) -> bool:
    from sympy import Basic

    if not isinstance(call.func, ast.Name) or call.keywords:
        return False
    made_by = names.get(call.func.id)
    return call.func.id in _FUNCTIONS or (isinstance(made_by, type) and issubclass(made_by, Basic))


def _score(row: str, answer: str | None) -> float:
    content = ast.literal_eval(row)
    entry = content["entry"]
    scorer = _scorer(content["task"], repr(content["options"]))
    return float(scorer(entry["answer"] if answer is None else answer, entry))


@lru_cache(maxsize=128)
def _scorer(task: str, options: str) -> Callable[[str | None, dict[str, Any]], float]:
    score: Callable[[str | None, dict[str, Any]], float]
    score = create_task(task, ast.literal_eval(options)).score_answer
    return score
