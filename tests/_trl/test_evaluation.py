"""Evaluation in the loop of transformers: what it reports, how often, and what it leaves alone."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from runs import series, settings, train, vowels
from transformers import EarlyStoppingCallback, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.evaluation import EvalGroups
from trl_grpo_ext.rewards import LastNumberReward

TIMES = ("runtime", "per_second", "epoch", "preparation_time")
HERE = Path(__file__).parent
NUM_PROMPTS = 7  # with groups of 4, batches of 8 do not divide it


def data(num_prompts: int = NUM_PROMPTS) -> Dataset:
    numbers = range(num_prompts)
    return Dataset.from_dict(
        {
            "prompt": [f"{a} + {a} =" for a in numbers],
            "answer": [2 * a for a in numbers],
            "task": ["even" if a % 2 == 0 else "odd" for a in numbers],
        }
    )


class Keep:
    """A ``compute_metrics`` that keeps what it got."""

    def __init__(self) -> None:
        self.groups: list[EvalGroups] = []

    def __call__(self, groups: EvalGroups) -> dict[str, float]:
        self.groups.append(groups)
        return {}

    @property
    def completions(self) -> list[Any]:
        return [groups.completions for groups in self.groups]


@pytest.fixture
def make(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that makes a trainer of the tiny model; options, then keyword arguments."""

    def made(
        options: dict[str, Any] | None = None, *, rewards: Any = vowels, **arguments: Any
    ) -> Any:
        config = ExtGRPOConfig(
            **settings(tmp_path, **{"per_device_eval_batch_size": 8, **(options or {})})
        )
        given = {"train_dataset": data(16), "eval_dataset": data(), **arguments}
        return ExtGRPOTrainer(str(tiny_model_dir), rewards, config, **given)

    return made


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.endswith(TIMES)}


# What it reports ----------------------------------------------------------------------------------


def test_evaluate_counts_each_prompt_once_in_the_order_of_the_dataset(
    make: Callable[..., Any],
) -> None:
    keep = Keep()
    metrics = make(
        {"eval_pass_k": [1, 2, 4], "eval_correct_threshold": 2.0, "eval_task_column": "task"},
        rewards=[vowels, LastNumberReward()],
        compute_metrics=keep,
    ).evaluate()
    (groups,) = keep.groups
    assert groups.prompts == data()["prompt"]
    assert groups.columns == {"answer": data()["answer"], "task": data()["task"]}
    scores = [vowels(completions=group) for group in groups.completions]
    assert groups.rewards["vowels"].tolist() == scores
    right = [[score >= 2 for score in group] for group in scores]
    pairs = [list(itertools.combinations(group, 2)) for group in right]
    even = [group for group, task in zip(right, data()["task"], strict=True) if task == "even"]
    expected = {
        "eval_num_prompts": NUM_PROMPTS,
        "eval_rewards/vowels/mean": mean(itertools.chain(*scores)),
        "eval_accuracy": mean(itertools.chain(*right)),
        "eval_pass@1": mean(itertools.chain(*right)),
        "eval_pass@2": mean(any(pair) for group in pairs for pair in group),
        "eval_pass@4": mean(any(group) for group in right),
        "eval_completions/mean_length": groups.lengths_PG.double().mean().item(),
        "eval_completions/clipped_ratio": groups.truncated_PG.double().mean().item(),
        "eval_tasks/even/accuracy": mean(itertools.chain(*even)),
        "eval_tasks/even/num_prompts": 4,
        "eval_num_tokens": 0,  # sampled in training so far
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert 0 < metrics["eval_accuracy"] < metrics["eval_pass@2"] < metrics["eval_pass@4"]
    assert "eval_rewards/last_number/maj@2" in metrics
    assert "eval_maj@2" not in metrics  # the first function says what no answer is


def mean(values: Iterator[Any]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def test_lengths_and_truncation_are_those_of_the_tokens(
    make: Callable[..., Any], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    keep = Keep()
    trainer = make({"max_completion_length": 6}, compute_metrics=keep)
    trainer.evaluate()
    (groups,) = keep.groups
    for texts, lengths, truncated in zip(
        groups.completions, groups.lengths_PG.tolist(), groups.truncated_PG.tolist(), strict=True
    ):
        for text, length, cut in zip(texts, lengths, truncated, strict=True):
            # One token a character; special ones are in no text, the last of which ends it.
            assert len(tiny_tokenizer(text).input_ids) <= length <= 6
            assert length == 6 if cut else True
    assert groups.truncated_PG.any()
    assert not groups.truncated_PG.all()


def test_evaluate_has_every_metric_of_trl(
    make: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = GRPOConfig(**settings(tmp_path, per_device_eval_batch_size=8))
    theirs = GRPOTrainer(str(tiny_model_dir), vowels, config, data(16), data()).evaluate()
    ours = make().evaluate()
    assert set(theirs) - set(ours) == set()


def test_loss_and_entropy_do_not_depend_on_the_batches(make: Callable[..., Any]) -> None:
    """7 prompts are a batch of 28, or 3 of 8 and one of 4, which must not weigh as much."""
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        one, several = (
            make(
                {
                    "per_device_eval_batch_size": size,
                    "loss_type": loss_type,
                    "scale_rewards": "none",  # so that the loss is not 0 where lengths differ
                }
            ).evaluate()
            for size in (28, 8)
        )
        assert one["eval_entropy"] == pytest.approx(several["eval_entropy"], rel=1e-5)
        assert one["eval_loss"] == pytest.approx(several["eval_loss"], rel=1e-4, abs=1e-6)


def test_what_a_reward_logs_is_reported_with_the_rest(make: Callable[..., Any]) -> None:
    def logging(*, completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        log_metric("half", 0.5)
        return [1.0 if index % 3 else None for index in range(len(completions))]

    metrics = make(rewards=logging).evaluate()
    assert metrics["eval_half"] == 0.5
    assert metrics["eval_rewards/logging/non_finite"] == 0
    assert metrics["eval_accuracy"] == 1.0
    # None at places 0, 3 and 6 of each batch of 8, and at 0 and 3 of the last one of 4.
    assert metrics["eval_rewards/logging/scored"] == pytest.approx(1 - (3 * 3 + 2) / 28)


def test_the_log_has_what_evaluate_returns(make: Callable[..., Any]) -> None:
    trainer = make()
    metrics = trainer.evaluate()
    logged = trainer.state.log_history[-1]
    assert {name: logged[name] for name in metrics} == metrics


def test_compute_metrics_adds_to_what_evaluate_returns(make: Callable[..., Any]) -> None:
    def short(groups: EvalGroups) -> dict[str, Any]:
        return {
            "short": (groups.lengths_PG < 8).float().mean(),
            "eval_prompts": len(groups.prompts),
        }

    metrics = make(compute_metrics=short).evaluate()
    assert metrics["eval_prompts"] == NUM_PROMPTS
    assert 0 < metrics["eval_short"] < 1
    assert isinstance(metrics["eval_short"], float)


@pytest.mark.parametrize("returned", [None, {"a": "much"}, {"a": [1, 2]}])
def test_compute_metrics_that_returns_no_numbers_is_refused(
    make: Callable[..., Any], returned: object
) -> None:
    with pytest.raises(ConfigurationError, match=r"is no dict of numbers .*cannot be logged\. Ret"):
        make(compute_metrics=lambda groups: returned).evaluate()


# Several sets, streams ----------------------------------------------------------------------------


def test_several_sets_have_metrics_of_their_own_name(make: Callable[..., Any]) -> None:
    keep = Keep()
    sets = {"small": data(3), "large": data()}
    metrics = make(eval_dataset=sets, compute_metrics=keep).evaluate()
    assert metrics["eval_small_num_prompts"] == 3
    assert metrics["eval_large_num_prompts"] == NUM_PROMPTS
    assert "eval_reward" not in metrics
    # Of the run and of no set; TRL calls it so.
    assert [name for name in metrics if name.endswith("num_tokens")] == ["eval_num_tokens"]
    small, large = keep.groups
    assert metrics["eval_small_reward"] == pytest.approx(small.reward_PG.double().mean().item())
    assert small.completions == large.completions[:3]  # the same prompts, so the same draws


def test_a_stream_gives_what_the_dataset_gives(make: Callable[..., Any]) -> None:
    expected = timeless(make().evaluate())
    stream = data().to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    trainer = make(eval_dataset=stream)
    assert timeless(trainer.evaluate()) == expected
    assert timeless(trainer.evaluate()) == expected
    assert timeless(trainer.evaluate(data().to_iterable_dataset())) == expected
    named = make(eval_dataset={"a": data(3), "b": data().to_iterable_dataset()}).evaluate()
    assert named["eval_b_reward"] == expected["eval_reward"]


# The same each time -------------------------------------------------------------------------------

ENGINES = ["shared_prefill", "transformers", "continuous_batching"]


@pytest.mark.parametrize("engine", [*ENGINES[:2], pytest.param(ENGINES[2], marks=pytest.mark.slow)])
def test_the_same_weights_get_the_same_completions(make: Callable[..., Any], engine: str) -> None:
    """Before training, at its start, in it and after it, with another set or a failure between."""
    keep = Keep()
    fails = iter([False])

    def reward(*, completions: list[str], **_: Any) -> list[float]:
        if next(fails, False):
            raise KeyboardInterrupt
        return vowels(completions=completions)

    trainer = make(
        {
            "group_sampler": engine,
            "learning_rate": 0.0,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "eval_on_start": True,
        },
        rewards=reward,
        compute_metrics=keep,
    )
    first = timeless(trainer.evaluate())
    fails = iter([False, True])  # in the second of four batches
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    assert timeless(trainer.evaluate()) == first
    trainer.evaluate(data(3), metric_key_prefix="other")
    trainer.train()
    trainer.evaluate()
    alike = [completions for completions in keep.completions if len(completions) == NUM_PROMPTS]
    assert len(alike) == 6
    assert all(completions == alike[0] for completions in alike)
    assert len({text for group in alike[0] for text in group}) > NUM_PROMPTS


def test_another_seed_gives_other_completions(make: Callable[..., Any]) -> None:
    first, second = Keep(), Keep()
    make(compute_metrics=first).evaluate()
    make({"seed": 8}, compute_metrics=second).evaluate()
    assert first.completions != second.completions


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_evaluation_leaves_training_as_it_is(make: Callable[..., Any], engine: str) -> None:
    options = {"group_sampler": engine}
    history, weights = train(make(options))
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    with_history, with_weights = train(
        make({**options, **evaluated, "eval_decoding": "both"}, rewards=vowels)
    )
    assert len(series(with_history, "eval_greedy/accuracy")) == 4
    for key in ("loss", "reward", "kl", "grad_norm", "entropy", "completions/mean_length"):
        assert series(history, key) == series(with_history, key)
    assert all(torch.equal(weight, with_weights[name]) for name, weight in weights.items())


# The best model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["pass@2", "eval_tasks/odd/accuracy"])
def test_the_best_model_is_loaded_and_training_stops_early(
    make: Callable[..., Any], tmp_path: Path, metric: str
) -> None:
    """A reward that falls from step to step, so that the first evaluation is the best."""
    steps = itertools.count()

    def falling(*, completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        next(steps)
        worse = trainer_state.global_step >= 2
        return [float(not worse and len(text) % 2 == 0) for text in completions]

    falling.__name__ = "vowels"
    trainer = make(
        {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 6,
            "learning_rate": 0.1,
            "load_best_model_at_end": True,
            "metric_for_best_model": metric,
            "eval_pass_k": [1, 2],
            "eval_task_column": "task",
        },
        rewards=falling,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    state = trainer.state
    assert state.global_step == 3  # one good step, and two without a better one
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = series(state.log_history, name)
    assert state.best_metric == values[0] > 0
    assert values[1:] == [0, 0]
    best = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-1")
    for key, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, best.state_dict()[key])


# Greedy -------------------------------------------------------------------------------------------


def argmax_text(model: Any, tokenizer: Any, prompt: str, *, num_tokens: int) -> str:
    """Slow reference: no cache, no padding, the whole text again for each token."""
    ids = tokenizer(prompt).input_ids
    new: list[int] = []
    for _ in range(num_tokens):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.parametrize(
    ("engine", "decoding"),
    [(ENGINES[0], "greedy"), (ENGINES[0], "both"), (ENGINES[1], "both"), (ENGINES[2], "greedy")],
)
def test_greedy_completions_are_the_likeliest_tokens(
    make: Callable[..., Any],
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    engine: str,
    decoding: str,
) -> None:
    keep = Keep()
    shape = {"temperature": 1.3}
    if engine != "continuous_batching":
        shape |= {"top_p": 0.9, "min_p": 0.05, "generation_kwargs": {"typical_p": 0.95}}
    trainer = make(
        {"group_sampler": engine, "eval_decoding": decoding, **shape}, compute_metrics=keep
    )
    metrics = trainer.evaluate()
    expected = [
        [argmax_text(tiny_model, tiny_tokenizer, prompt, num_tokens=8)]
        for prompt in data()["prompt"]
    ]
    assert keep.groups[-1].completions == expected
    accuracy = mean(score >= 0.5 for group in expected for score in vowels(completions=group))
    name = "eval_greedy/accuracy" if decoding == "both" else "eval_accuracy"
    assert metrics[name] == pytest.approx(accuracy)
    assert len(keep.groups) == (2 if decoding == "both" else 1)
    assert [groups.group_size for groups in keep.groups] == ([4, 1] if decoding == "both" else [1])


def test_a_greedy_pass_changes_nothing_of_the_sampled_one(make: Callable[..., Any]) -> None:
    sampled = timeless(make().evaluate())
    both = timeless(make({"eval_decoding": "both"}).evaluate())
    assert {name: both[name] for name in sampled} == sampled


def test_a_greedy_pass_runs_no_forward_pass_for_log_probabilities(
    make: Callable[..., Any],
) -> None:
    """The reference does not generate, so each of its passes computes log-probabilities."""
    counts = []
    for decoding in ("sampled", "both"):
        trainer = make({"eval_decoding": decoding, "verify_shared_prefix": False})
        passes: list[None] = []
        trainer.ref_model.register_forward_hook(lambda *_, seen=passes: seen.append(None))
        trainer.evaluate()
        counts.append(len(passes))
    assert counts[0] == counts[1] == 4  # batches


def test_greedy_settings_are_taken_back_after_a_failure(make: Callable[..., Any]) -> None:
    calls = itertools.count()

    def reward(*, completions: list[str], **_: Any) -> list[float]:
        if next(calls) == 4:  # after the four sampled batches
            raise RuntimeError("no more scores")
        return vowels(completions=completions)

    trainer = make({"eval_decoding": "both"}, rewards=reward)
    given, size = trainer.generation_config, trainer.num_generations_eval
    with pytest.raises(RuntimeError, match="no more scores"):
        trainer.evaluate()
    assert trainer.generation_config is given
    assert given.do_sample
    assert trainer.num_generations_eval == size == 4
    assert timeless(trainer.evaluate())["eval_greedy/num_prompts"] == NUM_PROMPTS


def test_greedy_vllm_has_temperature_0(make: Callable[..., Any]) -> None:
    """TRL hands these attributes of its vLLM client to each request; vLLM itself is not here."""
    trainer = make()
    engine = types.SimpleNamespace(temperature=0.7, generation_kwargs={"temperature": 1, "seed": 2})
    trainer.use_vllm, trainer.vllm_generation = True, engine
    with trainer._greedy():
        assert vars(engine) == {"temperature": 0.0, "generation_kwargs": {"seed": 2}}
        assert trainer.num_generations_eval == 1
    assert vars(engine) == {"temperature": 0.7, "generation_kwargs": {"temperature": 1, "seed": 2}}


def test_a_greedy_pass_shows_a_bar(
    make: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    make({"eval_decoding": "both", "disable_tqdm": False}).evaluate()
    assert "greedy: 100%" in capfd.readouterr().err


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            {"extensions": False},
            {"compute_metrics": len},
            "`compute_metrics` is given, but `extensions` is false, so TRL evaluates, which calls "
            "no such function. Set `extensions: true`, or remove `compute_metrics`.",
        ),
        ({}, {"compute_metrics": 3}, "`compute_metrics` is a int, which cannot be called. Pass a"),
        (
            {"eval_decoding": "both"},
            {"rollout_func": len},
            "`eval_decoding` is 'both', but a `rollout_func` generates the completions, and cannot",
        ),
        (
            {"eval_task_column": "kind"},
            {"eval_dataset": {"a": data(), "b": data().remove_columns("task")}},
            "`eval_task_column` is 'kind', but an eval set has the columns prompt, answer, task, "
            "so its prompts have no task. Name one of these",
        ),
        (
            {"metric_for_best_model": "pass@4", "eval_strategy": "steps", "eval_steps": 1},
            {"eval_dataset": {"easy": data(), "hard": data()}},
            "`metric_for_best_model` is 'pass@4', but `eval_dataset` has named sets (easy, hard), "
            "whose metrics begin with their name, so there would be no best model. Use one of: "
            "easy_pass@4, hard_pass@4.",
        ),
        (
            {
                "metric_for_best_model": "easy_rewards/vowels/accuracy",
                "eval_strategy": "steps",
                "eval_steps": 1,
            },
            {"eval_dataset": {"easy": data()}},
            "'vowels' is the first reward function, by which accuracy, pass@k and maj@k are "
            "reported without its name, so there would be no best model. Use "
            "`metric_for_best_model: easy_accuracy`.",
        ),
        (
            {"gradient_accumulation_steps": 4},
            {"train_dataset": data(7)},
            "`train_dataset` has 7 rows, but a generation batch takes 8 different prompts (32 "
            "completions / `num_generations`=4), and TRL leaves out what does not fill one, so "
            "nothing would be trained on. Add prompts, or lower `per_device_train_batch_size`, "
            "`gradient_accumulation_steps` or `steps_per_generation` (or `generation_batch_size`, "
            "if that is set) until they fill one.",
        ),
    ],
    ids=[
        "extensions-off",
        "not-callable",
        "rollout",
        "no-such-column",
        "best-of-no-set",
        "best-of-first-reward",
        "too-few-prompts",
    ],
)
def test_what_cannot_work_is_refused_before_a_model_loads(
    tmp_path: Path, options: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    config = ExtGRPOConfig(**settings(tmp_path, **options))
    with pytest.raises(ConfigurationError) as raised:
        ExtGRPOTrainer("no-such-model", vowels, config, **{"train_dataset": data(), **arguments})
    assert message in str(raised.value)


def test_a_metric_of_a_named_set_makes_the_best_model(make: Callable[..., Any]) -> None:
    trainer = make(
        {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "max_steps": 2,
            "metric_for_best_model": "easy_pass@4",
        },
        eval_dataset={"easy": data(2), "hard": data(3)},
    )
    trainer.train()
    assert trainer.state.best_metric == max(series(trainer.state.log_history, "eval_easy_pass@4"))


def test_as_many_prompts_as_a_generation_batch_takes_are_trained_on(
    make: Callable[..., Any],
) -> None:
    trainer = make({"gradient_accumulation_steps": 4, "max_steps": 1}, train_dataset=data(8))
    trainer.train()
    assert len(series(trainer.state.log_history, "reward")) == 1


def test_too_few_prompts_are_left_to_trl_with_extensions_off_and_in_a_stream(
    make: Callable[..., Any],
) -> None:
    options = {"gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = make({**options, "extensions": False}, train_dataset=data(7))
    trainer.train()
    assert series(trainer.state.log_history, "reward") == []
    make(options, train_dataset=data(7).to_iterable_dataset())


def test_a_batch_that_would_split_a_group_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"does not divide the eval batch of 6 completi"):
        make({"per_device_eval_batch_size": 6}).evaluate()


def test_a_set_without_the_task_column_is_refused(make: Callable[..., Any]) -> None:
    trainer = make({"eval_task_column": "task"})
    with pytest.raises(ConfigurationError, match="has the columns prompt, answer, so its prompts"):
        trainer.evaluate(data().remove_columns("task"))


def test_with_extensions_off_evaluation_is_that_of_trl(
    make: Callable[..., Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    ours = make({"extensions": False})
    config = GRPOConfig(**settings(tmp_path, per_device_eval_batch_size=8))
    theirs = GRPOTrainer(str(tiny_model_dir), vowels, config, data(16), data())
    torch.manual_seed(1)
    expected = theirs.evaluate()
    torch.manual_seed(1)
    found = ours.evaluate()
    assert timeless(found) == timeless(expected)


@pytest.mark.filterwarnings("ignore:.*rollout_func.*experimental")
def test_an_engine_that_leaves_the_model_in_training_mode_does_not_matter(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TRL does after ``generate_batch``; the metrics would become those of training."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        trainer.model.train()
        ids = [trainer.processing_class(prompt).input_ids for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": [[5, 6]] * len(prompts), "logprobs": None}

    trainer = make({"group_sampler": "transformers"}, rollout_func=rollout)
    metrics = trainer.evaluate()
    assert metrics["eval_num_prompts"] == NUM_PROMPTS
    assert metrics["eval_completions/clipped_ratio"] == 1
    assert metrics["eval_entropy"] > 0
    assert not trainer._metrics["train"]


def test_the_blocks_of_the_guide_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    """All but the last one, which needs a model from the package index."""
    text = (HERE.parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    *blocks, last = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {
        "model": str(tiny_model_dir),
        "reward_funcs": [vowels],
        "train_dataset": data(16),
        "eval_dataset": data(),
    }
    for block in blocks:
        small = f'output_dir="{tmp_path}", max_completion_length=4, bf16=False, use_cpu=True,'
        exec(block.replace('output_dir="outputs/run",', small), names)
    assert names["metrics"]["eval_greedy/num_prompts"] == NUM_PROMPTS
    assert names["config"].metric_for_best_model == "easy_pass@8"
    assert names["exact_match"](completions=["so\n7", "8"], answer=["7", "7"]) == [1.0, 0.0]
    compile(last, "evaluation.md", "exec")


# Processes ----------------------------------------------------------------------------------------


def digits(*, completions: list[str], **_: Any) -> list[float | None]:
    scores = [float(sum(character.isdigit() for character in text)) for text in completions]
    return [
        None if len(text) == 7 else score for text, score in zip(completions, scores, strict=True)
    ]


def evaluate_sets(model: str, out: Path, batch_size: int) -> tuple[dict[str, float], list[Any]]:
    """Return the metrics of two sets and their groups; see ``main``."""
    keep = Keep()
    config = ExtGRPOConfig(
        **settings(out, eval_decoding="both", eval_task_column="task", loss_type="grpo"),
        per_device_eval_batch_size=batch_size,
    )
    rewards = [LastNumberReward(), digits]
    sets = {"all": data(), "one": data().select([3])}
    trainer = ExtGRPOTrainer(model, rewards, config, data(16), sets, compute_metrics=keep)
    return trainer.evaluate(), keep.groups


def test_two_processes_report_what_one_does_where_nothing_divides(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """7 prompts of 4 are 28 completions: 2 x 8 fill up 4, 2 x 6 fill up 8 and split groups."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", __file__, str(tiny_model_dir), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, [HERE.parents[1], HERE.parent])),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = evaluate_sets(str(tiny_model_dir), tmp_path, 8)
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt", weights_only=False):
            assert_same_evaluation(found, one)
    assert one[0]["eval_all_num_prompts"] == 7
    assert one[0]["eval_one_num_prompts"] == 1
    assert 0 < one[0]["eval_all_rewards/digits/scored"] < 1


def assert_same_evaluation(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found[1], expected[1], strict=True):
        for name in ("prompts", "completions", "columns", "answers"):
            assert getattr(ours, name) == getattr(theirs, name)
        torch.testing.assert_close(
            ours.rewards_BR, theirs.rewards_BR, rtol=0, atol=0, equal_nan=True
        )
    assert found[0].keys() == expected[0].keys()
    for name, value in timeless(expected[0]).items():
        if name.endswith(("loss", "entropy", "kl")):  # sums over tokens, in another order
            assert found[0][name] == pytest.approx(value, rel=1e-5, abs=1e-6)
        else:
            assert found[0][name] == pytest.approx(value, rel=0, abs=0, nan_ok=True)


def main(model: str, out: Path) -> None:
    """One of two processes: evaluate in batches of two sizes, and write what came back."""
    results = [evaluate_sets(model, out, batch_size) for batch_size in (8, 6)]
    torch.save(results, out / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
