"""Write docs/reference/*.md from the classes; a test compares the two."""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from trl_grpo_ext.config import ExtensionOptions
from trl_grpo_ext.data import TaskArguments
from trl_grpo_ext.evaluation.policy import PolicyEvaluationArguments
from trl_grpo_ext.metrics import METRICS, Metric
from trl_grpo_ext.pipeline.options import R1Arguments
from trl_grpo_ext.recipe import RunArguments
from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rewards.models.training_options import RewardModelArguments
from trl_grpo_ext.sft.options import SFTArguments

HERE = Path(__file__).parent / "reference"
TABLE = "| option | default | what it does |\n|---|---|---|\n"
TRAINER = """# Options of the trainer

`ExtGRPOConfig` has every option of `trl.GRPOConfig` and these. With the defaults, training is plain
TRL's, from fewer tokens ([sampling and shared prefixes](../sampling.md)), but for groups of equal
rewards, which teach exactly nothing, and for rewards that are NaN or infinite, which are left out.
Options of the reference are unset until you set them; what they then stand for is in the text. This
page is written by `python docs/config_reference.py`.

"""
RECIPE = """# Keys of a recipe's YAML

A recipe takes these keys, those of the [trainer](config.md), every option of `trl.GRPOConfig`
(`output_dir`, `max_steps`, `learning_rate`, `num_generations`, ...) and those of `trl.ModelConfig`
(`model_name_or_path`, `dtype`, `use_peft`, `lora_r`, ...). Each can be given on the command line
too, as `--key value`. Other recipes have keys of their own, below. This page is written by
`python docs/config_reference.py`.

"""
METRICS_PAGE = """# Metrics

Everything that a training run logs: into `metrics.jsonl`, `trainer.state.log_history` and what
`report_to` names; the printed line shows a few. [Reading a run](../metrics.md) says what to look
at. Only what applies to a run is logged. A value is the mean over what happened since the last log
(generations or micro-batches) unless the table says otherwise, and null (`None`) if it was never a
number. An [evaluation](../evaluation.md) logs the same of its batches with `eval_` before the name,
and more. `<...>` stands for a name. A reward function can log metrics of its own (`log_metric`).
This page is written by `python docs/config_reference.py`.

"""


def pages() -> dict[str, str]:
    """Return each page that the classes stand for, by file name."""
    return {
        "config.md": TRAINER + _table(ExtensionOptions),
        "recipe.md": RECIPE
        + f"## Task\n\n{_table(TaskArguments)}\n## Run\n\n{_table(RunArguments)}"
        + f"\n## recipes/sft.py\n\n{_table(SFTArguments)}"
        + f"\n## recipes/r1.py\n\n{_table(R1Arguments)}"
        + f"\n## recipes/evaluation.py\n\n{_table(PolicyEvaluationArguments)}"
        + f"\n## recipes/reward_model.py\n\n{_table(RewardModelArguments)}"
        + f"\n## recipes/rejection_sampling.py\n\n{_table(RejectionArguments)}",
        "metrics.md": METRICS_PAGE + "\n".join(map(_metric_table, METRICS)),
    }


def _metric_table(part: str) -> str:
    head = "| metric | unit | meaning | healthy |\n|---|---|---|---|\n"
    return f"## {part}\n\n{head}" + "".join(map(_metric_row, METRICS[part]))


def _metric_row(metric: Metric) -> str:
    cells = (f"`{metric.name}`", metric.unit, metric.meaning, metric.healthy_range)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _table(options: type) -> str:
    return TABLE + "".join(_row(option) for option in fields(options))


def _row(option: Field[Any]) -> str:
    text = option.metadata["help"].replace("|", "\\|")
    return f"| `{option.name}` | {_default(option)} | {text} |\n"


def _default(option: Field[Any]) -> str:
    if option.default_factory is not MISSING:
        return f"`{json.dumps(option.default_factory())}`"
    return "needed" if option.default is MISSING else f"`{_yaml(option.default)}`"


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = str(value)
    return json.dumps(text) if "\n" in text or not text else text


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text)
