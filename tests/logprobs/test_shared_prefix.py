"""Shared prefixes against TRL's padded path and against one completion at a time."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.utils import _apply_to_tensors
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    StableLmConfig,
)
from trl.trainer.utils import add_fused_lm_head

from trl_grpo_ext.errors import SharedPrefixError
from trl_grpo_ext.logprobs import (
    PackedGroups,
    SharedPrefix,
    difference_in_nats,
    has_dropout,
    pack_groups,
    prepare_shared_prefix,
    shared_prefix_logprobs,
)

LOGGER = "trl_grpo_ext.logprobs.shared_prefix"

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # wide, so that the next token depends on what came before
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR: dict[str, Any] = {
    "shared_expert_intermediate_size": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
HYBRID_WINDOW = ["sliding_attention", "full_attention"]
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

# The longest row of ROWS is 7 + 5 tokens.
EXACT: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=8),
    "gemma3, window as long as a row": lambda: Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=12, layer_types=HYBRID_WINDOW
    ),
    "mistral, window as long as a row": lambda: MistralConfig(**SIZES, sliding_window=12),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3 moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8),
    "qwen3 moe, with router logits": lambda: Qwen3MoeConfig(
        **SIZES, **EXPERTS, head_dim=8, output_router_logits=True
    ),
    "phi3": lambda: Phi3Config(**SIZES),
    "granite": lambda: GraniteConfig(**SIZES, attention_multiplier=0.2),
    "gpt-neox": lambda: GPTNeoXConfig(**{**SIZES, "num_key_value_heads": None}),
    "cohere": lambda: CohereConfig(**SIZES),
}
REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "sliding window": (lambda: MistralConfig(**SIZES, sliding_window=11), "sliding window of 11"),
    "window in one layer": (
        lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6, layer_types=HYBRID_WINDOW),
        "sliding window of 6",
    ),
    "linear attention": (
        lambda: Qwen3NextConfig(**SIZES, **EXPERTS, **LINEAR, head_dim=8),
        "linear_attention",
    ),
    "learned positions": (
        lambda: GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1, n_positions=64),
        "not rotary",
    ),
    "learned positions, too few": (
        lambda: GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1, n_positions=8),
        "8 learned positions",
    ),
    "biases for positions": (
        lambda: FalconConfig(
            vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True
        ),
        "not rotary",
    ),
    "soft cap": (lambda: Gemma2Config(**SIZES, head_dim=8), "'eager'"),
    "sinks": (lambda: GptOssConfig(**SIZES, head_dim=8, num_local_experts=2), "'eager'"),
    "angles of the length": (
        lambda: LlamaConfig(**{**SIZES, "max_position_embeddings": 8}, rope_parameters=DYNAMIC),
        "dynamic",
    ),
}

Row = tuple[list[int], list[int]]
A, B, C = [3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [13]
ROWS: list[Row] = [  # three groups, not side by side; C alone; empty and one-token completions
    (A, [14, 15, 16, 17, 18]),
    (B, [19, 20, 21]),
    (A, []),
    (C, [22, 23]),
    (A, [24]),
    (B, [14, 14, 15, 16]),
    (A, [25, 26, 27]),
]
DISTINCT: list[Row] = [(A, [14, 15]), (B, [16, 17, 18]), (C, [19]), ([5, 6], [20, 21, 22, 23])]
ONE_GROUP: list[Row] = [(A, [14, 15, 16]), (A, [17, 18, 19]), (A, [20, 21, 22])]


def build(config: PreTrainedConfig, *, temperature: float = 1.0, **options: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at first, which would hide them
                nn.init.normal_(parameter, std=0.1)
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    return model.float().eval()


def build_exact(name: str = "llama", **options: Any) -> PreTrainedModel:
    model = build(EXACT[name](), **options)
    prepare_shared_prefix(model)
    return model


class Batch(NamedTuple):
    ids_BW: Tensor
    mask_BW: Tensor
    num_labels: int

    @property
    def mask_BT(self) -> Tensor:
        return self.mask_BW[:, -self.num_labels :].float()


def batch(rows: list[Row]) -> Batch:
    """Prompts padded on the left, completions on the right; the padding is no token of theirs."""
    num_left = max(len(prompt) for prompt, _ in rows)
    num_right = max(len(completion) for _, completion in rows)
    ids, mask = torch.full((2, len(rows), num_left + num_right), 1)
    mask[:] = 0
    for row, (prompt, completion) in enumerate(rows):
        start, end = num_left - len(prompt), num_left + len(completion)
        ids[row, start:end] = torch.tensor(prompt + completion)
        mask[row, start:end] = 1
    return Batch(ids, mask, num_right)


# The three ways to the same numbers ---------------------------------------------------------------

Logprobs = tuple[Tensor, Tensor]


def by_hand(model: nn.Module, rows: list[Row], *, temperature: float = 1.0) -> Logprobs:
    """Each completion alone: no padding, no packing, the softmax over all logits."""
    num_labels = max(len(completion) for _, completion in rows)
    logprobs_BT, entropies_BT = torch.zeros(2, len(rows), num_labels)
    for row, (prompt, completion) in enumerate(rows):
        with torch.no_grad():
            logits_NV = model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
        for t, token in enumerate(completion):
            logprobs_V = (logits_NV[len(prompt) - 1 + t].float() / temperature).log_softmax(-1)
            logprobs_BT[row, t] = logprobs_V[token]
            entropies_BT[row, t] = -(logprobs_V.exp() * logprobs_V).sum()
    return logprobs_BT, entropies_BT


def by_padding(model: nn.Module, data: Batch) -> Logprobs:
    """As TRL does it."""
    labels = data.ids_BW.masked_fill(data.mask_BW == 0, -100)
    labels[:, : -data.num_labels] = -100
    output = model(
        input_ids=data.ids_BW, attention_mask=data.mask_BW, labels=labels, fused_lm_head=True
    )
    return output.log_probs[:, -data.num_labels :], output.entropy[:, -data.num_labels :]


def forward_of(model: nn.Module) -> Callable[[PackedGroups], tuple[Tensor, Tensor | None]]:
    def forward(groups: PackedGroups) -> tuple[Tensor, Tensor | None]:
        output = model(**groups.inputs, shift_labels=groups.labels_1L, fused_lm_head=True)
        return output.log_probs, output.entropy

    return forward


def by_packing(model: nn.Module, data: Batch, *, batch_size: int | None = None) -> Logprobs:
    logprobs_BT, entropies_BT = shared_prefix_logprobs(
        forward_of(model),
        data.ids_BW,
        data.mask_BW,
        num_labels=data.num_labels,
        batch_size=batch_size,
    )
    assert entropies_BT is not None
    return logprobs_BT, entropies_BT


class Pass(NamedTuple):
    logprobs_BT: Tensor
    entropies_BT: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def train_on(model: nn.Module, way: Callable[..., Logprobs], data: Batch, **options: Any) -> Pass:
    """One pass with a GRPO loss: clipped ratios, group advantages, a penalty on the KL."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(2, *data.mask_BT.shape, generator=generator).to(data.ids_BW.device)
    advantages_B1 = torch.randn(len(data.ids_BW), 1, generator=generator).to(noise.device)
    model.zero_grad()
    logprobs_BT, entropies_BT = way(model, data, **options)
    old_BT, reference_BT = noise * 0.3 - 3.5  # about the logarithm of 1 / 32 words
    ratios_BT = (logprobs_BT - old_BT).exp()
    surrogate_BT = torch.minimum(ratios_BT * advantages_B1, ratios_BT.clamp(0.5, 2) * advantages_B1)
    gap_BT = reference_BT - logprobs_BT
    terms_BT = 0.05 * (gap_BT.exp() - gap_BT - 1) - surrogate_BT
    loss = (terms_BT * data.mask_BT).sum() / data.mask_BT.sum().clamp(min=1)
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Pass(logprobs_BT.detach(), entropies_BT.detach(), loss.detach(), gradients)


def assert_close(found: Tensor, expected: Tensor, *, relative: float = 1e-5) -> None:
    """Norm of the difference against the norm, which is not 0."""
    assert found.shape == expected.shape
    assert expected.norm() > 0
    assert (found - expected).norm() <= relative * expected.norm()


def assert_same_pass(found: Pass, expected: Pass) -> None:
    assert_close(found.logprobs_BT, expected.logprobs_BT)
    assert_close(found.entropies_BT, expected.entropies_BT)
    assert_close(found.loss, expected.loss)
    assert found.gradients.keys() == expected.gradients.keys()
    total = torch.cat([g.flatten() for g in expected.gradients.values()]).norm()
    for name, gradient in expected.gradients.items():
        distance = (found.gradients[name] - gradient).norm()
        # The second term is for gradients that all but cancel out, such as those of key biases.
        assert distance <= 1e-5 * gradient.norm() + 1e-7 * total, name


# Exactness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_shared_prefix_equals_each_completion_alone(name: str) -> None:
    model = build_exact(name)
    assert SharedPrefix().serves(model, longest=12)
    with torch.no_grad():
        logprobs_BT, entropies_BT = by_packing(model, batch(ROWS))
    expected = by_hand(model, ROWS)
    assert_close(logprobs_BT, expected[0])
    assert_close(entropies_BT, expected[1])


@pytest.mark.parametrize("name", EXACT)
def test_shared_prefix_equals_padding_in_loss_and_gradients(name: str) -> None:
    model = build_exact(name)
    expected = train_on(model, by_padding, batch(ROWS))
    assert len(expected.gradients) == len(list(model.parameters()))
    assert_same_pass(train_on(model, by_packing, batch(ROWS)), expected)


@pytest.mark.parametrize("rows", [DISTINCT, ONE_GROUP, ROWS[:1], [(A, [14]), (A, [15]), (B, [16])]])
def test_shared_prefix_equals_padding_for_other_groups(rows: list[Row]) -> None:
    model = build_exact("qwen2")
    expected = train_on(model, by_padding, batch(rows))
    assert_close(expected.logprobs_BT, by_hand(model, rows)[0])
    assert_same_pass(train_on(model, by_packing, batch(rows)), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_shared_prefix_equals_padding_when_micro_batches_split_groups(batch_size: int) -> None:
    model = build_exact("llama")
    expected = train_on(model, by_padding, batch(ROWS))
    assert_same_pass(train_on(model, by_packing, batch(ROWS), batch_size=batch_size), expected)


@pytest.mark.parametrize(
    ("batch_size", "max_tokens", "expected"),
    [(None, 0, [7]), (3, 0, [3, 3, 1]), (9, 0, [7]), (3, -1, [3, 3, 1]), (3, 1, [7])],
)
def test_shared_prefix_logprobs_takes_batch_size_completions_a_pass(
    batch_size: int | None, max_tokens: int, expected: list[int]
) -> None:
    seen: list[int] = []

    def forward(groups: PackedGroups) -> tuple[Tensor, None]:
        seen.append(groups.shape[0])
        return groups.labels_1L.float(), None

    data = batch(ROWS)
    if max_tokens:  # one less than all tokens, or all
        whole = pack_groups(data.ids_BW, data.mask_BW, num_labels=data.num_labels)
        max_tokens = whole.num_tokens + min(max_tokens, 0)
    tokens_BT, _ = shared_prefix_logprobs(
        forward,
        data.ids_BW,
        data.mask_BW,
        num_labels=data.num_labels,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    assert seen == expected
    assert tokens_BT.tolist() == (data.ids_BW * data.mask_BW)[:, -data.num_labels :].tolist()


def test_shared_prefix_divides_by_the_temperature() -> None:
    model = build_exact("llama", temperature=0.7)
    with torch.no_grad():
        logprobs_BT, entropies_BT = by_packing(model, batch(ROWS))
    expected = by_hand(model, ROWS, temperature=0.7)
    assert_close(logprobs_BT, expected[0])
    assert_close(entropies_BT, expected[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3, window as long as a row", "qwen3 moe"])
def test_shared_prefix_equals_padding_with_gradient_checkpointing(
    name: str, use_reentrant: bool
) -> None:
    model = build_exact(name)
    expected = train_on(model, by_padding, batch(ROWS))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    recomputed: list[int] = []
    first = model.base_model.layers[0].input_layernorm
    first.register_forward_pre_hook(lambda *_: recomputed.append(1))
    assert_same_pass(train_on(model, by_packing, batch(ROWS)), expected)
    assert len(recomputed) == 2  # forward, and once more in the backward pass


@pytest.mark.parametrize(
    ("name", "target", "num_adapted", "checkpointing"),
    [
        ("llama", "all-linear", 7, False),
        ("llama", "all-linear", 7, True),
        ("qwen3 moe", ["q_proj", "k_proj", "v_proj", "o_proj"], 4, False),
    ],
)
def test_shared_prefix_equals_padding_in_the_gradients_of_lora(
    name: str, target: str | list[str], num_adapted: int, checkpointing: bool
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        config = LoraConfig(r=4, target_modules=target, init_lora_weights=False)
        model = get_peft_model(build(EXACT[name]()), config).eval()
    assert isinstance(model, PeftModel)
    prepare_shared_prefix(model.get_base_model())
    expected = train_on(model, by_padding, batch(ROWS))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    assert len(expected.gradients) == 2 * num_adapted * 2  # layers, linear layers in each, A and B
    assert all("lora" in name for name in expected.gradients)
    assert_same_pass(train_on(model, by_packing, batch(ROWS)), expected)
    with model.disable_adapter(), torch.no_grad():
        reference_BT = by_packing(model, batch(ROWS))[0]
        assert_close(reference_BT, by_hand(model, ROWS)[0])
    assert (reference_BT - expected.logprobs_BT).abs().max() > 0.01  # the adapter does something


def test_shared_prefix_is_near_padding_in_bfloat16() -> None:
    model = build_exact("llama").bfloat16()
    with torch.no_grad():
        found_BT, expected_BT = by_packing(model, batch(ROWS))[0], by_padding(model, batch(ROWS))[0]
    mask_BT = batch(ROWS).mask_BW[:, -expected_BT.shape[1] :]
    difference, tolerance = difference_in_nats(found_BT, expected_BT, mask_BT, half_precision=True)
    assert 0 < difference < 0.05 < tolerance


def test_shared_prefix_is_near_float32_under_autocast() -> None:
    model = build_exact("llama")
    exact_BT = by_hand(model, ROWS)[0]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found_BT = by_packing(model, batch(ROWS))[0]
    assert 0 < (found_BT - exact_BT).abs().mean() < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3, window as long as a row"])
def test_shared_prefix_on_cuda_equals_padding_in_loss_and_gradients(name: str, kind: str) -> None:
    model = build_exact(name).to("cuda", torch.bfloat16 if kind == "bfloat16" else torch.float32)
    data = batch(ROWS)
    data = Batch(data.ids_BW.cuda(), data.mask_BW.cuda(), data.num_labels)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=kind == "autocast"):
        expected, found = (train_on(model, way, data) for way in (by_padding, by_packing))
    relative = 1e-4 if kind == "float32" else 0.05
    assert_close(found.logprobs_BT, expected.logprobs_BT, relative=relative)
    assert_close(found.loss, expected.loss, relative=relative)
    both = [torch.cat([g.flatten() for g in p.gradients.values()]) for p in (found, expected)]
    assert_close(*both, relative=5 * relative)


def test_shared_prefix_gives_zero_and_no_gradient_when_every_completion_is_empty() -> None:
    model = build_exact("llama")
    data = batch(ROWS)
    data.mask_BW[:, -data.num_labels :] = 0
    found = train_on(model, by_packing, data)
    assert found.logprobs_BT.tolist() == torch.zeros(7, 5).tolist()
    assert found.entropies_BT.tolist() == torch.zeros(7, 5).tolist()
    assert len(found.gradients) == len(list(model.parameters()))  # distributed training needs all
    assert all(not gradient.any() for gradient in found.gradients.values())


def test_shared_prefix_ignores_the_tokens_of_a_row_whose_completion_is_masked() -> None:
    model = build_exact("llama")
    data = batch(ROWS)
    data.mask_BW[0, -data.num_labels :] = 0
    assert_same_pass(train_on(model, by_packing, data), train_on(model, by_padding, data))
    with torch.no_grad():
        logprobs_BT = by_packing(model, data)[0]
    assert not logprobs_BT[0].any()
    assert logprobs_BT[1, :3].all()


def test_shared_prefix_logprobs_returns_no_entropies_when_forward_has_none() -> None:
    model = build_exact("llama")
    forward, data = forward_of(model), batch(ROWS)
    found = shared_prefix_logprobs(
        lambda groups: (forward(groups)[0], None),
        data.ids_BW,
        data.mask_BW,
        num_labels=data.num_labels,
    )
    assert found[1] is None
    assert_close(found[0].detach(), by_hand(model, ROWS)[0])


def test_shared_prefix_projects_only_what_is_scored() -> None:
    model = build_exact("llama")
    data = batch(ROWS)
    groups = pack_groups(data.ids_BW, data.mask_BW, num_labels=data.num_labels)
    logits_1LV = model(**groups.inputs).logits
    assert logits_1LV.shape == (1, 18, 32)  # 5 + 3 + 2 + 1 + 4 + 3 completion tokens
    labels_1L1 = groups.labels_1L[..., None]
    logprobs_1L = logits_1LV.log_softmax(-1).gather(-1, labels_1L1)[..., 0]
    assert_close(groups.unpack(logprobs_1L).detach(), by_hand(model, ROWS)[0])


def test_shared_prefix_survives_the_copies_that_fsdp_makes_of_arguments() -> None:
    # With mixed precision, FSDP rebuilds the arguments of what it wraps, dataclasses too.
    def rebuild(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return _apply_to_tensors(torch.clone, args), _apply_to_tensors(torch.clone, kwargs)

    model = build_exact("llama")
    for module in (model, model.base_model, *model.base_model.layers):
        module.register_forward_pre_hook(rebuild, with_kwargs=True)
    expected = train_on(model, by_padding, batch(ROWS))
    assert_same_pass(train_on(model, by_packing, batch(ROWS)), expected)


# Preparing ----------------------------------------------------------------------------------------


def test_prepare_shared_prefix_registers_one_hook_when_done_twice() -> None:
    model = build_exact("llama")
    prepare_shared_prefix(model)
    assert len(model.base_model._forward_hooks) == 1


def test_prepare_shared_prefix_changes_no_bit_of_other_calls() -> None:
    model = build(EXACT["llama"]())
    data = batch(ROWS)
    before = train_on(model, by_padding, data)
    logits = model(data.ids_BW, attention_mask=data.mask_BW).logits
    prepare_shared_prefix(model)
    by_packing(model, data)
    after = train_on(model, by_padding, data)
    assert torch.equal(model(data.ids_BW, attention_mask=data.mask_BW).logits, logits)
    assert torch.equal(after.logprobs_BT, before.logprobs_BT)
    assert all(torch.equal(after.gradients[name], before.gradients[name]) for name in before[3])


def test_prepare_shared_prefix_raises_where_attention_is_not_looked_up() -> None:
    with pytest.raises(SharedPrefixError, match="'eager'"):
        prepare_shared_prefix(build(EXACT["llama"](), attn_implementation="eager"))


def test_prepared_model_can_be_copied() -> None:
    model = build_exact("llama")
    twin = copy.deepcopy(model)
    assert len(twin.base_model._forward_hooks) == 1
    with torch.no_grad():
        twin.model.layers[0].self_attn.q_proj.weight.mul_(2)
        twin_BT, model_BT = by_packing(twin, batch(ROWS))[0], by_packing(model, batch(ROWS))[0]
        alone_BT = by_padding(twin, batch(ROWS))[0]
    assert_close(twin_BT, alone_BT)
    assert_close(model_BT, by_hand(model, ROWS)[0])
    assert (twin_BT - model_BT).abs().max() > 0.01


UNROUTED: dict[str, Callable[[], PreTrainedConfig]] = {
    # Their decoder layers do not hand `shared_prefix` on, so that attention takes its own way.
    "stablelm": lambda: StableLmConfig(**SIZES),
    "falcon": lambda: FalconConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    ),
}


@pytest.mark.parametrize("name", UNROUTED)
def test_shared_prefix_is_an_error_when_it_never_reached_the_attention(name: str) -> None:
    model = build(UNROUTED[name]())
    prepare_shared_prefix(model)
    with pytest.raises(SharedPrefixError, match="shared_prefix"):
        by_packing(model, batch(ROWS))


# Which models share -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_shared_prefix_falls_back_with_one_line_where_it_is_not_exact(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, reason = REFUSED[name]
    model = build(config())
    shared_prefix = SharedPrefix()
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        assert not shared_prefix.serves(model, longest=12)
        assert not shared_prefix.serves(model, longest=12)
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert "padded path" in record.getMessage()


@pytest.mark.parametrize("name", REFUSED)
def test_shared_prefix_raises_where_it_is_not_exact_and_must_always_share(name: str) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(SharedPrefixError, match=r"'always'.*`shared_prefix: auto`") as error:
        SharedPrefix("always").serves(build(config()), longest=12)
    assert reason in str(error.value)


def test_shared_prefix_serves_shorter_rows_of_a_model_with_a_window() -> None:
    model = build(MistralConfig(**SIZES, sliding_window=11))
    shared_prefix = SharedPrefix()
    assert not shared_prefix.serves(model, longest=12)
    assert shared_prefix.serves(model, longest=11)
    assert not shared_prefix.serves(model, longest=12)


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_shared_prefix_prepares_a_model_that_it_serves(mode: str) -> None:
    model = build(EXACT["llama"]())
    assert SharedPrefix(mode).serves(model, longest=12)
    with torch.no_grad():
        assert_close(by_packing(model, batch(ROWS))[0], by_hand(model, ROWS)[0])


def test_shared_prefix_never_serves_and_never_touches_a_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build(EXACT["llama"]())
    assert not SharedPrefix("never").serves(model, longest=12)
    assert not SharedPrefix("never").serves(model, longest=12, problem="it reads images")
    assert not model.base_model._forward_hooks
    assert not caplog.records


def test_shared_prefix_takes_a_problem_of_one_call_as_one_of_this_call_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, shared_prefix = build(EXACT["llama"]()), SharedPrefix()
    for _ in range(3):
        assert not shared_prefix.serves(model, longest=12, problem="it reads images")
    assert not shared_prefix.serves(model, longest=12, problem="it has dropout")
    assert shared_prefix.serves(model, longest=12)
    assert [record.getMessage().rsplit(": ", 1)[1] for record in caplog.records] == [
        "it reads images",
        "it has dropout",
    ]
    with pytest.raises(SharedPrefixError, match="it reads images"):
        SharedPrefix("always").serves(model, longest=12, problem="it reads images")


def test_shared_prefix_needs_one_check_a_model() -> None:
    shared_prefix, policy, reference = SharedPrefix(), build(EXACT["llama"]()), nn.Linear(1, 1)
    assert shared_prefix.needs_check(policy)
    assert shared_prefix.needs_check(policy)  # until it was compared
    assert shared_prefix.judge(policy, 0.0, tolerance=0.1)
    assert not shared_prefix.needs_check(policy)
    assert shared_prefix.needs_check(reference)
    assert not SharedPrefix(verify=False).needs_check(policy)


def test_shared_prefix_judges_a_difference_within_the_tolerance_as_rounding(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, shared_prefix = build(EXACT["llama"]()), SharedPrefix()
    assert shared_prefix.judge(model, 0.001, tolerance=0.001)
    assert shared_prefix.serves(model, longest=12)
    assert not caplog.records


@pytest.mark.parametrize("difference", [0.25, float("nan"), float("inf")])
def test_shared_prefix_refuses_a_model_for_good_after_a_difference(
    difference: float, caplog: pytest.LogCaptureFixture
) -> None:
    model, other, shared_prefix = build(EXACT["llama"]()), build(EXACT["qwen2"]()), SharedPrefix()
    assert not shared_prefix.judge(model, difference, tolerance=0.001)
    assert not shared_prefix.serves(model, longest=12)
    assert shared_prefix.serves(other, longest=12)
    (record,) = caplog.records
    assert f"by {difference:.2g} nats (tolerance 0.001)" in record.getMessage()
    with pytest.raises(SharedPrefixError, match=r"'always'.*differ from the padded path's by "):
        SharedPrefix("always").judge(model, difference, tolerance=0.001)


def test_shared_prefix_says_the_same_about_two_models_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shared_prefix = SharedPrefix()
    for _ in range(2):
        model = build(EXACT["llama"](), attn_implementation="eager")
        assert not shared_prefix.serves(model, longest=12)
    assert len(caplog.records) == 1


# Small things -------------------------------------------------------------------------------------


def test_difference_in_nats_is_the_largest_in_float32_and_the_mean_in_half_precision() -> None:
    shared = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    padded = torch.tensor([[-1.0, -2.5], [-2.9, 0.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert difference_in_nats(shared, padded, mask, half_precision=False) == (0.5, 1e-3)
    difference, tolerance = difference_in_nats(
        shared.bfloat16(), padded.bfloat16(), mask, half_precision=True
    )
    assert difference == pytest.approx((0.5 + 0.1) / 3, abs=0.005)  # padding does not count
    assert tolerance == 0.1


def test_difference_in_nats_is_zero_for_equal_values() -> None:
    ones = torch.ones(2, 2)
    assert difference_in_nats(ones, ones, ones, half_precision=False)[0] == 0


class DropsInside(nn.Module):
    """Some models keep the probability of attention dropout, others the module, by this name."""

    def __init__(self, attention_dropout: float | nn.Module):
        super().__init__()
        self.attention_dropout = attention_dropout


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2), False),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)), False),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), True),
        (DropsInside(0.0), False),
        (DropsInside(0.1), True),
        (nn.Sequential(DropsInside(nn.Dropout(0.0))), False),
        (nn.Sequential(DropsInside(nn.Dropout(0.1))), True),
    ],
)
def test_has_dropout_finds_modules_and_probabilities_above_zero(
    module: nn.Module, expected: bool
) -> None:
    assert has_dropout(module) is expected


def test_has_dropout_reads_a_model() -> None:
    assert not has_dropout(build(EXACT["llama"]()))
    assert has_dropout(build(LlamaConfig(**SIZES, attention_dropout=0.1)))
