"""Run folders for the tests of the page: ``from report.html_runs import write_run``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from datasets import Dataset
from report.logs import make_log

Row = dict[str, Any]


def make_rows(step: int, *, texts: Sequence[str] = ("a", "b", "c", "d")) -> list[Row]:
    """What TRL logs of a step: neighbours share a prompt, two and two."""
    return [
        {
            "step": step,
            "prompt": f"question {index // 2}",
            "completion": text,
            "right_answer": float(index),
            "advantage": index - 1.5,
        }
        for index, text in enumerate(texts)
    ]


def write_completions(folder: Path, steps: Mapping[int, Sequence[Row]]) -> None:
    """Write them as TRL does, a file a step."""
    (folder / "completions").mkdir(parents=True, exist_ok=True)
    for step, rows in steps.items():
        Dataset.from_list(list(rows)).to_parquet(
            folder / f"completions/completions_{step:05}.parquet"
        )


def write_run(
    folder: Path,
    *,
    log: Sequence[Mapping[str, object]] | None = None,
    summary: Mapping[str, object] | None = None,
    steps: Mapping[int, Sequence[Row]] | None = None,
) -> Path:
    """Write the folder of a run, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(entry) + "\n" for entry in (make_log() if log is None else log)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    write_completions(folder, steps or {})
    return folder


class Page(HTMLParser):
    """What a page holds: tags that are open at the end, attributes, text by tag, its data."""

    VOID = ("meta", "br", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]

    @property
    def data(self) -> Any:
        """The block of JSON."""
        (found,) = [text for text in self.text("script") if text.startswith("{")]
        return json.loads(found)
