"""The trainer as a drop-in: equal to plain TRL where it should be, different only where asked."""

from __future__ import annotations

import inspect
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import series, settings, train, vowels
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.errors import ConfigurationError, RewardError

PROMPTS = Dataset.from_dict(
    {"prompt": [f"{a} + {a} =" for a in range(8)], "answer": [str(2 * a) for a in range(8)]}
)


def short(*, completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [-len(ids) / 8 for ids in completion_ids]


def ext_trainer(model: Any, tmp_path: Path, *, rewards: Any = None, **changes: Any) -> Any:
    return ExtGRPOTrainer(
        model=str(model) if isinstance(model, Path) else model,
        reward_funcs=rewards or [vowels, short],
        args=ExtGRPOConfig(**settings(tmp_path, **changes)),
        train_dataset=PROMPTS,
    )


def trl_like(model: Any, tmp_path: Path, **changes: Any) -> Any:
    """Our trainer with TRL's sampling and padded rows, for a comparison of everything else."""
    off = {"group_sampler": "transformers", "shared_prefix": "never", "onednn_linear": False}
    return ext_trainer(model, tmp_path, **(off | changes))


def trl_trainer(model: Path, tmp_path: Path, *, rewards: Any = None, **changes: Any) -> Any:
    return GRPOTrainer(
        model=str(model),
        reward_funcs=rewards or [vowels, short],
        args=GRPOConfig(**settings(tmp_path, **changes)),
        train_dataset=PROMPTS,
    )


def same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# Off: bit-identical ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1},
        {"scale_rewards": "batch", "loss_type": "grpo"},
    ],
    ids=["defaults", "off-policy", "batch-scale"],
)
def test_trainer_is_bit_identical_to_trl_when_extensions_are_off(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    ours = train(ext_trainer(tiny_model_dir, tmp_path, extensions=False, **changes))
    theirs = train(trl_trainer(tiny_model_dir, tmp_path, **changes))
    for key in ("loss", "reward", "kl", "grad_norm", "entropy"):
        assert series(ours[0], key) == series(theirs[0], key)
    assert len(series(ours[0], "loss")) == 3
    assert same_weights(ours[1], theirs[1])


def test_trainer_takes_a_plain_trl_config_as_the_defaults(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    ours = ExtGRPOTrainer(str(tiny_model_dir), [vowels], GRPOConfig(**settings(tmp_path)), PROMPTS)
    assert ours.options.kl_estimator == "k3"
    history, _ = train(ours)
    default, _ = train(ext_trainer(tiny_model_dir, tmp_path, rewards=[vowels]))
    assert series(history, "loss") == series(default, "loss")


def test_trainer_makes_a_configuration_when_none_is_given(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in TRL, whose default is bf16: on a machine without a GPU it asks for `use_cpu`.
    monkeypatch.chdir(tmp_path)
    if torch.cuda.is_available():
        trainer = ExtGRPOTrainer(str(tiny_model_dir), vowels, train_dataset=PROMPTS)
        assert trainer.options.reference == "auto"
        return
    with pytest.raises(ValueError, match="use_cpu"):
        ExtGRPOTrainer(str(tiny_model_dir), vowels, train_dataset=PROMPTS)


# On: advantages -------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trainer_advantages_equal_those_of_trl(
    tiny_model_dir: Path, tmp_path: Path, aggregation: str, scale: str
) -> None:
    changes = {"multi_objective_aggregation": aggregation, "scale_rewards": scale, "max_steps": 1}
    ours = trl_like(tiny_model_dir, tmp_path, **changes)
    history, _ = train(ours)
    theirs = trl_trainer(tiny_model_dir, tmp_path, **changes)
    expected, _ = train(theirs)
    assert list(ours._logs["completion"]) == list(theirs._logs["completion"])
    assert list(ours._logs["advantages"]) == pytest.approx(
        list(theirs._logs["advantages"]), abs=1e-6
    )
    assert any(ours._logs["advantages"])
    assert series(history, "loss") == pytest.approx(series(expected, "loss"), abs=1e-6)


def test_trainer_gives_equal_rewards_exactly_no_advantage(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    def constant(*, prompts: list[str], **_: Any) -> list[float]:
        return [0.1] * len(prompts)

    trainer = ext_trainer(
        tiny_model_dir, tmp_path, rewards=[constant], beta=0.0, num_generations=8, max_steps=1
    )
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    history, after = train(trainer)
    assert list(trainer._logs["advantages"]) == [0.0] * 8
    assert series(history, "frac_reward_zero_std") == [1.0]
    assert series(history, "grad_norm") == [0.0]
    assert same_weights(before, after)


def test_trainer_uses_the_leave_one_out_baseline_when_asked(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = {"scale_rewards": "none", "max_steps": 1}
    mean = ext_trainer(tiny_model_dir, tmp_path, **changes)
    train(mean)
    left_out = ext_trainer(tiny_model_dir, tmp_path, advantage_baseline="leave_one_out", **changes)
    train(left_out)
    # r - mean of the others = (r - mean) * G / (G - 1), G = 4
    expected = [advantage * 4 / 3 for advantage in mean._logs["advantages"]]
    assert list(left_out._logs["advantages"]) == pytest.approx(expected, abs=1e-6)


# On: KL ---------------------------------------------------------------------------------------

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_trainer_kl_equals_that_of_trl_when_the_clamp_is_out_of_reach(
    tiny_model_dir: Path, tmp_path: Path, loss_type: str
) -> None:
    # A clamp takes our path instead of TRL's; at 1000 nats it changes nothing.
    changes = {
        "loss_type": loss_type,
        "gradient_accumulation_steps": 2,
        "beta": 0.5,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
    }
    ours = train(trl_like(tiny_model_dir, tmp_path, kl_clamp=1000.0, **changes))
    theirs = train(trl_trainer(tiny_model_dir, tmp_path, **changes))
    assert series(theirs[0], "kl")[-1] > 1e-6
    for key in ("loss", "kl", "grad_norm"):
        assert series(ours[0], key) == pytest.approx(series(theirs[0], key), rel=2e-4, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1},
        {"use_bias_correction_kl": False},
        {"mask_truncated_completions": True},
    ],
    ids=["sequence-level", "off-policy", "no-bias-correction", "truncated"],
)
def test_trainer_kl_equals_that_of_trl_with_options(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {"beta": 0.5, "max_steps": 3, **changes}
    ours = train(trl_like(tiny_model_dir, tmp_path, kl_clamp=1000.0, **changes))
    theirs = train(trl_trainer(tiny_model_dir, tmp_path, **changes))
    for key in ("loss", "kl", "grad_norm"):
        assert series(ours[0], key) == pytest.approx(series(theirs[0], key), rel=2e-4, abs=1e-6)


def test_trainer_kl_follows_the_estimator_when_set(tiny_model_dir: Path, tmp_path: Path) -> None:
    changes = {"beta": 0.5, "max_steps": 2}
    k3, _ = train(ext_trainer(tiny_model_dir, tmp_path, **changes))
    k2, _ = train(
        ext_trainer(
            tiny_model_dir, tmp_path, kl_estimator="k2", use_bias_correction_kl=False, **changes
        )
    )
    k1, _ = train(ext_trainer(tiny_model_dir, tmp_path, kl_estimator="k1", **changes))
    # Near the reference the three agree to first order, yet are not the same number.
    assert series(k2, "kl")[1] == pytest.approx(series(k3, "kl")[1], rel=0.5)
    assert len({series(history, "kl")[1] for history in (k1, k2, k3)}) == 3


# On: reference --------------------------------------------------------------------------------


def test_trainer_quantized_reference_is_frozen_and_small(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    from trl_grpo_ext.reference import QuantizedLinear, summarize_reference

    changes = {"reference": "quantized", "reference_compensation": "none"}
    trainer = ext_trainer(tiny_model_dir, tmp_path, **changes)
    reference = trainer.ref_model
    before = {name: buffer.clone() for name, buffer in reference.state_dict().items()}
    history, _ = train(trainer)
    assert isinstance(reference.model.layers[0].self_attn.q_proj, QuantizedLinear)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert same_weights(before, reference.state_dict())
    assert summarize_reference(reference).num_quantized > 0
    # The policy stays in full precision, and the penalty is against the quantized copy.
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert series(history, "kl")[0] > 1e-4


def test_trainer_resident_reference_equals_the_one_of_trl(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    ours = train(trl_like(tiny_model_dir, tmp_path, reference="resident", beta=0.5))
    theirs = train(trl_trainer(tiny_model_dir, tmp_path, beta=0.5))
    assert series(theirs[0], "kl")[-1] > 1e-3
    for key in ("kl", "loss"):
        assert series(ours[0], key) == pytest.approx(series(theirs[0], key), abs=1e-6)


def test_trainer_reference_is_the_live_policy_when_given_as_an_object(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    with torch.no_grad():  # no longer what any folder holds
        tiny_model.model.layers[0].mlp.up_proj.weight.mul_(-1.0)
    trainer = ExtGRPOTrainer(
        tiny_model,
        vowels,
        ExtGRPOConfig(**settings(tmp_path, reference="resident", max_steps=1, learning_rate=1e-9)),
        PROMPTS,
        processing_class=tiny_tokenizer,
    )
    history, _ = train(trainer)
    assert series(history, "kl")[0] == pytest.approx(0.0, abs=1e-6)


def test_trainer_refuses_a_reference_for_a_peft_policy(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    with pytest.raises(ConfigurationError, match="adapter switched off"):
        ExtGRPOTrainer(
            "a-model-that-must-not-be-loaded",
            vowels,
            ExtGRPOConfig(**settings(tmp_path, reference="quantized")),
            PROMPTS,
            peft_config=LoraConfig(),
        )


# Rewards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"'bad' returned 1 rewards, but 8 were expected"),
        (0.5, r"'bad' returned 0.5 \(float\), not a list"),
        (["0.5"] * 8, r"'bad' returned '0.5' \(str\) for completion 0, which is not a number"),
    ],
    ids=["too few", "a number", "strings"],
)
def test_trainer_stops_with_a_clear_error_when_a_reward_is_malformed(
    tiny_model_dir: Path, tmp_path: Path, returned: object, message: str
) -> None:
    def bad(**_: Any) -> object:
        return returned

    trainer = ext_trainer(tiny_model_dir, tmp_path, rewards=[vowels, bad])
    with pytest.raises(RewardError, match=message):
        trainer.train()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_trainer_leaves_a_reward_that_is_not_finite_out_and_counts_it(
    tiny_model_dir: Path, tmp_path: Path, value: float
) -> None:
    def sometimes(*, completions: list[str], **_: Any) -> list[float]:
        return [value, *(float(i) for i in range(1, len(completions)))]

    trainer = ext_trainer(tiny_model_dir, tmp_path, rewards=[sometimes], max_steps=1)
    history, _ = train(trainer)
    assert series(history, "rewards/sometimes/non_finite") == [1.0]
    advantages = list(trainer._logs["advantages"])
    assert advantages[0] == 0.0
    # Of the group's other rewards 1, 2, 3: mean 2, deviation 1.
    assert advantages[1:4] == pytest.approx([-1 / 1.0001, 0.0, 1 / 1.0001], abs=1e-6)
    assert math.isfinite(series(history, "loss")[0])
    assert trainer.reward_funcs == [sometimes]


def test_trainer_takes_two_rewards_of_one_name(tiny_model_dir: Path, tmp_path: Path) -> None:
    rewards = [lambda **kwargs: vowels(**kwargs), lambda **kwargs: short(**kwargs)]
    history, _ = train(ext_trainer(tiny_model_dir, tmp_path, rewards=rewards))
    expected, _ = train(ext_trainer(tiny_model_dir, tmp_path, rewards=[vowels, short]))
    assert series(history, "reward") == series(expected, "reward")


def test_trainer_counts_no_bad_rewards_where_there_are_none(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    history, _ = train(ext_trainer(tiny_model_dir, tmp_path))
    assert series(history, "rewards/vowels/non_finite") == [0.0] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_trainer_takes_a_reward_model_and_leaves_its_overflows_out(
    tiny_model_dir: Path, tmp_path: Path, value: float
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    calls = []

    def spoil(_: Any, __: Any, output: Any) -> None:
        calls.append(len(output.logits))
        output.logits[0, 0] = value

    model.register_forward_hook(spoil)
    trainer = ext_trainer(tiny_model_dir, tmp_path, rewards=[model, vowels], max_steps=1)
    history, _ = train(trainer)
    assert calls == [8]
    assert series(history, "rewards/tiny-llama/non_finite") == [1.0]
    assert math.isfinite(series(history, "loss")[0])
    assert all(math.isfinite(advantage) for advantage in trainer._logs["advantages"])
    assert any(trainer._logs["advantages"])


def test_trainer_awaits_asynchronous_rewards(tiny_model_dir: Path, tmp_path: Path) -> None:
    async def later(*, completions: list[str], **_: Any) -> list[float]:
        return vowels(completions=completions)

    asynchronous, _ = train(ext_trainer(tiny_model_dir, tmp_path, rewards=[later]))
    plain, _ = train(ext_trainer(tiny_model_dir, tmp_path, rewards=[vowels]))
    assert series(asynchronous, "reward") == series(plain, "reward")


# The rest of the drop-in ----------------------------------------------------------------------


def test_trainer_logs_seconds_a_phase(tiny_model_dir: Path, tmp_path: Path) -> None:
    def slow(*, completions: list[str], **_: Any) -> list[float]:
        time.sleep(1.0)
        return vowels(completions=completions)

    history, _ = train(ext_trainer(tiny_model_dir, tmp_path, rewards=[slow]))
    phases = {
        phase: series(history, f"time/{phase}")
        for phase in ("generation", "rewards", "logprobs", "update")
    }
    assert all(len(seconds) == 3 for seconds in phases.values())
    assert all(seconds >= 1.0 for seconds in phases["rewards"])
    for step_time, *parts in zip(series(history, "step_time"), *phases.values(), strict=True):
        assert sum(parts) == pytest.approx(step_time, rel=0.2)


def test_trainer_logs_no_seconds_of_generation_where_a_step_reuses_completions(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = {"num_iterations": 2, "steps_per_generation": 1, "max_steps": 4}
    history, _ = train(ext_trainer(tiny_model_dir, tmp_path, **changes))
    generated = [seconds > 0 for seconds in series(history, "time/generation")]
    assert generated == [True, False, True, False]


def test_trainer_evaluates_also_with_one_completion_a_prompt(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = ExtGRPOTrainer(
        str(tiny_model_dir),
        [vowels],
        ExtGRPOConfig(**settings(tmp_path, num_generations_eval=1, per_device_eval_batch_size=4)),
        PROMPTS,
        eval_dataset=PROMPTS,
    )
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_reward"])
    assert set(trainer._logs["advantages"]) == {0.0}


def test_trainer_evaluates_several_sets_and_streams_a_training_set(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = ExtGRPOTrainer(
        str(tiny_model_dir),
        [vowels],
        ExtGRPOConfig(**settings(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=2)),
        PROMPTS.to_iterable_dataset(),
        eval_dataset={"low": PROMPTS.select(range(4)), "high": PROMPTS.select(range(4, 8))},
    )
    history, _ = train(trainer)
    for name in ("loss", "reward"):
        low, high = (series(history, f"eval_{which}_{name}") for which in ("low", "high"))
        assert len(low) == len(high) == 1
        assert math.isfinite(low[0] + high[0])
    assert series(history, "eval_reward") == []  # of which set it would be nobody could tell


def test_trainer_calls_callbacks_and_trains_an_adapter(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    class Steps(TrainerCallback):
        count = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.count += 1

    steps = Steps()
    trainer = ExtGRPOTrainer(
        model=str(tiny_model_dir),
        reward_funcs=vowels,
        args=ExtGRPOConfig(**settings(tmp_path, kl_clamp=10.0)),
        train_dataset=PROMPTS,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
        callbacks=[steps],
    )
    history, _ = train(trainer)
    assert steps.count == 3
    assert trainer.ref_model is None
    assert series(history, "kl")[-1] > 0


@pytest.mark.parametrize("ours_first", [True, False])
def test_checkpoints_cross_over_between_trl_and_ours(
    tiny_model_dir: Path, tmp_path: Path, ours_first: bool
) -> None:
    first, second = (ext_trainer, trl_trainer) if ours_first else (trl_trainer, ext_trainer)
    first(tiny_model_dir, tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    resumed = second(tiny_model_dir, tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 3
    assert series(resumed.state.log_history, "step")[-1] == 3
    assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() > 0
    assert second(checkpoint, tmp_path).model.num_parameters() > 0


def test_trainer_checks_settings_before_a_model_loads(tmp_path: Path) -> None:
    config = ExtGRPOConfig(**settings(tmp_path))
    config.kl_estimator = "k4"
    with pytest.raises(ConfigurationError, match="`kl_estimator` is 'k4'"):
        ExtGRPOTrainer("a-model-that-must-not-be-loaded", vowels, config, PROMPTS)


def test_trainer_refuses_a_reference_for_a_policy_that_is_loaded_quantized(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="the policy is loaded quantized"):
        ExtGRPOTrainer(
            "a-model-that-must-not-be-loaded",
            vowels,
            ExtGRPOConfig(**settings(tmp_path, reference="quantized")),
            PROMPTS,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        )


def test_trainer_has_the_constructor_of_trl() -> None:
    *parameters, added = inspect.signature(ExtGRPOTrainer).parameters.values()
    assert parameters == list(inspect.signature(GRPOTrainer).parameters.values())
    assert (added.name, added.kind, added.default) == (
        "compute_metrics",
        inspect.Parameter.KEYWORD_ONLY,
        None,
    )
