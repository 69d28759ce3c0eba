"""The quantized layer against a plain reading of the paper, against bitsandbytes, by hand."""

from __future__ import annotations

import copy
import sys
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from trl_grpo_ext.config import BLOCK_SIZES
from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference import QuantizedLinear
from trl_grpo_ext.reference.quantized import QuantizationType

# Dettmers et al. 2023, arXiv:2305.14314, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
# One sign, two exponent and one mantissa bit, as bitsandbytes scales them.
FP4 = [sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 2, 3, 4, 6, 8, 12)]
CODES: dict[QuantizationType, list[float]] = {"nf4": NF4, "fp4": FP4}
INT8 = [step / 127 for step in [*range(-127, 1), *range(128)]]
ALL: list[QuantizationType] = ["nf4", "fp4", "int8"]

# Rows of whole blocks, rows that end inside a block, fewer weights than a block, odd numbers.
SHAPES = [(8, 256), (8, 64), (16, 96), (32, 40), (7, 5), (2, 1), (1, 3), (65, 33)]


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slowly_quantized(weight: Tensor, code: list[float], block_size: int) -> Tensor:
    """Each weight as the nearest value of the code, times the largest of its block."""
    blocks = weight.flatten().split(block_size)
    values = torch.tensor(code)
    rounded = []
    for block in blocks:
        scale = block.abs().max()
        nearest = (block[:, None] / scale - values).abs().argmin(dim=1)
        rounded.append(values[nearest] * scale)
    return torch.cat(rounded).view_as(weight)


def by_bitsandbytes(weight: Tensor, **settings: Any) -> Tensor:
    # In one row: see `QuantizedLinear._aligned_shape`.
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight.flatten(), **settings)).view_as(weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantized_weight_is_the_nearest_code_of_each_block(
    shape: tuple[int, int], block_size: int
) -> None:
    weight = random_weight(*shape)
    layer = QuantizedLinear(weight, block_size=block_size, double_quantization=False)
    expected = slowly_quantized(weight, NF4, block_size)
    torch.testing.assert_close(layer.dequantized_weight(torch.float32), expected)
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(layer.dequantized_weight(dtype), expected.to(dtype))


def test_dequantized_weight_takes_its_values_from_the_code_that_was_asked_for() -> None:
    weight = random_weight(16, 64)
    for quantization, code in CODES.items():
        layer = QuantizedLinear(weight, quantization=quantization, double_quantization=False)
        scaled = layer.dequantized_weight(torch.float32).view(-1, 64)
        scaled = scaled / weight.view(-1, 64).abs().amax(dim=1, keepdim=True)
        distances = (scaled.flatten()[:, None] - torch.tensor(code)).abs().amin(dim=1)
        assert distances.max() < 1e-4, quantization
    nf4, fp4 = (QuantizedLinear(weight, quantization=q) for q in CODES)
    assert not torch.equal(
        nf4.dequantized_weight(torch.float32), fp4.dequantized_weight(torch.float32)
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("double_quantization", [True, False])
def test_dequantized_weight_equals_that_of_bitsandbytes(
    shape: tuple[int, int],
    quantization: QuantizationType,
    block_size: int,
    double_quantization: bool,
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = random_weight(*shape).to(dtype)
        layer = QuantizedLinear(
            weight,
            quantization=quantization,
            block_size=block_size,
            double_quantization=double_quantization,
        )
        expected = by_bitsandbytes(
            weight,
            blocksize=block_size,
            quant_type=quantization,
            compress_statistics=double_quantization,
        )
        result = layer.dequantized_weight(dtype)
        assert result.dtype == dtype
        assert torch.equal(result, expected)


def test_double_quantization_rounds_the_scales_a_little() -> None:
    weight = random_weight(64, 64)
    single = QuantizedLinear(weight, double_quantization=False).dequantized_weight(torch.float32)
    double = QuantizedLinear(weight, double_quantization=True).dequantized_weight(torch.float32)
    assert not torch.equal(single, double)
    torch.testing.assert_close(single, double, rtol=0.05, atol=0.0)


def test_dequantized_weight_of_a_block_of_zeros_is_zero() -> None:
    weight = torch.cat([torch.zeros(1, 64), torch.ones(1, 64)])
    layer = QuantizedLinear(weight, double_quantization=False)
    assert torch.equal(layer.dequantized_weight(torch.float32), weight)


@given(
    out_features=st.integers(1, 9),
    in_features=st.integers(3, 90),
    seed=st.integers(0, 100),
    double_quantization=st.booleans(),
)
@hypothesis_settings(max_examples=30, deadline=None)
def test_dequantized_weight_is_never_off_by_more_than_half_the_widest_gap(
    out_features: int, in_features: int, seed: int, double_quantization: bool
) -> None:
    weight = random_weight(out_features, in_features, seed=seed)
    layer = QuantizedLinear(weight, double_quantization=double_quantization)
    error = (layer.dequantized_weight(torch.float32) - weight).abs().max()
    # NF4 is widest from -1 to -0.696; the second rounding moves a scale by a few percent.
    assert error <= weight.abs().max() * ((1 - 0.6961) / 2 + 0.05 * double_quantization)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(32, 64), (7, 5)])
def test_forward_equals_linear_with_the_dequantized_weight(
    dtype: torch.dtype, with_bias: bool, shape: tuple[int, int]
) -> None:
    weight = random_weight(*shape).to(dtype)
    bias = random_weight(shape[0], seed=1).to(dtype) if with_bias else None
    inputs = random_weight(2, 3, shape[1], seed=2).to(dtype)
    outputs = QuantizedLinear(weight, bias, double_quantization=False)(inputs)
    expected_weight = by_bitsandbytes(weight, blocksize=64, quant_type="nf4")
    assert outputs.dtype == dtype
    assert torch.equal(outputs, F.linear(inputs, expected_weight, bias))


def test_forward_follows_the_dtype_of_its_inputs_whatever_the_weight_was() -> None:
    weight, bias = random_weight(8, 64), random_weight(8, seed=1)
    layer = QuantizedLinear(weight, bias)
    inputs = random_weight(2, 64, seed=2).bfloat16()
    expected = F.linear(inputs, layer.dequantized_weight(torch.bfloat16), bias.bfloat16())
    assert torch.equal(layer(inputs), expected)
    assert layer(inputs).dtype == torch.bfloat16


def test_forward_under_autocast_equals_that_of_an_ordinary_layer() -> None:
    weight, bias = random_weight(8, 64), random_weight(8, seed=1)
    inputs = random_weight(2, 64, seed=2)
    layer = QuantizedLinear(weight, bias)
    ordinary = nn.Linear(64, 8)
    ordinary.weight.data, ordinary.bias.data = layer.dequantized_weight(torch.float32), bias
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        outputs, expected = layer(inputs), ordinary(inputs)
    assert outputs.dtype == torch.bfloat16
    assert torch.equal(outputs, expected)


def test_forward_under_autocast_never_makes_a_weight_in_full_precision() -> None:
    asked: list[torch.dtype] = []

    class Recording(QuantizedLinear):
        def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
            asked.append(dtype)
            return super().dequantized_weight(dtype)

    with torch.autocast("cpu", torch.bfloat16):
        Recording(random_weight(8, 64))(random_weight(2, 64))
    assert asked == [torch.bfloat16]


def test_the_bias_is_a_copy() -> None:
    bias = torch.zeros(4)
    layer = QuantizedLinear(random_weight(4, 8), bias)
    bias += 1.0
    assert torch.equal(layer(torch.zeros(1, 8)), torch.zeros(1, 4))


def test_the_layer_has_nothing_to_train() -> None:
    ordinary = nn.Linear(64, 8)
    layer = QuantizedLinear(ordinary.weight, ordinary.bias)
    assert list(layer.parameters()) == []
    assert not layer(torch.ones(1, 64)).requires_grad


@pytest.mark.parametrize("double_quantization", [True, False])
def test_a_change_of_dtype_does_not_change_the_weights(double_quantization: bool) -> None:
    layer = QuantizedLinear(
        random_weight(64, 64), random_weight(64, seed=1), double_quantization=double_quantization
    )
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    weight = layer.dequantized_weight(torch.float32)
    for changed in (layer.to(torch.bfloat16), layer.half(), nn.Sequential(layer).to(torch.half)):
        assert isinstance(changed, nn.Module)
        assert torch.equal(layer.dequantized_weight(torch.float32), weight)
        for name, buffer in layer.named_buffers():
            assert buffer.dtype == before[name].dtype, name
            assert torch.equal(buffer, before[name]), name


def test_a_move_to_a_device_takes_every_buffer_along() -> None:
    layer = QuantizedLinear(random_weight(64, 64), random_weight(64, seed=1)).to("meta")
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}


@pytest.mark.parametrize("double_quantization", [True, False])
def test_state_dict_restores_the_layer_in_another_one(double_quantization: bool) -> None:
    options: dict[str, Any] = {"double_quantization": double_quantization}
    source = QuantizedLinear(random_weight(48, 70), random_weight(48, seed=1), **options)
    target = QuantizedLinear(3 * random_weight(48, 70, seed=2), torch.zeros(48), **options)
    inputs = random_weight(2, 70, seed=3)
    assert not torch.equal(target(inputs), source(inputs))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(inputs), source(inputs))


@pytest.mark.parametrize(
    ("shape", "settings", "num_bytes"),
    [
        # packed + absmax (float32) + 16 codes (float32)
        ((32, 64), {"double_quantization": False}, 1024 + 32 * 4 + 64),
        ((32, 64), {"double_quantization": False, "block_size": 256}, 1024 + 8 * 4 + 64),
        ((7, 5), {"double_quantization": False}, 18 + 1 * 4 + 64),  # 35 weights: 17.5 bytes
        ((13, 10), {"double_quantization": False}, 65 + 3 * 4 + 64),  # 130 weights: 3 blocks
        # packed + absmax (8 bits) + codes + its own absmax, 256 codes and offset (float32)
        ((32, 64), {}, 1024 + 32 + 64 + 1 * 4 + 256 * 4 + 4),
        ((512, 64), {}, 16384 + 512 + 64 + 2 * 4 + 256 * 4 + 4),
    ],
)
def test_num_bytes_by_hand(
    shape: tuple[int, int], settings: dict[str, Any], num_bytes: int
) -> None:
    weight = random_weight(*shape)
    assert QuantizedLinear(weight, **settings).num_bytes == num_bytes
    assert QuantizedLinear(weight, torch.zeros(shape[0]), **settings).num_bytes == num_bytes


def test_repr_says_how_the_weight_is_stored() -> None:
    layer = QuantizedLinear(random_weight(8, 64), quantization="fp4", block_size=128)
    assert repr(layer) == (
        "QuantizedLinear(in_features=64, out_features=8, quantization=fp4, block_size=128, "
        "double_quantization=True)"
    )


# 8 bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_off_by_at_most_half_a_step(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype
) -> None:
    weight = random_weight(*shape).to(dtype)
    layer = QuantizedLinear(
        weight, quantization="int8", block_size=block_size, double_quantization=False
    )
    steps = torch.cat(
        [(b.abs().max() / 127).repeat(len(b)) for b in weight.float().flatten().split(block_size)]
    ).view_as(weight)
    error = layer.dequantized_weight(torch.float32) - weight
    # On a CPU bitsandbytes looks the level up in 65536 bins from -1 to 1: 0.004 of a step each.
    assert ((error / steps).abs() <= 0.505).all()
    assert torch.equal(
        layer.dequantized_weight(dtype), layer.dequantized_weight(torch.float32).to(dtype)
    )


def test_int8_by_hand() -> None:
    weight = torch.tensor([[127.0, -127.0, 0.0, 1.2, -63.9, 0.0]])
    layer = QuantizedLinear(weight, quantization="int8", double_quantization=False)
    expected = torch.tensor([[127.0, -127.0, 0.0, 1.0, -64.0, 0.0]])
    torch.testing.assert_close(layer.dequantized_weight(torch.float32), expected)
    torch.testing.assert_close(layer.levels, torch.tensor(INT8))


@pytest.mark.parametrize("block_size", [64, 256])
def test_int8_is_more_precise_than_the_dynamic_code_of_bitsandbytes(block_size: int) -> None:
    weight = random_weight(256, 256)
    layer = QuantizedLinear(weight, quantization="int8", block_size=block_size)
    dynamic = bnb.dequantize_blockwise(*bnb.quantize_blockwise(weight, blocksize=block_size))
    error = (layer.dequantized_weight(torch.float32) - weight).norm()
    assert 1.4 * error < (dynamic - weight).norm()


def test_int8_takes_8_13_bits_a_weight() -> None:
    layer = QuantizedLinear(random_weight(1024, 1024), quantization="int8")
    num_blocks, tables = 1024 * 1024 // 64, 4 * (256 + 256 + 1)
    assert layer.num_bytes == 1024 * 1024 + num_blocks + 4 * num_blocks // 256 + tables
    assert round(8 * (layer.num_bytes - tables) / 1024**2, 2) == 8.13


# Codes and scales -------------------------------------------------------------------------------


def test_codes_by_hand() -> None:
    row = torch.tensor([NF4])
    layer = QuantizedLinear(3.0 * row, double_quantization=False)
    assert layer.codes().tolist() == [list(range(16))]
    assert layer.scales().tolist() == [3.0]
    layer.set_codes(torch.arange(15, -1, -1)[None])
    torch.testing.assert_close(layer.dequantized_weight(torch.float32), 3.0 * row.flip(1))


@pytest.mark.parametrize("quantization", ALL)
@pytest.mark.parametrize("double_quantization", [True, False])
@given(out_features=st.integers(1, 9), in_features=st.integers(1, 150), seed=st.integers(0, 100))
@hypothesis_settings(max_examples=20, deadline=None)
def test_a_weight_is_the_level_of_its_code_times_its_scale(
    quantization: QuantizationType,
    double_quantization: bool,
    out_features: int,
    in_features: int,
    seed: int,
) -> None:
    layer = QuantizedLinear(
        random_weight(out_features, in_features, seed=seed),
        quantization=quantization,
        double_quantization=double_quantization,
    )
    before, scales = layer.codes(), layer.scales()
    num_weights = out_features * in_features
    each = scales.repeat_interleave(64)[:num_weights].view(out_features, in_features)
    assert torch.equal(layer.dequantized_weight(torch.float32), layer.levels[before.long()] * each)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(len(layer.levels), before.shape, generator=generator)
    layer.set_codes(codes)
    assert torch.equal(layer.codes().long(), codes)
    assert torch.equal(layer.scales(), scales)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = (layer.levels[codes] * each).to(dtype)
        assert torch.equal(layer.dequantized_weight(dtype), expected)
    layer.set_codes(before)
    assert torch.equal(layer.codes(), before)


@pytest.mark.parametrize("quantization", ALL)
def test_scales_are_the_largest_of_each_block(quantization: QuantizationType) -> None:
    weight = random_weight(3, 100)
    layer = QuantizedLinear(weight, quantization=quantization, double_quantization=False)
    expected = [block.abs().max() for block in weight.flatten().split(64)]
    assert layer.scales().tolist() == expected


def test_codes_that_are_no_codes_are_refused() -> None:
    layer = QuantizedLinear(random_weight(2, 4))
    for codes in (torch.full((2, 4), 16), torch.full((2, 4), -1), torch.zeros(4, 2)):
        with pytest.raises(AssertionError):
            layer.set_codes(codes)


# Low rank ---------------------------------------------------------------------------------------


def with_low_rank(rank: int = 2, **settings: Any) -> QuantizedLinear:
    layer = QuantizedLinear(random_weight(8, 64), random_weight(8, seed=1), **settings)
    layer.set_low_rank(random_weight(rank, 64, seed=2), random_weight(8, rank, seed=3))
    return layer


@pytest.mark.parametrize("quantization", ALL)
def test_low_rank_adds_the_product_of_the_factors(quantization: QuantizationType) -> None:
    layer = with_low_rank(quantization=quantization)
    inputs = random_weight(3, 64, seed=4)
    product = random_weight(8, 2, seed=3) @ random_weight(2, 64, seed=2)
    weight = layer.dequantized_weight(torch.float32) + product
    plain = QuantizedLinear(random_weight(8, 64), quantization=quantization)
    assert torch.equal(
        layer.dequantized_weight(torch.float32), plain.dequantized_weight(torch.float32)
    )
    torch.testing.assert_close(layer.effective_weight(torch.float32), weight, rtol=0, atol=0.01)
    expected = F.linear(inputs, layer.effective_weight(torch.float32), random_weight(8, seed=1))
    torch.testing.assert_close(layer(inputs), expected)
    assert torch.equal(
        plain.effective_weight(torch.bfloat16), plain.dequantized_weight(torch.bfloat16)
    )


def test_low_rank_follows_autocast() -> None:
    layer, inputs = with_low_rank(), random_weight(3, 64, seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(inputs)
    assert outputs.dtype == torch.bfloat16
    assert torch.equal(outputs, layer(inputs.bfloat16()))
    torch.testing.assert_close(outputs.float(), layer(inputs), rtol=0.05, atol=0.3)


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(1.0, torch.float16), (1e5, torch.bfloat16), (1e-9, torch.bfloat16)],
)
def test_a_factor_is_stored_in_the_16_bits_that_round_it_less(
    largest: float, dtype: torch.dtype
) -> None:
    factor_in, factor_out = random_weight(2, 64), random_weight(8, 2)
    layer = QuantizedLinear(random_weight(8, 64))
    layer.set_low_rank(largest * factor_in / factor_in.abs().max(), factor_out)
    assert layer.factor_in is not None
    assert layer.factor_out is not None
    assert (layer.factor_in.dtype, layer.factor_out.dtype) == (dtype, torch.float16)
    assert layer.factor_in.isfinite().all()


def test_low_rank_counts_in_num_bytes_and_shows_in_repr() -> None:
    layer = with_low_rank()
    plain = QuantizedLinear(random_weight(8, 64))
    assert layer.num_bytes == plain.num_bytes + 2 * (2 * 64 + 8 * 2)
    assert "rank=2" in repr(layer)
    assert "rank" not in repr(plain)


@pytest.mark.parametrize(
    ("shape_in", "shape_out"), [((9, 64), (8, 9)), ((2, 63), (8, 2)), ((2, 64), (8, 3))]
)
def test_low_rank_factors_that_do_not_fit_are_refused(
    shape_in: tuple[int, int], shape_out: tuple[int, int]
) -> None:
    layer = QuantizedLinear(random_weight(8, 64))
    with pytest.raises(ReferenceModelError) as caught:
        layer.set_low_rank(torch.zeros(shape_in), torch.zeros(shape_out))
    assert str(caught.value) == (
        f"Low-rank factors of shapes {shape_in} and {shape_out} do not fit a layer of 8 x 64, "
        "where a rank above 8 adds nothing. Set `reference_rank` to at most 8, or keep this layer "
        "unquantized (`reference_keep_modules`)."
    )


@pytest.mark.parametrize("quantization", ALL)
@pytest.mark.parametrize("double_quantization", [True, False])
def test_state_dict_of_a_compensated_layer_loads_into_a_plain_one(
    quantization: QuantizationType, double_quantization: bool
) -> None:
    settings: dict[str, Any] = {
        "quantization": quantization, "double_quantization": double_quantization
    }  # fmt: skip
    source, inputs = with_low_rank(**settings), random_weight(3, 64, seed=4)
    target = QuantizedLinear(random_weight(8, 64, seed=9), torch.zeros(8), **settings)
    nn.Sequential(target).load_state_dict(nn.Sequential(source).state_dict())
    assert torch.equal(target(inputs), source(inputs))
    other_rank = with_low_rank(rank=3, **settings)
    other_rank.load_state_dict(source.state_dict())
    assert torch.equal(other_rank(inputs), source(inputs))


def test_a_copy_or_a_change_of_dtype_keeps_the_low_rank_factors() -> None:
    layer, inputs = with_low_rank(), random_weight(3, 64, seed=4)
    expected = layer(inputs)
    assert torch.equal(copy.deepcopy(layer)(inputs), expected)
    assert torch.equal(layer.to(torch.bfloat16)(inputs), expected)


def test_without_bitsandbytes_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional")
    with pytest.raises(ReferenceModelError) as caught:
        QuantizedLinear(random_weight(8, 64))
    message = str(caught.value)
    assert message.startswith("bitsandbytes cannot be imported (")
    assert message.endswith(
        "), and a quantized reference needs its kernels. "
        "Run `pip install bitsandbytes`, or set `reference: streamed`."
    )


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_on_a_gpu_is_the_level_of_its_code_times_its_scale(
    quantization: QuantizationType, shape: tuple[int, int]
) -> None:
    weight = random_weight(*shape)
    layer = QuantizedLinear(weight.cuda(), quantization=quantization)
    each = layer.scales().repeat_interleave(64)[: weight.numel()].view(shape)
    result = layer.dequantized_weight(torch.float32)
    torch.testing.assert_close(result, layer.levels[layer.codes().long()] * each)
    on_cpu = QuantizedLinear(weight, quantization=quantization).dequantized_weight(torch.float32)
    # Rounding may differ where a weight is close to the middle between two levels.
    assert (result.cpu() - on_cpu).abs().mean() < 0.01 * weight.abs().mean()
