"""What of a reply is its final answer."""

from __future__ import annotations

import time

import pytest

from trl_grpo_ext.rewards.math.final_answer import read_gold, read_reply, said
from trl_grpo_ext.rewards.math.parse import read_answer

READ = [
    # boxes
    (r"It is \boxed{72}.", "72"),
    (r"First \boxed{5}." "\n\n" r"In all \boxed{72}.", "72"),
    (r"\boxed{72}, that is \boxed{72}", "72"),
    (r"\boxed{5} and \boxed{7}", "5, 7"),
    (r"-\boxed{5}", "-5"),
    (r"$\boxed{50}\%$", "50%"),
    (r"\boxed {\frac{1}{2}}", "1/2"),
    (r"\boxed{\text{(B)}}", "B"),
    (r"\boxed{\boxed{72}}", "72"),
    (r"\boxed{72} I hope it helps. There are 3 steps.", "72"),
    # tags
    ("<answer>72</answer>", "72"),
    ("<answer>\n72\n</answer> done in 3 steps", "72"),
    (r"<answer>It is \boxed{72}, not 71</answer>", "72"),
    (r"\boxed{71} <answer>72</answer>", "72"),
    ("<answer>The answer is 72.</answer>", "72"),
    ("<answer>She has 72 clips</answer>", "72"),
    # hashes
    ("48 + 24 = 72\n#### 72", "72"),
    ("#### Step 2\nThe answer is 72.", "72"),
    ("#### 1,234 dollars", "1234"),
    # the answer is
    ("The answer is 72.", "72"),
    ("The answer is **72**.", "72"),
    ("**Answer:** 72", "72"),
    ("The answer is 71. No: the answer is 72.", "72"),
    ("Final Answer\n\n\\[72\\]", "72"),
    ("So the answer is\n$$x = 72$$", "x = 72"),
    ("The answer is $x = 5$ or $x = 7$.", "5, 7"),
    ("The answer is 72 because 48 + 24 = 72.", "72"),
    ("The answer is (B).", "B"),
    ("The final answer is: yes", "yes"),
    # no marker
    ("72", "72"),
    ("yes", "yes"),
    ("She sold 72 clips.", "72"),
    ("She had 48.\nSo she sold 48 + 24 = 72 clips in all.", "72"),
    ("The total is $5 + $6 = $11.", "$11"),
    ("Thus $x = 5$.", "5"),
    ("It takes 1 1/2 hours.", "1.5 hours"),
    ("The roots are 1, 2 and 3.", "1, 2, 3"),
    # thinking
    ("She sold 72 clips over two months.", "72"),
    ("That was wrong, so the answer is 72.", "72"),
    ("~~71~~ 72", "72"),
    ("<think>71? 73?</think>72", "72"),
    (r"\boxed{71}</think>\boxed{72}", "72"),
    ("<think>a</think>72<think>73", "72"),
]

NOT_READ = [
    "",
    " \n",
    r"\boxed{}",
    r"\boxed{72",
    "<answer></answer>",
    "<answer>72",
    "<answer>72</answer><answer>",
    r"<think>\boxed{72}",
    r"<think>It is \boxed{72}.",
    "<think>The answer is 72.</think>",
    "<!-- 72 -->",
    r"I do not know. <!-- \boxed{72} -->",
    "She sold 48 in April and 24 in May.",
    "It is 71 or 72.",
    "It is 72, maybe 73.",
    "It is not 72.",
    "It isn't 72.",
    "It is 72. No wait, that is wrong.",
    "Is it 72?",
    "The answer is 72? No.",
    "The answer is probably 72 or 73.",
    "The answer is not 72.",
    "Answer: 70 71 72 73",
    "70 71 72 73",
    "x = 5 = 7 so x + 1 = 6 and x = 72",
    "She paid twice 36.",
    "It is at least 72.",
    "How many clips did she sell in 72 days?",
    "The answer is the square root of 72.",
    "The answer is the sum of 72 numbers.",
    "The answer is ten times 72.",
    "The answer is five plus 72.",
    "The answer is above 72.",
    "The answer is 72 too small.",
    "<answer>above 72</answer>",
    "<answer>We can rule out 72</answer>",
    "<answer>five plus 72</answer>",
    "The wrong answer is 72.",
    "It is false that the answer is 72.",
    "I doubt the answer is 72.",
    "Nobody thinks the answer is 72.",
    "Reject 72.",
    "72 is a lie.",
    "Step 72: I give up.",
    "It is up to 72.",
    "The answer is 72 if x is odd.",
    "I refuse to say 72.",
    "#### ~~72~~",
    "~~72~~",
]


@pytest.mark.parametrize(("reply", "answer"), READ)
def test_read_reply_finds_the_final_answer(reply: str, answer: str) -> None:
    found, wanted = read_reply(reply), read_answer(answer)
    assert found is not None
    assert wanted is not None
    assert _plain(found) == _plain(wanted)


def _plain(answer: object) -> str:
    """An answer without the names of variables and the units."""
    from trl_grpo_ext.rewards.math.vote import vote

    return repr(vote(answer))  # type: ignore[arg-type]


@pytest.mark.parametrize("reply", NOT_READ)
def test_read_reply_finds_nothing_when_a_reply_does_not_commit_itself(reply: str) -> None:
    found = read_reply(reply)
    assert found is None or type(found).__name__ in {"Group", "Words"}
    assert found != read_answer("72")


def test_read_reply_finds_nothing_when_the_template_opened_a_thought_that_is_not_closed() -> None:
    assert read_reply(r"It is \boxed{72}", starts_in_thought=True) is None
    assert read_reply(r"71</think>\boxed{72}", starts_in_thought=True) == read_answer("72")


def test_said_leaves_out_thoughts_and_comments() -> None:
    assert said("a<think>b</think>c") == "c"
    assert said("a <!-- b --> c") == "a   c"
    assert said("a <!-- b") == "a  "


def test_read_gold_takes_the_end_of_a_solution() -> None:
    assert read_gold("There are 3 of 4.\n#### 72") == read_answer("72")
    assert read_gold(r"From $x^2=4$ we get \boxed{2}.") == read_answer("2")
    assert read_gold("There are 72 of them, or 73.") is None


@pytest.mark.parametrize(
    "piece",
    [
        r"\boxed{",
        r"\boxed{7}",
        "{",
        "}",
        "<answer>",
        "</answer>",
        "<think>",
        "<!--",
        "#### 7\n",
        "the answer is ",
        "answer ",
        "7 ",
        "$",
        r"\(",
        "=",
        "\n\n",
        ". ",
        "9^",
        "a" * 100 + " ",
    ],
)
def test_read_reply_takes_time_linear_in_the_length(piece: str) -> None:
    start = time.perf_counter()
    read_reply(piece * (1_000_000 // len(piece)))
    assert time.perf_counter() - start < 20.0


@pytest.mark.parametrize(
    "piece",
    [
        "(",
        "()",
        "1,",
        "x=",
        r"\pm",
        "{",
        "7 ",
        r"\frac",
        "a ",
        r"\cup",
        "[(",
        "1/",
        "a/",
        r"\text{",
    ],
)
def test_read_answer_is_quick_on_any_short_text(piece: str) -> None:
    start = time.perf_counter()
    read_answer((piece * 500)[:500])
    assert time.perf_counter() - start < 5.0
