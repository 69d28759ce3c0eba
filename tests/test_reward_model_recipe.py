"""The recipe that trains reward models: its data, what the trainers read, the script itself."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from trl import ModelConfig, RewardConfig

from trl_grpo_ext.data import TaskArguments, load_task
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.recipe import read_recipe
from trl_grpo_ext.rewards import build_rewards
from trl_grpo_ext.rewards.models.outcome import OutcomeModelReward
from trl_grpo_ext.rewards.models.process import ProcessModelReward
from trl_grpo_ext.rewards.models.step_reading import step_reader
from trl_grpo_ext.rewards.models.sums import Sum, judge_steps, solve, solve_wrongly
from trl_grpo_ext.rewards.models.training import (
    StepCollator,
    label_tokens,
    load_with_head,
    outcome_trainer,
    process_trainer,
    read_pairs,
)
from trl_grpo_ext.rewards.models.training_data import (
    gold_reply,
    judge_replies,
    preference_pairs,
    sample_replies,
    step_solutions,
)
from trl_grpo_ext.rewards.models.training_options import (
    RewardModelArguments,
    base_problems,
    data_problems,
    training_problems,
)
from trl_grpo_ext.rewards.models.training_report import area_under_curve, measure, pair_accuracy
from trl_grpo_ext.rewards.number import LastNumberReward

ROOT = Path(__file__).parents[1]


def message(text: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def says(reply: list[dict[str, str]]) -> str:
    (only,) = reply
    assert only["role"] == "assistant"
    return only["content"]


# Sums and the labels of their lines -------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "wrong", "alone"),
    [
        (["3 + 4 = 7", "7 - 5 = 2"], [1, 1], [1, 1]),
        (["3 + 4 = 8", "8 - 5 = 3"], [0, 0], [0, 1]),  # a wrong result
        (["3 + 4 = 7", "6 - 5 = 1"], [1, 0], [1, 0]),  # not the result before
        (["3 + 4 = 7", "7 - 6 = 1"], [1, 0], [1, 0]),  # another term
        (["3 - 4 = -1", "-1 - 5 = -6"], [0, 0], [0, 1]),  # the other operator
        (["3 + 4 = 7", "7 - 5 = 2", "2 - 5 = -3"], [1, 1, 0], [1, 1, 0]),  # a line too many
        (["3 + 4 = 7"], [1], [1]),  # a line too few cannot be seen line by line
        (["Let us see:", "3 + 4 = 7"], [0, 0], [0, 1]),
        (["3+4=7.", " 7 - 5 = 2 "], [1, 1], [1, 1]),
        (["3 + 4 - 5 = 2"], [0], [0]),
        (["4 + 3 = 7"], [0], [0]),
        ([""], [0], [0]),
    ],
)
def test_judge_steps(lines: list[str], wrong: list[int], alone: list[int]) -> None:
    question = Sum(3, (("+", 4), ("-", 5)))
    assert judge_steps(question, lines) == [bool(label) for label in wrong]
    assert judge_steps(question, lines, after_error="alone") == [bool(label) for label in alone]


def test_sum_is_the_last_one_in_the_text() -> None:
    assert Sum.in_text("As 1 + 1 is 2, what is 12 - 3 + 40 =\nReply.") == Sum(
        12, (("-", 3), ("+", 40))
    )
    assert Sum.in_text("What is 12?") is None


SUMS = st.builds(
    Sum,
    st.integers(0, 20),
    st.lists(st.tuples(st.sampled_from("+-"), st.integers(0, 20)), min_size=1, max_size=4).map(
        tuple
    ),
)


@given(SUMS)
def test_solve_is_right_and_ends_in_the_value(question: Sum) -> None:
    lines = solve(question)
    assert all(judge_steps(question, lines, after_error="alone"))
    expected = eval(" ".join([str(question.first), *(f"{o} {n}" for o, n in question.terms)]))
    assert lines[-1].endswith(f"= {expected}")


@given(SUMS, st.integers(0, 10**6))
def test_solve_wrongly_has_one_error_on_which_the_rest_builds(question: Sum, seed: int) -> None:
    lines = solve_wrongly(question, random.Random(seed))
    alone = judge_steps(question, lines, after_error="alone")
    assert alone.count(False) == 1
    place = alone.index(False)
    assert judge_steps(question, lines) == [index < place for index in range(len(lines))]


def test_solve_wrongly_errs_at_every_place() -> None:
    question = Sum(3, (("+", 4), ("-", 5)))
    made = [solve_wrongly(question, random.Random(seed)) for seed in range(60)]
    assert {judge_steps(question, lines).index(False) for lines in made} == {0, 1, 2}


# Pairs ------------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [message("2 + 3 ="), message("4 + 4 ="), message("?")],
            "answer": ["5", "8", "x"],
        }
    )


def test_judge_replies_keeps_order_and_what_has_no_score(rows: Dataset) -> None:
    replies = [["5", "6"], [], ["5"]]
    judged = judge_replies(rows, replies, is_correct=LastNumberReward())
    assert judged == [[True, False], [], [None]]


def test_preference_pairs_have_a_right_and_a_wrong_reply(rows: Dataset) -> None:
    replies = [["2 + 3 = 5", "it is 5", "6", "none", "6"], ["9", "7"], ["1"]]
    pairs = preference_pairs(
        rows,
        replies,
        is_correct=LastNumberReward(),
        gold_replies=["gold 5", "4 + 4 = 8", "x"],
        num_pairs=4,
        num_near_misses=2,
    )
    sampled = [
        (row["prompt"][0]["content"], says(row["chosen"]), says(row["rejected"]))
        for row in pairs
        if row["source"] == "sampled"
    ]
    first = [pair for pair in sampled if pair[0] == "2 + 3 ="]
    assert len(set(first)) == 4
    assert set(first) == {
        ("2 + 3 =", r, w) for r in ("2 + 3 = 5", "it is 5") for w in ("6", "none")
    }
    # Nobody is right, so the gold answer stands in; the third prompt has no answer to judge by.
    assert set(sampled) - set(first) == {("4 + 4 =", "4 + 4 = 8", w) for w in ("7", "9")}
    near = [row for row in pairs if row["source"] == "near_miss"]
    assert len(near) == 4
    for row in near:
        right, wrong = says(row["chosen"]), says(row["rejected"])
        assert right[:-1] == wrong[: len(right) - 1]
        assert 1 <= abs(int(right[-1]) - int(wrong[len(right) - 1 :])) <= 3


def test_preference_pairs_refuses_when_there_is_none(rows: Dataset) -> None:
    with pytest.raises(ConfigurationError, match="None of the 3 prompts has a right and a wrong"):
        preference_pairs(
            rows,
            [[], [], []],
            is_correct=LastNumberReward(),
            gold_replies=["5", "8", "x"],
            num_pairs=3,
            num_near_misses=0,
        )


def test_gold_reply_writes_the_question_out() -> None:
    prompt = [*message("You add.", "system"), *message("Now: 7 - 3 =\nReply.")]
    written = gold_reply("{question} {answer}.", prompt=prompt, answer="4", pattern=r"\d[\d +-]*=")
    assert written == "7 - 3 = 4."


def test_sample_replies_do_not_depend_on_the_batch(
    tiny_model: Any, tiny_tokenizer: PreTrainedTokenizerFast, rows: Dataset
) -> None:
    found = [
        sample_replies(
            tiny_model,
            tiny_tokenizer,
            rows,
            num_replies=2,
            max_new_tokens=4,
            seed=3,
            batch_size=size,
        )
        for size in (2, 6)
    ]
    assert found[0] == found[1]
    assert [len(replies) for replies in found[0]] == [2, 2, 2]
    assert found[0][0][0] != found[0][0][1]


def test_step_solutions_are_labelled_by_arithmetic() -> None:
    rows = Dataset.from_dict({"prompt": [message("1 + 2 + 3 =")]})
    replies = [["1 + 2 = 3\n3 + 3 = 7\n", "1 + 2 = 3\n3 + 3 = 7\n", " "]]
    made = step_solutions(rows, replies, num_solutions=2, separator="\n")
    assert made["source"][:] == ["made", "made", "sampled"]
    assert made[0]["completions"] == ["1 + 2 = 3", "3 + 3 = 6"]
    assert made[0]["labels"] == [True, True]
    assert False in made[1]["labels"]
    assert made[2]["completions"] == ["1 + 2 = 3", "3 + 3 = 7"]
    assert made[2]["labels"] == [True, False]


# What the trainers read -------------------------------------------------------------------------


def test_label_tokens_labels_the_last_token_of_each_step(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    solution = {"prompt": "1+2", "completions": ["1+2=3", "ok"], "labels": [True, False]}
    reader = step_reader(tiny_tokenizer, tag="\n", max_tokens=64)
    found = label_tokens(reader, solution)
    # One token a character: three of the prompt, five and a line end, two and a line end.
    expected = [-100] * 8 + [1] + [-100] * 2 + [0]
    assert found["labels"][: len(expected)] == expected
    assert set(found["labels"][len(expected) :]) <= {-100}
    ids = tiny_tokenizer.convert_tokens_to_ids(list("1+21+2=3\nok\n"))
    assert found["input_ids"][: len(ids)] == ids


def test_label_tokens_in_a_conversation_stand_at_the_separators(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    lines = ["1+2=3", "3+3=7"]
    solution = {"prompt": message("1+2+3"), "completions": lines, "labels": [True, False]}
    found = label_tokens(step_reader(tiny_tokenizer, tag="\n", max_tokens=64), solution)
    text = tiny_tokenizer.convert_ids_to_tokens(found["input_ids"])
    places = [i for i, label in enumerate(found["labels"]) if label != -100]
    assert [found["labels"][i] for i in places] == [1, 0]
    assert [text[i] for i in places] == ["\n", "\n"]
    assert ["".join(text[i - 5 : i]) for i in places] == lines


def test_label_tokens_leaves_out_what_is_too_long(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    solution = {"prompt": "1", "completions": ["1+2=3"], "labels": [True]}
    assert label_tokens(step_reader(tiny_tokenizer, tag="\n", max_tokens=5), solution) is None


def test_step_collator_pads_on_the_right() -> None:
    batch = StepCollator(pad_token_id=9)(
        [{"input_ids": [4, 5, 6], "labels": [-100, 1, 0]}, {"input_ids": [7], "labels": [1]}]
    )
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 1, 0], [1, -100, -100]]


def test_read_pairs_writes_the_conversation_as_its_template_does(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    right, wrong = message("5", "assistant"), message("6<|im_end|>", "assistant")
    pairs = Dataset.from_dict({"prompt": [message("2+3")], "chosen": [right], "rejected": [wrong]})
    (row,) = read_pairs(pairs, tiny_tokenizer, max_tokens=64)
    template = tiny_tokenizer.apply_chat_template([*message("2+3"), *right], tokenize=False)
    assert tiny_tokenizer.decode(row["chosen_ids"]) == template
    # What a policy wrote closes no turn: one end-of-turn token a turn, as in the right reply.
    ends = [
        ids.count(tiny_tokenizer.eos_token_id) for ids in (row["chosen_ids"], row["rejected_ids"])
    ]
    assert ends == [2, 2]


def arguments(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 8,
    } | changes


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_outcome_training_lowers_the_loss_and_the_reward_reads_the_folder(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    model, tokenizer = load_with_head(str(tiny_model_dir), kind="outcome", num_layers=1)
    assert model.config.num_hidden_layers == 1
    right, wrong = message("yes", "assistant"), message("no", "assistant")
    prompts = [message(f"{n}?") for n in range(8)]
    pairs = Dataset.from_dict(
        {
            "prompt": prompts,
            "chosen": [right] * 8,
            "rejected": [wrong] * 8,
            "source": ["sampled"] * 8,
        }
    )
    config = RewardConfig(**arguments(tmp_path, gradient_checkpointing=False))
    trainer = outcome_trainer(model, tokenizer, pairs, args=config, max_tokens=64)
    found = losses(trainer)
    assert found[-1] < 0.1 < found[0]
    trainer.save_model()
    folder = str(tmp_path / "out")
    measures = measure(folder, pairs, options=RewardModelArguments(kind="outcome"))
    assert measures["pair_accuracy"] == measures["pair_accuracy_sampled"] == 1.0
    assert measures["num_heldout_pairs"] == 8
    # The score of the reward is the logit that the trained model gave in training.
    ids = torch.tensor([read_pairs(pairs, tokenizer, max_tokens=64)[0]["chosen_ids"]])
    logit = trainer.model.eval()(ids, attention_mask=torch.ones_like(ids)).logits.item()
    (score,) = OutcomeModelReward(folder)(prompts=prompts[:1], completions=[right])
    assert score == pytest.approx(logit, abs=1e-4)


def test_process_training_lowers_the_loss_and_the_reward_reads_the_folder(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    model, tokenizer = load_with_head(str(tiny_model_dir), kind="process")
    assert model.config.id2label == {0: "wrong", 1: "right"}
    prompts = [message(f"{n}?") for n in range(8)]
    solutions = Dataset.from_dict(
        {
            "prompt": prompts,
            "completions": [["yes", "no"]] * 8,
            "labels": [[True, False]] * 8,
            "source": ["made"] * 8,
        }
    )
    config = TrainingArguments(**arguments(tmp_path))
    trainer = process_trainer(model, tokenizer, solutions, args=config, tag="\n", max_tokens=64)
    found = losses(trainer)
    assert found[-1] < 0.1 < found[0]
    trainer.save_model()
    folder = str(tmp_path / "out")
    measures = measure(folder, solutions, options=RewardModelArguments(kind="process"))
    assert measures["step_accuracy"] == measures["step_auc"] == 1.0
    assert measures["num_heldout_steps"] == 16
    assert measures["right_steps_fraction"] == 0.5
    reward = ProcessModelReward(folder, step_separator="\n")
    (steps,) = reward.step_scores(
        prompts=prompts[:1], completions=[message("yes\nno\n", "assistant")]
    )
    assert steps.scores[0] > 0.8
    assert steps.scores[1] < 0.2


def test_load_with_head_leaves_the_body_as_it_is(tiny_model_dir: Path, tiny_model: Any) -> None:
    model, tokenizer = load_with_head(str(tiny_model_dir), kind="outcome")
    assert torch.equal(model.model.embed_tokens.weight, tiny_model.model.embed_tokens.weight)
    assert isinstance(model, AutoModelForSequenceClassification._model_mapping[type(model.config)])
    again, _ = load_with_head(str(tiny_model_dir), kind="outcome")
    assert torch.equal(model.score.weight, again.score.weight)
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_load_with_head_trains_the_last_layers_alone(tmp_path: Path, tiny_model_dir: Path) -> None:
    model, tokenizer = load_with_head(str(tiny_model_dir), kind="process", num_trained_layers=1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = {"prompt": [message("?")] * 8, "completions": [["yes"]] * 8, "labels": [[True]] * 8}
    config = TrainingArguments(**arguments(tmp_path, max_steps=1))
    process_trainer(
        model, tokenizer, Dataset.from_dict(rows), args=config, tag="\n", max_tokens=64
    ).train()
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name for name in changed if name.startswith("model.layers.1.")}
    assert "score.weight" in changed
    assert not {n for n in changed if n.startswith(("model.layers.0.", "model.embed_tokens"))}


def test_measures_by_hand() -> None:
    assert pair_accuracy([1.0, 0.0, 3.0, None], [0.0, 1.0, 3.0, 0.0]) == pytest.approx(1 / 3)
    assert area_under_curve([0.9, 0.8, 0.1], [True, False, True]) == 0.5
    assert area_under_curve([0.2, 0.7], [False, True]) == 1.0
    assert area_under_curve([0.2], [True]) != area_under_curve([0.2], [True])  # NaN


# Options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "both"}, "`kind` is 'both', which is no kind of reward model"),
        ({"num_layers": 0}, "`num_layers` is 0, which leaves no model"),
        ({"num_trained_layers": -1}, "`num_trained_layers` is -1, which is no number of layers"),
        ({"num_candidates": -1}, "`num_candidates` is -1, so there is nothing"),
        ({"num_solutions": 0}, "`num_solutions` is 0, so there is nothing"),
        ({"temperature": 0.0}, "`temperature` is 0.0, so all candidates would be the same"),
        ({"question_pattern": "("}, "`question_pattern` is '(', which is no regular expression"),
        ({"step_separator": ""}, "`step_separator` is empty"),
    ],
)
def test_training_problems(changes: dict[str, Any], message: str) -> None:
    options = RewardModelArguments(**{"kind": "process"} | changes)
    (problem,) = training_problems(options)
    assert problem.startswith(message)


def test_base_problems(tiny_model_dir: Path) -> None:
    options = RewardModelArguments(kind="outcome", num_layers=3)
    model = ModelConfig(model_name_or_path=str(tiny_model_dir), use_peft=True)
    adapter, layers = base_problems(options, model, source="auto", cache_dir=None)
    assert "the rewards load a whole model" in adapter
    assert layers.startswith("`num_layers` is 3, but the model has 2 layers")


def test_data_problems_of_a_process_model(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "Who?", "answer": "I"}\n')
    task = TaskArguments(dataset=str(path), rewards=["last_number"])
    held, rewards, prompts = data_problems(RewardModelArguments(kind="process"), task)
    assert held.startswith("`num_eval_prompts` is 0")
    assert rewards.startswith("`rewards` is set, but the steps of sums are judged by arithmetic")
    assert "has no sum such as 3 + 4 - 5 in 1 of 2 prompts" in prompts


def test_examples_are_turns_in_front_of_the_question(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "4 + 4 =", "answer": "8"}\n')
    task = load_task(
        TaskArguments(
            dataset=str(path),
            system_prompt="Add.",
            prompt_template="Q: {prompt}",
            examples=[{"prompt": "1 + 2 =", "reply": "3"}],
        )
    )
    assert [(m["role"], m["content"]) for m in task.train[0]["prompt"]] == [
        ("system", "Add."),
        ("user", "Q: 1 + 2 ="),
        ("assistant", "3"),
        ("user", "Q: 4 + 4 ="),
    ]
    with pytest.raises(ConfigurationError, match=r"`examples` holds .* no turn to show"):
        load_task(TaskArguments(dataset=str(path), examples=[{"prompt": "1 + 2 ="}]))


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_grpo_yaml_is_one_that_the_recipe_takes(
    kind: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    folder = tmp_path / "model"
    for part in load_with_head(str(tiny_model_dir), kind=kind):
        part.save_pretrained(folder)
    name = f"quickstart_{kind}_model.yaml"
    keys = yaml.safe_load((ROOT / "recipes" / "configs" / name).read_text())
    judge, model = keys["rewards"][:2]
    assert judge == {"name": "last_number", "weight": 0}
    trained_by = f"{'reward' if kind == 'outcome' else 'process'}_model_sums.yaml"
    trained = yaml.safe_load((ROOT / "recipes" / "configs" / trained_by).read_text())
    assert model["arguments"]["model"] == trained["output_dir"]
    shared = {*TASK_KEYS} & (keys.keys() | trained.keys())
    assert {key: keys.get(key) for key in shared} == {key: trained.get(key) for key in shared}
    model["arguments"]["model"] = str(folder)
    keys |= {"model_name_or_path": str(tiny_model_dir), "model_source": "auto"}
    (tmp_path / name).write_text(yaml.safe_dump(keys))
    recipe = read_recipe(["--config", str(tmp_path / name)])
    _, weights = build_rewards(recipe.task.rewards)
    assert weights[:2] == [0.0, 1.0]


TASK_KEYS = ("dataset", "dataset_arguments", "keep_answers", "system_prompt", "prompt_template")
TASK_KEYS += ("examples", "num_eval_prompts", "task_seed", "temperature")


# The script itself ------------------------------------------------------------------------------


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"]


def launch(arguments: list[str], *, processes: int = 1) -> subprocess.CompletedProcess[str]:
    # With --cpu, accelerate would start a single process whatever number is asked for.
    kind = "--cpu" if processes == 1 else "--multi_gpu"
    return subprocess.run(
        [
            *(*LAUNCH, kind, "--num_processes", str(processes)),
            *(str(ROOT / "recipes" / "reward_model.py"), *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture
def write(tmp_path: Path, tiny_model_dir: Path) -> Any:
    """Write a YAML of a short run with the tiny model, with changes to one of ours."""

    def written(name: str, **changes: Any) -> list[str]:
        keys = yaml.safe_load((ROOT / "recipes" / "configs" / f"{name}.yaml").read_text())
        keys |= {
            "model_name_or_path": str(tiny_model_dir),
            "model_source": "auto",
            "num_layers": 1,
            "num_train_prompts": 8,
            "num_eval_prompts": 4,
            "num_candidates": 2,
            "max_new_tokens": 4,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "output_dir": str(tmp_path / "out"),
            "cpu_threads": 1,
        } | changes
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(keys))
        return ["--config", str(path)]

    return written


@pytest.mark.parametrize("name", ["reward_model_sums", "process_model_sums"])
def test_recipe_trains_and_leaves_what_it_promises(name: str, write: Any, tmp_path: Path) -> None:
    done = launch(write(name))
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    measure = "pair_accuracy" if name == "reward_model_sums" else "step_accuracy"
    assert 0 <= summary[measure] <= 1
    assert summary["steps"] > 0
    assert summary["versions"]["trl"]
    assert f"{summary[measure]:.3f}" in done.stdout
    report = (out / "report.md").read_text()
    assert "## Held-out examples" in report
    entries = yaml.safe_load(report.split("```yaml\n")[1].split("```")[0])
    assert entries["rewards"][1]["arguments"]["model"] == str(out)


@pytest.mark.slow
def test_recipe_with_two_processes_gives_the_report_of_one(write: Any, tmp_path: Path) -> None:
    summaries = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        batch = 8 // processes
        changes = {"output_dir": str(folder), "per_device_train_batch_size": batch}
        done = launch(write("reward_model_sums", **changes), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Held-out accuracy of pairs") == 1
        summaries.append(json.loads((folder / "summary.json").read_text()))
    one, two = summaries
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert one["num_train_rows"] == two["num_train_rows"]
    assert one["num_heldout_pairs"] == two["num_heldout_pairs"]
    assert one["steps"] == two["steps"]
    assert one["loss_first"] == pytest.approx(two["loss_first"], rel=1e-4)


def test_recipe_dry_run_says_everything_that_is_wrong_at_once(write: Any, tmp_path: Path) -> None:
    done = launch([*write("process_model_sums", num_layers=9, kin="outcome"), "--dry_run"])
    assert done.returncode != 0
    assert "sets `kin`, which is not an option" in done.stderr
    assert "`num_layers` is 9, but the model has 2 layers" in done.stderr
    done = launch([*write("reward_model_sums"), "--dry_run"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "training prompts: 8, held out: 4" in done.stdout
    assert not (tmp_path / "out").exists()
