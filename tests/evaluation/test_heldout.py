"""Greedy evaluation against a plain argmax loop; the same results in one process and in two."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import MagicMock, patch

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.evaluation import evaluate_accuracy
from trl_grpo_ext.sampling import group_sample

PROMPTS = ["a", "what is 3 + 4?", "zz top", "q: 17", "count to ten"]


def argmax_loop(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int], *, num_tokens: int
) -> str:
    """Slow reference: one prompt, no padding, no cache, the whole text again for each token."""
    new_ids: list[int] = []
    for _ in range(num_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids + new_ids])).logits
        new_ids.append(int(logits[0, -1].argmax()))
        if new_ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(new_ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> list[str]:
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    return [
        argmax_loop(model, tiny_tokenizer, tiny_tokenizer(prompt)["input_ids"], num_tokens=12)
        for prompt in PROMPTS
    ]


def all_right(*, completions: list[object], **columns: object) -> list[float]:
    return [1.0] * len(completions)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_evaluate_accuracy_is_greedy_and_in_order_for_any_batch_size(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    expected: list[str],
    batch_size: int,
) -> None:
    result = evaluate_accuracy(
        tiny_model,
        tiny_tokenizer,
        Dataset.from_dict({"prompt": PROMPTS}),
        is_correct=all_right,
        max_new_tokens=12,
        batch_size=batch_size,
    )
    assert result.completions == expected
    assert len(set(expected)) == len(PROMPTS)  # or a wrong order would not show


def test_evaluate_accuracy_takes_the_longest_prompts_first_so_that_too_large_a_batch_shows(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    widths: list[int] = []
    tiny_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    evaluate_accuracy(
        tiny_model,
        tiny_tokenizer,
        Dataset.from_dict({"prompt": ["ab", "abcdef", "abcd"]}),
        is_correct=all_right,
        max_new_tokens=1,
        batch_size=1,
    )
    assert widths == [6, 4, 2]


# peft 0.21.2 reads an attribute that transformers 5.23 renamed. Remove when peft no longer does.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_evaluate_accuracy_takes_an_adapter_and_restores_the_training_mode(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, expected: list[str]
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    adapter = peft.get_peft_model(tiny_model, config).train()
    result = evaluate_accuracy(
        adapter,
        tiny_tokenizer,
        Dataset.from_dict({"prompt": PROMPTS}),
        is_correct=all_right,
        max_new_tokens=12,
    )
    assert result.completions == expected  # a fresh adapter changes nothing
    assert adapter.training
    assert tiny_model.training


def test_evaluate_accuracy_samples_each_prompt_as_often_as_asked_and_repeatably(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def draw(**options: Any) -> list[str]:
        return evaluate_accuracy(
            tiny_model,
            tiny_tokenizer,
            Dataset.from_dict({"prompt": ["ab", "abcd"], "answer": ["x", "y"]}),
            is_correct=is_correct,
            max_new_tokens=6,
            num_samples=3,
            batch_size=3,
            **options,
        ).completions

    def is_correct(*, prompts: list[str], answer: list[str], **columns: object) -> list[float]:
        assert prompts == ["ab"] * 3 + ["abcd"] * 3
        assert answer == ["x"] * 3 + ["y"] * 3
        return [1.0] * 6

    before = torch.get_rng_state()
    replies = draw()
    assert len(set(replies)) == 6
    assert draw() == replies
    assert draw(seed=7) != replies
    assert draw(temperature=5.0) != replies
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 6, 64])
def test_evaluate_accuracy_samples_the_same_replies_for_any_batch_size(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    def draw(batch_size: int) -> list[str]:
        return evaluate_accuracy(
            tiny_model,
            tiny_tokenizer,
            Dataset.from_dict({"prompt": PROMPTS}),
            is_correct=all_right,
            max_new_tokens=8,
            num_samples=3,
            seed=5,
            batch_size=batch_size,
        ).completions

    replies = draw(9)
    assert len(set(replies)) > 10
    assert draw(batch_size) == replies


def test_evaluate_accuracy_passes_arguments_to_the_chat_template(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ ending }}"
    result = evaluate_accuracy(
        tiny_model,
        tokenizer,
        Dataset.from_dict({"prompt": [[{"role": "user", "content": "1+"}]]}),
        is_correct=all_right,
        max_new_tokens=8,
        chat_template_kwargs={"ending": "2 is"},
    )
    ids = tiny_tokenizer("1+2 is").input_ids
    assert result.completions == [argmax_loop(tiny_model, tiny_tokenizer, ids, num_tokens=8)]


def test_evaluate_accuracy_is_nan_without_generation_when_there_is_no_prompt(
    tiny_tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    result = evaluate_accuracy(
        cast(Any, None),
        tiny_tokenizer,
        Dataset.from_dict({"prompt": []}),
        is_correct=cast(Any, None),
        max_new_tokens=1,
    )
    assert math.isnan(result.accuracy)
    assert (result.num_prompts, result.num_scored) == (0, 0)
    assert (result.completions, result.scores) == ([], [])
    assert capfd.readouterr().err == ""


def test_evaluate_accuracy_draws_a_progress_bar(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
) -> None:
    evaluate_accuracy(
        tiny_model,
        tiny_tokenizer,
        Dataset.from_dict({"prompt": PROMPTS}),
        is_correct=all_right,
        max_new_tokens=1,
        batch_size=2,
    )
    assert "3/3" in capfd.readouterr().err


def test_evaluate_accuracy_calls_the_reward_as_trl_does_and_counts_from_half_a_point_on(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, expected: list[str]
) -> None:
    dataset = Dataset.from_dict({"prompt": PROMPTS, "answer": ["v", "w", "x", "y", "z"]})

    def is_correct(
        *,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        answer: list[str],
        trainer_state: None,
        log_extra: Callable[[str, list[str]], None],
        log_metric: Callable[..., None],
    ) -> Sequence[float | None]:
        assert (prompts, completions, answer) == (PROMPTS, expected, ["v", "w", "x", "y", "z"])
        assert tiny_tokenizer.batch_decode(completion_ids, skip_special_tokens=True) == expected
        assert trainer_state is None
        log_extra("answer", answer)
        log_metric(name="mean", value=0.5)
        return [0.5, 0.49, None, True, math.nan]

    result = evaluate_accuracy(
        tiny_model, tiny_tokenizer, dataset, is_correct=is_correct, max_new_tokens=12, batch_size=2
    )
    assert result.accuracy == pytest.approx(2 / 3)
    assert (result.num_prompts, result.num_scored) == (5, 3)
    assert result.scores == [0.5, 0.49, None, 1.0, None]
    assert result.completions == expected
    assert str(result) == "0.667 (3 replies to 3 of 5 held-out prompts)"


def test_evaluate_accuracy_awaits_an_asynchronous_reward(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    async def is_correct(**columns: object) -> list[float]:
        await asyncio.sleep(0)
        return [1.0, 0.0]

    result = evaluate_accuracy(
        tiny_model,
        tiny_tokenizer,
        Dataset.from_dict({"prompt": ["a", "b"]}),
        is_correct=is_correct,
        max_new_tokens=1,
    )
    assert result.scores == [1.0, 0.0]


def test_evaluate_accuracy_hands_over_messages_when_the_prompts_are_conversations(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [[{"role": "user", "content": text}] for text in ("1+2", "3+4")]
    seen: list[object] = []

    def is_correct(
        *, prompts: object, completions: object, answer: object, **others: object
    ) -> list[float]:
        seen.extend([prompts, completions, answer])
        return [1.0, 0.0]

    result = evaluate_accuracy(
        tiny_model,
        tiny_tokenizer,
        Dataset.from_dict({"prompt": prompts, "answer": [3, 7]}),
        is_correct=is_correct,
        max_new_tokens=4,
    )
    replies = [[{"role": "assistant", "content": text}] for text in result.completions]
    assert seen == [prompts, replies, [3, 7]]
    assert result.accuracy == 0.5


def test_evaluate_accuracy_is_nan_when_nothing_could_be_scored(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    result = evaluate_accuracy(
        tiny_model,
        tiny_tokenizer,
        Dataset.from_dict({"prompt": ["a"], "answer": ["b"]}),
        is_correct=lambda **columns: [None],
        max_new_tokens=1,
    )
    assert math.isnan(result.accuracy)
    assert (result.num_prompts, result.num_scored) == (1, 0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [([1.0], "'judge' returned 1 rewards, but 2 were"), (["yes", 1.0], "'judge' returned 'yes'")],
)
def test_evaluate_accuracy_refuses_scores_that_are_not_one_number_a_completion(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    scores: list[float],
    message: str,
) -> None:
    def judge(**columns: object) -> list[float]:
        return scores

    with pytest.raises(RewardError, match=message):
        evaluate_accuracy(
            tiny_model,
            tiny_tokenizer,
            Dataset.from_dict({"prompt": ["a", "b"], "answer": ["c", "d"]}),
            is_correct=judge,
            max_new_tokens=1,
        )


def length_is_even(*, completions: list[str], **columns: object) -> list[float]:
    return [float(len(text) % 2 == 0) for text in completions]


def evaluate_prompts(folder: Path, *, accelerator: Accelerator | None) -> list[object]:
    """Return what is to be the same with any number of processes; see ``main``.

    Five prompts are batches of 2, 2 and 1; one prompt leaves the second process without any.
    """
    from tiny import build_tiny_tokenizer

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    results: list[object] = []
    for num_prompts, num_samples, batch_size in ((5, 0, 2), (5, 3, 6), (1, 0, 2)):
        result = evaluate_accuracy(
            model,
            build_tiny_tokenizer(),
            Dataset.from_dict({"prompt": PROMPTS[:num_prompts]}),
            is_correct=length_is_even,
            max_new_tokens=12,
            num_samples=num_samples,
            batch_size=batch_size,
            accelerator=accelerator,
        )
        results.append([result.accuracy, result.num_prompts, result.completions, result.scores])
    return results


def test_evaluate_accuracy_is_the_same_with_two_processes_when_batches_do_not_divide(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parents[1], Path(__file__).parent])),
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, __file__, str(tiny_model_dir), str(tmp_path)]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    alone = evaluate_prompts(tiny_model_dir, accelerator=None)
    for rank, num_batches in (("0", 2 + 2 + 1), ("1", 1 + 1 + 0)):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["results"] == alone
        assert found["num_batches"] == num_batches


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(folder: Path, out: Path) -> None:
    """One of two processes: evaluate, and write what came back."""
    counted = MagicMock(wraps=group_sample)
    accelerator = Accelerator(cpu=True)
    with patch("trl_grpo_ext.evaluation.heldout.group_sample", counted):
        results = evaluate_prompts(folder, accelerator=accelerator)
    found = {"results": results, "num_batches": counted.call_count}
    (out / f"{accelerator.process_index}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
