"""The model card: what it says, what it must not, and that the Hub can read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from trl_grpo_ext.hub.card import RunFacts, render, scores, write_card

TRLS = """---
base_model: {base}
library_name: transformers
model_name: out
tags:
- trl
---

# Model Card for out

This model is a fine-tuned version of [None](https://huggingface.co/None).

## Citations

Cite GRPO as:
"""
LOG = [
    {"step": 1, "eval_accuracy": 0.25, "eval_pass@4": 0.5, "eval_loss": 0.1, "kl": 0.0},
    {"step": 2, "eval_accuracy": 0.5, "eval_pass@4": 0.75, "eval_easy_accuracy": 1.0},
]
FACTS = RunFacts(
    base_model="Qwen/Qwen3-0.6B",
    dataset="openai/gsm8k",
    rewards=[("math", 1.0), ("format", 0.25)],
    settings={"beta": 0.04, "hub_token": "hf_abc", "rewards": [{"api_key": "sk-abc", "name": "x"}]},
    reference=["`quantized`: as asked.", "The KL floor is 0.01."],
    log_history=LOG,
    summary={"accuracy_before": 0.125, "accuracy_after": 0.375, "num_eval_prompts": 64},
    versions={"trl": "1.16.0"},
    command="accelerate launch recipes/grpo.py --config x.yaml",
)


def written(folder: Path, facts: RunFacts, *, base: str = "null") -> str:
    (folder / "README.md").write_text(TRLS.format(base=base))
    write_card(folder, facts)
    return (folder / "README.md").read_text()


def metadata(text: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(text.split("---")[1])
    return found


def test_scores_are_accuracy_of_the_report_and_then_the_evaluations_first_and_last() -> None:
    assert [(row.name, row.before, row.after) for row in scores(FACTS)] == [
        ("accuracy", 0.125, 0.375),
        ("eval_accuracy", 0.25, 0.5),
        ("eval_easy_accuracy", None, 1.0),
        ("eval_pass@4", 0.5, 0.75),
    ]


def test_card_says_in_its_metadata_what_the_hub_reads(tmp_path: Path) -> None:
    data = metadata(written(tmp_path, FACTS))
    assert data["base_model"] == "Qwen/Qwen3-0.6B"
    assert data["datasets"] == ["openai/gsm8k"]
    (index,) = data["model-index"]
    (result,) = index["results"]
    assert index["name"] == "out"
    assert result["dataset"] == {"name": "openai/gsm8k", "type": "openai/gsm8k"}
    found = {metric["type"]: metric["value"] for metric in result["metrics"]}
    # `eval_accuracy` is left out: the Hub takes one value a metric, and the report's is that.
    assert found == {"accuracy": 0.375, "easy_accuracy": 1.0, "pass@4": 0.75}
    loaded = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert sorted(each.metric_value for each in loaded) == [0.375, 0.75, 1.0]


def test_card_says_what_the_run_was_before_the_citations(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "kl.png").write_bytes(b"")
    text = written(tmp_path, FACTS)
    for said in (
        "of [Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B), trained on [openai/gsm8k]",
        "| `math` | 1 |\n| `format` | 0.25 |",
        "The KL floor is 0.01.",
        "`accuracy` is of 64 held-out prompts.",
        "| `accuracy` | 0.125 | 0.375 |",
        "(plots/kl.png)",
        "Rewards can be gamed",
        "accelerate launch recipes/grpo.py --config x.yaml",
        "| `beta` | 0.04 |",
        "| `trl` | `1.16.0` |",
    ):
        assert said in text
    assert "None" not in text
    assert text.index("## Versions") < text.index("## Citations")


def test_card_has_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_JUDGE_API_KEY", "the-key-of-the-judge")
    facts = RunFacts(
        settings={**FACTS.settings, "url": "https://u:p4ss@host/?api_key=abcd", "note": "hidden42"},
        command="run --x the-key-of-the-judge",
        secrets=["hidden42"],
    )
    text = written(tmp_path, facts)
    for secret in ("hf_abc", "sk-abc", "p4ss", "abcd", "hidden42", "the-key-of-the-judge"):
        assert secret not in text


@pytest.mark.parametrize("name", ["my model: é\n---\n# x", "a|b`c", "out/a/b", "'\"}{", "- x"])
def test_card_holds_any_name_and_stays_a_card(tmp_path: Path, name: str) -> None:
    data = metadata(written(tmp_path, RunFacts(base_model=name, dataset=name), base="out/x/y"))
    assert "base_model" not in data
    assert "datasets" not in data
    body = (tmp_path / "README.md").read_text().split("\n---\n", 1)[1]
    assert "\n# x" not in body


def test_card_of_a_folder_on_this_machine_is_not_linked_as_if_on_the_hub(tmp_path: Path) -> None:
    text = written(tmp_path, RunFacts(base_model="tiny"))
    assert "a fine-tuned version of `tiny`." in text
    assert "model-index" not in metadata(text)


def test_render_says_that_there_was_no_evaluation() -> None:
    assert "No evaluation was recorded in this run." in render(RunFacts(), drawn=set())
