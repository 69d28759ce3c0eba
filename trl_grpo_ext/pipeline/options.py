"""The options of the three-stage recipe: what its stages share, and what is each stage's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

StageOptions = dict[str, Any]


@dataclass
class R1Arguments:
    """The stages; each is a mapping with the options of its recipe, which win over shared ones."""

    output_dir: str = field(
        metadata={"help": "Where each stage has its folder, beside summary.json and report.md."}
    )
    seed: int = field(default=0, metadata={"help": "Of every stage that sets none of its own."})
    sft: StageOptions | str = field(
        default_factory=dict,
        metadata={
            "help": "Stage 1, options of recipes/sft.py: a mapping, or JSON, which takes the place "
            "of the whole mapping; so for the others."
        },
    )
    grpo: StageOptions | str = field(
        default_factory=dict,
        metadata={"help": "Stage 2, options of recipes/grpo.py: a mapping, or JSON."},
    )
    rejection: StageOptions | str = field(
        default_factory=dict,
        metadata={"help": "Stage 3a, options of recipes/rejection_sampling.py: a mapping or JSON."},
    )
    rejection_sft: StageOptions | str = field(
        default_factory=dict,
        metadata={"help": "Stage 3b, options of recipes/sft.py: a mapping, or JSON."},
    )
    rejection_sft_from: Literal["base", "sft"] = field(
        default="sft",
        metadata={"help": "What stage 3b starts from: the base model, or that of stage 1."},
    )
    evaluation: StageOptions | str = field(
        default_factory=dict,
        metadata={
            "help": "After each stage, options of recipes/evaluation.py: a mapping, or JSON."
        },
    )

    def __post_init__(self) -> None:
        """Bring what a command line gives into the form that YAML gives."""
        for name in STAGE_KEYS:
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, _parsed(value))

    def of(self, stage: str) -> StageOptions:
        """Return the own options of a stage."""
        options: StageOptions = getattr(self, stage)
        return options


STAGE_KEYS = tuple(f.name for f in fields(R1Arguments) if "StageOptions" in str(f.type))


_DECIDED = {"all": {"output_dir", "config", "dry_run", "model_name_or_path", "model_source"}}
_DECIDED["rejection_sft"] = _DECIDED["all"] | {
    *("traces", "traces_split", "solver", "solution_column", "solution_pattern"),
}
_OF_THE_TASK = {
    *("dataset", "dataset_arguments", "dataset_split", "eval_dataset_split", "prompt_column"),
    *("keep_answers", "num_eval_prompts", "task_seed"),
}


def r1_problems(options: R1Arguments) -> Iterator[str]:
    """Yield what cannot work in the mappings themselves; each recipe judges its own options."""
    for name in STAGE_KEYS:
        value: object = options.of(name)
        if not isinstance(value, dict):
            yield (
                f"`{name}` is {value!r}, which is no mapping of options. Indent the options of "
                "the stage below it in the YAML, or give JSON on the command line."
            )
            continue
        for key in sorted(_DECIDED.get(name, _DECIDED["all"]) & set(value)):
            yield (
                f"`{name}` sets `{key}`, which follows from the stages before it. Remove it; the "
                "model and `output_dir` of the whole stand at the top."
            )
        for key in sorted(_OF_THE_TASK & set(value)):
            yield (
                f"`{name}` sets `{key}`, so that it would hold out other prompts than the other "
                "stages, and train on some of theirs. Set it at the top, for all of them."
            )
        for key in sorted({"hub_token"} & set(value)):
            yield (
                f"`{name}` sets `{key}`, which would be written to its stage.yaml. Remove it, and "
                "set HF_TOKEN in the environment."
            )
        yield from adapter_problems(name, value)


def adapter_problems(where: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield what cannot work in how a model is loaded: each stage starts from a whole one."""
    for key in ("use_peft", "load_in_4bit", "load_in_8bit"):
        if given.get(key):
            yield (
                f"{where} sets `{key}`, but the next stage starts from a whole model. Remove it, "
                "or run the stages by themselves (`recipes/sft.py`, ...) and merge the adapter in "
                "between, with peft's `merge_and_unload`."
            )


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
