"""The line of a log, from numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.log_line import (
    Field,
    duration,
    evaluation_fields,
    last_fields,
    line,
    number,
    training_fields,
    wrapped,
)
from trl_grpo_ext.pace import Pace

LOGS: dict[str, Any] = {
    "loss": 0.0123,
    "reward": 0.5634,
    "reward_std": 0.3141,
    "kl": 0.0041,
    "entropy": 1.5,
    "completions/mean_length": 118.4,
    "completions/clipped_ratio": 0.05,
    "frac_reward_zero_std": 0.25,
}


class Clock:
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(seconds: list[float], tokens: list[int]) -> Pace:
    """The pace of steps that took so long and sampled so much, 100 s between any two of them."""
    clock, sampled = Clock(), 0
    pace = Pace(clock=clock)
    for duration_s, new in zip(seconds, tokens, strict=True):
        pace.begin_step(sampled)
        clock.now, sampled = clock.now + duration_s, sampled + new
        pace.end_step(sampled)
        clock.now += 100.0
    return pace


def texts(logs: dict[str, Any], pace: Pace | None = None) -> list[str]:
    fields = training_fields(logs, step=12, max_steps=100, pace=pace or Pace())
    return [field.text for field in fields]


def test_training_line_has_what_was_logged_and_the_pace() -> None:
    assert texts(LOGS, paced([4.2], [5166])) == [
        "step  12/100",
        "reward 0.563±0.31",
        "loss 0.0123",
        "kl 0.004",
        "entropy 1.500",
        "len  118",
        "silent 25%",
        "1,230 tok/s",  # 5166 / 4.2
        "4.20 s/step",
        "6:10 left",  # 88 steps of 4.2 s are 369.6 s
    ]


def test_training_line_leaves_out_what_was_not_logged() -> None:
    assert texts({"loss": 0.5}) == ["step  12/100", "loss 0.5000"]


def test_training_line_says_that_no_completion_was_scored() -> None:
    assert "reward   n/a" in texts({"loss": 0.5, "reward": None, "reward_std": None})


def test_truncation_is_said_only_where_it_matters() -> None:
    assert "truncated 26%" in texts({"completions/clipped_ratio": 0.26})
    assert not [text for text in texts({"completions/clipped_ratio": 0.25}) if "trunc" in text]


def test_line_of_80_columns_keeps_reward_throughput_and_time_left() -> None:
    fields = training_fields(LOGS, step=12, max_steps=100, pace=paced([4.2], [5166]))
    text = line(fields, width=80).plain
    assert text == ("step  12/100  reward 0.563±0.31  kl 0.004  silent 25%  1,230 tok/s  6:10 left")


def test_unhealthy_value_is_yellow_and_stays_where_others_are_left_out() -> None:
    fields = training_fields(LOGS | {"entropy": 0.001}, step=12, max_steps=100, pace=Pace())
    text = line(fields, width=47)
    assert text.plain == "step  12/100  reward 0.563±0.31  entropy 0.001"
    ((start, end, style),) = [tuple(span) for span in text.spans if span.style]
    assert (text.plain[start:end], style) == ("entropy 0.001", "yellow")


def test_unhealthy_value_does_not_push_out_throughput_and_time_left() -> None:
    logs = LOGS | {"entropy": 0.001, "frac_reward_zero_std": 1.0, "kl": 9.0}
    fields = training_fields(logs, step=12, max_steps=100, pace=paced([4.2], [5166]))
    text = line(fields, width=80).plain
    assert text == (
        "step  12/100  reward 0.563±0.31  kl 9.000  silent 100%  1,230 tok/s  6:10 left"
    )


def test_healthy_line_has_no_colour() -> None:
    fields = training_fields(LOGS, step=12, max_steps=100, pace=paced([1.0], [10]))
    assert not [span for span in line(fields, width=200).spans if span.style]


@given(
    texts=st.lists(st.text("abc 1", min_size=1, max_size=30), min_size=1, max_size=8),
    ranks=st.lists(st.integers(0, 9), min_size=8, max_size=8),
    healthy=st.lists(st.booleans(), min_size=8, max_size=8),
    width=st.integers(10, 200),
)
def test_line_is_never_wider_than_asked_and_keeps_the_order(
    texts: list[str], ranks: list[int], healthy: list[bool], width: int
) -> None:
    fields = [Field(*parts) for parts in zip(texts, ranks, healthy, strict=False)]
    text = line(fields, width=width).plain
    assert len(text) <= width
    if len("  ".join(texts)) <= width:
        assert text == "  ".join(texts)


def test_evaluation_line_has_accuracy_with_its_interval() -> None:
    logs = {
        "eval_loss": 0.1,
        "eval_runtime": 32.4,
        "eval_reward": 1.25,
        "eval_accuracy": 0.451,
        "eval_accuracy/low": 0.4,
        "eval_accuracy/high": 0.5,
        "eval_pass@1": 0.451,
        "eval_pass@8": 0.8,
        "eval_tasks/sum/accuracy": 1.0,
        "eval_completions/mean_length": 20.0,
    }
    fields = [field.text for field in evaluation_fields(logs, step=50, max_steps=100)]
    assert fields == [
        "eval  50/100",
        "reward 1.250",
        "accuracy 0.451 (0.40-0.50)",
        "pass@8 0.800",
        "len   20",
        "in 0:32",
    ]


EVALUATION: dict[str, Any] = {
    "eval_loss": 0.1,
    "eval_runtime": 32.4,
    "eval_samples_per_second": 3.0,
    "eval_model_preparation_time": 0.001,
    "eval_num_prompts": 64.0,
    "eval_reward": 1.25,
    "eval_reward_std": 0.5,
    "eval_rewards/exact/mean": 0.5,
    "eval_rewards/exact/scored": 1.0,
    "eval_accuracy": 0.451,
    "eval_accuracy/low": 0.4,
    "eval_accuracy/high": 0.5,
    "eval_pass@1": 0.451,
    "eval_pass@8": 0.8,
    "eval_pass@8/low": 0.7,
    "eval_pass@8/high": 0.9,
    "eval_maj@8": 0.5,
    "eval_rewards/other/pass@8": 0.1,
    "eval_tasks/sum/accuracy": 1.0,
    "eval_tasks/sum/answers_a_prompt": 1.0,
    "eval_greedy/accuracy": 0.7,
    "eval_greedy/answers_a_prompt": 1.0,
    "eval_num_tokens": 5000,
    "eval_kl": 0.25,
    "eval_completions/mean_length": 20.0,
    "eval_answers_a_prompt": 3.25,
    "epoch": 1.0,
}


@pytest.mark.parametrize(
    ("is_new_best", "mark"), [(True, " new best"), (False, "")], ids=["new-best", "not-the-best"]
)
def test_evaluation_line_begins_with_the_metric_of_the_best_model(
    is_new_best: bool, mark: str
) -> None:
    fields = evaluation_fields(
        EVALUATION, step=50, max_steps=100, best="eval_pass@8", is_new_best=is_new_best
    )
    assert [field.text for field in fields] == [
        "eval  50/100",
        f"pass@8 0.800 (0.70-0.90){mark}",
        "reward 1.250±0.50",
        "accuracy 0.451 (0.40-0.50)",
        "maj@8 0.500",
        "answers_a_prompt 3.250",
        "kl 0.250",
        "len   20",
        "in 0:32",
    ]


def test_evaluation_in_80_columns_leaves_nothing_out() -> None:
    fields = evaluation_fields(
        EVALUATION, step=50, max_steps=100, best="eval_pass@8", is_new_best=True
    )
    assert wrapped(fields, width=80).plain.splitlines() == [
        "eval  50/100  pass@8 0.800 (0.70-0.90) new best  reward 1.250±0.50",
        "  accuracy 0.451 (0.40-0.50)  maj@8 0.500  answers_a_prompt 3.250  kl 0.250",
        "  len   20  in 0:32",
    ]


def test_metric_of_the_best_model_can_be_of_a_named_set() -> None:
    logs = {"eval_easy_runtime": 5.0, "eval_easy_pass@2": 0.5, "eval_easy_reward": 1.0}
    fields = evaluation_fields(logs, step=5, max_steps=10, best="eval_easy_pass@2")
    assert [field.text for field in fields][:2] == ["eval_easy  5/10", "pass@2 0.500"]
    other = {"eval_hard_runtime": 5.0, "eval_hard_pass@2": 0.5}
    fields = evaluation_fields(other, step=5, max_steps=10, best="eval_easy_pass@2")
    assert [field.text for field in fields][:2] == ["eval_hard  5/10", "pass@2 0.500"]


def test_evaluation_without_a_run_has_no_step() -> None:
    first, *_ = evaluation_fields({"eval_runtime": 5.0}, step=0, max_steps=0)
    assert first.text == "eval"


def test_metric_of_the_best_model_that_is_no_number_is_said() -> None:
    logs = {"eval_runtime": 5.0, "eval_pass@2": None}
    fields = evaluation_fields(logs, step=5, max_steps=10, best="eval_pass@2")
    assert "pass@2   n/a" in [field.text for field in fields]


@given(
    texts=st.lists(st.text("abc1", min_size=1, max_size=30), min_size=1, max_size=8),
    width=st.integers(32, 100),
)
def test_wrapped_lines_hold_every_field_in_order_and_are_no_wider_than_asked(
    texts: list[str], width: int
) -> None:
    rows = wrapped([Field(text, 0) for text in texts], width=width).plain.splitlines()
    assert all(len(row) <= width for row in rows)
    assert [text for row in rows for text in row.split()] == texts
    assert [row.startswith("  ") for row in rows] == [False] + [True] * (len(rows) - 1)


def test_last_line_of_a_resumed_run_counts_the_steps_and_tokens_of_its_session() -> None:
    fields = last_fields(
        {"train_runtime": 130.0},
        step=72,
        num_tokens=53_000,
        first_step=40,
        best="checkpoint-60 (pass@8 0.800)",
    )
    assert [field.text for field in fields] == [
        "done: 72 steps",
        "since the resume: 32 steps",
        "in 2:10",
        "53,000 tokens",
        "best: checkpoint-60 (pass@8 0.800)",
    ]


def test_evaluation_line_names_the_set_if_there_are_several() -> None:
    logs = {"eval_sums_runtime": 5.0, "eval_sums_loss": 0.1, "eval_reward": 1.0}
    first, reward, _ = evaluation_fields(logs, step=5, max_steps=10)
    assert (first.text, reward.text) == ("eval_sums  5/10", "reward 1.000")


def test_pace_does_not_count_what_happens_between_steps() -> None:
    pace = paced([2.0, 2.0, 2.0], [10, 10, 10])
    assert pace.seconds_per_step == pytest.approx(2.0)
    assert pace.tokens_per_second == pytest.approx(5.0)


def test_pace_weighs_each_step_nine_tenths_of_the_next() -> None:
    pace = paced([30.0, 2.0, 4.0], [10, 0, 20])
    weights = 0.81 + 0.9 + 1.0
    seconds = 0.81 * 30 + 0.9 * 2 + 4
    assert pace.seconds_per_step == pytest.approx(seconds / weights)
    assert pace.tokens_per_second == pytest.approx((0.81 * 10 + 20) / seconds)


def test_pace_of_no_step_is_unknown() -> None:
    pace = Pace()
    pace.end_step(100)
    assert pace.seconds_per_step is None
    assert pace.tokens_per_second is None


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [
        (0.0, 5, "0.000"),
        (9.9996, 5, "10.00"),
        (-0.5634, 5, "-0.56"),
        (1234.5, 5, " 1234"),
        (0.0123, 6, "0.0123"),
        (0.0006, 5, " 6e-4"),
        (-0.00041, 5, "-4e-4"),
        (123456.0, 5, "  1e5"),
        (None, 5, "  n/a"),
        (math.nan, 5, "  nan"),
        (-math.inf, 5, " -inf"),
    ],
)
def test_number_takes_its_columns(value: float | None, width: int, text: str) -> None:
    assert number(value, width) == text


@given(size=st.floats(-9, 9), sign=st.sampled_from([-1, 1]))
def test_number_keeps_sign_and_size(size: float, sign: int) -> None:
    value = sign * 10**size
    text = number(value, 6)
    assert len(text) == 6
    assert float(text) == pytest.approx(value, rel=0.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1h00m"), (86400, "1d00h")],
)
def test_duration_in_its_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
