"""What an error says, and what it can be caught as."""

from __future__ import annotations

import pytest

from trl_grpo_ext import errors
from trl_grpo_ext.errors import ConfigurationError, ExtGRPOError


def test_configuration_error_with_one_problem_is_that_problem() -> None:
    assert str(ConfigurationError(["`beta` is negative."])) == "`beta` is negative."


def test_configuration_error_numbers_several_problems() -> None:
    error = ConfigurationError(["`beta` is negative.", "`top_p` is above 1.", "No reward."])
    assert str(error) == (
        "3 problems with this run:\n"
        "  1. `beta` is negative.\n"
        "  2. `top_p` is above 1.\n"
        "  3. No reward."
    )


def test_configuration_error_keeps_its_problems_apart_from_the_list_it_was_given() -> None:
    problems = ["`beta` is negative."]
    error = ConfigurationError(problems)
    problems.append("another")
    assert error.problems == ["`beta` is negative."]


@pytest.mark.parametrize(
    ("name", "standard"),
    [
        ("ConfigurationError", ValueError),
        ("RewardError", ValueError),
        ("ContractError", ImportError),
        ("ModelPreparationError", RuntimeError),
        ("ReferenceModelError", ValueError),
    ],
)
def test_every_error_is_ours_and_the_standard_one_it_stands_for(
    name: str, standard: type[Exception]
) -> None:
    assert issubclass(getattr(errors, name), ExtGRPOError)
    assert issubclass(getattr(errors, name), standard)
