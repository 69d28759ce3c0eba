"""The headline: accuracy, its interval, and how it was measured."""

from __future__ import annotations

import pytest

from trl_grpo_ext.report.accuracy import headline, wilson_interval

SUMMARY = {"accuracy_before": 0.25, "accuracy_after": 0.75, "num_eval_prompts": 64}
SAMPLED = "to each prompt, sampled at the training temperature."


@pytest.mark.parametrize(
    ("share", "num_trials", "low", "high"),
    [
        (0.5, 10, 0.2366, 0.7634),  # Wilson's interval of 5 in 10
        (0.0, 10, 0.0, 0.2775),  # z^2 / (n + z^2) = 3.8415 / 13.8415
        (1.0, 10, 0.7225, 1.0),
    ],
)
def test_wilson_interval_equals_known_values_at_the_middle_and_the_edges(
    share: float, num_trials: int, low: float, high: float
) -> None:
    assert wilson_interval(share, num_trials=num_trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("num_samples", "sentence"),
    [
        (0, "It was measured on the greedy reply to each prompt."),
        (1, f"It was measured on one reply {SAMPLED}"),
        (
            4,
            f"It is the mean over 4 replies {SAMPLED} The intervals count each prompt once: they "
            "are too wide rather than too narrow.",
        ),
    ],
)
def test_headline_says_how_accuracy_was_measured_when_summary_or_settings_tell(
    num_samples: int, sentence: str
) -> None:
    told = headline({**SUMMARY, "eval_samples": num_samples}, settings={"eval_samples": 9})
    assert told.endswith(f"95% intervals). {sentence}")
    assert headline(SUMMARY, settings={"eval_samples": num_samples}) == told
    assert headline(SUMMARY, settings={}).endswith("95% intervals).")


def test_headline_speaks_of_no_intervals_when_the_number_of_prompts_is_not_known() -> None:
    found = headline({"accuracy_after": 0.5, "eval_samples": 4}, settings={})
    assert found == (
        f"**Accuracy: 50.0%** on held-out prompts. It is the mean over 4 replies {SAMPLED}"
    )
