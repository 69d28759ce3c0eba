"""What a trainer knows of its run, for the model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import Any

from trl_grpo_ext.files import SUMMARY_FILE
from trl_grpo_ext.hub.card import RunFacts
from trl_grpo_ext.hub.shown import command_line
from trl_grpo_ext.report.versions import library_versions

# Secrets, paths of the machine, and what changes nothing of the result.
_NOT_TOLD = {"accelerator_config", "debug", "disable_tqdm", "hub_token", "output_dir", "report_to"}


def run_facts(trainer: Any) -> RunFacts:
    """Return what the card of an :class:`~trl_grpo_ext.trainer.ExtGRPOTrainer`'s run says."""
    settings = trainer.run_settings
    settings = changed_settings(trainer.args) if settings is None else dict(settings)
    base = settings.get("model_name_or_path") or trainer.model.config.name_or_path
    weights = trainer.reward_weights.tolist()
    return RunFacts(
        base_model=_named(base),
        dataset=_named(trainer.run_dataset or settings.get("dataset")),
        rewards=list(zip(trainer.reward_func_names, weights, strict=True)),
        settings=settings,
        reference=_reference(trainer),
        log_history=trainer.state.log_history,
        summary=_summary(Path(str(trainer.args.output_dir)) / SUMMARY_FILE),
        versions=_versions(),
        command=command_line(),
        secrets=trainer.hub_secrets,
    )


def fine_tuning_facts(trainer: Any, settings: Mapping[str, object]) -> RunFacts:
    """Return what the card of a fine-tuned model says.

    Args:
        trainer: TRL's ``SFTTrainer``, at its end.
        settings: Every option that was given, by its key.
    """
    return RunFacts(
        imitates=True,
        base_model=_named(settings.get("model_name_or_path")),
        dataset=_named(settings.get("traces") or settings.get("dataset")),
        settings=settings,
        log_history=trainer.state.log_history,
        summary=_summary(Path(str(trainer.args.output_dir)) / SUMMARY_FILE),
        versions=_versions(),
        command=command_line(),
        secrets=[os.environ.get("HF_TOKEN", "")],
    )


def changed_settings(args: Any) -> dict[str, object]:
    """Return the options of a configuration that differ from their defaults."""
    return {
        f.name: value
        for f in fields(args)
        if f.name not in _NOT_TOLD and (value := getattr(args, f.name, None)) != _default(f)
    }


def _default(option: Field[Any]) -> object:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return option.default


def _named(name: object) -> str | None:
    """The name of a model or of data; of a folder or file the last part."""
    text = str(name or "")
    is_path = text.startswith(("/", ".", "~")) or Path(text).exists()
    return (Path(text).name if is_path else text) or None


def _reference(trainer: Any) -> list[str]:
    keeper, kind = trainer.reference_keeper, trainer.reference_kind
    told = [f"`{kind}`: {trainer.reference_reason}."]
    if keeper is not None and keeper.fidelity is not None:
        told.append(keeper.fidelity.sentence())
    elif kind in ("resident", "streamed", "adapter"):
        told.append("It is exact: its KL floor is 0.")
    return told


def _summary(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@cache
def _versions() -> dict[str, str]:
    return library_versions()
