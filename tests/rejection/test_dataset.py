"""The dataset that is written: its columns, its order, and that TRL trains on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from rejection.made import candidate, group
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rejection.candidates import Group
from trl_grpo_ext.rejection.dataset import (
    refuse_nothing_kept,
    select_candidates,
)
from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rejection.shards import ShardWriter
from trl_grpo_ext.rejection.tally import Tally
from trl_grpo_ext.rewards.score_rows import read_rows

WEIGHTS = {"math": 1.0, "style": 0.5}


def scores(right: float, style: float | None) -> dict[str, float | None]:
    return {"math": right, "style": style}


GROUPS = [
    group(
        candidate(0, "it is two", scores=scores(1.0, 0.0)),
        candidate(1, "two", scores=scores(1.0, 0.5)),
        candidate(2, "three", scores=scores(0.0, 1.0)),
        candidate(3, "four", scores=scores(0.0, None)),
        prompt_index=1,
    ),
    group(candidate(0, "one [b]\x1b", scores=scores(1.0, None)), prompt_index=0),
    group(candidate(0, "no", scores=scores(0.0, 0.0)), prompt_index=2),
]


def select(folder: Path, *groups: Group, **changes: Any) -> Tally:
    with ShardWriter(folder / "candidates" / "00000.jsonl") as writer:
        writer.append(groups)
    options = RejectionArguments(
        **{"output_dir": str(folder), "similarity_ngram_size": 1} | changes
    )
    return select_candidates(
        folder / "candidates",
        num_prompts=len(groups),
        options=options,
        weights=WEIGHTS,
        provenance={"model": "some/model", "seed": 3},
    )


def rows(folder: Path, tmp_path: Path) -> Dataset:
    path = str(folder / "dataset")
    return load_dataset(path, split="train", cache_dir=str(tmp_path / "cache"))


def test_texts_are_kept_as_they_are_whatever_they_look_like(tmp_path: Path) -> None:
    texts = ["2024-01-05", "2024-01-05T10:00:00Z", "1e5", "null", "true"]
    groups = [group(candidate(0, text), prompt_index=i) for i, text in enumerate(texts)]
    select(tmp_path / "run[1]", *groups)
    found = read_rows(tmp_path / "run[1]" / "dataset" / "train.parquet")
    assert [row["completion"][0]["content"] for row in found] == texts


def test_the_old_dataset_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select(tmp_path, *GROUPS)
    path = tmp_path / "dataset" / "train.parquet"
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", _fail)
    with pytest.raises(OSError, match="killed"):
        select(tmp_path, *GROUPS, best_n=1)
    assert path.read_bytes() == before


def _fail(*_: object) -> None:
    raise OSError("killed")


def test_rows_have_conversation_and_provenance_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    tally = select(tmp_path / "out", *GROUPS)
    assert tally.summary()["kept"] == 3
    assert rows(tmp_path / "out", tmp_path).to_list() == [
        {
            "prompt": [{"role": "user", "content": f"{index} + 1 ="}],
            "completion": [{"role": "assistant", "content": text}],
            "prompt_id": f"id{index}",
            "completion_index": place,
            "reward": reward,
            "rewards": found,
            "pass_rate": rate,
            "num_tokens": len(text) + 1,
            "model": "some/model",
            "seed": 3,
        }
        for index, text, place, reward, found, rate in [
            (0, "one [b]\x1b", 0, 1.0, scores(1.0, None), 1.0),
            (1, "two", 1, 1.25, scores(1.0, 0.5), 0.5),
            (1, "it is two", 0, 1.0, scores(1.0, 0.0), 0.5),
        ]
    ]


def test_messages_are_one_conversation_with_the_prefix(tmp_path: Path) -> None:
    select(tmp_path / "out", *GROUPS, dataset_format="messages", reply_prefix="<think>\n")
    found = rows(tmp_path / "out", tmp_path)
    assert "prompt" not in found.column_names
    assert found[0]["messages"] == [
        {"role": "user", "content": "0 + 1 ="},
        {"role": "assistant", "content": "<think>\none [b]\x1b"},
    ]


def test_selecting_again_replaces_the_dataset_and_leaves_no_other_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    select(out, *GROUPS)
    options = {"best_n": 1, "max_pass_rate": 0.9}
    select(out, *GROUPS, **options)
    assert rows(out, tmp_path)["completion_index"] == [1]
    assert sorted(path.name for path in out.rglob("*")) == [
        "00000.jsonl",
        "00000.lock",
        "candidates",
        "dataset",
        "train.parquet",
    ]


def test_nothing_kept_leaves_no_dataset_and_is_refused_with_the_main_reason(tmp_path: Path) -> None:
    out = tmp_path / "out"
    select(out, *GROUPS)
    tally = select(out, *GROUPS, correct_threshold=2.0)
    assert not list((out / "dataset").iterdir())
    with pytest.raises(ConfigurationError, match=r"none of 6 replies is kept \(6 fell for 'wrong'"):
        refuse_nothing_kept(tally)


@pytest.mark.parametrize("dataset_format", ["prompt_completion", "messages"])
def test_trl_fine_tunes_on_the_dataset(
    dataset_format: str,
    tmp_path: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    select(tmp_path / "out", *GROUPS, dataset_format=dataset_format)
    config = SFTConfig(
        str(tmp_path / "sft"),
        max_steps=1,
        per_device_train_batch_size=3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = rows(tmp_path / "out", tmp_path)
    trainer = SFTTrainer(tiny_model, config, train_dataset=data, processing_class=tiny_tokenizer)
    assert trainer.train().training_loss > 0
    batch = next(iter(trainer.get_train_dataloader()))
    learned = sum(
        tiny_tokenizer.decode([t for t in labels if t >= 0]).count("+")
        for labels in batch["labels"]
    )
    # With a prompt and a completion, the loss is on the completion alone.
    assert learned == (0 if dataset_format == "prompt_completion" else 3)
