"""What cannot work is told, all of it, in words that say what to do."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from rejection.made import candidate
from trl import ModelConfig

from trl_grpo_ext.rejection.filters import first_failure
from trl_grpo_ext.rejection.option_checks import rejection_problems
from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rejection.selection import Selection
from trl_grpo_ext.sampling.policy import policy_problems


def options(**changes: Any) -> RejectionArguments:
    return RejectionArguments(**{"output_dir": "out"} | changes)


def problems(**changes: Any) -> str:
    return "\n".join(rejection_problems(options(**changes)))


def test_defaults_work() -> None:
    assert problems() == ""
    assert list(policy_problems(ModelConfig())) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 0}, "`num_generations` is 0, so nothing"),
        ({"best_n": 0}, "`best_n` is 0, so nothing"),
        ({"prompts_per_batch": 0}, "`prompts_per_batch` is 0"),
        ({"similarity_ngram_size": 0}, "`similarity_ngram_size` is 0"),
        ({"max_tokens": 0}, "`max_tokens` is 0"),
        ({"max_pass_rate": 1.1}, "`max_pass_rate` is 1.1, which is no share"),
        ({"max_repetition": -0.1}, "`max_repetition` is -0.1, which is no share"),
        ({"prefer": "length"}, "`prefer` is 'length', .* Use brevity or diversity"),
        ({"balance": "easy"}, "`balance` is 'easy', .* Use prop2diff or uniform"),
        ({"dataset_format": "text"}, "Use prompt_completion or messages"),
        ({"min_tokens": 9, "max_tokens": 8}, "`max_tokens`=8 is below `min_tokens`=9"),
        ({"min_pass_rate": 0.5, "max_pass_rate": 0.4}, "so no prompt is left"),
        ({"max_similarity": 0.0}, "all replies to a prompt would be near-duplicates"),
        ({"temperature": 0.0}, "all replies to a prompt would be the same"),
        ({"generation_kwargs": {"temperature": 0}}, "`temperature` is 0, so all replies"),
        ({"correct_threshold": math.nan}, "`correct_threshold` is nan, which tells no right"),
        ({"top_p": 0.0}, "the options of the sampling cannot work: .*`top_p`=0.0"),
        ({"generation_kwargs": {"num_beams": 4}}, "`num_beams` are not honoured"),
        ({"generation_kwargs": "5"}, "`generation_kwargs` is '5', which is no mapping"),
        ({"required_format": {}}, "'required_format' has neither of `pattern` and `structure`"),
        ({"required_format": {"patern": "7"}}, "`required_format` is refused by the reward format"),
        ({"scripts": ["English"]}, "'English' among its `scripts`"),
        ({"repetition_ngram_size": 0}, "'repetition_ngram_size' has `ngram_size`=0"),
        ({"repetition_unit": "lines"}, "`unit`='lines'"),
        ({"forbidden_patterns": ["("]}, r"`forbidden_patterns` holds '\('"),
    ],
)
def test_each_problem_is_told(changes: dict[str, Any], message: str) -> None:
    assert re.search(message, problems(**changes))


def test_problems_come_all_at_once() -> None:
    assert len(problems(best_n=0, temperature=0.0, scripts=["English"]).splitlines()) == 3


@pytest.mark.parametrize("name", ["use_peft", "load_in_4bit", "load_in_8bit"])
def test_what_would_train_or_quantize_is_refused(name: str) -> None:
    (told,) = policy_problems(ModelConfig(**{name: True}))
    assert f"`{name}` is set" in told


def test_null_asks_for_nothing_on_a_command_line() -> None:
    given = options(required_format="null")
    assert given.rules().format is None
    assert problems(required_format="null") == ""


def test_mappings_are_read_from_a_command_line() -> None:
    given = options(required_format='{"structure": "answer"}', generation_kwargs='{"top_k": 3}')
    assert given.required_format == {"structure": "answer"}
    assert given.sampling()["generation_kwargs"] == {"top_k": 3}


@pytest.mark.parametrize(
    ("changes", "text", "reason"),
    [
        ({"required_format": {"structure": "answer"}}, "7", "format"),
        ({"scripts": ["Latin"]}, "so the 答案 is", "language"),
        ({"scripts": ["Latin"], "min_script_share": 0.6}, "so the 答案 is", None),
        ({"max_repetition": 0.1, "repetition_ngram_size": 1}, "yes yes", "repetition"),
        ({"max_repetition": None, "repetition_ngram_size": 1}, "yes yes", None),
        ({}, "one two three four five six seven eight nine ten " * 9, "repetition"),
        ({"forbidden_patterns": ["```", r"\n\n"]}, "a\n\nb", "forbidden"),
        ({"max_tokens": 3}, "long", "length"),
    ],
)
def test_options_become_the_rules(changes: dict[str, Any], text: str, reason: str | None) -> None:
    assert first_failure(candidate(text=text), options(**changes).rules()) == reason


def test_plain_options_are_taken_over() -> None:
    plain = {
        "correct_threshold": 0.3,
        "keep_truncated": True,
        "keep_special_tokens": True,
        "min_tokens": 2,
        "max_tokens": 9,
        "max_characters": 99,
    }
    rules = options(**plain).rules()
    assert {name: getattr(rules, name) for name in plain} == plain
    chosen = {
        "best_n": 7,
        "prefer": "diversity",
        "max_similarity": 0.7,
        "balance": "uniform",
        "min_pass_rate": 0.1,
        "max_pass_rate": 0.9,
    }
    found = options(**chosen, similarity_ngram_size=3).selection({"math": 2.0})
    assert found == Selection(weights={"math": 2.0}, ngram_size=3, **chosen)  # type: ignore[arg-type]
