"""A plan: what was asked for, what it needs for each kind of sharding, and what fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, get_args

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.memory.comparison import Setup, compare_setups
from trl_grpo_ext.memory.estimate import (
    MemoryEstimate,
    estimate_run,
    log_prob_bytes,
    trainable_parameters,
)
from trl_grpo_ext.memory.models import nominal_parameters, planned_config
from trl_grpo_ext.memory.recipe_lines import launch_command, recipe_options
from trl_grpo_ext.memory.search import fastest_that_fits, gpus_that_suffice
from trl_grpo_ext.memory.settings import RunSettings, Sharding, settings_problems
from trl_grpo_ext.memory.shape import ModelShape, model_shape

GB: Final = 10**9
RESERVE: Final = 0.1  # of the GPU, for the CUDA context and the fragmentation of the allocator


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What :func:`make_plan` returns. All sizes are bytes, of one GPU.

    Attributes:
        model: As it was named.
        shape: Of the policy.
        asked: The settings asked for.
        gpu_bytes: Memory of one GPU.
        usable_bytes: Of those, without the reserve.
        host_bytes: Host memory of the machine; ``None`` if not given.
        stages: What the settings asked for need with each kind of sharding.
        suggestion: The first settings that fit, from those asked for to the most frugal; ``None``
            if none fits.
        enough_gpus: Where none fits, GPUs with which some would; ``None`` if even 1024 do not.
        comparison: The weights of PPO and GRPO.
    """

    model: str
    shape: ModelShape
    asked: RunSettings
    gpu_bytes: int
    usable_bytes: int
    host_bytes: int | None
    stages: dict[Sharding, MemoryEstimate]
    suggestion: RunSettings | None
    enough_gpus: int | None
    comparison: list[Setup]

    @property
    def estimate(self) -> MemoryEstimate:
        """What the settings asked for need."""
        return self.stages[self.asked.sharding]

    @property
    def fits(self) -> bool:
        """Whether the settings asked for fit, in GPU and in host memory."""
        return self.suggestion == self.asked

    @property
    def log_prob_bytes(self) -> dict[str, int]:
        """Activations of a log-prob pass of one micro-batch: padded, and with shared prefixes."""
        return {
            "padded": log_prob_bytes(self.shape, self.asked, shared_prefix=False),
            "shared_prefix": log_prob_bytes(self.shape, self.asked, shared_prefix=True),
        }

    def verdict(self) -> str:
        """Return whether the settings asked for fit, and by how much, in one sentence."""
        need, usable = self.estimate.total_bytes, self.usable_bytes
        if need > usable:
            return (
                f"does not fit by {gb(need - usable)}: "
                f"it needs {gb(need)} a GPU, and {gb(usable)} are usable."
            )
        host = self.estimate.host_bytes * self.asked.num_gpus
        if self.host_bytes is not None and host > self.host_bytes:
            short = gb(host - self.host_bytes)
            rest = estimate_run(self.shape, replace(self.asked, reference="none")).host_bytes
            helps = rest * self.asked.num_gpus <= self.host_bytes
            hint = " `reference_on_disk: true` reads the layers from disk instead." * helps
            return f"does not fit by {short} of host memory: it needs {gb(host)}.{hint}"
        return (
            f"fits: it needs {gb(need)} of the {gb(usable)} usable on a GPU, "
            f"{gb(usable - need)} to spare.{self._without_checkpointing()}"
        )

    def _without_checkpointing(self) -> str:
        """A sentence for runs that compute layers twice and have the memory to do it once."""
        keeping = replace(self.asked, gradient_checkpointing=False)
        need = estimate_run(self.shape, keeping).total_bytes
        if not self.asked.gradient_checkpointing or need > self.usable_bytes:
            return ""
        return (
            f" With {gb(need)} it does without `gradient_checkpointing`, which computes every "
            "layer twice, about a quarter of the update."
        )

    def assumptions(self) -> Iterator[str]:
        """Yield what the numbers stand on, one line each."""
        settings, precision = self.asked, self.asked.precision
        moments = _MOMENTS[settings.optimizer].format(4 if settings.lora_rank else precision.moment)
        master = "" if settings.lora_rank or not precision.master else ", a float32 copy of weights"
        trained = trainable_parameters(self.shape, settings)
        yield (
            f"{self.shape.num_parameters:,} parameters, {trained:,} trained; dtype "
            f"{settings.dtype}: weights {precision.weight} bytes, activations and cache "
            f"{precision.compute}, gradients {4 if settings.lora_rank else precision.weight}, "
            f"{settings.optimizer}: {moments}{master}"
        )
        yield (
            f"{settings.micro_batch} completions a micro-batch, {settings.generation_batch} "
            f"generated at a time on a GPU, groups of {settings.num_generations}, "
            f"{settings.prompt_tokens} + {settings.completion_tokens} tokens, all of full length"
        )
        yield (
            "a full reference in the dtype of the weights; a reward model in 16 bits; logits and "
            "attention scores are not kept (fused LM head; SDPA or flash attention)"
        )
        yield (
            f"GB is 1e9 bytes; {gb(self.usable_bytes)} of {gb(self.gpu_bytes)} a GPU are usable, "
            "the rest is for the CUDA context and fragmentation; activations are approximate"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in plain types, for JSON; all sizes in bytes of one GPU."""
        return {
            "model": self.model,
            "unit": "bytes of one GPU",
            "num_parameters": self.shape.num_parameters,
            "settings": asdict(self.asked),
            "gpu_bytes": self.gpu_bytes,
            "usable_bytes": self.usable_bytes,
            "fits": self.fits,
            "verdict": self.verdict(),
            "stages": {name: _as_dict(estimate) for name, estimate in self.stages.items()},
            "log_prob_pass": self.log_prob_bytes,
            "suggestion": self._suggestion(),
            "enough_gpus": self.enough_gpus,
            "comparison": [
                asdict(setup) | {"total": setup.total, "exact_total": setup.exact_total}
                for setup in self.comparison
            ],
            "assumptions": list(self.assumptions()),
        }

    def _suggestion(self) -> dict[str, Any] | None:
        if self.suggestion is None:
            return None
        return {
            "settings": asdict(self.suggestion),
            "estimate": _as_dict(estimate_run(self.shape, self.suggestion)),
            "recipe": recipe_options(self.model, self.suggestion),
            "launch": launch_command(self.suggestion),
        }


def make_plan(
    model: str,
    settings: RunSettings,
    *,
    gpu_memory_gb: float,
    host_memory_gb: float | None = None,
    reserve: float = RESERVE,
    choose_reference: bool = False,
) -> Plan:
    """Return the plan of a run.

    Args:
        model: A folder, a ``config.json``, the name of a known model, or one on the Hub, of which
            nothing but the configuration is fetched.
        settings: What is asked for.
        gpu_memory_gb: Of one GPU, in GB of 1e9 bytes.
        host_memory_gb: Of the machine, in GB; if not given, it is taken to be enough.
        reserve: The share of a GPU that is left free.
        choose_reference: Whether the reference is the first that fits, as ``reference: auto`` has
            it, if the one asked for does not.

    Raises:
        ConfigurationError: settings that cannot work, all at once.
        ModelPreparationError: the model's configuration cannot be had.

    Example:
        >>> plan = make_plan("Llama-3-70B", RunSettings(num_gpus=8), gpu_memory_gb=80)
        >>> plan.fits, plan.suggestion.sharding, plan.suggestion.lora_rank
        (False, 'fsdp', 16)
    """
    problems = [
        *settings_problems(settings),
        *_memory_problems(gpu_memory_gb, host_memory_gb, reserve),
    ]
    if problems:
        raise ConfigurationError(problems)
    shape = model_shape(planned_config(model))
    usable = int(gpu_memory_gb * GB * (1 - reserve))
    host = None if host_memory_gb is None else int(host_memory_gb * GB)
    found = fastest_that_fits(shape, settings, usable_bytes=usable, host_bytes=host)
    if choose_reference and found and found == replace(settings, reference=found.reference):
        settings = found
    nominal = nominal_parameters(model, counted=shape.num_parameters)
    return Plan(
        model=model,
        shape=shape,
        asked=settings,
        gpu_bytes=int(gpu_memory_gb * GB),
        usable_bytes=usable,
        host_bytes=host,
        stages=dict(_stages(shape, settings)),
        suggestion=found,
        enough_gpus=None if found else gpus_that_suffice(shape, settings, usable_bytes=usable),
        comparison=compare_setups(shape, nominal=nominal),
    )


def gb(num_bytes: int) -> str:
    """Return bytes in decimal gigabytes.

    Example:
        >>> gb(39_520_000_000)
        '39.5 GB'
    """
    return f"{num_bytes / GB:,.1f} GB"


_MOMENTS = {
    "adamw": "two moments of {} bytes",
    "adamw_8bit": "two moments of 1 byte (embeddings: 4)",
    "paged_adamw_8bit": "two moments of 1 byte (embeddings: 4), in host memory",
    "sgd": "no state",
}


def _stages(shape: ModelShape, asked: RunSettings) -> Iterator[tuple[Sharding, MemoryEstimate]]:
    stages: tuple[Sharding, ...] = get_args(Sharding) if asked.num_gpus > 1 else ("none",)
    for stage in stages:
        yield stage, estimate_run(shape, replace(asked, sharding=stage))


def _memory_problems(
    gpu_memory_gb: float, host_memory_gb: float | None, reserve: float
) -> Iterator[str]:
    if host_memory_gb is not None and not 0 < host_memory_gb < math.inf:
        yield (
            f"--host-memory-gb is {host_memory_gb}, which no machine has. Give its memory in GB, "
            "such as 512, or leave it out."
        )
    if not 0 < gpu_memory_gb < math.inf:
        yield (
            f"--gpu-memory-gb is {gpu_memory_gb}, which no GPU has. "
            "Give the memory of one GPU in GB, such as 80."
        )
    if not 0 <= reserve < 1:
        yield (
            f"--reserve is {reserve}, which is no share of a GPU that could be left free. "
            "Use a number from 0 to below 1, such as 0.1."
        )


def _as_dict(estimate: MemoryEstimate) -> dict[str, Any]:
    return {
        "parts": estimate.parts,
        "total": estimate.total_bytes,
        "host_bytes": estimate.host_bytes,
    }
