"""The dataset of kept replies, for supervised fine-tuning, and the summary beside it."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value

from trl_grpo_ext.data import MESSAGES
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rejection.candidates import Candidate, Group
from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rejection.selection import Verdict, select
from trl_grpo_ext.rejection.shards import located_prompts, read_group
from trl_grpo_ext.rejection.tally import Tally
from trl_grpo_ext.rewards.completion import completion_text

DATASET_FILE = Path("dataset") / "train.parquet"
_ROWS_AT_A_TIME = 1000


def select_candidates(
    folder: Path,
    *,
    num_prompts: int,
    options: RejectionArguments,
    weights: Mapping[str, float],
    provenance: Mapping[str, Any],
) -> Tally:
    """Write the dataset of the kept candidates; return what became of all of them.

    One prompt is in memory at a time. The rows are in the order of the prompts, the best reply to a
    prompt first; ``dataset/train.parquet`` is replaced when the new one is whole. If nothing is
    kept, there is none.

    Args:
        folder: With the shards, which hold every prompt.
        num_prompts: Of the task.
        options: What a candidate must be, how the others are thinned out, and where to write.
        weights: Of the rewards, by name.
        provenance: Columns that have the same value in each row: ``model`` and ``seed``.
    """
    target = Path(options.output_dir) / DATASET_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    tally = Tally()

    def kept_rows() -> Iterator[dict[str, Any]]:
        for group, verdict in _verdicts(folder, num_prompts, options, weights):
            tally.add(group, verdict)
            for row in rows_of(group, verdict, options=options, weights=weights):
                yield {**row, **provenance}

    with tempfile.TemporaryDirectory(dir=options.output_dir, ignore_cleanup_errors=True) as scratch:
        written = Path(scratch) / target.name
        columns = features(list(weights), options.dataset_format)
        _write_parquet(kept_rows(), written, columns.arrow_schema)
        if tally.num_kept_prompts:
            written.replace(target)
        else:
            target.unlink(missing_ok=True)
    return tally


def rows_of(
    group: Group, verdict: Verdict, *, options: RejectionArguments, weights: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each kept candidate, as :func:`select_candidates` writes it."""
    for one in verdict.kept:
        yield {
            **_conversation(group, one, options),
            "prompt_id": group.prompt_id,
            "completion_index": one.index,
            "reward": one.reward(weights),
            "rewards": dict(one.scores),
            "pass_rate": verdict.pass_rate,
            "num_tokens": one.num_tokens,
        }


def features(rewards: Sequence[str], dataset_format: str) -> Features:
    """Return the columns of the dataset.

    Args:
        rewards: Their names.
        dataset_format: ``"prompt_completion"`` or ``"messages"``.
    """
    names = ["messages"] if dataset_format == "messages" else ["prompt", "completion"]
    return Features(
        {
            **dict.fromkeys(names, MESSAGES),
            "prompt_id": Value("string"),
            "completion_index": Value("int32"),
            "reward": Value("float64"),
            "rewards": {name: Value("float64") for name in rewards},
            "pass_rate": Value("float64"),
            "num_tokens": Value("int32"),
            "model": Value("string"),
            "seed": Value("int64"),
        }
    )


def refuse_nothing_kept(tally: Tally) -> None:
    """Refuse a run that keeps nothing, for which there is no dataset.

    Raises:
        ConfigurationError: No candidate is kept.
    """
    if tally.num_kept_prompts:
        return
    (reason, count), *_ = tally.reasons.most_common(1)
    raise ConfigurationError(
        [
            f"none of {tally.reasons.total()} replies is kept ({count} fell for '{reason}'), so "
            "there is nothing to fine-tune on. The table says why each fell: ease that, or sample "
            "from a better model; only a new model, seed or sampling is sampled again."
        ]
    )


def _verdicts(
    folder: Path, num_prompts: int, options: RejectionArguments, weights: Mapping[str, float]
) -> Iterator[tuple[Group, Verdict]]:
    """Yield each prompt with what became of its candidates, in the order of the prompts."""
    places = located_prompts(folder)
    rules, selection = options.rules(), options.selection(weights)
    for index in range(num_prompts):
        path, offset, _ = places[index]
        group = read_group(path, offset)
        yield group, select(group, rules=rules, selection=selection)


def _conversation(
    group: Group, one: Candidate, options: RejectionArguments
) -> dict[str, list[dict[str, str]]]:
    prompt = [
        {"role": str(message["role"]), "content": completion_text([message])}
        for message in group.prompt
    ]
    reply = [{"role": "assistant", "content": options.reply_prefix + one.text}]
    if options.dataset_format == "messages":
        return {"messages": prompt + reply}
    return {"prompt": prompt, "completion": reply}


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path, schema: pa.Schema) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        while some := list(itertools.islice(rows, _ROWS_AT_A_TIME)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
