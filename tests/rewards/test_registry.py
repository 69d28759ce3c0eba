import inspect
from pathlib import Path

import pytest
from trl.trainer.utils import get_callable_name

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.format import FormatReward
from trl_grpo_ext.rewards.number import LastNumberReward
from trl_grpo_ext.rewards.registry import (
    BUILT_IN_REWARDS,
    RewardEntry,
    RewardSpec,
    build_rewards,
    required_columns,
    resolve_reward,
    reward_problems,
)

KNOWN = ", ".join(sorted(BUILT_IN_REWARDS))

MODULE = """
NOT_CALLABLE = 3

def brevity(completions, limit, scale=1.0, **columns):
    return [scale * (len(text) <= limit) for text in completions]

def narrow(prompts, completions, completion_ids, solution, tolerance=0.1):
    return [0.0 for _ in completions]

def solved(prompts, completions, completion_ids, solution, tolerance=0.1, **columns):
    return [float(text == gold) for text, gold in zip(completions, solution)]

async def slow(completions, wait=0, **columns):
    return [1.0 for _ in completions]

class Picky:
    def __init__(self, *, level):
        if level > 1:
            raise ValueError("level is above 1")
        self.__name__ = "picky"

    def __call__(self, *, completions, **columns):
        return [0.5 for _ in completions]
"""


@pytest.fixture(autouse=True)
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


def problem(entry: RewardEntry) -> str:
    (message,) = reward_problems([entry])
    return message


@pytest.mark.parametrize("name", sorted(BUILT_IN_REWARDS))
def test_resolve_reward_finds_every_built_in_name(name: str) -> None:
    assert inspect.isclass(resolve_reward(name))


def test_resolve_reward_finds_an_object_at_an_import_path() -> None:
    assert resolve_reward("my_rewards:brevity").__name__ == "brevity"


def test_build_rewards_returns_functions_and_weights_when_given_names_and_mappings() -> None:
    functions, weights = build_rewards(
        [
            "last_number",
            {"name": "format", "weight": 0.25, "arguments": {"pattern": "7"}},
            RewardSpec(name="my_rewards:Picky", weight=-1.0, arguments={"level": 1}),
            {"name": "my_rewards:slow", "weight": "1e-1", "arguments": None},
        ]
    )
    assert isinstance(functions[0], LastNumberReward)
    assert isinstance(functions[1], FormatReward)
    assert functions[1](completions=["7", "8"]) == [1.0, 0.0]
    assert functions[2](completions=["a"]) == [0.5]
    assert weights == [1.0, 0.25, -1.0, 0.1]


def test_build_rewards_binds_the_arguments_of_a_function_and_keeps_its_name() -> None:
    arguments = {"limit": 2, "scale": 3.0}
    (brevity,), _ = build_rewards([{"name": "my_rewards:brevity", "arguments": arguments}])
    assert brevity(prompts=["?", "?"], completions=["ab", "abc"]) == [3.0, 0.0]
    assert vars(brevity)["__name__"] == get_callable_name(brevity) == "brevity"


def test_build_rewards_passes_any_argument_on_when_the_function_takes_any() -> None:
    arguments = {"limit": 2, "not_named": 1}
    (brevity,), _ = build_rewards([{"name": "my_rewards:brevity", "arguments": arguments}])
    assert brevity(completions=["ab"]) == [1.0]


def test_build_rewards_keeps_a_function_asynchronous_when_it_is_bound() -> None:
    (slow,), _ = build_rewards([{"name": "my_rewards:slow", "arguments": {"wait": 1}}])
    assert inspect.iscoroutinefunction(slow)


def test_build_rewards_raises_all_problems_at_once() -> None:
    specs: list[RewardEntry] = [
        "last_numbr",
        {"name": "format"},
        {"name": "my_rewards:absent"},
        {"weight": 1.0},
    ]
    with pytest.raises(ConfigurationError) as error:
        build_rewards(specs)
    assert error.value.problems == reward_problems(specs)
    assert len(error.value.problems) == 4


def test_reward_problems_is_empty_when_all_can_be_built() -> None:
    assert reward_problems(["last_number", "my_rewards:solved"]) == []


def test_reward_problems_suggests_a_close_name_when_the_name_is_unknown() -> None:
    assert problem("last_numbr") == (
        f"reward 'last_numbr' is not known (known: {KNOWN}), so the replies cannot be scored. Set "
        "`name` in `rewards` to 'last_number', or to an import path `package.module:object`."
    )
    assert "to one of them, or" in problem("zzz")


def test_reward_problems_says_why_when_an_import_path_leads_nowhere() -> None:
    assert problem("no_such_module:f") == (
        "reward 'no_such_module:f' could not be imported (ModuleNotFoundError: No module named "
        "'no_such_module'), so the replies cannot be scored. Correct the import path in "
        "`rewards`, or install the module or add its folder to PYTHONPATH."
    )
    assert "has no attribute 'absent'" in problem("my_rewards:absent")
    assert "(ValueError: " in problem("not a module:f")


def test_reward_problems_says_so_when_an_import_path_is_not_callable() -> None:
    assert problem("my_rewards:NOT_CALLABLE") == (
        "reward 'my_rewards:NOT_CALLABLE' is a int, which cannot be called to score replies. Set "
        "the import path in `rewards` to a function or a class."
    )


def test_reward_problems_names_the_accepted_arguments_when_one_is_wrong() -> None:
    assert problem({"name": "last_number", "arguments": {"column": "answer"}}) == (
        "reward 'last_number' does not accept column, so it cannot be built. It accepts "
        "answer_column, log_as: correct its `arguments` in `rewards`."
    )
    assert "does not accept typo, so it" in problem(
        {"name": "my_rewards:narrow", "arguments": {"typo": 1}}
    )
    assert "It accepts solution, tolerance:" in problem(
        {"name": "my_rewards:narrow", "arguments": {"typo": 1}}
    )


def test_reward_problems_names_the_missing_argument_when_a_class_needs_it() -> None:
    assert problem({"name": "language", "arguments": {"script": "Latin"}}) == (
        "reward 'language' does not accept script and needs scripts, so it cannot be built. It "
        "accepts log_as, scripts: correct its `arguments` in `rewards`."
    )


def test_reward_problems_passes_on_what_a_constructor_refuses() -> None:
    assert problem({"name": "my_rewards:Picky", "arguments": {"level": 2}}) == (
        "reward 'my_rewards:Picky' refused its arguments (ValueError: level is above 1), so the "
        "replies cannot be scored. Correct its `arguments` in `rewards`."
    )
    assert problem({"name": "format", "arguments": {"pattern": "("}}).startswith(
        "reward 'format' has `pattern`='('"
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "last_number", "wieght": 2}, "has the unknown keys wieght, which would"),
        ({"name": "last_number", "weight": "x"}, "has `weight`='x', which is not a finite"),
        ({"name": "last_number", "weight": float("nan")}, "has `weight`=nan, which is not"),
        ({"name": "last_number", "weight": None}, "has `weight`=None, which is not"),
        ({"name": "last_number", "arguments": [1]}, "has `arguments`=[1], which is not a mapping"),
        ({"weight": 2.0}, "holds {'weight': 2.0}, which names no reward"),
        (7, "holds 7, which names no reward"),
    ],
)
def test_reward_problems_describes_an_entry_that_is_malformed(
    entry: RewardEntry, message: str
) -> None:
    assert message in problem(entry)


def test_reward_problems_says_so_when_two_rewards_share_a_name() -> None:
    entry = {"name": "format", "arguments": {"pattern": "7"}}
    other = {"name": "format", "arguments": {"pattern": "7", "log_as": "other"}}
    assert reward_problems([entry, other]) == []
    assert reward_problems([entry, entry, "last_number"]) == [
        "2 of the `rewards` are called 'format', so their curves would be merged in the logs. "
        "Give each its own name: built-in rewards take `log_as` in their `arguments`, your own "
        "set `__name__`."
    ]


def test_reward_problems_wants_at_least_one_reward() -> None:
    assert reward_problems([]) == [
        f"`rewards` is empty, so there is nothing to learn from. Add at least one of {KNOWN}, or "
        "an import path `package.module:object`."
    ]


def test_required_columns_are_what_trl_does_not_pass_on_its_own() -> None:
    (solved, bound, last), _ = build_rewards(
        [
            "my_rewards:solved",
            {"name": "my_rewards:brevity", "arguments": {"limit": 3}},
            {"name": "last_number", "arguments": {"answer_column": "gold"}},
        ]
    )
    assert required_columns(solved) == {"solution"}
    assert required_columns(bound) == frozenset()
    assert required_columns(last) == {"gold"}


def test_reward_problems_names_what_trl_could_not_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "not_rewards.py").write_text(
        "def make(scale):\n    return lambda *, completions, **_: [scale for _ in completions]\n"
        "class Silent:\n    pass\n"
        "def narrow(prompts, completions, answer):\n    return [0.0 for _ in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for entry in (
        {"name": "not_rewards:make", "arguments": {"scale": 2.0}},
        "not_rewards:Silent",
        "not_rewards:narrow",
    ):
        (problem,) = reward_problems([entry])
        assert "does not accept `completion_ids`, which TRL passes" in problem
        assert "not one that makes a function" in problem
