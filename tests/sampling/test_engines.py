"""Which engine samples: what is fastest and can serve the run, or what was asked for."""

from __future__ import annotations

import pytest

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.sampling import SamplingNeeds, choose_engine


@pytest.mark.parametrize(
    ("needs", "engine", "reason"),
    [
        (SamplingNeeds(), "shared_prefill", "once a group"),
        (SamplingNeeds(uses_vllm=True), "vllm", "use_vllm"),
        (SamplingNeeds(only_transformers="tools"), "transformers", "tools"),
        (
            SamplingNeeds(only_transformers="tools", prefers_continuous_batching=True),
            "transformers",
            "tools",
        ),
        (SamplingNeeds(prefers_continuous_batching=True), "continuous_batching", "CUDA graphs"),
        (
            SamplingNeeds(prefers_continuous_batching=True, continuous_batching_problem="min_p"),
            "shared_prefill",
            "no continuous batching: min_p",
        ),
        (
            SamplingNeeds(prefers_continuous_batching=True, continuous_batching_drawback="slow"),
            "shared_prefill",
            "no continuous batching: slow",
        ),
    ],
)
def test_auto_takes_the_fastest_that_serves(needs: SamplingNeeds, engine: str, reason: str) -> None:
    found, why = choose_engine("auto", needs)
    assert found == engine
    assert reason in why


def test_what_was_asked_for_is_taken_although_it_is_slow() -> None:
    needs = SamplingNeeds(continuous_batching_drawback="slow")
    assert choose_engine("continuous_batching", needs)[0] == "continuous_batching"
    assert choose_engine("shared_prefill", needs)[0] == "shared_prefill"
    assert choose_engine("transformers", SamplingNeeds(only_transformers="tools")) == (
        "transformers",
        "as configured",
    )


@pytest.mark.parametrize(
    ("asked", "needs"),
    [
        ("shared_prefill", SamplingNeeds(only_transformers="completions call tools")),
        ("continuous_batching", SamplingNeeds(only_transformers="completions call tools")),
        (
            "continuous_batching",
            SamplingNeeds(continuous_batching_problem="completions call tools"),
        ),
    ],
)
def test_what_cannot_serve_the_run_is_refused(asked: str, needs: SamplingNeeds) -> None:
    with pytest.raises(ConfigurationError, match=r"call tools\. Set `group_sampler: auto`\."):
        choose_engine(asked, needs)  # type: ignore[arg-type]
