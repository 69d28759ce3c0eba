from __future__ import annotations

import copy
import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from rewards.models.tiny_orm import logits_at, save_orm, without_architecture
from runs import series, settings, train
from tiny import build_tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.models.outcome import OutcomeModelReward
from trl_grpo_ext.rewards.registry import build_rewards, reward_problems

PROMPTS = ["1+1=", "2+2=", "Say hi: ", "1+1="]
REPLIES = ["2", "It is 5, or so I think.", "hi<|im_end|>", "3"]


@pytest.fixture(scope="session")
def orm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_orm(tmp_path_factory.mktemp("orm") / "one")


@pytest.fixture(scope="session")
def three_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_orm(tmp_path_factory.mktemp("orm") / "three", num_labels=3)


def make(folder: Path, **arguments: Any) -> OutcomeModelReward:
    return OutcomeModelReward(str(folder), device="cpu", **arguments)


def problems_of(folder: Path | str, **arguments: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        OutcomeModelReward(str(folder), **arguments)
    return caught.value.problems


def plain_score(folder: Path, prompt: str, reply: str) -> list[float]:
    """The head at the EOS token that ends prompt and reply, each character a token."""
    ids = build_tiny_tokenizer().convert_tokens_to_ids([*prompt, *reply, "<|im_end|>"])
    return logits_at(folder, ids)


def in_turns(texts: Sequence[str], role: str) -> list[list[dict[str, str]]]:
    return [[{"role": role, "content": text}] for text in texts]


# Scores -------------------------------------------------------------------------------------------


def test_score_is_the_logit_at_the_end_of_prompt_and_reply(orm_dir: Path) -> None:
    scores = make(orm_dir)(prompts=PROMPTS, completions=REPLIES, answer=[None] * 4)
    expected = [plain_score(orm_dir, *pair)[0] for pair in zip(PROMPTS, REPLIES, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in expected}) == 4


def test_message_before_the_last_one_is_a_turn_of_its_own(orm_dir: Path) -> None:
    [prompt], messages = in_turns(["1+1="], "user"), in_turns(["It", "is 2."], "assistant")
    completion = [message for [message] in messages]
    ids = build_tiny_tokenizer().apply_chat_template([*prompt, *completion])["input_ids"]
    scores = make(orm_dir)(prompts=[prompt], completions=[completion])
    assert scores == pytest.approx(logits_at(orm_dir, ids), abs=1e-5)


def test_conversation_is_scored_at_the_end_of_its_template(orm_dir: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    [score] = make(orm_dir)(
        prompts=in_turns(["1+1?"], "user"), completions=in_turns(["2"], "assistant")
    )
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert score == pytest.approx(logits_at(orm_dir, ids)[0], abs=1e-5)


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_label_and_activation_choose_the_score(three_dir: Path, activation: Any) -> None:
    logits = plain_score(three_dir, "1+1=", "2")
    expected = {
        "none": logits[2],
        "sigmoid": 1 / (1 + math.exp(-logits[2])),
        "softmax": math.exp(logits[2]) / sum(map(math.exp, logits)),
    }
    [score] = make(three_dir, label=2, activation=activation)(prompts=["1+1="], completions=["2"])
    assert score == pytest.approx(expected[activation], abs=1e-5)


def test_reply_that_is_too_long_has_no_score_and_is_told_once(
    orm_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged: dict[str, float] = {}
    reward = make(orm_dir, max_tokens=6)  # one of them for EOS
    asked: dict[str, Any] = {"prompts": ["1+1="] * 3, "completions": ["2", "12345", "123456"]}
    with caplog.at_level(logging.WARNING):
        scores = reward(**asked, log_metric=logged.__setitem__)
        reward(**asked)
    expected = [plain_score(orm_dir, "1+1=", "2")[0], plain_score(orm_dir, "", "12345")[0]]
    assert scores == [*(pytest.approx(score, abs=1e-5) for score in expected), None]
    assert logged == {
        "rewards/outcome_model/too_long_fraction": 1 / 3,
        "rewards/outcome_model/cut_prompts_fraction": 1 / 3,
    }
    [record] = caplog.records
    assert "of more than 6 tokens, and 1 of 3 are longer" in record.getMessage()


def test_scores_of_no_completions_are_none(orm_dir: Path) -> None:
    assert make(orm_dir, normalize=True)(prompts=[], completions=[]) == []


def test_scoring_is_repeatable_and_leaves_random_numbers_alone(orm_dir: Path) -> None:
    before = torch.get_rng_state()
    first, second = (make(orm_dir)(prompts=PROMPTS, completions=REPLIES) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


# Normalization ------------------------------------------------------------------------------------


def test_normalized_scores_are_those_of_numpy_over_all_so_far(orm_dir: Path) -> None:
    reward, plain = make(orm_dir, normalize=True), make(orm_dir)
    seen: list[float] = []
    logged: dict[str, float] = {}
    for shift in range(3):
        asked: dict[str, Any] = {
            "prompts": PROMPTS,
            "completions": [f"{r}{shift}" for r in REPLIES],
        }
        raw = np.array(plain(**asked), dtype=float)
        seen += raw.tolist()
        expected = (raw - np.mean(seen)) / np.std(seen, ddof=1)
        assert reward(**asked, log_metric=logged.__setitem__) == pytest.approx(expected, abs=1e-5)
        assert logged["rewards/outcome_model/running_mean"] == pytest.approx(np.mean(seen))
        assert logged["rewards/outcome_model/running_std"] == pytest.approx(np.std(seen, ddof=1))


def test_missing_score_is_no_part_of_the_mean(orm_dir: Path) -> None:
    reward = make(orm_dir, normalize=True, max_tokens=8)
    scores = reward(prompts=["1="] * 3, completions=["2", "33", "long reply"])
    assert scores[2] is None
    assert sorted(scores[:2]) == pytest.approx([-(0.5**0.5), 0.5**0.5])  # two are as far apart
    assert reward.state_dict()["count"] == 2


def test_frozen_moments_are_used_and_not_changed(orm_dir: Path) -> None:
    reward = make(orm_dir, normalize=True)
    reward(prompts=PROMPTS, completions=REPLIES)
    state = reward.state_dict()
    reward.frozen = True
    [score] = reward(prompts=["3+3="], completions=["6"])
    raw = plain_score(orm_dir, "3+3=", "6")[0]
    seen = [plain_score(orm_dir, *pair)[0] for pair in zip(PROMPTS, REPLIES, strict=True)]
    assert score == pytest.approx((raw - np.mean(seen)) / np.std(seen, ddof=1), abs=1e-4)
    assert reward.state_dict() == state


def test_saved_state_goes_on_in_another_object(orm_dir: Path) -> None:
    one, other = make(orm_dir, normalize=True), make(orm_dir, normalize=True)
    one(prompts=PROMPTS, completions=REPLIES)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    asked: dict[str, Any] = {"prompts": PROMPTS[:2], "completions": ["7", "8"]}
    assert one(**asked) == other(**asked)


# Construction and life ----------------------------------------------------------------------------


def test_constructor_reads_no_weights(orm_dir: Path, tmp_path: Path) -> None:
    shutil.copy(orm_dir / "config.json", tmp_path)
    reward = make(tmp_path)
    with pytest.raises(ConfigurationError, match="could not be loaded as a sequence-class"):
        reward.prepare()


def test_constructor_refuses_what_cannot_work(orm_dir: Path, three_dir: Path) -> None:
    [problem] = problems_of("/no/model")
    assert "`model`='/no/model' has no configuration that can be read" in problem
    assert problems_of(orm_dir, activation="tanh", dtype="half")[0].startswith(
        "`activation`='tanh'"
    )
    assert len(problems_of(orm_dir, activation="tanh", dtype="half", max_tokens=0)) == 3
    [problem] = problems_of(orm_dir, activation="softmax")
    assert "has one label, is always 1. Set `activation` to 'sigmoid' or 'none'" in problem
    [problem] = problems_of(three_dir)
    assert "has 3 labels, and none of them is the reward. Set `label` to an index from 0" in problem
    [problem] = problems_of(three_dir, label=3)
    assert "`label`=3 is no logit" in problem
    assert len(problems_of(three_dir, label=-1)) == 1


def test_untrained_head_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a LlamaForCausalLM, a language model"):
        make(tiny_model_dir)
    nameless = without_architecture(tiny_model_dir, tmp_path / "nameless")
    with pytest.raises(ConfigurationError, match=r"'score.weight'.* its scores would be random"):
        make(nameless, label=0).prepare()


def test_reward_is_built_by_its_name(orm_dir: Path) -> None:
    entry = {"name": "outcome_model", "arguments": {"model": str(orm_dir), "log_as": "taste"}}
    [reward], _ = build_rewards([entry])
    assert reward.__name__ == "taste"
    [problem] = reward_problems([{"name": "outcome_model", "arguments": {"modle": "x"}}])
    assert "does not accept modle and needs model" in problem


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copy_has_the_state_and_loads_its_own_model(
    orm_dir: Path, copied: Callable[[Any], Any]
) -> None:
    reward = make(orm_dir, normalize=True)
    reward(prompts=PROMPTS, completions=REPLIES)
    other = copied(reward)
    assert len(pickle.dumps(other)) < 5000  # the weights are not in it
    asked: dict[str, Any] = {"prompts": PROMPTS, "completions": REPLIES[::-1]}
    assert other(**asked) == reward(**asked)


def test_closed_reward_gives_the_model_back_and_loads_it_again(orm_dir: Path) -> None:
    reward = make(orm_dir)
    before = reward(prompts=PROMPTS, completions=REPLIES)
    reward.close()
    assert len(pickle.dumps(reward)) < 5000
    assert reward(prompts=PROMPTS, completions=REPLIES) == before


# In training --------------------------------------------------------------------------------------


def test_plain_trl_trains_with_it(tiny_model_dir: Path, orm_dir: Path, tmp_path: Path) -> None:
    tokenizer, reward = build_tiny_tokenizer(), make(orm_dir)
    seen: list[float] = []

    def noted(*, prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        scores = reward(prompts=prompts, completions=completions, **columns)
        both = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        encoded = tokenizer(both, split_special_tokens=True)["input_ids"]
        expected = [logits_at(orm_dir, [*ids, tokenizer.eos_token_id])[0] for ids in encoded]
        assert scores == pytest.approx(expected, abs=1e-4)
        seen.extend(expected)
        return scores

    config = GRPOConfig(**settings(tmp_path, max_steps=2))
    data = Dataset.from_dict({"prompt": ["1+1=", "2+2=", "3+3=", "4+4="]})
    history, _ = train(GRPOTrainer(str(tiny_model_dir), noted, config, data))
    means = [np.mean(seen[:8]), np.mean(seen[8:])]
    assert series(history, "reward") == pytest.approx(means, abs=1e-4)


def test_plain_trl_logs_it_by_its_name(tiny_model_dir: Path, orm_dir: Path, tmp_path: Path) -> None:
    reward = make(orm_dir, normalize=True)
    config = GRPOConfig(**settings(tmp_path, max_steps=2))
    data = Dataset.from_dict({"prompt": in_turns(["1+1=", "2+2=", "3+3=", "4+4="], "user")})
    history, _ = train(GRPOTrainer(str(tiny_model_dir), reward, config, data))
    first, second = series(history, "rewards/outcome_model/mean")
    assert first == pytest.approx(0, abs=1e-6)  # the mean of the first batch is its own
    assert second != pytest.approx(0, abs=1e-6)
    assert series(history, "rewards/outcome_model/too_long_fraction") == [0.0, 0.0]
    assert reward.state_dict()["count"] == 16


def test_trainer_loads_it_first_keeps_its_mean_and_freezes_it_in_evaluation(
    tiny_model_dir: Path, orm_dir: Path, tmp_path: Path
) -> None:
    data = Dataset.from_dict({"prompt": ["1+1=", "2+2=", "3+3=", "4+4="]})
    options = settings(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    options |= {"per_device_eval_batch_size": 4, "num_generations_eval": 2}
    nameless = without_architecture(tiny_model_dir, tmp_path / "nameless")
    untrained, config = make(nameless, label=0), ExtGRPOConfig(**options)
    with pytest.raises(ConfigurationError, match="its scores would be random"):
        ExtGRPOTrainer(str(tiny_model_dir), untrained, config, data)

    whole = make(orm_dir, normalize=True)
    trainer = ExtGRPOTrainer(str(tiny_model_dir), whole, ExtGRPOConfig(**options), data, data)
    assert whole._model is not None
    trainer.train()
    state = whole.state_dict()
    assert state["count"] == 32
    trainer.evaluate()
    assert whole.state_dict() == state

    resumed = make(orm_dir, normalize=True)
    trainer = ExtGRPOTrainer(str(tiny_model_dir), resumed, ExtGRPOConfig(**options), data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.state_dict() == state


TWO = """
import json, sys
from accelerate import PartialState
from trl_grpo_ext.rewards.models.outcome import OutcomeModelReward

state = PartialState(cpu=True)
reward = OutcomeModelReward(sys.argv[1], normalize=True, max_tokens=30)
rows = json.loads(sys.argv[2])
found = []
for batch in rows:
    share = len(batch) // state.num_processes
    own = batch[state.process_index * share :][:share]
    found.append(reward(prompts=[p for p, _ in own], completions=[c for _, c in own]))
with open(f"{sys.argv[3]}.{state.process_index}", "w") as file:
    json.dump([found, reward.state_dict(), str(reward._loaded().device)], file)
state.destroy_process_group()
"""


def test_two_processes_give_what_one_gives(orm_dir: Path, tmp_path: Path) -> None:
    """Where FSDP gives the first process alone its weights, too."""
    texts = ["2", "It is 5, or so I think it is; who knows?", "hi", "3", "no", "yes!"]
    rows = [[("1+1=", text * times) for text in texts] for times in (1, 2)]
    (tmp_path / "score.py").write_text(TWO)
    for processes in (1, 2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        arguments = [str(orm_dir), json.dumps(rows), str(tmp_path / f"of{processes}")]
        done = subprocess.run(
            [*torchrun, "--nproc_per_node", str(processes), str(tmp_path / "score.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
            },
        )
        assert done.returncode == 0, done.stderr[-3000:]
    [one, moments, device] = json.loads((tmp_path / "of1.0").read_text())
    two = [json.loads((tmp_path / f"of2.{index}").read_text()) for index in range(2)]
    for batch in range(2):
        together = two[0][0][batch] + two[1][0][batch]
        assert [score is None for score in together] == [score is None for score in one[batch]]
        for left, right in zip(together, one[batch], strict=True):
            assert left == (None if right is None else pytest.approx(right, abs=1e-5))
    assert None in one[0]
    assert two[0][1] == two[1][1]
    assert two[0][1] == pytest.approx(moments)
    assert moments["count"] == 10  # 12 replies, and 2 are too long
    assert {device, two[0][2], two[1][2]} == {"cpu"}
