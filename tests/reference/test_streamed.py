"""The streamed reference: bit for bit a whole copy, one copy of a layer a batch, its files."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head

from trl_grpo_ext.cpu_linear import OneDNNLinear, use_onednn
from trl_grpo_ext.errors import LayerOrderError, ReferenceModelError
from trl_grpo_ext.layerwise import decoder_layers, run_layerwise
from trl_grpo_ext.logprobs import shared_prefix_logprobs
from trl_grpo_ext.logprobs.shared_prefix import prepare_shared_prefix
from trl_grpo_ext.reference import build_reference
from trl_grpo_ext.reference.layer_stream import (
    LayerStream,
    StreamedLayer,
    host_pages,
    memory_bytes,
    streamed_layers,
    views_of,
)
from trl_grpo_ext.reference.streamed import (
    build_streamed_reference,
    describe_streamed,
    mix_streamed,
    open_streamed,
    remove_mixed,
    save_streamed,
)

CPU = torch.device("cpu")
IDS = torch.arange(2, 26).view(2, 12)
# Two rows, padded on the left and on the right.
MASK = torch.tensor([[0] * 3 + [1] * 9, [1] * 10 + [0] * 2])
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def llama(num_layers: int = 3, **changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=num_layers, **changes)).eval()


def qwen3() -> Qwen3ForCausalLM:
    config = Qwen3Config(**SMALL, num_hidden_layers=3, head_dim=8, tie_word_embeddings=True)
    return Qwen3ForCausalLM(config).eval()


def qwen3_moe(**changes: Any) -> Qwen3MoeForCausalLM:
    """The first layer is dense, the others are mixtures: their sizes differ."""
    config = Qwen3MoeConfig(
        **SMALL,
        num_hidden_layers=3,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
        **changes,
    )
    return Qwen3MoeForCausalLM(config).eval()


def gemma2() -> Gemma2ForCausalLM:
    config = Gemma2Config(**SMALL, num_hidden_layers=4, head_dim=8, sliding_window=4)
    return Gemma2ForCausalLM(config).eval()


def gemma3() -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(
        **SMALL,
        num_hidden_layers=3,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return Gemma3ForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=32,
        n_positions=16,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


MODELS = [llama, qwen3, qwen3_moe, gemma2, gemma3, gpt2]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def logits_of(model: nn.Module, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def num_copies(reference: nn.Module) -> int:
    return streamed_layers(reference)[0].stream.num_copies


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters by name, those of streamed layers from the host."""
    weights = dict(model.named_parameters())
    for layer in streamed_layers(model):
        weights |= {layer.prefix + name: p for name, p in layer.host.named_parameters()}
    return weights


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(params=["memory", "files"])
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., PreTrainedModel]:
    """Builds a reference from host memory, or from files."""
    folder = tmp_path / "reference" if request.param == "files" else None
    return lambda policy: build_streamed_reference(policy, folder=folder)


# Equal to a resident copy -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MODELS)
def test_streamed_logits_equal_those_of_a_resident_copy_bit_for_bit(
    make: Callable[[], PreTrainedModel],
    dtype: torch.dtype,
    build: Callable[..., PreTrainedModel],
) -> None:
    policy = make().to(dtype)
    resident, reference = build_reference(policy, kind="resident"), build(policy)
    assert type(reference) is type(policy)
    for ids in (IDS, IDS + 3, IDS[:1, :5]):  # the slots are filled anew each time
        mask = MASK[: ids.shape[0], : ids.shape[1]]
        expected = logits_of(resident, ids, mask)
        assert expected.dtype == dtype
        assert torch.equal(logits_of(reference, ids, mask), expected)


@pytest.mark.parametrize("num_layers", [1, 2, 4, 5])
def test_streamed_logits_are_exact_for_any_number_of_layers(num_layers: int) -> None:
    policy = llama(num_layers)
    reference = build_streamed_reference(policy)
    for _ in range(3):
        assert torch.equal(logits_of(reference), logits_of(policy))


@pytest.mark.parametrize("make", MODELS)
def test_streamed_passes_in_step_equal_resident_passes(make: Callable[[], PreTrainedModel]) -> None:
    policy = make()
    reference = build_streamed_reference(policy)
    passes = [lambda i=i: logits_of(reference, IDS[:, : 12 - i], MASK[:, : 12 - i]) for i in (0, 5)]
    found = run_layerwise(decoder_layers(reference), passes)
    expected = [logits_of(policy, IDS[:, : 12 - i], MASK[:, : 12 - i]) for i in (0, 5)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("inside", [True, False], ids=["in each pass", "around all"])
def test_streamed_passes_under_autocast_equal_resident_ones(inside: bool) -> None:
    policy = llama()
    reference = build_streamed_reference(policy)

    def run(shift: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if inside else nullcontext():
            return logits_of(reference, IDS + shift)

    with torch.autocast("cpu", torch.bfloat16):
        expected = [logits_of(policy, IDS + shift) for shift in range(3)]
    assert expected[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        found = run_layerwise(decoder_layers(reference), [lambda s=s: run(s) for s in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def bf16_accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state()  # it is one for the whole process, and keeps its precision
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state()


def test_prepared_streamed_passes_with_mixed_precision_equal_resident_ones(
    bf16_accelerator: Accelerator,
) -> None:
    """Accelerate's forward enters and leaves autocast within each pass."""
    policy, accelerator = llama(), bf16_accelerator
    reference = build_streamed_reference(policy)
    models = [build_reference(policy, kind="resident"), reference]
    resident, streamed = (accelerator.prepare_model(m, evaluation_mode=True) for m in models)
    passes = [lambda s=s: logits_of(streamed, IDS + s) for s in range(3)]
    found = run_layerwise(decoder_layers(reference), passes)
    for shift in range(3):
        assert torch.equal(found[shift], logits_of(resident, IDS + shift))
    assert not torch.equal(found[0], logits_of(policy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", MODELS)
def test_streamed_layers_follow_a_model_that_was_turned_to_16_bits(
    make: Callable[[], PreTrainedModel], dtype: torch.dtype
) -> None:
    """As DeepSpeed turns what it prepares."""
    policy = make()
    resident = build_reference(policy, kind="resident").to(dtype)
    streamed = build_streamed_reference(policy).to(dtype)
    with torch.no_grad():
        expected, found = resident(IDS).logits, streamed(IDS).logits
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_streamed_reference_computes_a_shared_prefix_as_a_resident_copy_does() -> None:
    policy = llama()
    resident, reference = build_reference(policy, kind="resident"), build_streamed_reference(policy)
    prompt, completions = torch.arange(2, 8), torch.tensor([[9, 10, 11], [12, 13, 0]])
    ids = torch.cat([prompt.expand(2, -1), completions], dim=1)
    mask = torch.ones_like(ids)
    mask[1, -1] = 0

    def logprobs(model: PreTrainedModel) -> Tensor:
        prepare_shared_prefix(model)

        def forward(groups: Any) -> tuple[Tensor, None]:
            logits_1LV = model(**groups.inputs).logits
            labels_1L1 = groups.labels_1L[..., None]
            return logits_1LV.log_softmax(-1).gather(-1, labels_1L1)[..., 0], None

        with torch.no_grad():
            return shared_prefix_logprobs(forward, ids, mask, num_labels=3)[0]

    expected = logprobs(resident)
    assert torch.equal(logprobs(reference), expected)
    assert (expected != 0).tolist() == [[True, True, True], [True, True, False]]
    padded = logits_of(policy, ids, mask).log_softmax(-1)[:, 5:8]
    padded = padded.gather(-1, completions[..., None])[..., 0]
    torch.testing.assert_close(expected, padded * mask[:, 6:], atol=1e-5, rtol=0)


def test_streamed_reference_works_with_a_fused_head_and_a_prepared_model() -> None:
    policy = llama(tie_word_embeddings=True)
    found = []
    for model in (build_reference(policy, kind="resident"), build_streamed_reference(policy)):
        add_fused_lm_head(model, temperature=0.7)
        prepared = Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)
        with torch.no_grad():
            output = prepared(input_ids=IDS, attention_mask=MASK, labels=IDS, fused_lm_head=True)
            shifted = prepared(
                input_ids=IDS, attention_mask=MASK, shift_labels=IDS.roll(-1, 1), fused_lm_head=True
            )
        found.append((output.log_probs, shifted.log_probs))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_streamed_mixture_whose_policy_records_its_router_works() -> None:
    policy = qwen3_moe(output_router_logits=True)
    reference = build_streamed_reference(policy)
    assert torch.equal(logits_of(reference), logits_of(policy))


def test_streamed_reference_of_a_policy_in_training_with_checkpointing_is_in_evaluation() -> None:
    policy = llama(attention_dropout=0.5)
    expected = logits_of(policy)
    policy.train().gradient_checkpointing_enable()
    reference = build_streamed_reference(policy)
    assert torch.equal(logits_of(reference), expected)
    reference.train()  # its layers stay as they are
    assert torch.equal(logits_of(reference), expected)


def test_streamed_layers_run_in_onednn_when_their_hosts_do() -> None:
    if not torch._C._has_mkldnn:
        pytest.skip("this torch has no oneDNN")
    policy = llama(head_dim=32)
    resident, reference = build_reference(policy, kind="resident"), build_streamed_reference(policy)
    num_linears = use_onednn(resident)
    changed = use_onednn(reference) + sum(use_onednn(x.host) for x in streamed_layers(reference))
    assert changed == num_linears > 3
    assert type(reference.model.layers[0].mlp.up_proj) is OneDNNLinear
    assert torch.equal(logits_of(reference), logits_of(resident))


def test_streamed_reference_of_a_policy_in_onednn_equals_its_resident_copy() -> None:
    policy = llama(head_dim=32)
    use_onednn(policy)
    resident, reference = build_reference(policy, kind="resident"), build_streamed_reference(policy)
    assert torch.equal(logits_of(reference), logits_of(resident))


def test_streamed_reference_can_be_used_in_and_after_inference_mode() -> None:
    policy = llama()
    reference = build_streamed_reference(policy)
    with torch.inference_mode():
        assert torch.equal(reference(input_ids=IDS).logits, policy(input_ids=IDS).logits)
    assert torch.equal(logits_of(reference), logits_of(policy))


# What it holds ----------------------------------------------------------------------------------


def test_streamed_reference_keeps_its_weights_when_the_policy_learns(
    build: Callable[..., PreTrainedModel],
) -> None:
    policy = llama(tie_word_embeddings=True)
    before = logits_of(policy)
    reference = build(policy)
    assert_same(weights_of(reference), dict(policy.named_parameters()))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    assert torch.equal(logits_of(reference), before)
    assert reference.lm_head.weight is reference.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in weights_of(reference).values())


def test_building_a_streamed_reference_changes_nothing_of_the_policy(
    build: Callable[..., PreTrainedModel],
) -> None:
    policy = llama().train()
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    modules = dict(policy.named_modules())
    build(policy)
    assert dict(policy.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert all(module.training for module in policy.modules())
    assert_same(dict(policy.named_parameters()), before)


def test_streamed_layers_are_hidden_from_what_moves_or_saves_a_model() -> None:
    reference = build_streamed_reference(llama())
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert sorted(reference.state_dict()) == names
    assert sorted(name for name, _ in reference.named_parameters()) == names
    assert not any(isinstance(module, LlamaDecoderLayer) for module in reference.modules())


def test_streamed_layer_has_the_attributes_of_its_layer() -> None:
    layer = build_streamed_reference(gemma3()).model.layers[1]
    assert isinstance(layer, StreamedLayer)
    assert layer.layer_idx == 1
    assert layer.self_attn.layer_idx == 1
    assert layer.self_attn.config is layer.host.self_attn.config
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = layer.no_such_name


def test_layers_share_the_configuration_of_their_model() -> None:
    policy = llama()
    reference = build_streamed_reference(policy)
    assert reference.model.layers[0].self_attn.config is reference.config
    assert reference.config is not policy.config


def test_streamed_reference_takes_two_of_the_largest_layers_on_the_device() -> None:
    stream = streamed_layers(build_streamed_reference(llama()))[0].stream
    # Attention 32x32, 16x32, 16x32, 32x32; MLP three of 64x32; two norms of 32: all float32, and
    # norms of 128 bytes take 256.
    layer = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32) + 2 * 256
    assert stream.slot_bytes == 2 * layer
    assert stream.host_bytes == 3 * layer


# Copies -----------------------------------------------------------------------------------------


def test_a_plain_forward_copies_each_layer_once() -> None:
    reference = build_streamed_reference(llama(5))
    logits_of(reference)
    assert num_copies(reference) == 5 + 1  # the first is fetched again, for the next forward
    for count in (2, 3):
        logits_of(reference)
        assert num_copies(reference) == 5 * count + 1


def test_many_passes_in_step_copy_each_layer_once() -> None:
    reference = build_streamed_reference(llama(5))
    passes = [lambda i=i: logits_of(reference, IDS + i) for i in range(4)]
    run_layerwise(decoder_layers(reference), passes)
    assert num_copies(reference) == 5 + 1
    run_layerwise(decoder_layers(reference), passes)
    assert num_copies(reference) == 2 * 5 + 1


def test_two_layers_stay_on_the_device() -> None:
    reference = build_streamed_reference(llama(2))
    for _ in range(3):
        logits_of(reference)
    assert num_copies(reference) == 2


def different_layers() -> list[nn.Module]:
    """Five layers of other sizes, types and buffers each."""
    norm = nn.BatchNorm1d(7)
    norm.running_mean.fill_(3.0)
    return [
        nn.Linear(3, 5),
        norm,
        nn.Linear(40, 2, bias=False).bfloat16(),
        nn.Embedding(1, 1).double(),
        nn.Conv1d(2, 3, 4),
    ]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_layers_asked_for_in_any_order_have_their_own_weights(order: list[int]) -> None:
    layers = different_layers()
    stream = LayerStream(layers)
    for index in order:
        found = stream.weights(index, device=CPU)
        assert_same(found, layers[index].state_dict())
        assert not any(
            found[name].data_ptr() == tensor.data_ptr()
            for name, tensor in layers[index].state_dict().items()
        )


def test_a_layer_keeps_its_weights_while_the_next_one_is_fetched() -> None:
    layers = different_layers()
    stream = LayerStream(layers)
    for index in [0, 1, 2, 3, 4, 0, 1]:
        found = stream.weights(index, device=CPU)
        for slot in stream._slots:
            slot.filled()
        assert_same(found, layers[index].state_dict())


def test_views_keep_the_order_of_dimensions_and_are_aligned() -> None:
    like = {"a": torch.zeros(3, 5).T, "b": torch.zeros(()), "c": torch.zeros(0, 2).bfloat16()}
    assert memory_bytes(like) == 256 + 256
    views = views_of(torch.zeros(512, dtype=torch.uint8), like)
    assert {name: (v.shape, v.stride(), v.dtype) for name, v in views.items()} == {
        "a": ((5, 3), (1, 5), torch.float32),
        "b": ((), (), torch.float32),
        "c": ((0, 2), (2, 1), torch.bfloat16),
    }
    assert views["b"].data_ptr() - views["a"].data_ptr() == 256


def test_host_pages_are_whole_pages() -> None:
    memory = host_pages(5)
    assert memory.nbytes == 5
    assert memory.data_ptr() % os.sysconf("SC_PAGE_SIZE") == 0
    memory.fill_(7)
    assert memory.tolist() == [7] * 5


def test_the_memory_of_a_reference_is_given_back() -> None:
    reference = build_streamed_reference(llama())
    logits_of(reference)
    held = weakref.ref(streamed_layers(reference)[0].stream)
    del reference
    gc.collect()
    assert held() is None


# Files ------------------------------------------------------------------------------------------


def test_saved_files_hold_each_layer_under_the_names_of_the_policy(tmp_path: Path) -> None:
    policy = llama(2, tie_word_embeddings=True)
    save_streamed(policy, tmp_path)
    names = {path.name: set(load_file(path)) for path in tmp_path.iterdir()}
    parameters = {name for name, _ in policy.named_parameters()}
    assert names == {
        "layer-00000.safetensors": {n for n in parameters if n.startswith("model.layers.0.")},
        "layer-00001.safetensors": {n for n in parameters if n.startswith("model.layers.1.")},
        "outside-layers.safetensors": {
            "model.embed_tokens.weight",
            "model.norm.weight",
            "model.rotary_emb.inv_freq",
            "model.rotary_emb.original_inv_freq",
        },
    }
    for path in tmp_path.iterdir():
        for name, tensor in load_file(path).items():
            if name in parameters:
                assert torch.equal(tensor, policy.get_parameter(name))


def test_opened_reference_has_the_weights_that_were_saved_and_not_those_of_the_policy(
    tmp_path: Path,
) -> None:
    saved, policy = llama(), llama()
    save_streamed(saved, tmp_path)
    reference = open_streamed(policy, tmp_path)
    assert torch.equal(logits_of(reference), logits_of(saved))
    assert not torch.equal(logits_of(reference), logits_of(policy))


def test_layers_from_files_are_mapped_and_not_read_into_memory(tmp_path: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not show what is mapped")
    reference = build_streamed_reference(llama(), folder=tmp_path)
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(tmp_path / f"layer-{i:05d}.safetensors") in mapped for i in range(3))
    del reference
    gc.collect()
    assert str(tmp_path / "layer") not in Path("/proc/self/maps").read_text()


def test_what_a_streamed_reference_takes_in_words(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
    )
    policy = LlamaForCausalLM(config)
    # A layer has 4 x 512 x 512 + 3 x 512 x 1024 + 2 x 512 weights in 4 bytes: 10.49 MB. Two of them
    # and embeddings and head, 1000 x 512 each, take 20.98 + 4.10 MB.
    assert describe_streamed(build_streamed_reference(policy)) == (
        "31 MB of layers in host memory, 25 MB on the device"
    )
    assert describe_streamed(build_streamed_reference(policy, folder=tmp_path)) == (
        "31 MB of layers in files, 25 MB on the device"
    )


def test_files_of_the_same_weights_are_used_again(tmp_path: Path) -> None:
    policy = llama()
    save_streamed(policy, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    build_streamed_reference(policy, folder=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_files_of_other_weights_are_written_anew(tmp_path: Path, name: str) -> None:
    policy = llama()
    with torch.no_grad():
        policy.get_parameter(name).view(-1)[3] = 0.0
    save_streamed(policy, tmp_path)
    with torch.no_grad():
        policy.get_parameter(name).view(-1)[3] = -0.0  # equal, but other bits
    reference = build_streamed_reference(policy, folder=tmp_path)
    assert weights_of(reference)[name].view(-1)[3].signbit()


def test_a_damaged_file_is_written_anew_when_building_and_refused_when_opening(
    tmp_path: Path,
) -> None:
    policy = llama()
    save_streamed(policy, tmp_path)
    path = tmp_path / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ReferenceModelError) as error:
        open_streamed(policy, tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path} is damaged (")
    assert message.endswith(
        f"), so the reference cannot be read from it. Delete the folder {tmp_path}, and start "
        "again."
    )
    reference = build_streamed_reference(policy, folder=tmp_path)
    assert torch.equal(logits_of(reference), logits_of(policy))


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    save_streamed(llama(3), tmp_path)
    with pytest.raises(ReferenceModelError) as error:
        open_streamed(llama(3, hidden_act="silu", head_dim=16), tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'layer-00000.safetensors'} does not hold this policy: 4 tensors are missing, "
        "too many, or of another shape or type (the first is "
        "model.layers.0.self_attn.k_proj.weight), so it cannot be read as its reference. "
        "Delete the folder, or give the reference another one."
    )
    with pytest.raises(ReferenceModelError, match=r"layer-00003.safetensors does not hold this"):
        open_streamed(llama(4), tmp_path)


def test_no_partial_file_stays_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        save_streamed(llama(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# Mixing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [llama, qwen3_moe, gpt2])
def test_mixing_equals_what_trl_does_to_a_resident_copy(
    make: Callable[[], PreTrainedModel],
    dtype: torch.dtype,
    build: Callable[..., PreTrainedModel],
) -> None:
    policy, other = make().to(dtype), make().to(dtype)
    resident, reference = build_reference(policy, kind="resident"), build(policy)
    logits_of(reference)  # leaves layers in the slots
    for alpha in (0.6, 0.1):
        SyncRefModelCallback._sync_target_model(other, resident, alpha)
        mix_streamed(reference, other, alpha=alpha)
        assert_same(weights_of(reference), dict(resident.named_parameters()))
        assert torch.equal(logits_of(reference), logits_of(resident))


def test_mixing_by_hand() -> None:
    policy = llama(1)
    reference = build_streamed_reference(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(3.0)
        for parameter in weights_of(reference).values():
            parameter.fill_(1.0)
    mix_streamed(reference, policy, alpha=0.25)
    assert all((parameter == 1.5).all() for parameter in weights_of(reference).values())


def test_mixing_leaves_the_initial_files_and_removes_its_own(tmp_path: Path) -> None:
    policy, other = llama(), llama()
    reference = build_streamed_reference(policy, folder=tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(2):
        mix_streamed(reference, other, alpha=0.5)
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    assert {path: path.read_bytes() for path in files} == files
    assert torch.equal(logits_of(open_streamed(other, tmp_path)), logits_of(policy))
    del reference
    gc.collect()
    assert set(tmp_path.iterdir()) == set(files)


def test_what_a_killed_run_left_of_mixing_is_removed(tmp_path: Path) -> None:
    reference = build_streamed_reference(llama(), folder=tmp_path)
    files = set(tmp_path.iterdir())
    (tmp_path / "mixed-abc").mkdir()
    (tmp_path / "mixed-abc" / "0.safetensors").write_bytes(b"0")
    remove_mixed(tmp_path)
    assert set(tmp_path.iterdir()) == files
    del reference


def test_mixed_layers_are_mapped_too(tmp_path: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not show what is mapped")
    reference = build_streamed_reference(llama(), folder=tmp_path)
    mix_streamed(reference, llama(), alpha=0.5)
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "mixed-") in mapped
    assert str(tmp_path / "layer-") not in mapped


def test_mixing_that_cannot_write_leaves_the_reference_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = llama()
    reference = build_streamed_reference(policy, folder=tmp_path)
    files = set(tmp_path.iterdir())
    replace, calls = os.replace, []

    def fails_later(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == 3:
            raise OSError("no space left")
        replace(*paths)

    monkeypatch.setattr(os, "replace", fails_later)
    with pytest.raises(OSError, match="no space left"):
        mix_streamed(reference, llama(), alpha=0.5)
    assert set(tmp_path.iterdir()) == files
    assert torch.equal(logits_of(reference), logits_of(policy))


# Errors -----------------------------------------------------------------------------------------


def test_too_little_host_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(available=10_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    wide = SMALL | {"hidden_size": 512, "intermediate_size": 1024}
    policy = LlamaForCausalLM(LlamaConfig(**wide, num_hidden_layers=2))
    # Attention 2 x 512 x 512 + 2 x 256 x 512, MLP 3 x 1024 x 512, norms 2 x 512: 2,360,320 weights.
    with pytest.raises(ReferenceModelError) as error:
        build_streamed_reference(policy)
    free.available = 18_882_559
    with pytest.raises(ReferenceModelError):
        build_streamed_reference(policy)
    free.available = 18_882_560  # 2 layers x 4 bytes
    build_streamed_reference(policy)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ReferenceModelError):
        build_streamed_reference(policy)  # and the other process as much
    monkeypatch.setenv("RANK", "1")
    build_streamed_reference(policy)  # the main process has its own by now
    assert str(error.value) == (
        "The streamed reference keeps 0.02 GB of layers in host memory, where 0.01 GB are free for "
        "it, so that the system would end the run. Use `reference: quantized`, or give the "
        "reference a folder on a disk with that much room."
    )


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, folder, other = llama(), tmp_path / "reference", tmp_path / "other"
    reference = build_streamed_reference(policy, folder=folder)
    files = set(folder.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=30_000))
    with pytest.raises(ReferenceModelError) as error:
        save_streamed(policy, other)
    assert str(error.value) == (
        f"The streamed reference writes 0.00 GB of weights into {other}, where 0.00 GB are "
        "free, so that it could not be read back whole. Use `reference: quantized`, or give it a "
        "folder on a disk with that much room."
    )
    assert list(other.iterdir()) == []
    with pytest.raises(ReferenceModelError, match="are free"):
        mix_streamed(reference, llama(), alpha=0.5)
    assert set(folder.iterdir()) == files
    assert torch.equal(logits_of(reference), logits_of(policy))


@pytest.mark.parametrize("start", [build_streamed_reference, save_streamed, open_streamed])
def test_a_policy_without_weights_is_refused(start: Callable[..., Any], tmp_path: Path) -> None:
    with torch.device("meta"):
        policy = llama()
    arguments = () if start is build_streamed_reference else (tmp_path / "folder",)
    with pytest.raises(ReferenceModelError, match="meta device"):
        start(policy, *arguments)
    assert not (tmp_path / "folder").exists()


def test_layers_that_share_a_tensor_are_refused() -> None:
    policy = llama()
    policy.model.layers[2].mlp.up_proj.weight = policy.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ReferenceModelError) as error:
        build_streamed_reference(policy)
    assert str(error.value) == (
        "LlamaForCausalLM shares model.layers.0.mlp.up_proj.weight between a layer and another "
        "part of the model, so its layers cannot be kept apart. Use `reference: resident`."
    )
    policy = llama()
    policy.model.norm.weight = policy.model.layers[1].input_layernorm.weight
    with pytest.raises(ReferenceModelError, match=r"shares model.norm.weight between"):
        build_streamed_reference(policy)


def test_a_model_without_decoder_layers_is_refused() -> None:
    policy = llama()
    policy.config.num_hidden_layers = 7
    with pytest.raises(LayerOrderError, match="cannot run layer by layer"):
        build_streamed_reference(policy)


# CUDA -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["pinned", "pageable", "files"])
def test_streamed_reference_on_cuda_equals_a_resident_copy(source: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        **SMALL | {"hidden_size": 1024, "intermediate_size": 4096}, num_hidden_layers=7
    )
    policy = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    resident = build_reference(policy, kind="resident")
    folder = tmp_path if source == "files" else None
    reference = build_streamed_reference(policy, folder=folder, pin=source == "pinned")
    host = next(streamed_layers(reference)[0].host.parameters())
    assert host.is_pinned() == (source == "pinned")
    ids = torch.randint(2, 32, (4, 8, 256), device="cuda")
    mask = torch.ones_like(ids[0])
    expected = [logits_of(resident, batch, mask) for batch in ids]
    for _ in range(5):  # copies and kernels race, if they can
        plain = [logits_of(reference, batch, mask) for batch in ids]
        assert all(torch.equal(a, b) for a, b in zip(plain, expected, strict=True))
        passes = [lambda batch=batch: logits_of(reference, batch, mask) for batch in ids]
        found = run_layerwise(decoder_layers(reference), passes)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    other = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    SyncRefModelCallback._sync_target_model(other, resident, 0.5)
    mix_streamed(reference, other, alpha=0.5)
    assert torch.equal(logits_of(reference, ids[0], mask), logits_of(resident, ids[0], mask))


@pytest.mark.gpu
def test_streamed_reference_on_cuda_holds_two_layers_there() -> None:
    config = LlamaConfig(
        **SMALL | {"hidden_size": 1024, "intermediate_size": 4096}, num_hidden_layers=7
    )
    policy = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(2, 32, (1, 16), device="cuda")
    logits_of(policy, ids, torch.ones_like(ids))  # takes the workspace of the matrix products
    before = torch.cuda.memory_allocated()
    reference = build_streamed_reference(policy)
    logits_of(reference, ids, torch.ones_like(ids))
    gc.collect()
    outside = sum(t.nbytes for t in [*reference.parameters(), *reference.buffers()])
    slots = streamed_layers(reference)[0].stream.slot_bytes
    assert torch.cuda.memory_allocated() - before == pytest.approx(outside + slots, rel=0.05)
