"""The memory planner: what a run needs on each GPU, from the model's configuration alone."""

from trl_grpo_ext.memory.activations import kv_cache_bytes
from trl_grpo_ext.memory.available import available_host_bytes, available_memory_bytes
from trl_grpo_ext.memory.estimate import (
    PARTS,
    MemoryEstimate,
    estimate_memory,
    estimate_run,
)
from trl_grpo_ext.memory.reference import (
    ReferenceChoice,
    ReferenceFormat,
    ReferenceKind,
    choose_reference,
    reference_bytes,
)
from trl_grpo_ext.memory.settings import RunSettings
from trl_grpo_ext.memory.shape import ModelShape, model_shape

__all__ = [
    "PARTS",
    "MemoryEstimate",
    "ModelShape",
    "ReferenceChoice",
    "ReferenceFormat",
    "ReferenceKind",
    "RunSettings",
    "available_host_bytes",
    "available_memory_bytes",
    "choose_reference",
    "estimate_memory",
    "estimate_run",
    "kv_cache_bytes",
    "model_shape",
    "reference_bytes",
]
