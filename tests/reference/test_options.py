"""The options of the reference: what they stand for, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from trl_grpo_ext.reference import build_reference, summarize_reference
from trl_grpo_ext.reference.options import (
    ReferenceOptions,
    ReferenceSettings,
    code_bits,
    reference_problems,
)


def problems(*, sync: bool = False, alpha: float = 0.6, **options: Any) -> list[str]:
    given = ReferenceOptions(**{"reference": "quantized", **options})
    return list(reference_problems(given, beta=0.1, mixes=sync, mixup_alpha=alpha))


def test_settings_are_four_calibrated_bits_when_nothing_is_set() -> None:
    assert ReferenceSettings.of(ReferenceOptions(), kind="quantized") == ReferenceSettings(
        kind="quantized",
        quantization="nf4",
        block_size=64,
        double_quantization=True,
        compensation="mixed",
        calibration_tokens=16384,
        distillation_steps=0,
    )


def test_settings_take_over_what_is_set_also_where_it_is_false_or_zero() -> None:
    options = ReferenceOptions(
        reference_double_quantization=False,
        reference_distillation_steps=0,
        reference_keep_modules=["down_proj"],
        reference_rank=8,
        reference_kl_target=0.02,
    )
    settings = ReferenceSettings.of(options, kind="quantized")
    assert settings.double_quantization is False
    assert settings.keep_modules == ("down_proj",)
    assert (settings.rank, settings.kl_target) == (8, 0.02)


@pytest.mark.parametrize(
    ("quantization", "given", "expected"),
    [
        ("int8", None, "rounding"),
        ("int8", "low_rank", "low_rank"),
        ("fp4", None, "mixed"),
        ("nf4", "none", "none"),
    ],
)
def test_settings_compensate_eight_bits_by_rounding_alone_unless_told(
    quantization: Any, given: Any, expected: str
) -> None:
    options = ReferenceOptions(reference_quantization=quantization, reference_compensation=given)
    assert ReferenceSettings.of(options, kind="quantized").compensation == expected


@pytest.mark.parametrize("name", ["reference_rank", "reference_distillation_steps"])
def test_what_needs_factors_asks_for_them(name: str) -> None:
    settings = ReferenceSettings.of(ReferenceOptions(**{name: 4}), kind="quantized")
    assert settings.compensation == "low_rank"


@pytest.mark.parametrize("changes", [{"kl_target": 0.1}, {"max_floor": 0.9}, {"on_disk": True}])
def test_identity_leaves_out_what_changes_no_weight(changes: dict[str, Any]) -> None:
    assert ReferenceSettings(**changes).identity == ReferenceSettings().identity


def test_identity_names_what_changes_the_weights_and_of_an_exact_reference_the_kind_alone() -> None:
    assert set(ReferenceSettings().identity) == {
        "kind",
        "quantization",
        "block_size",
        "double_quantization",
        "embedding_quantization",
        "keep_modules",
        "compensation",
        "rank",
        "bits",
        "calibration_tokens",
        "distillation_steps",
    }
    assert ReferenceSettings(kind="streamed", rank=3).identity == {"kind": "streamed"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_rank": 0}, "`reference_rank` is 0; use 1 or more, or leave it out."),
        ({"reference_calibration_tokens": 0}, "`reference_calibration_tokens` is 0; use 1 or more"),
        ({"reference_distillation_steps": -1}, "use 0 or more"),
        ({"reference_kl_target": 0.0}, "use nats a token above 0"),
        ({"reference_max_floor": float("nan")}, "`reference_max_floor` is nan"),
        (
            {"reference_rank": 8, "reference_compensation": "rounding"},
            "`reference_rank` is set, but `reference_compensation` is 'rounding', which has no "
            "low-rank factors. Set `reference_compensation: low_rank`, or remove `reference_rank`.",
        ),
        (
            {"reference_distillation_steps": 5, "reference_compensation": "mixed"},
            "`reference_distillation_steps` is set, but `reference_compensation` is 'mixed'",
        ),
        (
            {"reference_bits": 5, "reference_compensation": "rounding"},
            "whose weights all take the same. Set `reference_compensation: mixed` (4-bit types)",
        ),
        (
            {"reference_compensation": "mixed", "reference_quantization": "int8"},
            "so that all layers have 8 bits already.",
        ),
        ({"reference_rank": 8, "reference_bits": 5.0}, "Keep one of them."),
        (
            {"reference_bits": 4.1},
            "nf4 in blocks of 64 takes 4.127 bits a weight alone. Use more",
        ),
        ({"reference_bits": 16}, "`reference_bits` is 16, but a copy in 16 bits is exact."),
        (
            {"reference_bits": 4.6, "reference_quantization": "int8"},
            "whose weights all take the same.",
        ),
        (
            {"reference_compensation": "none", "reference_calibration_tokens": 99},
            "calibrates nothing. Remove one of them.",
        ),
        ({"sync": True}, "Set `ref_model_mixup_alpha: 1.0` (the reference is then built anew)"),
        ({"reference": "none"}, "`reference` is 'none', but `beta` is 0.1"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    (found,) = problems(**options)
    assert message in found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sync": True, "alpha": 1.0},
        {"reference": "streamed", "sync": True},
        {"reference": "resident", "sync": True},
        {"reference_quantization": "int8", "reference_compensation": "low_rank"},
        {"reference_bits": 4.6},
        {"reference_bits": 4.6, "reference_compensation": "low_rank"},
        {"reference_rank": 8},
        {"reference_distillation_steps": 8},
    ],
)
def test_what_can_work_is_not_refused(options: dict[str, Any]) -> None:
    assert problems(**options) == []


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("double", [True, False])
def test_code_bits_are_what_a_weight_takes_apart_from_its_tables(
    tiny_model: Any, quantization: Any, double: bool
) -> None:
    reference = build_reference(tiny_model, quantization=quantization, double_quantization=double)
    layer = reference.model.layers[0].mlp.up_proj  # 64 x 32
    tables = layer.levels.nbytes + (4 * (256 + 1) if double else 0)
    # Scales in 8 bits share a float32 in blocks of 256; here 32 scales have one for themselves.
    short = 32 / 2048 - 32 / 256 / 64 if double else 0
    settings = ReferenceSettings(quantization=quantization, double_quantization=double)
    assert 8 * (layer.num_bytes - tables) / 2048 - short == pytest.approx(code_bits(settings))
    assert summarize_reference(reference).bits_per_weight > code_bits(settings)
