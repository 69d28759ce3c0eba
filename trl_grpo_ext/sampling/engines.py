"""Which engine samples the completions of a run, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trl_grpo_ext.errors import ConfigurationError

Engine = Literal["shared_prefill", "continuous_batching", "vllm", "transformers"]


@dataclass(frozen=True, kw_only=True)
class SamplingNeeds:
    """What decides about the engine.

    Attributes:
        uses_vllm: TRL's vLLM is switched on.
        prefers_continuous_batching: It usually is the fastest here (CUDA), or TRL's option for it
            is switched on.
        only_transformers: Why nothing but ``generate`` serves the run: tools, images, sharded
            weights, an option that the others do not honour; ``None`` if they all do.
        continuous_batching_problem: Why ``generate_batch`` cannot serve it, if so.
        continuous_batching_drawback: Why it would be slow, if so.
    """

    uses_vllm: bool = False
    prefers_continuous_batching: bool = False
    only_transformers: str | None = None
    continuous_batching_problem: str | None = None
    continuous_batching_drawback: str | None = None


def choose_engine(asked: Literal["auto"] | Engine, needs: SamplingNeeds) -> tuple[Engine, str]:
    """Return the engine for ``group_sampler``, and the reason for the log.

    Raises:
        ConfigurationError: the engine that was asked for cannot serve the run.

    Example:
        >>> choose_engine("auto", SamplingNeeds())
        ('shared_prefill', 'each prompt is computed once a group')
    """
    if asked == "auto":
        return _automatic(needs)
    problem = None if asked in ("vllm", "transformers") else needs.only_transformers
    if asked == "continuous_batching":
        problem = problem or needs.continuous_batching_problem
    if problem is not None:
        raise ConfigurationError(
            [
                f"`group_sampler` is {asked!r}, which cannot serve this run: {problem}. "
                "Set `group_sampler: auto`."
            ]
        )
    return asked, "as configured"


def _automatic(needs: SamplingNeeds) -> tuple[Engine, str]:
    if needs.uses_vllm:
        return "vllm", "`use_vllm` is true"
    if needs.only_transformers is not None:
        return "transformers", needs.only_transformers
    if needs.prefers_continuous_batching:
        drawback = needs.continuous_batching_problem or needs.continuous_batching_drawback
        if drawback is None:
            return "continuous_batching", "paged cache and CUDA graphs, each prompt computed once"
        return "shared_prefill", f"no continuous batching: {drawback}"
    return "shared_prefill", "each prompt is computed once a group"
