"""Steps that are skipped, advantages that are clipped, truncated completions that are counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from launching import launch
from runs import series, settings, vowels
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.advantages import group_advantages
from trl_grpo_ext.errors import ExtGRPOError
from trl_grpo_ext.robustness import (
    NonFiniteGradientError,
    RobustnessOptions,
    robustness_problems,
)


class Spoil(TrainerCallback):
    """Makes the gradient of some steps NaN, and notes weights and moments after each step."""

    def __init__(self, *steps: int, value: float = math.nan) -> None:
        self.steps, self.value = steps, value
        self.trainer: Any = None
        self.after: list[dict[str, torch.Tensor]] = []

    def spoil(self) -> None:
        """Put the value into one place of one gradient."""
        if self.trainer.state.global_step + 1 in self.steps:
            next(self.trainer.model.parameters()).grad.view(-1)[3] = self.value

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what the step left."""
        optimizer = self.trainer.optimizer.state_dict()["state"]
        moments = {f"{i} {k}": v.clone() for i, kept in optimizer.items() for k, v in kept.items()}
        weights = {k: v.clone() for k, v in self.trainer.model.state_dict().items()}
        self.after.append(weights | moments)


class SpoiledTrainer(ExtGRPOTrainer):
    """Its backward pass leaves gradients that are not finite where the callback says so."""

    spoiler: Spoil

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the step, and spoil what it left."""
        loss = super().training_step(*args, **kwargs)
        self.spoiler.spoil()
        return loss


def build(
    model: Path, tmp_path: Path, spoiler: Spoil, reward: Any = vowels, **changes: Any
) -> SpoiledTrainer:
    config = ExtGRPOConfig(**settings(tmp_path, weight_decay=0.5, **changes))
    prompts = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(8)]})
    trainer = SpoiledTrainer(str(model), reward, config, prompts, callbacks=[spoiler])
    trainer.spoiler, spoiler.trainer = spoiler, trainer
    return trainer


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_whose_gradient_is_not_finite_changes_neither_weights_nor_moments(
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    max_grad_norm: float,
    value: float,
) -> None:
    spoiler = Spoil(2, value=value)
    trainer = build(tiny_model_dir, tmp_path, spoiler, max_grad_norm=max_grad_norm)
    trainer.train()
    first, second, third = spoiler.after
    assert first.keys() == second.keys()
    assert len(first) > len(trainer.model.state_dict())  # Adam's moments too
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(second[name], third[name]) for name in first)
    assert all(tensor.isfinite().all() for tensor in third.values())
    assert series(trainer.state.log_history, "skipped_steps") == [0.0, 1.0, 1.0]
    assert (trainer.num_skipped, trainer.num_skipped_in_a_row) == (1, 0)
    assert "the gradient of step 2 has norm" in caplog.text
    assert "`learning_rate`" in caplog.text


def test_steps_that_are_skipped_in_a_row_end_the_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    spoiler = Spoil(2, 3, 5, 6, 7)
    trainer = build(tiny_model_dir, tmp_path, spoiler, max_steps=9, max_skipped_steps=3)
    with pytest.raises(NonFiniteGradientError, match=r"step 7 has norm nan.*3 in a row") as caught:
        trainer.train()
    assert isinstance(caught.value, ExtGRPOError)
    assert isinstance(caught.value, FloatingPointError)
    assert (trainer.num_skipped, trainer.num_skipped_in_a_row) == (5, 3)
    last_finite = spoiler.after[3]  # of step 4
    weights = trainer.model.state_dict()
    assert all(torch.equal(last_finite[name], weight) for name, weight in weights.items())


def test_the_guard_leaves_a_run_of_plain_trl_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    spoiler = Spoil(2)
    trainer = build(tiny_model_dir, tmp_path, spoiler, extensions=False, max_steps=2)
    trainer.train()
    assert not series(trainer.state.log_history, "skipped_steps")
    assert not all(weight.isfinite().all() for weight in spoiler.after[1].values())


TWO = """
import os, sys, warnings
warnings.filterwarnings("ignore")
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer

class Spoiled(ExtGRPOTrainer):
    def _compute_loss(self, *args, **kwargs):
        loss = super()._compute_loss(*args, **kwargs)
        spoiled = self.state.global_step == 1 and self.accelerator.process_index == 1
        return loss * torch.nan if spoiled else loss

config = ExtGRPOConfig(
    sys.argv[2], use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
    per_device_train_batch_size=2, num_generations=4, max_completion_length=8, max_steps=3,
    learning_rate=1e-3, gradient_checkpointing=False, logging_steps=1, advantage_clip=0.25,
    scale_rewards="none",
)
data = Dataset.from_dict({"prompt": [f"{a} + 1" for a in range(4)]})
reward = lambda **_: [[1.0, 0.0], [0.5, 0.5]][int(os.environ["RANK"])]
trainer = Spoiled(sys.argv[1], reward, config, data)
trainer.train()
weight = trainer.accelerator.unwrap_model(trainer.model).lm_head.weight.detach()
shares = [e.get("advantages/clipped_fraction") for e in trainer.state.log_history][:3]
found = gather_object([(trainer.num_skipped, weight.sum().item(), shares)])
if trainer.accelerator.is_main_process:
    torch.save(found, sys.argv[2] + ".pt")
torch.distributed.destroy_process_group()
"""


def test_all_processes_skip_the_step_that_one_of_them_spoiled_and_count_what_is_cut(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    first, second = launch(TWO, tmp_path, tiny_model_dir, tmp_path / "out", processes=2)
    assert first == second
    assert first[0] == 1
    assert math.isfinite(first[1])
    assert first[2] == [0.5] * 3  # of a group of 1, 0 and 1/2, 1/2, two advantages are cut


def test_advantage_clip_limits_what_the_loss_and_the_table_get(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    def fixed(*, completions: list[str], **_: Any) -> list[float]:
        return [1.0, 0.0, 0.5, 0.5] * (len(completions) // 4)

    trainer = build(
        tiny_model_dir, tmp_path, Spoil(), fixed, advantage_clip=0.25, scale_rewards="none"
    )
    rewards = torch.tensor([[1.0], [0.0], [0.5], [0.5]])
    # The mean is 0.5.
    assert trainer.compute_advantages(rewards, 4).tolist() == [0.25, -0.25, 0.0, 0.0]
    trainer.train()
    # Each group scores 1, 0, 1/2, 1/2: two of four advantages are cut.
    assert series(trainer.state.log_history, "advantages/clipped_fraction") == [0.5] * 3
    assert max(map(abs, trainer._logs["advantages"])) == 0.25
    assert trainer._buffered_inputs[0]["advantages"].abs().max() == 0.25


def test_truncated_completions_that_are_masked_are_counted(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = build(tiny_model_dir, tmp_path, Spoil(), mask_truncated_completions=True)
    trainer.train()
    history = trainer.state.log_history
    counts = series(history, "completions/num_truncated")
    # 8 completions a generation; TRL logs the share of the truncated ones.
    assert counts == [8 * share for share in series(history, "completions/clipped_ratio")]
    assert sum(counts) > 0
    trainer.evaluate(Dataset.from_dict({"prompt": ["1 + 1 ="] * 2}))
    assert not trainer._metrics["train"]["completions/num_truncated"]
    plain = build(tiny_model_dir, tmp_path, Spoil())
    plain.train()
    assert not series(plain.state.log_history, "completions/num_truncated")


@pytest.mark.parametrize(("group_size", "limit"), [(2, 0.71), (8, 2.47), (64, 7.88)])
def test_no_advantage_of_a_group_exceeds_what_the_help_of_the_clip_says(
    group_size: int, limit: float
) -> None:
    rewards_B = torch.zeros(group_size, dtype=torch.float64)
    rewards_B[3 % group_size] = 1.0  # one right answer: the farthest from its group
    advantages_B = group_advantages(rewards_B, group_size=group_size, eps=0.0)
    greatest = (group_size - 1) / math.sqrt(group_size)
    assert advantages_B.max().item() == pytest.approx(greatest) == pytest.approx(limit, abs=0.006)
    random_B = torch.randn(100 * group_size, dtype=torch.float64).exp()
    others_B = group_advantages(random_B, group_size=group_size, eps=0.0)
    assert others_B.abs().max() <= greatest + 1e-9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dynamic_sampling_max_rounds": 1}, "no further prompt would be drawn"),
        ({"dynamic_sampling_max_rounds": 4}, "`dynamic_sampling` is false"),
        ({"advantage_clip": 0.0}, "would leave no advantage"),
        ({"advantage_clip": math.nan}, "would leave no advantage"),
        ({"max_skipped_steps": 0}, "no step could fail"),
    ],
)
def test_options_that_cannot_work_are_told(changes: dict[str, Any], message: str) -> None:
    (problem,) = robustness_problems(RobustnessOptions(**changes))
    assert message in problem


def test_the_defaults_have_no_problem() -> None:
    assert not list(robustness_problems(RobustnessOptions()))
    assert not list(robustness_problems(RobustnessOptions(dynamic_sampling=True)))
