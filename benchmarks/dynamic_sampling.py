"""What does dynamic sampling buy? The same run with it and without, by steps and by time.

    python benchmarks/dynamic_sampling.py                    # 60 steps and as many minutes: hours
    python benchmarks/dynamic_sampling.py --steps 2 --json   # does it run; its last line is JSON

SmolLM2-135M-Instruct learns sums of two two-digit numbers from a reward of 0 or 1. At first one
reply in forty is right, so about 6 of the 8 groups of a batch are silent. Both trainers have the
same model, prompts, seed and options. The one with dynamic sampling runs first; plain sampling then
goes on for as many steps and for as many minutes, so that both comparisons end at the same place.
Accuracy is the share of right replies to held-out prompts, sampled as in training; measuring it
does not count as time. Run it with nothing else on the machine. Writes curves.json and curves.png
into outputs/dynamic_sampling; what was measured, and on what, stands in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.data import TaskArguments, load_task
from trl_grpo_ext.evaluation import evaluate_accuracy
from trl_grpo_ext.model_cache import prepare_model
from trl_grpo_ext.report.plots import BLUE, PLOT_STYLE, VERMILION
from trl_grpo_ext.rewards import build_rewards

OUTPUT = Path("outputs/dynamic_sampling")
PACKAGED = "HuggingFaceTB/SmolLM2-135M-Instruct"
ARMS = ("dynamic", "plain")
COLOURS = {"dynamic": BLUE, "plain": VERMILION}
LABELS = {"dynamic": "dynamic sampling", "plain": "plain"}
MOST_STEPS = 10**6  # of plain sampling, which ends when its time is up

TASK = TaskArguments(
    dataset="reasoning_gym:chain_sum",
    dataset_arguments={
        "size": 6000,
        "min_terms": 2,
        "max_terms": 2,
        "min_digits": 2,
        "max_digits": 2,
    },
    keep_answers=r"\d+",
    system_prompt="You are a calculator.",
    prompt_template="{prompt}\nReply with the completed equation.",
    rewards=["last_number"],
)
LOGGED = {  # metric of the log: its name in the curve
    "reward": "reward",
    "frac_reward_zero_std": "silent",
    "dynamic_sampling/cost": "cost",
    "dynamic_sampling/unfilled": "unfilled",
    "time/generation": "generation_s",
}


def main() -> None:
    """Run both arms, each in a process of its own, and write what they did."""
    options = parse()
    if options.arm is not None:
        print(json.dumps(train(options)))
        return
    curves: dict[str, list[dict[str, float]]] = {}
    for arm in ARMS:
        minutes = max((points[-1]["minutes"] for points in curves.values()), default=0.0)
        curves[arm] = run(arm, minutes)
    result = {
        "settings": vars(options),
        "curves": curves,
        "summary": {arm: summary(curve, curves, options) for arm, curve in curves.items()},
    }
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "curves.json").write_text(json.dumps(result, indent=2))
    plot(curves, OUTPUT / "curves.png")
    show(result["summary"], target=options.target)
    if options.json:
        print(json.dumps(result))


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval_every", type=int, default=5, help="steps")
    parser.add_argument("--eval_prompts", type=int, default=64)
    parser.add_argument("--eval_samples", type=int, default=4, help="replies a prompt; 0: greedy")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--max_rounds", type=int, default=8)
    parser.add_argument("--target", type=float, default=0.5, help="accuracy to be reached")
    parser.add_argument("--model", help="a local folder; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--json", action="store_true", help="print the result as the last line")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(arm: str, minutes: float) -> list[dict[str, float]]:
    """Run one arm in a process of its own, and return its curve."""
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm, "--minutes", str(minutes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    curve: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return curve


# One process: one arm ----------------------------------------------------------------------------


class Curve(TrainerCallback):
    """Notes the minutes of each step, and the accuracy every few steps, with the clock stopped."""

    def __init__(self, options: argparse.Namespace, held_out: Dataset) -> None:
        self.options, self.held_out = options, held_out
        self.points: list[dict[str, float]] = []
        self.trainer: Any = None
        self._seconds = self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure where the run starts."""
        self.points.append({"step": 0, "minutes": 0.0, "accuracy": self.accuracy()})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock, and the run if it has done its steps and its minutes."""
        self._seconds += time.perf_counter() - self._start
        options, minutes = self.options, self._seconds / 60
        ends = state.global_step >= options.steps and minutes >= options.minutes
        point: dict[str, float] = {"step": state.global_step, "minutes": minutes}
        if ends or state.global_step % options.eval_every == 0:
            point["accuracy"] = self.accuracy()
        self.points.append(point)
        control.should_training_stop = ends

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note what the step logged."""
        found = {name: (logs or {})[key] for key, name in LOGGED.items() if key in (logs or {})}
        self.points[-1].update(found)
        if found:
            print(json.dumps(self.points[-1]), file=sys.stderr)

    def accuracy(self) -> float:
        """Return the share of right replies to the held-out prompts, of the same random numbers."""
        trainer = self.trainer
        return evaluate_accuracy(
            trainer.model,
            trainer.processing_class,
            self.held_out,
            is_correct=trainer.reward_funcs[0],
            max_new_tokens=trainer.max_completion_length,
            num_samples=self.options.eval_samples,
            batch_size=64,
        ).accuracy


def train(options: argparse.Namespace) -> list[dict[str, float]]:
    """Train one arm, and return its curve."""
    TASK.num_eval_prompts = options.eval_prompts
    task = load_task(TASK)
    model = options.model or prepare_model(PACKAGED, source="package")
    reward_funcs, weights = build_rewards(TASK.rewards)
    curve = Curve(options, task.held_out)
    trainer = ExtGRPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=configuration(options, weights),
        train_dataset=task.train,
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        callbacks=[curve],
    )
    curve.trainer = trainer
    trainer.train()
    return curve.points


def configuration(options: argparse.Namespace, weights: list[float]) -> ExtGRPOConfig:
    """Return the options of a run: 8 prompts x 8 completions a step, without a reference."""
    dynamic = options.arm == "dynamic"
    return ExtGRPOConfig(
        output_dir=str(OUTPUT / options.arm),
        seed=options.seed,
        max_steps=options.steps if dynamic else MOST_STEPS,
        num_generations=8,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        max_completion_length=16,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        beta=0.0,
        reward_weights=weights,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **({"dynamic_sampling": True} if dynamic else {}),
        **({"dynamic_sampling_max_rounds": options.max_rounds} if dynamic else {}),
    )


# What they did -----------------------------------------------------------------------------------


def summary(
    curve: Sequence[Mapping[str, float]],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    options: argparse.Namespace,
) -> dict[str, float | None]:
    """Return an arm's accuracy after as many steps and minutes, and when it reached the target."""
    minutes = min(points[-1]["minutes"] for points in curves.values())
    measured = [point for point in curve if "accuracy" in point]
    reached = next((p for p in measured if p["accuracy"] >= options.target), None)
    costs = [point["cost"] for point in curve if "cost" in point]
    return {
        "silent_at_first": curve[1]["silent"],
        "cost": sum(costs) / len(costs) if costs else 1.0,
        "accuracy_at_first": measured[0]["accuracy"],
        "accuracy_after_steps": last(measured, "step", options.steps),
        "accuracy_after_minutes": last(measured, "minutes", minutes),
        "minutes_a_step": curve[-1]["minutes"] / curve[-1]["step"],
        "steps_to_target": reached and reached["step"],
        "minutes_to_target": reached and reached["minutes"],
    }


def last(measured: Sequence[Mapping[str, float]], axis: str, limit: float) -> float:
    """Return the last accuracy up to the limit."""
    return [point["accuracy"] for point in measured if point[axis] <= limit][-1]


def show(summaries: Mapping[str, Mapping[str, float | None]], *, target: float) -> None:
    """Print the summaries side by side."""
    table = Table(title=f"Dynamic sampling against plain; the target is {target}")
    table.add_column("")
    for arm in summaries:
        table.add_column(LABELS[arm], justify="right")
    for name in next(iter(summaries.values())):
        values = [found[name] for found in summaries.values()]
        cells = ["not reached" if value is None else f"{value:.3g}" for value in values]
        table.add_row(name.replace("_", " "), *cells)
    Console().print(table)


def plot(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw the accuracy against steps and against minutes."""
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        draw(by_step, curves, axis="step", label="optimizer steps")
        draw(by_time, curves, axis="minutes", label="minutes, without evaluation")
        by_step.set_xlim(0, min(points[-1]["step"] for points in curves.values()))
        by_step.set_ylabel("accuracy on held-out prompts")
        by_step.set_title("By steps", loc="left")
        by_time.set_title("By time", loc="left")
        by_step.legend(loc="upper left")
        figure.savefig(path, dpi=120)


def draw(
    axes: Axes, curves: Mapping[str, Sequence[Mapping[str, float]]], *, axis: str, label: str
) -> None:
    """Draw each arm's accuracy against one axis."""
    for arm, points in curves.items():
        measured = [point for point in points if "accuracy" in point]
        axes.plot(
            [point[axis] for point in measured],
            [point["accuracy"] for point in measured],
            "-o",
            color=COLOURS[arm],
            label=LABELS[arm],
            markersize=4,
        )
    axes.set_xlabel(label)
    axes.set_ylim(0, 1)


if __name__ == "__main__":
    main()
