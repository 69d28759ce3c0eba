"""The completions that a run logged, as a dataset that the Hub's viewer shows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from huggingface_hub import DatasetCardData

from trl_grpo_ext.data import MESSAGES
from trl_grpo_ext.hub.card import CARD
from trl_grpo_ext.report.markdown import code_span, section

LOGGED = "completions"  # folder of a run, in which TRL writes a parquet file a log
COMPLETIONS = "_completions"  # folder of a run; uploads of the model leave it out
DATA_FILE = Path("data") / "train.parquet"
_NUMBER, _TEXT = Value("float64"), Value("string")
_WHAT = {
    "step": "optimizer steps when it was sampled",
    "prompt": "what the model was given",
    "completion": "what the model wrote",
    "advantage": "how much better it scored than its group",
}


def write_completions(run_dir: Path, *, model: str) -> Path | None:
    """Write the logged completions as one parquet file, with a card.

    Columns: ``step``, ``prompt`` and ``completion`` (messages of ``role`` and ``content``, or
    text), one a reward, what rewards logged besides, ``advantage``.

    Args:
        run_dir: With the files that TRL writes with ``log_completions``.
        model: Repository of the model, for the card.

    Returns:
        The folder; ``None`` if nothing was logged.
    """
    files = sorted((run_dir / LOGGED).glob("*.parquet"))
    if not files:
        return None
    folder = run_dir / COMPLETIONS
    target = folder / DATA_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        logs = [Dataset.from_parquet(str(path), cache_dir=cache) for path in files]
        features = _features(logs)
        rows = Dataset.from_list(list(_rows(logs, features)), features=features)
        temporary = target.with_suffix(".tmp")
        rows.to_parquet(temporary)
        temporary.replace(target)
    card = dataset_card(model=model, columns=features, num_rows=rows.num_rows)
    (folder / CARD).write_text(card, encoding="utf-8")
    return folder


def dataset_card(*, model: str, columns: Iterable[str], num_rows: int) -> str:
    """Return the card of a run's completions: how to read the data, and what it is."""
    rows = [(name, _WHAT.get(name, "a reward, or what one logged")) for name in columns]
    listed = "\n".join(f"| {code_span(name)} | {what} |" for name, what in rows)
    text = (
        f"{num_rows} completions that the model {code_span(model)} wrote in training, with their "
        "rewards. They are as sampled: wrong, repetitive or offensive text is among them."
    )
    columns_section = section("Columns", f"| column | what it is |\n| --- | --- |\n{listed}")
    return _card(f"Completions of {model}", f"{text}\n\n{columns_section}", files=str(DATA_FILE))


def folder_card(name: str) -> str:
    """Return a card for a folder of parquet files that has none."""
    return _card(name, "Replies that a model wrote, as sampled.", files="*.parquet")


def _card(title: str, text: str, *, files: str) -> str:
    configs: Any = [{"config_name": "default", "data_files": [{"split": "train", "path": files}]}]
    tags = ["trl", "trl-grpo-ext", "completions"]
    data = DatasetCardData(pretty_name=title, tags=tags, configs=configs)
    return f"---\n{data.to_yaml()}\n---\n\n# {code_span(title)}\n\n{text}\n"


def _features(logs: Iterable[Dataset]) -> Features:
    """Columns of all logs: numbers as float64, conversations as such, all else as text."""
    kinds: dict[str, Any] = {}
    for name, found in ((name, kind) for log in logs for name, kind in log.features.items()):
        kind = _kind(found)
        if not name.startswith("__"):  # the index of pandas
            known = [each for each in (kinds.get(name), kind) if each is not None]
            same = all(each == known[0] for each in known)
            kinds[name] = (known[0] if same else _TEXT) if known else None
    step, advantage = {"step": Value("int64")}, {"advantage": kinds.pop("advantage", None)}
    kinds = step | {name: kind for name, kind in kinds.items() if name != "step"} | advantage
    return Features({name: kind or _NUMBER for name, kind in kinds.items()})


def _kind(found: Any) -> Any:
    """How a column is written; ``None`` if all of it is null."""
    if isinstance(found, Value):
        number = found.dtype.startswith(("int", "uint", "float"))
        return None if found.dtype == "null" else _NUMBER if number else _TEXT
    of = getattr(found, "feature", None)
    texts = isinstance(of, dict) and all(of.get(name) == _TEXT for name in ("role", "content"))
    return MESSAGES if texts else _TEXT


def _rows(logs: Iterable[Dataset], features: Features) -> Iterator[dict[str, Any]]:
    for log in logs:
        for row in log:
            yield {name: _fitting(row.get(name), kind) for name, kind in features.items()}


def _fitting(value: Any, kind: Any) -> Any:
    if kind == MESSAGES and value is not None:
        return [{name: message[name] for name in ("role", "content")} for message in value]
    return as_text(value) if kind == _TEXT else value


def as_text(value: object) -> str | None:
    r"""Return what a model was given or wrote as text.

    Example:
        >>> as_text([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}])
        'user: 2 + 2?\n\nassistant: 4'
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, dict) and "role" in each for each in value):
        return "\n\n".join(f"{each['role']}: {_content(each)}" for each in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _content(message: dict[str, Any]) -> str:
    return as_text(message.get("content")) or ""
