"""Each check by itself, and that a candidate falls once, for the first one it fails."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rejection.made import candidate

from trl_grpo_ext.rejection.candidates import Candidate
from trl_grpo_ext.rejection.filters import CHECKS, SPECIAL_TEXT, Rules, first_failure
from trl_grpo_ext.rewards import FormatReward, LanguageReward, RepetitionReward

FORMAT = FormatReward(structure="answer")
LATIN = LanguageReward(scripts=["Latin"])
PAIRS = RepetitionReward(ngram_size=2, max_penalty=-1.0)


@pytest.mark.parametrize(
    ("changes", "rules", "reason"),
    [
        ({}, {}, None),
        ({"scores": {"math": None}}, {}, "unscored"),
        ({"scored": False}, {}, "unscored"),
        ({"scores": {}}, {}, "unscored"),
        ({"scores": {"math": 0.49}}, {}, "wrong"),
        ({"scores": {"math": 0.5}}, {}, None),
        ({"scores": {"math": 0.5}}, {"correct_threshold": 0.6}, "wrong"),
        ({"scores": {"math": 1.0, "style": None}}, {}, None),
        ({"scores": {"style": 0.0, "math": 1.0}}, {}, "wrong"),  # the first one decides
        ({"finished": False}, {}, "cut off"),
        ({"finished": False}, {"keep_truncated": True}, None),
        ({"num_tokens": 3}, {"min_tokens": 4}, "length"),
        ({"num_tokens": 4}, {"min_tokens": 4, "max_tokens": 4}, None),
        ({"num_tokens": 5}, {"max_tokens": 4}, "length"),
        ({"text": "x" * 11}, {"max_characters": 10}, "length"),
        ({"text": " \n "}, {}, "length"),
        ({"special_tokens": ("<pad>",)}, {}, "special tokens"),
        ({"text": "7<|im_end|>"}, {}, "special tokens"),
        ({"text": "7<|im_end|>"}, {"keep_special_tokens": True}, None),
        ({"text": "7"}, {"format": FORMAT}, "format"),
        ({"text": "<answer>7</answer>"}, {"format": FORMAT}, None),
        ({"text": "so the 答案 is"}, {"language": LATIN}, "language"),  # 3 of 5 words
        ({"text": "so the 答案 is"}, {"language": LATIN, "min_language": 0.6}, None),
        ({"text": "7"}, {"language": LATIN}, None),
        # "a b", "b a", "a b": one of three pairs repeats
        ({"text": "a b a b"}, {"repetition": PAIRS, "max_repetition": 0.33}, "repetition"),
        ({"text": "a b a b"}, {"repetition": PAIRS, "max_repetition": 0.34}, None),
        ({"text": "```x```"}, {"forbidden": [re.compile("```")]}, "forbidden"),
        ({"text": "x"}, {"forbidden": [re.compile("```")]}, None),
    ],
)
def test_candidate_falls_for_what_is_wrong_with_it(
    changes: dict[str, Any], rules: dict[str, Any], reason: str | None
) -> None:
    assert first_failure(candidate(**changes), Rules(**rules)) == reason


def test_candidate_that_fails_all_falls_for_the_first_and_then_the_next() -> None:
    rules = Rules(
        max_tokens=4,
        format=FORMAT,
        language=LATIN,
        repetition=PAIRS,
        max_repetition=0.0,
        forbidden=[re.compile("9")],
    )
    bad = "答 案 9 答 案 9 <|im_end|>"
    cures: list[dict[str, Any]] = [
        {"scored": True},
        {"scores": {"math": 1.0}},
        {"finished": True},
        {"num_tokens": 4},
        {"text": "答 案 9 答 案 9"},
        {"text": "<answer>答 案 9 答 案 9</answer>"},
        {"text": "<answer> a 9 b a 9 b </answer>"},
        {"text": "<answer>a 9 b</answer>"},
    ]
    values: dict[str, Any] = {"text": bad, "num_tokens": 5, "finished": False, "scored": False}
    values["scores"] = {"math": 0.0}
    found = [first_failure(Candidate(index=0, **values), rules)]
    for cure in cures:
        values |= cure
        found.append(first_failure(Candidate(index=0, **values), rules))
    assert found == list(CHECKS)


@pytest.mark.parametrize(
    "text",
    [
        *("<|im_start|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<s>", "<unk>", "<pad>", "<bos>"),
        *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<end_of_turn>", "<｜end▁of▁sentence｜>"),
    ],
)
def test_marks_of_conversations_are_special_text(text: str) -> None:
    assert SPECIAL_TEXT.search(f"It is 7.{text} So")


@pytest.mark.parametrize(
    "text", ["<think>", "</answer>", "a < b | c > d", "|x| <|> |y|", "[1, 2]", "<sum>", "x<s>y"[:3]]
)
def test_reasoning_and_mathematics_are_not_special_text(text: str) -> None:
    assert SPECIAL_TEXT.search(text) is None


def test_special_text_is_found_in_linear_time_in_what_is_made_to_be_slow() -> None:
    assert SPECIAL_TEXT.search("<|" * 200_000 + "x" * 200_000) is None
