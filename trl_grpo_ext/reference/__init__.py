"""The frozen reference model: built from the live policy, calibrated, streamed, and measured."""

from trl_grpo_ext.reference.build import ReferenceSummary, build_reference, summarize_reference
from trl_grpo_ext.reference.calibration import calibrate
from trl_grpo_ext.reference.completions import CompletionBatch, completion_batches
from trl_grpo_ext.reference.distillation import distill
from trl_grpo_ext.reference.embeddings import QuantizedEmbedding, QuantizedHead
from trl_grpo_ext.reference.experts import QuantizedExperts
from trl_grpo_ext.reference.fidelity import KLPenalty, ReferenceFidelity, measure_fidelity
from trl_grpo_ext.reference.layer_stream import streamed_layers
from trl_grpo_ext.reference.mixed import calibrate_mixed
from trl_grpo_ext.reference.quantized import QuantizedLinear
from trl_grpo_ext.reference.streamed import build_streamed_reference, mix_streamed

__all__ = [
    "CompletionBatch",
    "KLPenalty",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedHead",
    "QuantizedLinear",
    "ReferenceFidelity",
    "ReferenceSummary",
    "build_reference",
    "build_streamed_reference",
    "calibrate",
    "calibrate_mixed",
    "completion_batches",
    "distill",
    "measure_fidelity",
    "mix_streamed",
    "streamed_layers",
    "summarize_reference",
]
