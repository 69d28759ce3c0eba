import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.length import LengthReward, length_penalty


@pytest.mark.parametrize(
    ("length", "penalty"),  # of equation 13 with L_max = 20480, L_cache = 4096
    [(0, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20480, -1.0), (30000, -1.0)],
)
def test_length_penalty_is_that_of_dapo(length: int, penalty: float) -> None:
    assert length_penalty(length, max_length=20480, buffer=4096) == penalty


def test_length_penalty_falls_to_minus_one_at_length_zero_below_the_window() -> None:
    penalties = [length_penalty(n, max_length=50, buffer=10, min_length=8) for n in (0, 2, 6, 8)]
    assert penalties == [-1.0, -0.75, -0.25, 0.0]


@given(st.integers(0, 200), st.integers(1, 100), st.data())
def test_length_penalty_stays_in_its_range_and_never_rises_above_the_window(
    length: int, max_length: int, data: st.DataObject
) -> None:
    buffer = data.draw(st.integers(1, max_length))
    low = data.draw(st.integers(0, max_length - buffer))
    window = {"max_length": max_length, "buffer": buffer, "min_length": low}
    here, next_one = length_penalty(length, **window), length_penalty(length + 1, **window)
    assert -1.0 <= here <= 0.0
    assert (here == 0.0) == (low <= length <= max_length - buffer)
    assert next_one >= here if length < low else next_one <= here


def test_length_reward_counts_the_sampled_tokens() -> None:
    reward = LengthReward(max_length=4, buffer=2)
    ids = [[1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert reward(completions=["long text"] * 3, completion_ids=ids) == [0.0, -0.5, -1.0]


def test_length_reward_counts_characters_of_the_reply_when_asked_to() -> None:
    reward = LengthReward(max_length=4, buffer=2, unit="characters", log_as="short")
    reply = [{"role": "assistant", "content": "öäü"}]
    assert reward(completions=[reply], completion_ids=[[1] * 9]) == [-0.5]
    assert reward.__name__ == "short"


def test_length_reward_says_what_to_do_when_there_are_no_tokens() -> None:
    with pytest.raises(RewardError) as error:
        LengthReward(max_length=4, buffer=2)(completions=["a"])
    assert str(error.value) == (
        "reward 'length' got no `completion_ids`, so it cannot count tokens. Pass the token ids of "
        "the completions (`trl-grpo-ext score` takes a `--tokenizer`), or set `unit: characters` "
        "in the `arguments` of this reward."
    )


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"max_length": 0, "buffer": 1}, "`max_length`=0, so every reply would be too long"),
        ({"max_length": 9, "buffer": 0}, "`buffer`=0 and `max_length`=9, so the penalty has no"),
        ({"max_length": 9, "buffer": 10}, "`buffer`=10 and `max_length`=9"),
        ({"max_length": 9, "buffer": 4, "min_length": 6}, "`min_length`=6, but lengths above 5"),
        ({"max_length": 9, "buffer": 4, "unit": "words"}, "`unit`='words', so it is open what"),
    ],
)
def test_length_reward_refuses_a_window_that_cannot_work(
    arguments: dict[str, object], found: str
) -> None:
    with pytest.raises(ConfigurationError, match=found):
        LengthReward(**arguments)
