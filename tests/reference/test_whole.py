"""Policies without their weights, and with all of them; for two processes see test_sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference import whole
from trl_grpo_ext.reference.whole import (
    aligned,
    blueprint,
    gathered,
    is_partitioned,
    near,
    split_again,
    unsplit,
    whole_policy,
    whole_shape,
)

IDS = torch.arange(6)[None]


def tied() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).eval()


def test_a_blueprint_has_shapes_and_no_weights() -> None:
    policy = tied()
    policy.model.layers[0].requires_grad_(False)
    policy.forward = None  # type: ignore[method-assign,assignment]
    plan = blueprint(policy)
    assert "forward" not in vars(plan)
    assert plan.lm_head.weight is plan.model.embed_tokens.weight
    for (name, parameter), (other, drawn) in zip(
        policy.named_parameters(), plan.named_parameters(), strict=True
    ):
        assert (name, parameter.shape, parameter.dtype) == (other, drawn.shape, drawn.dtype)
        assert drawn.is_meta
        assert drawn.requires_grad == parameter.requires_grad
    assert not any(buffer.is_meta for buffer in plan.buffers())


def test_a_whole_policy_has_the_weights_of_the_moment() -> None:
    policy = tied()
    plan = blueprint(policy)
    for _ in range(2):
        found = whole_policy(policy, plan)
        assert found.lm_head.weight is found.model.embed_tokens.weight
        assert torch.equal(found(IDS).logits, policy(IDS).logits)
        with torch.no_grad():
            policy.model.layers[1].mlp.up_proj.weight.mul_(2)
        assert not torch.equal(found(IDS).logits, policy(IDS).logits)
    assert all(parameter.is_meta for parameter in plan.parameters())


def test_a_copy_that_host_memory_has_no_room_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = tied()
    num_bytes = sum(parameter.nbytes for parameter in policy.parameters())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(whole, "available_host_bytes", lambda: 2 * num_bytes)
    whole_policy(policy, blueprint(policy))
    monkeypatch.setattr(whole, "available_host_bytes", lambda: 2 * num_bytes - 2)
    with pytest.raises(ReferenceModelError, match="each process gathers all"):
        whole_policy(policy, blueprint(policy))


def test_what_nothing_splits_is_its_own_part() -> None:
    policy, value = tied(), torch.ones(3)
    target = torch.zeros(3)
    assert aligned(target, value) == (target, value)
    assert gathered(target) is target
    assert whole_shape(target) == (3,)
    with unsplit(target, writes=True):
        target.add_(1)
    assert torch.equal(target, value)
    split_again(policy)
    assert not is_partitioned(policy)
    policy.lm_head.weight.ds_id = 0  # type: ignore[attr-defined]
    assert is_partitioned(policy)


@pytest.mark.parametrize(("share", "expected"), [(2.1, ["cuda", "cpu"]), (1.9, [])])
def test_a_policy_moves_to_a_device_that_has_room_for_it_twice(
    share: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, moves = tied(), []
    num_bytes = sum(parameter.nbytes for parameter in policy.parameters())
    monkeypatch.setattr(whole, "available_memory_bytes", lambda: int(share * num_bytes))

    def to(self: nn.Module, device: torch.device) -> Any:
        assert self is policy
        moves.append(device.type)

    monkeypatch.setattr(nn.Module, "to", to)
    with pytest.raises(KeyError), near(policy, torch.device("cuda")):
        raise KeyError
    assert moves == expected
    with near(policy, torch.device("cpu")):
        assert moves == expected
