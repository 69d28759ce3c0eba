"""The stages of DeepSeek-R1's recipe, as the programs and settings that they are.

    base --sft--> sft --grpo--> grpo --rejection--> dataset --rejection_sft--> rejection_sft

Each model is evaluated when it is there. A stage's settings lie in its folder as ``stage.yaml``,
which its recipe takes by itself too; its ``summary.json`` says that it is complete.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.files import SUMMARY_FILE, write_atomically
from trl_grpo_ext.pipeline.options import R1Arguments

MODELS = ("base", "sft", "grpo", "rejection_sft")  # what is evaluated, in this order
SETTINGS_FILE = "stage.yaml"


@dataclass(frozen=True)
class Stage:
    """One recipe with its settings.

    Attributes:
        name: Of the stage, and of its folder: ``sft``, ``evaluation/sft``.
        recipe: Name of the program in recipes/, without its ending.
        settings: All of its options.
        inputs: Names of the stages whose output it starts from.
        stand_ins: What takes the place of outputs of earlier stages while they are not there, so
            that the settings can be checked before anything runs; ``None`` takes an option out.
    """

    name: str
    recipe: str
    settings: Mapping[str, Any]
    inputs: Sequence[str]
    stand_ins: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where its output is."""
        return Path(self.settings["output_dir"])

    def is_complete(self) -> bool:
        """Return whether its output is there, made with these settings.

        Raises:
            ConfigurationError: What is there was made with others.
        """
        path = self.folder / SETTINGS_FILE
        own = {path.name, f".{path.name}"}  # also what a kill left of it
        if not self.folder.is_dir() or own.issuperset(p.name for p in self.folder.iterdir()):
            return False
        made_with = _read(path)
        wanted = yaml.safe_load(self.to_yaml())
        changed = sorted(
            key for key in {*made_with, *wanted} if made_with.get(key) != wanted.get(key)
        )
        if changed:
            raise ConfigurationError([_made_otherwise(self, changed)])
        return (self.folder / SUMMARY_FILE).is_file()

    def set_aside(self) -> Path | None:
        """Move the folder to where no stage looks; return where, ``None`` if there is none."""
        if not self.folder.exists():
            return None
        numbers = itertools.count(1)
        aside = next(
            path for n in numbers if not (path := Path(f"{self.folder}.earlier-{n}")).exists()
        )
        return self.folder.rename(aside)

    def to_yaml(self, *, checkable: bool = False) -> str:
        """Return the settings as its recipe takes them.

        Args:
            checkable: Whether with stand-ins for what earlier stages have not made yet.
        """
        settings = {**self.settings, **(self.stand_ins if checkable else {})}
        kept = {key: value for key, value in settings.items() if value is not None}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=100)

    def write_settings(self) -> Path:
        """Write ``stage.yaml`` and return its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / SETTINGS_FILE
        write_atomically(path, self.to_yaml())
        return path


def _read(path: Path) -> dict[str, Any]:
    """Settings that are on disk; none if they are not there, or no settings."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def make_stages(options: R1Arguments, shared: Mapping[str, Any]) -> list[Stage]:
    """Return the stages in the order in which they run.

    Args:
        options: Of the whole.
        shared: Options of task, model and run that were given, by their key.
    """
    root = Path(options.output_dir)
    base = {key: shared[key] for key in ("model_name_or_path", "model_source") if key in shared}
    common = {**shared, "seed": options.seed}

    def trained(name: str) -> dict[str, Any]:
        """Return what names the model of a stage."""
        if name == "base":
            return base
        return {"model_name_or_path": str(root / name), "model_source": "auto"}

    def stage(name: str, recipe: str, own: Mapping[str, Any], *, model: str, **more: Any) -> Stage:
        settings = {**common, **trained(model), **more, **own, "output_dir": str(root / name)}
        if model == "base":
            return Stage(name, recipe, settings, [], {})
        return Stage(name, recipe, settings, [model], {"model_source": None, **base})

    def evaluated(name: str) -> Stage:
        return stage(f"evaluation/{name}", "evaluation", options.of("evaluation"), model=name)

    unmeasured = {"measure_accuracy": False}  # the evaluations do that
    of_traces = {"traces": str(root / "rejection" / "dataset")}
    again = stage(
        "rejection_sft",
        "sft",
        options.of("rejection_sft"),
        model=options.rejection_sft_from,
        **unmeasured,
        **of_traces,
        solution_column=None,
        solution_pattern=None,
    )
    solved = {
        key: {**shared, **options.of("sft")}.get(key)
        for key in ("traces", "solver", "solution_column", "solution_pattern")
    }
    return [
        evaluated("base"),
        stage("sft", "sft", options.of("sft"), model="base", **unmeasured),
        evaluated("sft"),
        stage("grpo", "grpo", options.of("grpo"), model="sft", **unmeasured),
        evaluated("grpo"),
        stage("rejection", "rejection_sampling", options.of("rejection"), model="grpo"),
        replace(
            again, inputs=[*again.inputs, "rejection"], stand_ins={**again.stand_ins, **solved}
        ),
        evaluated("rejection_sft"),
    ]


def missing_stages(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages that are to run: those that are not complete, or start from one of these.

    Raises:
        ConfigurationError: One that starts from complete ones was made with other settings.
    """
    missing: dict[str, Stage] = {}
    for stage in stages:
        if any(name in missing for name in stage.inputs) or not stage.is_complete():
            missing[stage.name] = stage
    return list(missing.values())


def set_aside_outdated(missing: Sequence[Stage]) -> list[Path]:
    """Move aside what was made from earlier outputs of stages that run again; return where to."""
    names = {stage.name for stage in missing}
    moved = [stage.set_aside() for stage in missing if names & set(stage.inputs)]
    return [path for path in moved if path is not None]


def distinct(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages without those evaluations that differ by their model alone."""
    return [each for each in stages if each.recipe != "evaluation" or each.name.endswith("/base")]


def _made_otherwise(stage: Stage, changed: list[str]) -> str:
    named = ", ".join(f"`{key}`" for key in changed[:8])
    return (
        f"{stage.folder} was made with other settings ({named} differ), so going on would not "
        "give what the YAML says. Set these back, name another `output_dir`, or move that folder "
        "away to run the stage, and those behind it, again."
    )
