"""Fidelity: slow loops over the tokens, the exact reference, and a policy that comes back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_grpo_ext.layerwise import decoder_layers
from trl_grpo_ext.reference import build_reference
from trl_grpo_ext.reference.completions import CompletionBatch, completion_batches
from trl_grpo_ext.reference.fidelity import KLPenalty, ReferenceFidelity, measure_fidelity

Batches = list[CompletionBatch]


def random_batches(*, seed: int = 0, count: int = 16, max_tokens: int = 80) -> Batches:
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> list[int]:
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    prompts, completions = zip(*((tokens(5), tokens(8)) for _ in range(count)), strict=True)
    return completion_batches(prompts, completions, max_tokens=max_tokens)


def perturbed(policy: PreTrainedModel, *, size: float = 0.02) -> PreTrainedModel:
    """A reference that is a little off: the policy with noise on every parameter."""
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in reference.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += size * noise.to(parameter.dtype)
    return reference


def seeded(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval()


def gpt2() -> PreTrainedModel:
    """It has dropout."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return seeded(GPT2LMHeadModel, config)


def gptj() -> PreTrainedModel:
    """Its layers return tuples."""
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}
    return seeded(GPTJForCausalLM, GPTJConfig(**sizes, initializer_range=0.2))


def qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return seeded(Qwen3MoeForCausalLM, config)


def last_layer(policy: PreTrainedModel) -> list[nn.Parameter]:
    return list(decoder_layers(policy)[-1].parameters())


def rows_of(batches: Batches) -> list[tuple[Tensor, int]]:
    """Token ids of each completion with its prompt, without padding, and its own length."""
    return [
        (ids[mask.bool()], int(mask[-batch.num_labels :].sum()))
        for batch in batches
        for ids, mask in zip(batch.input_ids_BW, batch.attention_mask_BW, strict=True)
    ]


def logprobs_of(model: nn.Module, ids: Tensor, length: int, temperature: float = 1.0) -> Tensor:
    """Of the whole vocabulary at each token of the completion: ``(T, V)``."""
    logits: Tensor = model(input_ids=ids[None]).logits[0, -length - 1 : -1]
    return (logits / temperature).log_softmax(dim=-1)


# The floor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_floors_are_those_of_a_slow_loop_over_the_tokens(
    tiny_model: LlamaForCausalLM, temperature: float
) -> None:
    batches, reference = random_batches(), perturbed(tiny_model)
    k1, k3, full, same = [], [], [], []
    with torch.no_grad():
        for ids, length in rows_of(batches):
            exact_TV = logprobs_of(tiny_model, ids, length, temperature).double()
            found_TV = logprobs_of(reference, ids, length, temperature).double()
            for token, exact_V, found_V in zip(ids[-length:], exact_TV, found_TV, strict=True):
                p, q = exact_V.exp(), found_V.exp()
                d = math.log(q[token] / p[token])
                k1.append(-d)
                k3.append(math.exp(d) - d - 1)
                full.append(float((p * (p / q).log()).sum()))
                same.append(int(p.argmax()) == int(q.argmax()))
    found = measure_fidelity(
        tiny_model, reference, batches, penalty=KLPenalty(temperature=temperature)
    )
    count = len(k1)
    assert found.num_tokens == count
    assert found.kl_k1 == pytest.approx(sum(k1) / count, rel=1e-3, abs=1e-5)
    assert found.kl_k3 == pytest.approx(sum(k3) / count, rel=1e-3)
    assert found.kl_full == pytest.approx(sum(full) / count, rel=1e-3)
    assert found.top_token_agreement == pytest.approx(sum(same) / count)
    assert 0 < found.top_token_agreement < 1  # so that it can fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_reference_has_no_floor_and_the_same_gradient(
    tiny_model: LlamaForCausalLM, dtype: torch.dtype
) -> None:
    policy = tiny_model.to(dtype)
    reference = build_reference(policy, kind="resident")
    found = measure_fidelity(policy, reference, random_batches())
    assert found.kl_k1 == found.kl_k3 == found.kl_full == 0
    assert found.top_token_agreement == 1
    assert found.gradient_cosine == pytest.approx(1, abs=1e-5)


def test_a_worse_reference_shows_in_every_value(tiny_model: LlamaForCausalLM) -> None:
    near, far = (
        measure_fidelity(tiny_model, perturbed(tiny_model, size=size), random_batches())
        for size in (0.003, 0.05)
    )
    assert 0 < near.kl_k3 < far.kl_k3
    assert 0 < near.kl_full < far.kl_full
    assert near.top_token_agreement > far.top_token_agreement
    assert 1 > near.gradient_cosine > far.gradient_cosine


def test_padding_does_not_matter(tiny_model: LlamaForCausalLM) -> None:
    reference = perturbed(tiny_model)
    padded = measure_fidelity(tiny_model, reference, random_batches(max_tokens=10_000))
    single = measure_fidelity(tiny_model, reference, random_batches(max_tokens=1))
    assert padded.num_tokens == single.num_tokens
    assert padded.metrics() == pytest.approx(single.metrics(), rel=1e-2, abs=1e-4)


def test_unlikely_padding_does_not_overflow(tiny_model: LlamaForCausalLM) -> None:
    """As cold as this, its log-probability is some -1000, and k3 would take the exponential."""
    reference = build_reference(tiny_model, kind="resident")
    penalty = KLPenalty(temperature=0.01)
    found = measure_fidelity(tiny_model, reference, random_batches(), penalty=penalty)
    assert found.gradient_cosine == pytest.approx(1, abs=1e-4)


def test_dropout_is_off() -> None:
    policy = gpt2()
    reference = build_reference(policy, kind="resident")
    found = measure_fidelity(policy.train(), reference, random_batches())
    assert found.kl_full < 1e-6
    assert found.gradient_cosine == pytest.approx(1, abs=1e-4)


# The gradient -------------------------------------------------------------------------------------


def slow_cosine(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    batches: Batches,
    parameters: Sequence[nn.Parameter],
    *,
    kl_target: float,
) -> float:
    """The same by whole forward passes of one completion at a time, k3, and halving an interval."""
    policy.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    rows = rows_of(batches)

    def drawn(model: nn.Module, row: tuple[Tensor, int]) -> Tensor:
        ids, length = row
        return logprobs_of(model, ids, length).gather(1, ids[-length:, None])[:, 0]

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)])

    def k3(logprobs: Tensor, ref: Tensor) -> Tensor:
        return (ref - logprobs).exp() - (ref - logprobs) - 1

    def pull(refs: list[Tensor]) -> Tensor:
        total = torch.zeros(())
        for row, ref in zip(rows, refs, strict=True):
            logprobs = drawn(policy, row)
            total = total + (k3(logprobs, ref) * (logprobs - logprobs.detach()).exp()).sum()
        return gradient(total)

    exact = [drawn(policy, row).detach() for row in rows]
    found = [drawn(reference, row).detach() for row in rows]
    # Within a batch, completions in turn get 1 and -1; which comes first changes with the batch.
    signs = [
        (-1.0) ** (index + row)
        for index, batch in enumerate(batches)
        for row in range(len(batch.input_ids_BW))
    ]
    push = sum(sign * drawn(policy, row).sum() for sign, row in zip(signs, rows, strict=True))
    direction, start = gradient(push), nn.utils.parameters_to_vector(parameters).detach()
    low, high = 0.0, 0.1 * float(start.norm() / direction.norm())
    for _ in range(20):
        middle = (low + high) / 2
        nn.utils.vector_to_parameters(start + middle * direction, parameters)
        with torch.no_grad():
            each = [k3(drawn(policy, row), ref) for row, ref in zip(rows, exact, strict=True)]
        below = float(torch.cat(each).mean()) < kl_target
        low, high = (middle, high) if below else (low, middle)
    assert high < 0.09 * float(start.norm() / direction.norm())  # it lay in the interval
    return float(torch.cosine_similarity(pull(exact), pull(found), dim=0))


def test_the_cosine_is_that_of_a_slow_computation(tiny_model: LlamaForCausalLM) -> None:
    batches, reference = random_batches(), perturbed(tiny_model, size=0.01)
    found = measure_fidelity(tiny_model, reference, batches, kl_target=0.01)
    expected = slow_cosine(tiny_model, reference, batches, last_layer(tiny_model), kl_target=0.01)
    assert found.gradient_cosine == pytest.approx(expected, abs=0.02)
    assert 0.1 < found.gradient_cosine < 0.97  # so that it can fail


@pytest.mark.parametrize("make_policy", [None, gpt2, gptj, qwen3_moe])
def test_going_from_the_last_layer_equals_the_whole_forward_pass(
    tiny_model: LlamaForCausalLM, make_policy: Callable[[], PreTrainedModel] | None
) -> None:
    policy = make_policy() if make_policy else tiny_model
    batches, reference = random_batches(), perturbed(policy)
    fast = measure_fidelity(policy, reference, batches)
    whole = measure_fidelity(policy, reference, batches, parameters=last_layer(policy))
    assert fast.gradient_cosine == pytest.approx(whole.gradient_cosine, abs=1e-3)


def test_gradients_are_of_the_parameters_that_were_asked_for(tiny_model: LlamaForCausalLM) -> None:
    batches, reference = random_batches(), perturbed(tiny_model)
    every, last = (
        measure_fidelity(tiny_model, reference, batches, parameters=chosen).gradient_cosine
        for chosen in (list(tiny_model.parameters()), last_layer(tiny_model))
    )
    assert abs(every - last) > 1e-3


@dataclass(frozen=True)
class NotedPenalty(KLPenalty):
    """Notes the k3 to the exact reference, which is measured first, at each call."""

    seen: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        d = (ref_logprobs_BT - logprobs_BT.detach()) * mask_BT
        self.seen.append((float((d.exp() - d - 1).sum()), float(mask_BT.sum())))
        return super().__call__(logprobs_BT, ref_logprobs_BT, mask_BT)


@pytest.mark.parametrize("kl_target", [1e-4, 0.01, 0.5])
def test_gradients_are_taken_at_the_target(tiny_model: LlamaForCausalLM, kl_target: float) -> None:
    batches, penalty = random_batches(), NotedPenalty()
    reference = build_reference(tiny_model, kind="resident")
    found = measure_fidelity(tiny_model, reference, batches, penalty=penalty, kl_target=kl_target)
    assert found.kl_target == kl_target
    totals = penalty.seen[: len(batches)]
    kl = sum(k3 for k3, _ in totals) / sum(count for _, count in totals)
    assert kl == pytest.approx(kl_target, rel=0.11)


def test_a_step_that_the_dtype_swallows_is_made_larger(tiny_model: LlamaForCausalLM) -> None:
    """In bfloat16, most of a step of a hundredth of the weights is rounded away."""
    policy = tiny_model.bfloat16()
    found = measure_fidelity(policy, perturbed(policy), random_batches(), kl_target=0.3)
    assert math.isfinite(found.gradient_cosine)


# The penalty --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "value", "grad"),
    [
        # d = log pi_ref - log pi = (-1, 0.5); the mean of two tokens, the third is padding.
        (KLPenalty("k1", bias_correction=False), (1 - 0.5) / 2, (0.5, 0.5)),
        (KLPenalty("k1"), (1 - 0.5) / 2, ((1 + 1) / 2, (1 - 0.5) / 2)),
        (KLPenalty("k2", bias_correction=False), (0.5 + 0.125) / 2, (1 / 2, -0.5 / 2)),
        (
            KLPenalty("k3", bias_correction=False),
            (math.exp(-1) + 1 - 1 + math.exp(0.5) - 0.5 - 1) / 2,
            ((1 - math.exp(-1)) / 2, (1 - math.exp(0.5)) / 2),
        ),
        (  # the gradient of the value, and the value times that of the ratio: 1 - e^d + e^d - d - 1
            KLPenalty(),
            (math.exp(-1) + 1 - 1 + math.exp(0.5) - 0.5 - 1) / 2,
            (1 / 2, -0.5 / 2),
        ),
        (KLPenalty("k1", clamp=0.75, bias_correction=False), (0.75 - 0.5) / 2, (0.0, 0.5)),
    ],
)
def test_the_penalty_and_its_gradient_by_hand(
    penalty: KLPenalty, value: float, grad: tuple[float, float]
) -> None:
    logprobs = torch.tensor([[-1.0, -2.0, 0.0]], requires_grad=True)
    ref_logprobs, mask = torch.tensor([[-2.0, -1.5, -7.0]]), torch.tensor([[1, 1, 0]])
    found = penalty(logprobs, ref_logprobs, mask)
    torch.autograd.backward(found)
    assert found.item() == pytest.approx(value)
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([*grad, 0.0])


@pytest.mark.parametrize(
    "penalty",
    [
        KLPenalty("k1"),
        KLPenalty("k2", bias_correction=False),
        KLPenalty(clamp=10.0),
        KLPenalty(temperature=0.7),
    ],
)
def test_the_cosine_is_that_of_the_penalty_of_the_run(
    tiny_model: LlamaForCausalLM, penalty: KLPenalty
) -> None:
    batches = random_batches()
    exact = build_reference(tiny_model, kind="resident")
    same = measure_fidelity(tiny_model, exact, batches, penalty=penalty)
    assert same.gradient_cosine == pytest.approx(1, abs=1e-5)
    off = measure_fidelity(tiny_model, perturbed(tiny_model), batches, penalty=penalty)
    assert -1 <= off.gradient_cosine < 0.99


# What it leaves behind ----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k3", "unknown"])
@pytest.mark.parametrize("every", [True, False])
def test_the_policy_comes_back_bit_for_bit(
    tiny_model: LlamaForCausalLM, estimator: Any, *, every: bool
) -> None:
    """An unknown estimator fails when the policy is a step away."""
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    tiny_model.model.norm.weight.requires_grad_(False)

    def state() -> list[Any]:
        return [
            [(p.requires_grad, p.grad is None) for p in tiny_model.parameters()],
            [module.training for module in tiny_model.modules()],
            [sorted(vars(module)) for module in tiny_model.modules()],
        ]

    before, values = state(), [p.detach().clone() for p in tiny_model.parameters()]
    reference, error = perturbed(tiny_model), None
    try:
        measure_fidelity(
            tiny_model,
            reference,
            random_batches(),
            penalty=KLPenalty(estimator),
            parameters=list(tiny_model.parameters()) if every else None,
        )
    except ValueError as caught:
        error = caught
    assert (error is None) == (estimator == "k3")
    assert state() == before
    for parameter, value in zip(tiny_model.parameters(), values, strict=True):
        assert torch.equal(parameter, value)
    assert torch.is_grad_enabled()


def test_it_is_the_same_each_time_and_needs_no_grad_mode(tiny_model: LlamaForCausalLM) -> None:
    reference, batches = perturbed(tiny_model), random_batches()
    first = measure_fidelity(tiny_model, reference, batches)
    torch.manual_seed(1)
    with torch.no_grad():
        assert measure_fidelity(tiny_model, reference, batches) == first


# What it says -------------------------------------------------------------------------------------

FIDELITY = ReferenceFidelity(
    kl_k1=0.001,
    kl_k3=0.0123,
    kl_full=0.02,
    top_token_agreement=0.955,
    gradient_cosine=0.871,
    kl_target=0.01,
    num_tokens=1234,
)


def test_metrics_by_name() -> None:
    assert FIDELITY.metrics() == {
        "reference/kl_floor": 0.0123,
        "reference/kl_floor_k1": 0.001,
        "reference/kl_floor_full": 0.02,
        "reference/top_token_agreement": 0.955,
        "reference/gradient_cosine": 0.871,
    }


def test_it_prints_one_line() -> None:
    assert str(FIDELITY) == (
        "KL floor 0.012 nats a token (k3; k1 0.001, full 0.02), top token 95.5% alike, gradient "
        "cosine 0.87 at a KL of 0.01, 1234 tokens"
    )
