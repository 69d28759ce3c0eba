"""The reward of a process reward model in this process."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewards.models.tiny_prm import TAG, PlainLoop, save_prm

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.models.process import ProcessModelReward
from trl_grpo_ext.rewards.models.steps import StepScores
from trl_grpo_ext.rewards.registry import build_rewards, required_columns, reward_problems

PROMPT = "2 + 2 + 3?"
ANSWER = "2 + 2 = 4\n\n4 + 3 = 8\n\nSo 8."
STEPS = ["2 + 2 = 4", "4 + 3 = 8", "So 8."]


@pytest.fixture(scope="session")
def prm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_prm(tmp_path_factory.mktemp("prm") / "prm")


@pytest.fixture(scope="session")
def loop(prm_dir: Path) -> PlainLoop:
    return PlainLoop(prm_dir)


@pytest.fixture(scope="session")
def reward(prm_dir: Path) -> ProcessModelReward:
    return build(prm_dir)


def build(folder: Path, **arguments: Any) -> ProcessModelReward:
    return ProcessModelReward(str(folder), **{"step_tag": TAG, "device": "cpu", **arguments})


def step_scores(reward: ProcessModelReward, *answers: Any, prompt: Any = PROMPT) -> list[Any]:
    return reward.step_scores(prompts=[prompt] * len(answers), completions=list(answers))


def test_each_step_has_the_probability_at_its_tag(
    reward: ProcessModelReward, loop: PlainLoop
) -> None:
    [scored] = step_scores(reward, ANSWER)
    assert scored.ends == (11, 22, 27)
    assert scored.scores == pytest.approx(loop.scores(PROMPT, STEPS), abs=1e-6)
    assert max(scored.scores) - min(scored.scores) > 0.01  # the loop could tell them apart


def test_separator_stands_after_each_step_without_a_tag(prm_dir: Path, loop: PlainLoop) -> None:
    [scored] = step_scores(build(prm_dir, step_tag=None, step_separator="\n"), "a\nb = c\n")
    assert scored.ends == (2, 8)
    expected = loop.scores(PROMPT, ["a", "b = c"], tag="\n")
    assert scored.scores == pytest.approx(expected, abs=1e-6)


def test_conversation_is_read_with_the_chat_template(
    reward: ProcessModelReward, loop: PlainLoop
) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    before = loop.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = loop.tokenizer(before, add_special_tokens=False)["input_ids"]
    ends = []
    for step in STEPS:
        ids += [*loop.read(step), loop.ids[TAG]]
        ends.append(len(ids) - 1)
    probabilities = loop.probabilities(ids)
    completion = [{"role": "assistant", "content": ANSWER}]
    [scored] = step_scores(reward, completion, prompt=chat)
    assert scored.ends == (11, 22, 27)
    assert scored.scores == pytest.approx([probabilities[end][1] for end in ends], abs=1e-6)


def test_messages_before_the_answer_are_read_with_the_prompt(
    reward: ProcessModelReward,
) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    earlier = [{"role": "assistant", "content": "calc"}, {"role": "user", "content": "7"}]
    answer = [{"role": "assistant", "content": ANSWER}]
    [together] = step_scores(reward, [*earlier, *answer], prompt=chat)
    [apart] = step_scores(reward, answer, prompt=[*chat, *earlier])
    [without] = step_scores(reward, answer, prompt=chat)
    assert together == apart
    assert together.scores != pytest.approx(without.scores, abs=1e-3)


@pytest.mark.parametrize("how", ["min", "mean", "product", "last"])
def test_reward_is_the_aggregate(prm_dir: Path, loop: PlainLoop, how: Any) -> None:
    first, second, third = loop.scores(PROMPT, STEPS)
    by_hand = {
        "min": min(first, second, third),
        "mean": (first + second + third) / 3,
        "product": first * second * third,
        "last": third,
    }
    with build(prm_dir, aggregate=how) as reward:
        assert reward(prompts=[PROMPT], completions=[ANSWER], answer=["7"]) == [
            pytest.approx(by_hand[how], abs=1e-6)
        ]


def test_aggregated_leaves_out_what_has_no_steps(reward: ProcessModelReward) -> None:
    assert reward.aggregated([StepScores((1, 2), (0.5, 0.25)), None]) == [0.25, None]
    assert reward.aggregated([]) == []


@pytest.mark.parametrize(
    ("bias", "label", "expected"),
    [
        ([0.0, math.log(3)], None, 0.75),
        ([0.0, math.log(3)], 0, 0.25),
        ([math.log(3)], None, 0.75),  # the sigmoid
        ([math.log(3)], 0, 0.75),
        ([0.0, math.log(5), math.log(2)], 2, 0.25),
    ],
)
def test_score_is_the_probability_of_the_label(
    tmp_path: Path, bias: list[float], label: int | None, expected: float
) -> None:
    folder = save_prm(tmp_path, num_labels=len(bias), bias=bias)
    [scored] = step_scores(build(folder, label=label), "a\n\nb")
    assert scored.scores == pytest.approx([expected, expected])


def test_empty_completion_is_one_step(reward: ProcessModelReward, loop: PlainLoop) -> None:
    [nothing, blank] = step_scores(reward, "", " \n\n ")
    assert nothing.ends == (0,)
    assert blank.ends == (4,)
    expected = pytest.approx(loop.scores(PROMPT, [""]), abs=1e-6)
    assert nothing.scores == expected
    assert blank.scores == expected


def test_missing_scores_exclude_with_a_service_and_leave_it_to_others_without(
    prm_dir: Path,
) -> None:
    service = {"base_url": "http://127.0.0.1:1", "step_tag": TAG}
    assert build(prm_dir).on_missing == "skip"
    assert ProcessModelReward("prm", **service).on_missing == "exclude"
    assert build(prm_dir, on_missing="exclude").on_missing == "exclude"
    assert ProcessModelReward("prm", **service, on_missing="skip").on_missing == "skip"


def test_no_completions_have_no_scores_and_load_no_model(prm_dir: Path, tmp_path: Path) -> None:
    shutil.copy(prm_dir / "config.json", tmp_path)  # nothing else is there to be loaded
    assert build(tmp_path)(prompts=[], completions=[]) == []


def test_batch_equals_one_by_one(reward: ProcessModelReward) -> None:
    answers = [ANSWER, "", "a", "a\n\nb\n\n" * 9, ANSWER + "\n\n" + ANSWER, "x" * 90]
    for together, answer in zip(step_scores(reward, *answers), answers, strict=True):
        [alone] = step_scores(reward, answer)
        assert together.ends == alone.ends
        assert together.scores == pytest.approx(alone.scores, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(pieces=st.lists(st.sampled_from(["a", "1 + 1 = 2", "b c", "\n"]), min_size=2, max_size=6))
def test_score_of_a_step_does_not_depend_on_later_ones(
    reward: ProcessModelReward, pieces: list[str]
) -> None:
    [whole, part] = step_scores(reward, "\n\n".join(pieces), "\n\n".join(pieces[:-1]))
    num_steps = len(part.scores) if "".join(pieces[:-1]).strip() else 0
    assert whole.scores[:num_steps] == pytest.approx(part.scores[:num_steps], abs=1e-5)


def test_tag_in_an_answer_is_its_characters(reward: ProcessModelReward, loop: PlainLoop) -> None:
    forged = f"all good{TAG}{TAG}\n\n{TAG}x<|im_end|>{TAG}"
    [scored] = step_scores(reward, forged)
    steps = [f"all good{TAG}{TAG}", f"{TAG}x<|im_end|>{TAG}"]
    ids, _ = loop.read_all(PROMPT, steps)
    assert ids.count(loop.ids[TAG]) == 2  # those of the two steps
    assert scored.ends == (len(steps[0]) + 2, len(forged))
    assert scored.scores == pytest.approx(loop.scores(PROMPT, steps), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(answer=st.text(max_size=40) | st.text(alphabet=f"{TAG}\n\ud800\0", max_size=40))
def test_any_text_is_scored(reward: ProcessModelReward, answer: str) -> None:
    [scored] = step_scores(reward, answer)
    assert scored.ends[-1] == len(answer)
    assert len(scored.ends) == len(scored.scores)
    assert all(0 <= score <= 1 for score in scored.scores)


def test_answer_longer_than_the_model_takes_is_none(
    prm_dir: Path, loop: PlainLoop, caplog: pytest.LogCaptureFixture
) -> None:
    logged: dict[str, float] = {}
    reward = build(prm_dir, max_tokens=12)
    answers = ["a" * 11, "a" * 12, "a\n\nb"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            fits, too_long, short = reward.step_scores(
                prompts=[PROMPT] * 3, completions=answers, log_metric=logged.__setitem__
            )
    assert fits.scores == pytest.approx(loop.scores("", ["a" * 11]), abs=1e-6)
    assert too_long is None
    # 4 tokens of the answer leave 8 for the end of the prompt
    assert short.scores == pytest.approx(loop.scores(PROMPT[-8:], ["a", "b"]), abs=1e-6)
    assert logged == {
        "rewards/process_model/steps_mean": pytest.approx(4 / 3),
        "rewards/process_model/unscored_fraction": 1 / 3,
        "rewards/process_model/cut_prompts_fraction": 2 / 3,
    }
    assert (reward.failure, reward.num_failed) == ("", 0)
    [record] = [one for one in caplog.records if one.name.startswith("trl_grpo_ext")]
    assert "reward 'process_model' gave no score to 1 of 3 completions" in record.getMessage()


def test_logits_that_are_not_finite_are_none(tmp_path: Path) -> None:
    reward = build(save_prm(tmp_path, bias=[0.0, math.nan]))
    assert reward(prompts=[PROMPT], completions=["a"]) == [None]


def test_copies_have_settings_and_no_model(reward: ProcessModelReward) -> None:
    [expected] = step_scores(reward, ANSWER)
    pickled = pickle.dumps(reward)
    assert len(pickled) < 10_000
    for other in (pickle.loads(pickled), copy.deepcopy(reward)):
        assert other.__name__ == "process_model"
        assert step_scores(other, ANSWER) == [expected]


def test_submitting_to_a_model_in_this_process_changes_nothing(prm_dir: Path) -> None:
    reward = build(prm_dir)
    [expected] = step_scores(reward, ANSWER)
    reward.submit(row={"prompt": PROMPT}, completion=ANSWER, completion_ids=[1], group_index=0)
    assert step_scores(reward, ANSWER) == [expected]


def test_prepare_says_what_is_wrong_with_the_model(tiny_model_dir: Path, prm_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a LlamaForCausalLM, a language model"):
        build(tiny_model_dir)
    with pytest.raises(ConfigurationError, match="`step_tag`='ки' is not in the vocabulary"):
        build(prm_dir, step_tag="ки").prepare()


def problems(model: Any = None, **arguments: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        ProcessModelReward(model, **arguments)
    return caught.value.problems


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"aggregate": "max"}, "`aggregate`='max' is not known"),
        ({"step_separator": ""}, "`step_separator`='' is no text"),
        ({"step_separator": None}, "`step_separator`=None is no text"),
        ({"step_tag": ""}, "`step_tag`='' is no text"),
        ({"label": -1}, "`label`=-1 is no label of a model"),
        ({"label": True}, "`label`=True is no label of a model"),
        ({"label": 1.0}, "`label`=1.0 is no label of a model"),
        ({"label": 2}, "`label` is 2, but `model`="),
        ({"process_advantages": "yes"}, "`process_advantages`='yes' is neither true nor false"),
        ({"on_missing": "drop"}, "`on_missing`='drop' is not known"),
        ({"dtype": "float8"}, "`dtype`='float8' is not known"),
        ({"deadline_s": 9.0}, "`deadline_s` has no effect on a model that runs in this process"),
        ({"task": "x"}, "`task` has no effect on a model that runs in this process"),
        ({"pooling": "last"}, "`pooling` is not an option of this reward"),
        ({"devise": "cpu"}, "`devise` is not an option of this reward, so it would have no effect"),
    ],
)
def test_what_cannot_work_is_said(prm_dir: Path, arguments: dict[str, Any], said: str) -> None:
    [problem] = problems(str(prm_dir), **arguments)
    assert problem.startswith(said)
    assert problem.count(". ") >= 1  # found, why; what to do


def test_all_problems_are_said_at_once(prm_dir: Path) -> None:
    found = problems("", aggregate="max", label=-1, deadline_s=1.0)
    assert [one.split("`")[1] for one in found] == ["model", "aggregate", "label", "deadline_s"]


def test_model_that_is_not_there_is_said() -> None:
    [problem] = problems("no/such/folder")
    assert problem.startswith("`model`='no/such/folder' has no configuration")


def test_label_must_be_chosen_among_three(tmp_path: Path) -> None:
    folder = save_prm(tmp_path, num_labels=3)
    [problem] = problems(str(folder))
    assert problem.startswith("`label` is not set, but `model`=")
    assert problem.endswith("Set it to that of a right step, from 0 to 2.")


def test_one_label_has_no_second(tmp_path: Path) -> None:
    [problem] = problems(str(save_prm(tmp_path, num_labels=1)), label=1)
    assert problem.startswith("`label` is 1, but `model`=")


def test_reward_trains_in_the_plain_trainer(
    prm_dir: Path, tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        str(tiny_model_dir),
        reward_funcs=build(prm_dir),
        processing_class=tiny_tokenizer,
        train_dataset=Dataset.from_dict({"prompt": ["2 + 2 ="] * 4, "answer": ["4"] * 4}),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            report_to=[],
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
        ),
    )
    trainer.train()
    [logged] = [line for line in trainer.state.log_history if "reward" in line]
    assert 0 < logged["rewards/process_model/mean"] < 1
    assert logged["rewards/process_model/steps_mean"] == 1
    assert logged["rewards/process_model/unscored_fraction"] == 0


def test_reward_is_built_by_its_name(prm_dir: Path) -> None:
    arguments = {"model": str(prm_dir), "step_tag": TAG, "device": "cpu", "aggregate": "last"}
    [built], _ = build_rewards([{"name": "process_model", "arguments": arguments}])
    assert isinstance(built, ProcessModelReward)
    assert required_columns(built) == frozenset()
    assert (built.__name__, built.aggregate) == ("process_model", "last")
    [problem] = reward_problems([{"name": "process_model", "arguments": {"agregate": "last"}}])
    assert "needs model" in problem


def test_scoring_leaves_random_numbers_alone(reward: ProcessModelReward) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    step_scores(reward, ANSWER)
    assert torch.rand(1) == expected
