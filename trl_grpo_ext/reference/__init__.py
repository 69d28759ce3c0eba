"""The frozen reference model, built from the live policy."""

from trl_grpo_ext.reference.build import ReferenceSummary, build_reference, summarize_reference
from trl_grpo_ext.reference.embeddings import QuantizedEmbedding, QuantizedHead
from trl_grpo_ext.reference.experts import QuantizedExperts
from trl_grpo_ext.reference.quantized import QuantizedLinear

__all__ = [
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedHead",
    "QuantizedLinear",
    "ReferenceSummary",
    "build_reference",
    "summarize_reference",
]
