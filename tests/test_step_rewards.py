"""Rewards of steps in the trainer: advantages of each token, and what counts of a reward."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from launching import launch
from runs import series, settings, train, vowels

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.errors import ConfigurationError, RewardError, RewardOutageError
from trl_grpo_ext.rewards.process_advantages import checked_steps

PROMPTS = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(8)]})


@dataclass(frozen=True)
class Steps:
    ends: tuple[int, ...]
    scores: tuple[float, ...]


class VowelsOfSteps:
    """A process reward: steps of some characters, each scored by its vowels and odd digits."""

    def __init__(self, *, width: int = 3, process_advantages: bool = True) -> None:
        self.width, self.process_advantages = width, process_advantages
        self.__name__ = "steps"

    def step_scores(self, *, completions: Sequence[str], **_: Any) -> list[Steps | None]:
        return [self._steps(text) for text in completions]

    def _steps(self, text: str) -> Steps:
        ends = [*range(self.width, len(text), self.width), len(text)]
        pieces = [text[max(end - self.width, 0) : end] for end in ends[:-1]]
        pieces.append(text[ends[-2] if len(ends) > 1 else 0 :])
        return Steps(tuple(ends), tuple(vowels(completions=pieces)))

    def aggregated(self, steps: Sequence[Steps | None]) -> list[float | None]:
        return [None if one is None else sum(one.scores) for one in steps]

    def __call__(self, **columns: Any) -> list[float | None]:
        return self.aggregated(self.step_scores(**columns))


class Watched(ExtGRPOTrainer):
    """Keeps each batch as it was scored, before TRL shuffles it."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("seen", []).append(output)
        return output


def short(*, completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [-len(ids) / 8 for ids in completion_ids]


def build(model: Path, tmp_path: Path, *rewards: Any, **changes: Any) -> Watched:
    config = ExtGRPOConfig(**settings(tmp_path, **changes))
    return Watched(str(model), list(rewards), config, PROMPTS)


def expected_advantages(
    inputs: dict[str, Any], tokenizer: Any, reward: VowelsOfSteps, group_size: int
) -> torch.Tensor:
    """Equation of DeepSeekMath 4.1.3, token by token."""
    masks = inputs["completion_mask"].bool()
    rows = [ids[mask].tolist() for ids, mask in zip(inputs["completion_ids"], masks, strict=True)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
    steps = reward.step_scores(completions=texts)
    result = torch.zeros(inputs["completion_ids"].shape)
    for row, (ids, one) in enumerate(zip(rows, steps, strict=True)):
        first = row // group_size * group_size
        scores = [s for other in steps[first : first + group_size] for s in other.scores]
        mean, deviation = statistics.fmean(scores), statistics.stdev(scores)
        read = [
            len(tokenizer.decode(ids[: n + 1], skip_special_tokens=True)) for n in range(len(ids))
        ]
        # What follows the text, such as the EOS token, belongs to the last step.
        ends = [next(n for n, length in enumerate(read) if length >= end) for end in one.ends]
        ends[-1] = len(ids) - 1
        for token in range(len(ids)):
            result[row, token] = sum(
                (score - mean) / (deviation + 1e-4)
                for end, score in zip(ends, one.scores, strict=True)
                if end >= token
            )
    return result


def test_each_token_has_the_advantage_of_its_step_and_those_after_it(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    reward = VowelsOfSteps(width=10)  # more than a token has characters
    options = {"beta": 0.0, "max_completion_length": 32}
    trainer = build(tiny_model_dir, tmp_path, reward, reward_weights=[0.5], **options)
    train(trainer)
    for inputs in trainer.seen:
        expected = expected_advantages(inputs, trainer.processing_class, reward, 4) / 2
        masked = inputs["advantages"] * inputs["completion_mask"]
        torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-5)
    assert len({float(value) for value in trainer.seen[0]["advantages"].flatten()}) > 8
    means = (masked.sum(1) / inputs["completion_mask"].sum(1)).tolist()
    assert list(trainer._logs["advantages"])[-8:] == pytest.approx(means)


def test_other_rewards_add_the_advantage_of_the_whole_completion(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 1, "beta": 0.0, "learning_rate": 0.0}
    runs = [
        build(tiny_model_dir, tmp_path, *rewards, **options, **more)
        for rewards, more in (
            ([VowelsOfSteps()], {}),
            ([short], {}),
            ([VowelsOfSteps(), short], {"reward_weights": [2.0, 1.0]}),
            ([VowelsOfSteps(), short], {"reward_weights": [2.0, 1.0], "advantage_clip": 0.7}),
        )
    ]
    for trainer in runs:
        trainer.train()
    steps, whole, both, clipped = (trainer.seen[0]["advantages"] for trainer in runs)
    torch.testing.assert_close(both, 2 * steps + whole[:, None])
    torch.testing.assert_close(clipped, both.clamp(-0.7, 0.7))
    shares = series(runs[3].state.log_history, "advantages/clipped_fraction")
    assert shares == pytest.approx([(both.abs() >= 0.7).any(dim=1).float().mean().item()])


@pytest.mark.parametrize(
    "options",
    [{"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")]
    + [
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
        {"loss_type": "grpo", "kl_estimator": "k2", "use_bias_correction_kl": False},
        {"dynamic_sampling": True},
        {"scale_rewards": "batch"},
        {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_one_step_a_completion_trains_as_the_outcome_does(
    tiny_model_dir: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """With one step the advantage of each token is that of the completion, in every loss."""
    process = build(tiny_model_dir, tmp_path, VowelsOfSteps(width=1000), **options)
    outcome = build(
        tiny_model_dir, tmp_path, VowelsOfSteps(width=1000, process_advantages=False), **options
    )
    assert outcome.process_reward is None
    (history, weights), (expected, wanted) = train(process), train(outcome)
    assert process.seen[0]["advantages"].ndim == 2
    for name in ("loss", "reward", "grad_norm", "frac_reward_zero_std", "rewards/steps/mean"):
        assert series(history, name) == pytest.approx(series(expected, name), rel=1e-4, abs=1e-6)
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-4)


def test_a_completion_without_steps_teaches_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    class Sometimes(VowelsOfSteps):
        def step_scores(self, *, completions: Sequence[str], **_: Any) -> list[Steps | None]:
            found = super().step_scores(completions=completions)
            return [None if at == 1 else one for at, one in enumerate(found)]

    trainer = build(tiny_model_dir, tmp_path, Sometimes(), max_steps=1, beta=0.0)
    trainer.train()
    advantages = trainer.seen[0]["advantages"]
    assert not advantages.isnan().any()
    assert [bool(row.any()) for row in advantages] == [True, False, *[True] * 6]


class Failing(VowelsOfSteps):
    """A service that does not answer for odd completions in its first call."""

    on_missing, failure = "exclude", "HTTP 503"

    def __init__(self) -> None:
        super().__init__()
        self.num_failed, self.asked = 0, []

    def step_scores(self, *, completions: Sequence[str], **_: Any) -> list[Steps | None]:
        found = super().step_scores(completions=completions)
        fails = not self.asked
        self.asked.append(len(completions))
        kept = [None if fails and at % 2 else one for at, one in enumerate(found)]
        self.num_failed = sum(one is None for one in kept)
        return kept


def test_an_outage_leaves_out_completions_or_is_waited_for(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_grpo_ext._trl.rewards._PAUSE_S", 0.0)
    options = {"max_steps": 1, "beta": 0.0}
    whole = build(tiny_model_dir, tmp_path, VowelsOfSteps(), short, **options)
    waiting = build(tiny_model_dir, tmp_path, Failing(), short, on_outage="wait", **options)
    leaving = build(tiny_model_dir, tmp_path, Failing(), short, on_outage="continue", **options)
    for trainer in (whole, waiting, leaving):
        trainer.train()
    assert waiting.reward_funcs[0].asked == [8, 4]  # only what was missing, the second time
    assert torch.equal(waiting.seen[0]["advantages"], whole.seen[0]["advantages"])
    assert leaving.reward_funcs[0].asked == [8]
    assert not leaving.seen[0]["advantages"][1::2].any()
    assert leaving.seen[0]["advantages"][::2].any(dim=1).all()


def test_an_outage_ends_the_run_which_then_asks_for_all_steps(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    undisturbed = build(tiny_model_dir, tmp_path / "a", VowelsOfSteps(), **options)
    _, wanted = train(undisturbed)
    reward = Failing()
    with pytest.raises(RewardOutageError, match="HTTP 503"):
        build(tiny_model_dir, tmp_path / "b", reward, **options).train()
    resumed = build(tiny_model_dir, tmp_path / "b", reward, **options)
    resumed.train(resume_from_checkpoint="last-good")
    assert reward.asked == [8, 8, 8]
    for name, weight in wanted.items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_dynamic_sampling_keeps_the_steps_of_what_it_drew(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    class Rare(VowelsOfSteps):
        """Most groups have no score that differs."""

        def _steps(self, text: str) -> Steps:
            found = super()._steps(text)
            return Steps(found.ends, tuple(float(score > 4) for score in found.scores))

    reward = Rare(width=10)
    options = {"beta": 0.0, "max_completion_length": 24, "dynamic_sampling": True}
    trainer = build(tiny_model_dir, tmp_path, reward, **options)
    train(trainer)
    rounds = series(trainer.state.log_history, "dynamic_sampling/rounds")
    for inputs in trainer.seen:
        assert "step_rewards" not in inputs
        advantages = inputs["advantages"] * inputs["completion_mask"]
        expected = expected_advantages(inputs, trainer.processing_class, reward, 4)
        torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=1e-5)
    assert max(rounds) > 1


def test_groups_whose_steps_differ_teach_though_their_aggregates_are_equal(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    class Equal(VowelsOfSteps):
        def aggregated(self, steps: Sequence[Steps | None]) -> list[float | None]:
            return [0.0 for _ in steps]

    options = {"max_steps": 1, "beta": 0.0, "dynamic_sampling": True}
    teaching = build(tiny_model_dir, tmp_path, Equal(), **options)
    silent = build(tiny_model_dir, tmp_path, Equal(), short, reward_weights=[0, 0], **options)
    for trainer, share in ((teaching, 1.0), (silent, 0.0)):
        trainer.train()
        name = "dynamic_sampling/informative_fraction"
        assert series(trainer.state.log_history, name) == [share]


def test_each_aggregation_works_without_another_reward(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 1, "beta": 0.0}
    runs = [
        build(tiny_model_dir, tmp_path, VowelsOfSteps(), multi_objective_aggregation=how, **options)
        for how in ("sum_then_normalize", "normalize_then_sum")
    ]
    for trainer in runs:
        trainer.train()
    assert torch.equal(runs[0].seen[0]["advantages"], runs[1].seen[0]["advantages"])


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (Steps((2, 4), (1.0,)), "as many numbers in `scores`"),
        (Steps((), ()), "`ends` that increase up to the length"),
        (Steps((3,), (1.0,)), "a text of 4 characters"),
        (Steps((4, 4), (1.0, 0.0)), "`ends` that increase"),
        (Steps((4,), ("good",)), "'steps'"),  # type: ignore[arg-type]
        (0.5, "an object|`ends`"),
    ],
)
def test_malformed_steps_are_refused_by_name(steps: Any, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        checked_steps([steps], texts=["1234"], name="steps")
    with pytest.raises(RewardError, match="returned 1 values, but 2 were expected"):
        checked_steps([None], texts=["", ""], name="steps")


def test_steps_that_are_not_finite_are_counted_and_left_out(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    class Broken(VowelsOfSteps):
        def step_scores(self, *, completions: Sequence[str], **_: Any) -> list[Steps | None]:
            first, *rest = super().step_scores(completions=completions)
            return [Steps(first.ends, (math.inf, *first.scores[1:])), *rest]

    trainer = build(tiny_model_dir, tmp_path, Broken(), max_steps=1, beta=0.0)
    trainer.train()
    advantages = trainer.seen[0]["advantages"]
    assert [bool(row.any()) for row in advantages] == [False, *[True] * 7]
    assert series(trainer.state.log_history, "rewards/steps/non_finite") == [1.0]


def test_steps_are_resumed_exactly(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2}
    undisturbed = build(tiny_model_dir, tmp_path / "a", VowelsOfSteps(), **options)
    _, wanted = train(undisturbed)
    resumed = build(tiny_model_dir, tmp_path / "b", VowelsOfSteps(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-3"))
    for name, weight in wanted.items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_evaluation_has_the_reward_of_completions(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = ExtGRPOConfig(**settings(tmp_path, per_device_eval_batch_size=8))
    trainer = Watched(str(tiny_model_dir), [VowelsOfSteps()], config, PROMPTS, PROMPTS)
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/steps/mean"] == pytest.approx(metrics["eval_reward"])
    assert math.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize(
    ("options", "rewards", "words"),
    [
        ({"loss_type": "vespo"}, 1, "`loss_type: vespo` weighs whole completions"),
        ({"off_policy_mask_threshold": 0.1}, 1, "`off_policy_mask_threshold` drops whole"),
        ({"advantage_baseline": "leave_one_out"}, 1, "`advantage_baseline` is 'leave_one_out'"),
        ({"extensions": False}, 1, "`extensions` is false"),
        ({}, 2, "true for 2 rewards"),
    ],
)
def test_what_has_one_advantage_a_completion_is_refused(
    tmp_path: Path, options: dict[str, Any], rewards: int, words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        build(Path("no-model-is-loaded"), tmp_path, *[VowelsOfSteps()] * rewards, **options)


def even(*, completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 2 == 0) for text in completions]


@pytest.mark.parametrize(
    "given",
    [
        {"rollout_func": lambda **_: {}},
        {"tools": [even]},
        {"environment_factory": object},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_others_write_into_completions_is_refused(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    config = ExtGRPOConfig(**settings(tmp_path))
    with pytest.raises(ConfigurationError, match=f"`{next(iter(given))}` is given"):
        ExtGRPOTrainer("none", [VowelsOfSteps()], config, PROMPTS, **given)


# Gates and limits ---------------------------------------------------------------------------------


def test_gates_and_limits_change_what_is_learned_and_not_what_is_logged(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 1, "beta": 0.0, "scale_rewards": "none", "max_completion_length": 12}
    plain = build(tiny_model_dir, tmp_path, vowels, even, **options)
    gates = {"reward_gates": {"even": 1.0}, "reward_clip": {"vowels": [0, 2]}}
    gated = build(tiny_model_dir, tmp_path, vowels, even, **options, **gates)
    for trainer in (plain, gated):
        trainer.train()
    texts = list(gated._logs["completion"])
    scores, gate = vowels(completions=texts), even(completions=texts)
    counts = [min(s, 2.0) * g + g for s, g in zip(scores, gate, strict=True)]
    assert 0 < sum(gate) < 8
    [logged], [before] = gated.state.log_history[:1], plain.state.log_history[:1]
    for name in ("rewards/vowels/mean", "rewards/vowels/std", "rewards/even/mean"):
        assert logged[name] == before[name]
    assert before["reward"] == pytest.approx(statistics.fmean(scores) + statistics.fmean(gate))
    assert logged["reward"] == pytest.approx(statistics.fmean(counts))
    assert logged["reward_std"] == pytest.approx(statistics.stdev(counts))
    assert logged["rewards/gated_fraction"] == pytest.approx(1 - statistics.fmean(gate))
    cut = statistics.fmean(float(score > 2) for score in scores)
    assert logged["rewards/vowels/clipped_fraction"] == pytest.approx(cut)
    groups = [counts[:4], counts[4:]]
    expected = [value - statistics.fmean(group) for group in groups for value in group]
    assert list(gated._logs["advantages"]) == pytest.approx(expected, abs=1e-6)


def test_gates_and_limits_are_of_steps_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {"max_steps": 1, "beta": 0.0, "scale_rewards": "none", "max_completion_length": 12}
    gates = {"reward_gates": {"even": 1.0}, "reward_clip": {"steps": [0, 1]}}
    reward = VowelsOfSteps()
    trainer = build(
        tiny_model_dir, tmp_path, reward, even, reward_weights=[1, 0], **options, **gates
    )
    trainer.train()
    texts = list(trainer._logs["completion"])
    scores = [
        [min(score, 1.0) * gate for score in one.scores]
        for one, gate in zip(
            reward.step_scores(completions=texts), even(completions=texts), strict=True
        )
    ]
    for first in (0, 4):
        mean = statistics.fmean(s for of_one in scores[first : first + 4] for s in of_one)
        for row in range(first, first + 4):  # what the first token earns: all steps
            expected = sum(score - mean for score in scores[row])
            found = float(trainer.seen[0]["advantages"][row, 0])
            assert found == pytest.approx(expected, abs=1e-5)


def test_only_tokens_count_as_clipped(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Behind its end a completion has the advantage of the whole alone, which teaches nothing."""
    options = {"max_steps": 1, "beta": 0.0, "advantage_clip": 1.2}
    trainer = build(tiny_model_dir, tmp_path, VowelsOfSteps(), short, **options)
    trainer.train()
    output = trainer.seen[0]
    cut = (output["advantages"].abs() >= 1.2) & output["completion_mask"].bool()
    shares = series(trainer.state.log_history, "advantages/clipped_fraction")
    assert shares == pytest.approx([cut.any(dim=1).float().mean().item()])


def test_evaluation_counts_as_training_does(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = ExtGRPOConfig(
        **settings(tmp_path, reward_gates='{"even": 1.0}', per_device_eval_batch_size=8)
    )
    trainer = ExtGRPOTrainer(str(tiny_model_dir), [vowels, even], config, PROMPTS, PROMPTS)
    seen: dict[str, Any] = {}
    trainer.compute_group_metrics = lambda groups: seen.update(groups=groups) or {}
    metrics = trainer.evaluate()
    scores, gate = seen["groups"].rewards["vowels"], seen["groups"].rewards["even"]
    assert metrics["eval_reward"] == pytest.approx(((scores + 1) * gate).mean().item())
    assert metrics["eval_rewards/vowels/mean"] == pytest.approx(scores.mean().item())


def test_gates_of_rewards_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`reward_gates` names 'evne'"):
        build(Path("no-model-is-loaded"), tmp_path, vowels, even, reward_gates={"evne": 1.0})


def test_dynamic_sampling_fills_a_batch_by_what_counts(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    never = {"reward_gates": {"never": 1.0}}

    def zero(*, completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    zero.__name__ = "never"
    trainer = build(
        tiny_model_dir, tmp_path, vowels, zero, dynamic_sampling=True, max_steps=1, **never
    )
    trainer.train()
    assert series(trainer.state.log_history, "dynamic_sampling/informative_fraction") == [0.0]
    assert series(trainer.state.log_history, "reward") == [0.0]


# What rewards remember ----------------------------------------------------------------------------


class Counting:
    """A reward that remembers how many completions it has seen in training."""

    def __init__(self) -> None:
        self.count, self.frozen, self.prepared = 0, False, 0
        self.__name__ = "counting"

    def prepare(self) -> None:
        self.prepared += 1

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]

    def __call__(self, *, completions: list[str], **_: Any) -> list[float]:
        if not self.frozen:
            self.count += len(completions)
        found = vowels(completions=completions)
        return [score / math.sqrt(1 + self.count) for score in found]


def test_what_a_reward_remembers_is_resumed_and_left_alone_by_evaluation(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "beta": 0.0}
    undisturbed = build(tiny_model_dir, tmp_path / "a", Counting(), **options)
    _, wanted = train(undisturbed)
    reward = Counting()
    resumed = build(tiny_model_dir, tmp_path / "b", reward, **options)
    assert reward.prepared == 1
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
    assert reward.count == 4 * 8
    for name, weight in wanted.items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
    resumed.evaluate(PROMPTS)
    assert reward.count == 4 * 8


def test_a_live_state_is_copied(tiny_model_dir: Path, tmp_path: Path) -> None:
    class Live(Counting):
        """Returns what it goes on changing, with a number of NumPy in it."""

        def __init__(self) -> None:
            super().__init__()
            self.state = {"count": np.float64(0.0)}

        def state_dict(self) -> Any:
            return self.state

        def load_state_dict(self, state: Any) -> None:
            self.state = state

        def __call__(self, **columns: Any) -> list[float]:
            found = super().__call__(**columns)
            self.state["count"] = np.float64(self.count)
            return found

    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "beta": 0.0}
    reward = Live()
    trainer = build(tiny_model_dir, tmp_path, reward, **options)
    kept = trainer.reward_states()
    trainer.train()
    assert kept == {"counting": {"count": 0.0}}
    resumed = build(tiny_model_dir, tmp_path / "b", Live(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    path = tmp_path / "out" / "checkpoint-1" / "run_state_0.pt"
    state = torch.load(path, weights_only=True)
    assert state["state"]["rewards"] == {"counting": {"count": 8.0}}
    torch.save(state | {"num_processes": 3}, path)  # which plain resume leaves at that
    other = build(tiny_model_dir, tmp_path / "c", Live(), **options)
    other.restore_rewards({})
    other._read_run_state(path.parent)
    assert other.reward_states() == {"counting": {"count": 8.0}}


def test_what_a_checkpoint_cannot_keep_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    class Odd(Counting):
        def state_dict(self) -> Any:
            return {"count": object()}

    with pytest.raises(RewardError, match="'counting' has a object in its `state_dict"):
        build(tiny_model_dir, tmp_path, Odd(), max_steps=1, beta=0.0).train()


def test_names_that_must_tell_rewards_apart_are_not_shared(tmp_path: Path) -> None:
    nowhere = Path("no-model-is-loaded")
    with pytest.raises(ConfigurationError, match="2 rewards are called 'counting'"):
        build(nowhere, tmp_path, Counting(), Counting())
    with pytest.raises(ConfigurationError, match="2 rewards are called 'even'"):
        build(nowhere, tmp_path, even, even, reward_gates={"even": 1.0})


# Two processes ------------------------------------------------------------------------------------

PROCESSES = """
import json, logging, sys, warnings
warnings.filterwarnings("ignore")
import torch
from datasets import Dataset
from test_step_rewards import VowelsOfSteps, short
from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer

model, out, per_device = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = ExtGRPOConfig(
    out, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
    per_device_train_batch_size=per_device, max_completion_length=8, learning_rate=1e-2,
    optim="sgd", logging_steps=1, seed=3, gradient_checkpointing=False, num_generations=8,
    max_steps=3, reward_clip={"short": [-0.8, 0]},
)
dataset = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(8)]})
trainer = ExtGRPOTrainer(model, [VowelsOfSteps(), short], config, dataset)
trainer.train()
if trainer.accelerator.is_main_process:
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    keys = ("loss", "reward", "grad_norm", "rewards/short/clipped_fraction")
    history = [[entry[key] for key in keys] for entry in trainer.state.log_history[:3]]
    torch.save([list(trainer._logs["advantages"]), history, weights], out + ".pt")
trainer.accelerator.end_training()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def test_two_processes_with_a_split_group_give_what_one_gives(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    (one, logs, weights), (two, logs2, weights2) = (
        launch(PROCESSES, tmp_path, tiny_model_dir, tmp_path / f"out{n}", 8 // n, processes=n)
        for n in (1, 2)
    )
    assert one == pytest.approx(two, abs=1e-5)
    assert any(one)
    for left, right in zip(logs, logs2, strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, weights2[name], atol=1e-5, rtol=1e-4)
