"""Sampler and shared prefixes inside the trainer: plain TRL's numbers, from fewer tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from runs import series, settings, train, vowels
from sampling.tapes import record_tapes
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext._trl.logprobs import _shuffle_groups
from trl_grpo_ext.errors import ConfigurationError, SharedPrefixError
from trl_grpo_ext.logprobs import PackedGroups

PROMPTS = Dataset.from_dict(
    {"prompt": [f"{s}{i}" for i in range(3) for s in ("1 + ", "what is 23 + ", "", "abc " * 5)]}
)


OPTIONS = {
    "per_device_train_batch_size": 12,
    "learning_rate": 0.05,
    "optim": "sgd",
    "max_grad_norm": 1e9,
    "beta": 0.1,
}


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions of 1 to 8 tokens; each depends on the prompt and its place in the batch only."""
    rows = []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(sum(map(ord, prompt)) * 10 + index % 4)
        length = 1 + int(torch.randint(8, (), generator=generator))
        rows.append(torch.randint(4, 60, (length,), generator=generator).tolist())
        if index % 2:
            rows[-1][-1] = trainer.processing_class.eos_token_id
    ids = [trainer.processing_class(prompt).input_ids for prompt in prompts]
    return {"prompt_ids": ids, "completion_ids": rows, "logprobs": None}


def trainer_of(cls: Any, config: Any, model: Any, tmp_path: Path, **changes: Any) -> Any:
    of_trainer = {k: changes.pop(k) for k in ("rollout_func", "peft_config") if k in changes}
    return cls(
        str(model) if isinstance(model, Path) else model,
        vowels,
        config(**settings(tmp_path, **(OPTIONS | changes))),
        PROMPTS,
        **of_trainer,
    )


def ours(model: Any, tmp_path: Path, **changes: Any) -> Any:
    return trainer_of(ExtGRPOTrainer, ExtGRPOConfig, model, tmp_path, **changes)


def theirs(model: Any, tmp_path: Path, **changes: Any) -> Any:
    return trainer_of(GRPOTrainer, GRPOConfig, model, tmp_path, **changes)


def count_packed_passes(model: Any, *, with_gradient: bool) -> list[int]:
    """A list that gets an entry for each packed pass of a model."""
    passes: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        packed = isinstance(kwargs.get("shared_prefix"), PackedGroups)
        if packed and torch.is_grad_enabled() is with_gradient:
            passes.append(1)

    model.register_forward_pre_hook(note, with_kwargs=True)
    return passes


@pytest.fixture
def warnings_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What this package and transformers log at warning level."""
    loggers = [logging.getLogger(name) for name in ("transformers", "trl_grpo_ext")]
    before = [logger.propagate for logger in loggers]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    yield caplog
    for logger, propagate, level in zip(loggers, before, levels, strict=True):
        logger.propagate = propagate
        logger.setLevel(level)


# Shared prefixes: the numbers of plain TRL ----------------------------------------------------

LORA = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss_type": "grpo", "gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 6},
        {"gradient_accumulation_steps": 6, "per_device_train_batch_size": 2},
        {"num_iterations": 2},
        {"gradient_checkpointing": True},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        {"mask_truncated_completions": True},
        {"temperature": 0.7, "top_entropy_quantile": 0.5},
        {"kl_clamp": 1000.0},
        {"entropy_coef": 0.1},
        {"entropy_coef": 0.1, "onednn_linear": False},
        {"peft_config": LORA},
        {"peft_config": LORA, "num_iterations": 2, "gradient_checkpointing": True},
    ],
    ids=[
        "defaults",
        "accumulation",
        "groups-cut-in-two",
        "half-groups",
        "two-iterations",
        "checkpointing",
        "reentrant-checkpointing",
        "masked-truncated",
        "entropy-quantile",
        "own-kl",
        "entropy-bonus",
        "fused-head",
        "peft",
        "peft-two-iterations",
    ],
)
@pytest.mark.filterwarnings("ignore:You are importing from 'rollout_func'")
def test_shared_prefix_gives_the_numbers_of_trl_for_given_completions(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    changes = {"rollout_func": rollout, **changes}
    found, weights = train(ours(tiny_model_dir, tmp_path, shared_prefix="always", **changes))
    for name in ("kl_clamp", "onednn_linear"):
        changes.pop(name, None)
    expected, their_weights = train(theirs(tiny_model_dir, tmp_path, **changes))
    keys = ["loss", "grad_norm", "reward"]
    if "gradient_accumulation_steps" not in changes:  # these are means of micro-batches' means
        keys += ["kl", "entropy", "clip_ratio/region_mean"]
    for key in keys:
        assert series(found, key) == pytest.approx(series(expected, key), rel=1e-4, abs=1e-6), key
    assert max(map(abs, series(expected, "kl"))) > 1e-3
    assert weights.keys() == their_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, their_weights[name], atol=2e-6, rtol=1e-5)


def test_shared_prefix_computes_each_prompt_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = ours(tiny_model_dir, tmp_path, max_steps=1, verify_shared_prefix=False)
    rows: list[tuple[int, ...]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        if isinstance(kwargs.get("shared_prefix"), PackedGroups):
            rows.append(tuple(kwargs["input_ids"].shape))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    (batch,) = trainer._buffered_inputs
    prompts = {
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    }
    assert len(prompts) == 3
    # The last token of a completion predicts nothing.
    num_tokens = sum(map(len, prompts)) + int(batch["completion_mask"].sum()) - 12
    assert rows == [(1, num_tokens)]  # the policy; the reference is another model


def test_micro_batches_hold_whole_groups(tiny_model_dir: Path, tmp_path: Path) -> None:
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    trainer = ours(tiny_model_dir, tmp_path, max_steps=1, **changes)
    trainer.train()
    for batch in trainer._buffered_inputs:
        assert len({tuple(row) for row in batch["prompt_ids"].tolist()}) == 1
    firsts = [tuple(batch["prompt_ids"][0].tolist()) for batch in trainer._buffered_inputs]
    assert len(set(firsts)) == 3


# Shared prefixes: where they are not exact ----------------------------------------------------


def tiny_mixture(tokenizer: Any, **changes: Any) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )
    return Qwen3MoeForCausalLM(config).float()


@pytest.mark.parametrize(("coefficient", "shared"), [(0.001, False), (0.0, True)])
@pytest.mark.parametrize("in_the_config", [False, True])
def test_a_mixture_with_an_auxiliary_loss_takes_padded_rows(
    tiny_tokenizer: Any,
    tmp_path: Path,
    warnings_logged: pytest.LogCaptureFixture,
    coefficient: float,
    shared: bool,
    in_the_config: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    folder = tmp_path / "mixture"
    mixture = tiny_mixture(
        tiny_tokenizer, router_aux_loss_coef=coefficient, output_router_logits=in_the_config
    )
    mixture.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    options = {"router_aux_loss_coef": coefficient}
    changes = {"max_steps": 2, "rollout_func": rollout, **options}
    trainer = ours(folder, tmp_path, verify_shared_prefix=False, **changes)
    packed = count_packed_passes(trainer.model, with_gradient=True)
    found, _ = train(trainer)
    expected, _ = train(theirs(folder, tmp_path, **changes))
    told = [r.message for r in warnings_logged.records if "padded path" in r.message]
    assert len(told) == (0 if shared else 1)
    assert shared or "router_aux_loss_coef: 0" in told[0]
    assert len(packed) == (2 if shared else 0)
    for key in ("loss", "kl", "grad_norm"):
        assert series(found, key) == pytest.approx(series(expected, key), rel=1e-4, abs=1e-6), key


def test_dropout_takes_padded_rows_and_says_so_once(
    tiny_model_dir: Path, tmp_path: Path, warnings_logged: pytest.LogCaptureFixture
) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
    ours(tiny_model_dir, tmp_path, peft_config=lora).train()
    told = [r.message for r in warnings_logged.records if "padded path" in r.message]
    assert len(told) == 1
    assert "it has dropout" in told[0]


def test_shared_prefix_always_is_an_error_where_it_is_not_exact(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
    with pytest.raises(SharedPrefixError, match=r"it has dropout .* Set `shared_prefix: auto`"):
        ours(tiny_model_dir, tmp_path, peft_config=lora, shared_prefix="always").train()


def test_the_first_batch_finds_a_model_whose_attention_is_another(
    tiny_model_dir: Path, tmp_path: Path, warnings_logged: pytest.LogCaptureFixture
) -> None:
    # A layer that looks at the place in the batch, as attention of an unknown kind might.
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    layer = model.model.layers[0].mlp
    layer.register_forward_hook(lambda _, __, out: out + 0.1 * torch.arange(out.shape[1])[:, None])
    trainer = ExtGRPOTrainer(model, vowels, ExtGRPOConfig(**settings(tmp_path, **OPTIONS)), PROMPTS)
    trainer.train()
    told = [r.message for r in warnings_logged.records if "padded path" in r.message]
    assert len(told) == 1
    assert "log-probabilities differ" in told[0]


def test_the_first_batch_finds_a_device_that_cannot_compute_it(
    tiny_model_dir: Path, tmp_path: Path, warnings_logged: pytest.LogCaptureFixture
) -> None:
    # A layer that takes whole batches only, as a kernel of an unknown device might.
    def no_row_alone(_: Any, inputs: Any) -> None:
        if len(inputs[0]) == 1:
            raise RuntimeError("no kernel for 1 row")

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model.model.layers[0].mlp.register_forward_pre_hook(no_row_alone)
    changes = {**OPTIONS, "group_sampler": "transformers", "beta": 0.0}
    config = ExtGRPOConfig(**settings(tmp_path, **changes))
    ExtGRPOTrainer(model, vowels, config, PROMPTS).train()
    (told,) = [r.message for r in warnings_logged.records if "padded path" in r.message]
    assert "its first batch failed so (RuntimeError: no kernel for 1 row)" in told


def test_the_check_waits_for_a_batch_with_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    # No completion ends, so each is masked out, and there is nothing to compare.
    changes = {"mask_truncated_completions": True, "max_steps": 1, "beta": 0.0}
    trainer = ours(tiny_model_dir, tmp_path, generation_kwargs={"suppress_tokens": [2]}, **changes)
    trainer.train()
    assert trainer.shared_prefix.needs_check(trainer.model)
    trainer = ours(tiny_model_dir, tmp_path, max_steps=1, beta=0.0)
    trainer.train()
    assert not trainer.shared_prefix.needs_check(trainer.model)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_an_adapter_with_virtual_tokens_takes_the_paths_of_trl(
    tiny_model_dir: Path, tmp_path: Path, warnings_logged: pytest.LogCaptureFixture
) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = ours(tiny_model_dir, tmp_path, peft_config=prompt, max_steps=1)
    assert trainer.group_sampler == "transformers"
    trainer.train()
    told = [r.message for r in warnings_logged.records if "padded path" in r.message]
    assert len(told) == 1
    assert "virtual tokens" in told[0]


def test_a_model_that_keeps_its_attention_to_itself_takes_padded_rows(
    tiny_tokenizer: Any, tmp_path: Path, warnings_logged: pytest.LogCaptureFixture
) -> None:
    config = StableLmConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    StableLmForCausalLM(config).float().save_pretrained(tmp_path / "stable")
    tiny_tokenizer.save_pretrained(tmp_path / "stable")
    ours(tmp_path / "stable", tmp_path).train()
    told = [r.message for r in warnings_logged.records if "padded path" in r.message]
    assert len(told) == 1
    assert "does not hand `shared_prefix` on" in told[0]
    with pytest.raises(SharedPrefixError, match="does not hand `shared_prefix` on"):
        ours(tmp_path / "stable", tmp_path, shared_prefix="always").train()


# Old log-probabilities ------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_old_logprobs_come_from_the_sampler(
    tiny_model_dir: Path, tmp_path: Path, masked: bool
) -> None:
    changes = {"num_iterations": 2, "max_steps": 4, "verify_shared_prefix": False, "beta": 0.0}
    changes |= {"mask_truncated_completions": masked, "temperature": 0.9, "top_k": 20}
    kept = ours(tiny_model_dir, tmp_path, **changes)
    recomputed = ours(tiny_model_dir, tmp_path, old_logprobs="recompute", **changes)
    passes = [count_packed_passes(t.model, with_gradient=False) for t in (kept, recomputed)]
    kept.train()
    recomputed.train()
    assert [len(found) for found in passes] == [0, 2]  # one for each generation
    for key in ("loss", "grad_norm", "clip_ratio/region_mean"):
        found, expected = (series(t.state.log_history, key) for t in (kept, recomputed))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for batches in zip(kept._buffered_inputs, recomputed._buffered_inputs, strict=True):
        left, right = (batch["old_per_token_logps"] for batch in batches)
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_old_logprobs_come_from_the_sampler_when_a_generation_feeds_several_steps(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = {"steps_per_generation": 3, "per_device_train_batch_size": 4, "max_steps": 3}
    changes |= {"verify_shared_prefix": False, "beta": 0.0}
    found = []
    for source, recomputes in (("sampler", False), ("recompute", True)):
        trainer = ours(tiny_model_dir, tmp_path, old_logprobs=source, **changes)
        passes = count_packed_passes(trainer.model, with_gradient=False)
        trainer.train()
        assert bool(passes) is recomputes
        batches = trainer._buffered_inputs  # groups are shuffled into them
        rows = [row for batch in batches for row in batch["completion_ids"].tolist()]
        logprobs = [row for batch in batches for row in batch["old_per_token_logps"].tolist()]
        found.append([row for _, row in sorted(zip(rows, logprobs, strict=True))])
    assert len(found[0]) == 12
    torch.testing.assert_close(*map(torch.tensor, found), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("verify", [True, False])
def test_a_model_that_keeps_the_prefix_to_itself(
    verify: bool,
    tiny_model_dir: Path,
    tmp_path: Path,
    warnings_logged: pytest.LogCaptureFixture,
) -> None:
    config = FalconConfig(
        vocab_size=AutoConfig.from_pretrained(tiny_model_dir).vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    folder = tmp_path / "falcon"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        FalconForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    trainer = ours(folder, tmp_path, verify_shared_prefix=verify, max_steps=1)
    if verify:
        trainer.train()
        assert "does not hand `shared_prefix` on to its attention" in warnings_logged.text
    else:
        with pytest.raises(SharedPrefixError, match="FalconForCausalLM does not hand"):
            trainer.train()


def recomputed(records: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in records.records if "old policy are recomputed" in r.message]


def first_loss(trainer: Any) -> float:
    history, _ = train(trainer)
    return float(series(history, "loss")[0])


def test_old_logprobs_are_recomputed_where_positions_count_padding(
    tiny_model_dir: Path, tmp_path: Path, warnings_logged: pytest.LogCaptureFixture
) -> None:
    config = GPT2Config(
        vocab_size=AutoConfig.from_pretrained(tiny_model_dir).vocab_size,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    folder = tmp_path / "gpt2"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    changes = {"num_iterations": 2, "beta": 0.0, "max_steps": 2}
    expected = first_loss(ours(folder, tmp_path, old_logprobs="recompute", **changes))
    assert first_loss(ours(folder, tmp_path, **changes)) == pytest.approx(expected, abs=1e-6)
    (told,) = recomputed(warnings_logged)
    assert "positions are not rotary, and may count padding" in told


def test_old_logprobs_are_recomputed_where_the_first_batch_disagrees(
    tiny_model_dir: Path, tmp_path: Path, warnings_logged: pytest.LogCaptureFixture
) -> None:
    changes = {"num_iterations": 2, "beta": 0.0, "max_steps": 2}
    expected = first_loss(ours(tiny_model_dir, tmp_path, old_logprobs="recompute", **changes))
    trainer = ours(tiny_model_dir, tmp_path, **changes)
    sample = trainer.sample_completions

    def wrong(*args: Any, **kwargs: Any) -> Any:
        completions = sample(*args, **kwargs)
        for completion in completions:
            completion.policy_logprobs = [value - 0.5 for value in completion.policy_logprobs]
        return completions

    trainer.sample_completions = wrong
    assert first_loss(trainer) == pytest.approx(expected, abs=1e-6)
    (told,) = recomputed(warnings_logged)
    assert "the sampler's differ by 0.5 nats on the first batch" in told


@pytest.mark.parametrize("asked", ["sampler", "recompute"])
def test_an_engine_that_keeps_no_logprobs_is_told(
    asked: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    warnings_logged: pytest.LogCaptureFixture,
) -> None:
    changes = {"group_sampler": "transformers", "num_iterations": 2, "max_steps": 4}
    ours(tiny_model_dir, tmp_path, old_logprobs=asked, **changes).train()
    assert len(recomputed(warnings_logged)) == (asked == "sampler")


@pytest.mark.parametrize(
    ("group_size", "micro_batch_size", "num_rows", "unit"),
    [(8, 8, 16, 8), (8, 4, 16, 4), (4, 8, 16, 4), (8, 12, 24, 8), (5, 4, 20, 5), (8, 12, 12, 4)],
)
def test_groups_are_shuffled_as_whole_as_can_be(
    group_size: int, micro_batch_size: int, num_rows: int, unit: int
) -> None:
    batch = {"advantages": torch.arange(num_rows), "loss": torch.tensor(1.0), "none": None}
    sizes = {"group_size": group_size, "micro_batch_size": micro_batch_size}
    orders = set()
    for seed in range(5):
        torch.manual_seed(seed)
        rows = _shuffle_groups(batch, **sizes)["advantages"]
        assert sorted(rows.tolist()) == list(range(num_rows))
        pieces = rows.view(-1, unit)
        assert torch.equal(pieces, pieces[:, :1] + torch.arange(unit))
        assert torch.equal(pieces[:, 0] % unit, torch.zeros(len(pieces), dtype=torch.int64))
        orders.add(tuple(rows.tolist()))
    assert len(orders) > 1


def test_reference_computes_each_prompt_once_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = ours(tiny_model_dir, tmp_path, max_steps=2, verify_shared_prefix=False)
    passes = count_packed_passes(trainer.ref_model, with_gradient=False)
    trainer.train()
    assert len(passes) == 2  # one for each generation


@pytest.mark.parametrize(("num_tokens", "shows"), [(255, False), (256, True)])
def test_long_generations_show_their_progress(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    num_tokens: int,
    shows: bool,
) -> None:
    changes = {"max_completion_length": num_tokens, "disable_tqdm": False, "max_steps": 1}
    ours(tiny_model_dir, tmp_path, **changes).train()
    assert ("sampling:" in capsys.readouterr().err) is shows


def test_old_logprobs_of_the_reference_adapter_are_not_the_samplers(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    # Under PEFT the reference is the policy with its adapter off: also a pass of the same model.
    changes = {"peft_config": LORA, "learning_rate": 0.5, "max_steps": 2}
    history, _ = train(ours(tiny_model_dir, tmp_path, **changes))
    again, _ = train(ours(tiny_model_dir, tmp_path, old_logprobs="recompute", **changes))
    assert series(history, "kl") == pytest.approx(series(again, "kl"), rel=1e-4)
    assert series(history, "kl")[1] > 1e-5


def test_old_logprobs_are_recomputed_under_dropout(
    tiny_model_dir: Path, tmp_path: Path, warnings_logged: pytest.LogCaptureFixture
) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
    ours(tiny_model_dir, tmp_path, peft_config=lora, num_iterations=2).train()
    told = [r.message for r in warnings_logged.records if "old policy are recomputed" in r.message]
    assert len(told) == 1
    assert "dropout" in told[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"generation_kwargs": {"temperature": 0.5}}, "another temperature"),
        ({"generation_kwargs": {"do_sample": False}}, "another temperature"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "half precision"),
    ],
)
def test_old_logprobs_are_recomputed_where_the_samplers_are_others(
    tiny_model_dir: Path,
    tmp_path: Path,
    warnings_logged: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    reason: str,
) -> None:
    trainer = ours(tiny_model_dir, tmp_path, num_iterations=2, beta=0.0, max_steps=2, **changes)
    trainer.train()
    told = [r.message for r in warnings_logged.records if "old policy are recomputed" in r.message]
    assert len(told) == 1
    assert reason in told[0]


def test_old_logprobs_are_not_the_samplers_if_a_rollout_changed_the_completions(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def cut(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [trainer.processing_class(prompt).input_ids for prompt in prompts]
        completions, _ = trainer._generate_single_turn(ids, None, {}, 4)
        return {
            "prompt_ids": ids,
            "completion_ids": [row[: 1 + len(row) // 2] for row in completions],
            "logprobs": None,
        }

    changes = {"num_iterations": 2, "max_steps": 2, "beta": 0.0, "rollout_func": cut}
    found, _ = train(ours(tiny_model_dir, tmp_path, **changes))
    expected, _ = train(ours(tiny_model_dir, tmp_path, old_logprobs="recompute", **changes))
    for key in ("loss", "grad_norm"):
        assert series(found, key) == series(expected, key)


# The sampler ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        {"max_live_tokens": 40},
    ],
    ids=["micro-batches", "waves"],
)
def test_completions_do_not_depend_on_how_the_batch_is_cut(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = ours(tiny_model_dir, tmp_path, max_steps=3, learning_rate=0.0)
    cut = ours(tiny_model_dir, tmp_path, max_steps=3, learning_rate=0.0, **changes)
    whole.train()
    cut.train()
    assert list(whole._logs["prompt"]) == list(cut._logs["prompt"])
    assert list(whole._logs["completion"]) == list(cut._logs["completion"])
    assert len(set(whole._logs["completion"])) > 6


@pytest.mark.parametrize(
    "changes",
    [{}, {"bf16": True}, {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4)}],
    ids=["float32", "autocast", "LoRA"],
)
def test_a_training_with_repeated_steps_is_the_same(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    tapes = record_tapes(monkeypatch)
    changes = {"max_steps": 2, "learning_rate": 1e-3, **changes}
    expected, _ = train(ours(tiny_model_dir, tmp_path, cuda_graphs=False, **changes))
    assert tapes == []
    found, _ = train(ours(tiny_model_dir, tmp_path, **changes))
    assert sum(tapes) > len(tapes) > 1
    for key in ("loss", "grad_norm", "completions/mean_length"):
        assert series(found, key) == pytest.approx(series(expected, key), rel=1e-3)


def test_each_generation_draws_other_numbers(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = ours(tiny_model_dir, tmp_path, learning_rate=0.0, max_steps=2)
    trainer.train_dataset = Dataset.from_dict({"prompt": ["1 + 1 ="] * 6})
    trainer.train()
    rewards = series(trainer.state.log_history, "reward")
    lengths = series(trainer.state.log_history, "completions/mean_length")
    assert rewards[0] != rewards[1] or lengths[0] != lengths[1]


def test_generations_within_an_optimizer_step_draw_other_numbers(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    # Two generations a step: each is of one micro-batch, with the same prompt.
    changes = {"gradient_accumulation_steps": 2, "steps_per_generation": 1}
    changes |= {"per_device_train_batch_size": 4, "learning_rate": 0.0}
    seen: list[str] = []

    def keep(*, completions: list[str], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    config = ExtGRPOConfig(**settings(tmp_path, **(OPTIONS | {"max_steps": 2} | changes)))
    prompts = Dataset.from_dict({"prompt": ["1 + 1 ="] * 6})
    ExtGRPOTrainer(str(tiny_model_dir), keep, config, prompts).train()
    assert len(seen) == 16
    assert len(set(seen)) == 16


def test_evaluations_of_the_same_weights_are_equal(tiny_model_dir: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def keep(*, completions: list[str], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    config = ExtGRPOConfig(**settings(tmp_path, **OPTIONS, per_device_eval_batch_size=8))
    trainer = ExtGRPOTrainer(str(tiny_model_dir), keep, config, PROMPTS)
    prompts = Dataset.from_dict({"prompt": ["1 + 1 ="] * 6})  # three batches of two
    trainer.evaluate(prompts)
    first = list(seen)
    seen.clear()
    trainer.evaluate(prompts)
    assert seen == first
    assert len(first) == 24
    assert len(set(first)) > 20  # no batch draws the numbers of another


def test_generation_options_are_honoured(tiny_model_dir: Path, tmp_path: Path) -> None:
    exact = {"min_new_tokens": 8, "suppress_tokens": [5, 6]}
    trainer = ours(tiny_model_dir, tmp_path, generation_kwargs=exact, max_steps=1)
    assert trainer.group_sampler == "shared_prefill"
    trainer.train()
    ids = trainer._buffered_inputs[0]["completion_ids"]
    assert ids.shape == (12, 8)
    assert not torch.isin(ids, torch.tensor([5, 6])).any()


def test_a_generation_option_of_another_kind_leaves_the_sampling_to_trl(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = ours(tiny_model_dir, tmp_path, generation_kwargs={"num_beams": 2}, max_steps=1)
    assert trainer.group_sampler == "transformers"
    trainer.train()
    assert len(trainer._logs["completion"]) == 12
    with pytest.raises(ConfigurationError, match=r"`num_beams`.*Remove `max_live_tokens`"):
        ours(tiny_model_dir, tmp_path, generation_kwargs={"num_beams": 2}, max_live_tokens=99)


def test_an_engine_that_cannot_serve_the_run_is_refused(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = {"group_sampler": "shared_prefill", "cache_implementation": "static"}
    with pytest.raises(ConfigurationError, match=r"`cache_implementation`.*group_sampler: auto"):
        ours(tiny_model_dir, tmp_path, **changes)


def test_a_prompt_longer_than_the_positions_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = ours(tiny_model_dir, tmp_path, max_steps=1)
    trainer.train_dataset = Dataset.from_dict({"prompt": ["1" * 600] * 3})
    with pytest.raises(ValueError, match=r"has 600 tokens, .* 512 positions"):
        trainer.train()


def test_continuous_batching_samples_in_the_trainer(tiny_model_dir: Path, tmp_path: Path) -> None:
    changes = {"group_sampler": "continuous_batching", "num_iterations": 2, "max_steps": 2}
    trainer = ours(tiny_model_dir, tmp_path, **changes)
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    trainer.train()
    assert len(set(trainer._logs["completion"])) > 6
    assert {parameter.dtype for parameter in trainer.model.parameters()} == dtypes
    assert trainer.model.config._attn_implementation == "sdpa"
