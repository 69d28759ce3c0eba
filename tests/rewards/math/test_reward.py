"""The reward as TRL calls it."""

from __future__ import annotations

import time

import pytest

from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.math.reward import MathReward


def test_reward_scores_right_wrong_and_unreadable() -> None:
    scores = MathReward()(completions=["72", "73", "none"], answer=["72", "72", "??"])
    assert scores == [1.0, 0.0, None]


def test_reward_reads_the_last_message_of_a_conversation() -> None:
    messages = [{"role": "assistant", "content": "71"}, {"role": "assistant", "content": "72"}]
    assert MathReward()(completions=[messages, []], answer=["72", "72"]) == [1.0, 0.0]


def test_reward_takes_what_trl_passes() -> None:
    reward = MathReward(answer_column="gold")
    assert reward.required_columns == {"gold"}
    assert reward.__name__ == "math"
    passed = {"prompts": ["?"], "completion_ids": [[1]], "trainer_state": None, "log_extra": None}
    assert reward(completions=["72"], gold=["72"], **passed) == [1.0]


def test_reward_logs_what_was_not_scored() -> None:
    logged: dict[str, float] = {}
    reward = MathReward(log_as="maths")
    reward(completions=["1", "2", "3"], answer=["", "2", ""], log_metric=logged.__setitem__)
    assert logged["rewards/maths/unparsable_gold_fraction"] == 2 / 3


def test_reward_names_the_missing_column() -> None:
    with pytest.raises(RewardError, match=r"no column 'answer' \(columns: gold\).*`answer_column`"):
        MathReward()(completions=["72"], gold=["72"])


@pytest.mark.parametrize(
    ("argument", "value"), [("time_limit_s", 0), ("time_limit_s", -1.0), ("num_workers", 0)]
)
def test_reward_refuses_limits_that_cannot_work(argument: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"`{argument}`={value}.*Set `{argument}`"):
        MathReward(**{argument: value})  # type: ignore[arg-type]


def test_reward_says_what_to_install_when_math_verify_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'trl-grpo-ext\[math\]'"):
        MathReward()


def test_answer_is_one_vote_for_each_way_to_write_it() -> None:
    vote = MathReward().answer
    assert (
        len({vote(text) for text in ("72", r"\boxed{72.0}", "The answer is $72.", "x = 72")}) == 1
    )
    assert vote(r"\boxed{\{1, 2\}}") == vote("2 and 1")
    assert vote("(1, 2)") != vote("(2, 1)")
    assert vote("yes") == vote("**Yes**")
    assert vote("no idea, 5 or so") is None


def test_answer_leaves_out_a_thought_that_the_template_opened() -> None:
    assert MathReward(starts_in_thought=True).answer("72") is None
    assert MathReward().answer("72") is not None


def test_reward_is_quick_on_numbers() -> None:
    reward = MathReward()
    replies = [f"There are {i} of them and {i} of those.\n#### {i:,}" for i in range(2000)]
    golds = [f"{i} + 0 = {i}\n#### {i}" for i in range(2000)]
    reward(completions=replies, answer=golds)
    start = time.process_time()
    assert reward(completions=replies, answer=golds) == [1.0] * 2000
    assert time.process_time() - start < 2.0  # 30 times what it takes on an idle core
