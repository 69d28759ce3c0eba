"""What the log says of a reference: how faithful it is, and what keeps it from being more so."""

from __future__ import annotations

from torch import nn
from transformers.utils import logging

from trl_grpo_ext.reference.experts import unknown_experts
from trl_grpo_ext.reference.fidelity import ReferenceFidelity
from trl_grpo_ext.reference.options import ReferenceSettings
from trl_grpo_ext.reference.sampling import CalibrationData

logger = logging.get_logger(__name__)

_FEW = 0.5  # of the tokens asked for


def tell_few_tokens(data: CalibrationData, *, asked: int) -> None:
    """Warn of a calibration on far fewer tokens than were asked for."""
    found = sum(int(batch.attention_mask_BW.sum()) for batch in data.calibration)
    if found < asked * _FEW:
        logger.warning(
            f"The reference is calibrated on {found} tokens, though "
            f"`reference_calibration_tokens` is {asked}: prompts and their completions "
            "do not come to more. Its floor is higher than it could be. Give more prompts, or "
            "lower `reference_calibration_tokens` to say that this is enough."
        )


def tell_unknown_experts(reference: nn.Module, settings: ReferenceSettings) -> None:
    """Warn of experts that could not be quantized."""
    found = [] if settings.keep_modules else unknown_experts(reference)
    if found:
        logger.warning(
            f"{len(found)} weights of three dimensions (the first is {found[0]}) stay in full "
            "precision, because transformers does not mark them as experts of a kind that can "
            "be read one by one. The reference is larger than its bits say; see its bytes."
        )


def tell_fidelity(fidelity: ReferenceFidelity, settings: ReferenceSettings) -> None:
    """Log how faithful a reference is, and warn of a floor that is too high for the run."""
    logger.info(f"reference: {fidelity}")
    if fidelity.kl_k3 > settings.max_floor * settings.kl_target:
        logger.warning(
            f"The reference shows a KL of {fidelity.kl_k3:.2g} nats a token where the "
            f"truth is 0, above {settings.max_floor:g} of the KL expected of the run "
            f"(`reference_kl_target`={settings.kl_target:g}), so a part of the penalty "
            "pulls towards rounding errors. Use `reference: streamed` or `resident` (exact), "
            "`reference_quantization: int8`, or more `reference_bits`; or raise "
            "`reference_kl_target` if the run's `kl` will be larger."
        )
