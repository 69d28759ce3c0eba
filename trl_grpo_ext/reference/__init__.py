"""The frozen reference model, built from the live policy."""

from trl_grpo_ext.reference.build import ReferenceSummary, build_reference, summarize_reference
from trl_grpo_ext.reference.quantized import QuantizedLinear

__all__ = ["QuantizedLinear", "ReferenceSummary", "build_reference", "summarize_reference"]
