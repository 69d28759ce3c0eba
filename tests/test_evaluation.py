"""Greedy evaluation against a plain argmax loop, in one process and in two."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.evaluation import evaluate_accuracy, generate_greedy

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


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_generate_greedy_equals_an_argmax_loop_in_order_for_any_batch_size(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    expected: list[str],
    batch_size: int,
) -> None:
    texts = generate_greedy(
        tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size
    )
    assert texts == expected
    assert len(set(expected)) == len(PROMPTS)  # or a wrong order would not show


def test_generate_greedy_stops_each_row_at_its_own_end_token_when_lengths_differ(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = ["1+2=", "b?", "a"]
    reference = [
        argmax_loop(tiny_model, tiny_tokenizer, tiny_tokenizer(prompt)["input_ids"], num_tokens=12)
        for prompt in prompts
    ]
    assert [len(text) for text in reference] == [0, 3, 12]  # the model ends two of them
    # A tokenizer that pads with an ordinary character: it must not appear behind the end.
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token_id = tokenizer.convert_tokens_to_ids("a")
    texts = generate_greedy(tiny_model, tokenizer, prompts, max_new_tokens=12)
    assert texts == reference


def test_generate_greedy_ends_at_the_tokenizers_and_at_the_models_end_token(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    # "b?" is continued by "??&" and the tokenizer's token, then by "&GG"; "a" by text with a W.
    tiny_model.generation_config.eos_token_id = tiny_tokenizer.convert_tokens_to_ids("W")
    texts = generate_greedy(tiny_model, tiny_tokenizer, ["b?", "a"], max_new_tokens=12)
    assert texts[0] == "??&"
    whole = argmax_loop(tiny_model, tiny_tokenizer, tiny_tokenizer("a")["input_ids"], num_tokens=12)
    assert "W" in whole
    assert texts[1] == whole.split("W")[0]


def test_generate_greedy_takes_the_longest_prompts_first_so_that_too_large_a_batch_shows(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    widths: list[int] = []
    tiny_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate_greedy(
        tiny_model, tiny_tokenizer, ["ab", "abcdef", "abcd"], max_new_tokens=1, batch_size=1
    )
    assert widths == [6, 4, 2]


def test_generate_greedy_continues_a_conversation_as_the_chat_template_says(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    question = [{"role": "user", "content": "1+2"}]
    started = [*question, {"role": "assistant", "content": "It is"}]
    texts = generate_greedy(tiny_model, tiny_tokenizer, [question, started], max_new_tokens=8)
    rendered = [
        "<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\nIt is",
    ]
    assert texts == [
        argmax_loop(tiny_model, tiny_tokenizer, tiny_tokenizer(text)["input_ids"], num_tokens=8)
        for text in rendered
    ]


def test_generate_greedy_ignores_sampling_settings_of_the_model_without_a_warning(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    expected: list[str],
) -> None:
    settings = tiny_model.generation_config
    settings.update(
        do_sample=True, temperature=0.3, top_p=0.5, min_p=0.1, top_k=3, repetition_penalty=5.0
    )
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger, verbosity = logging.getLogger("transformers"), transformers_logging.get_verbosity()
    logger.addHandler(handler)
    transformers_logging.set_verbosity_warning()
    try:
        texts = generate_greedy(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=12)
    finally:
        transformers_logging.set_verbosity(verbosity)
        logger.removeHandler(handler)
    assert texts == expected
    assert messages == []
    assert tiny_model.generation_config is settings


@pytest.mark.parametrize("training", [True, False])
def test_generate_greedy_restores_mode_settings_and_padding_side_even_after_an_error(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, training: bool
) -> None:
    tiny_model.train(training)
    settings = tiny_model.generation_config
    tiny_tokenizer.padding_side = "right"
    modes: list[bool] = []

    def interrupt(*args: object) -> None:
        modes.append(tiny_model.training)
        raise KeyboardInterrupt

    hook = tiny_model.model.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate_greedy(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=2)
        hook.remove()
        assert modes == [False]
        assert tiny_model.training is training
        assert tiny_model.generation_config is settings
        assert tiny_tokenizer.padding_side == "right"
    finally:
        tiny_tokenizer.padding_side = "left"


# peft 0.21.2 reads an attribute that transformers 5.23 renamed. Remove when peft no longer does.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_generate_greedy_leaves_the_model_inside_an_adapter_as_it_was(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, expected: list[str]
) -> None:
    peft = pytest.importorskip("peft")
    settings = tiny_model.generation_config
    settings.repetition_penalty = 5.0
    adapter = peft.get_peft_model(tiny_model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    texts = generate_greedy(adapter, tiny_tokenizer, PROMPTS, max_new_tokens=12)
    assert texts == expected  # a fresh adapter changes nothing
    assert tiny_model.generation_config is settings


def test_generate_greedy_refuses_a_prompt_without_tokens(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        generate_greedy(tiny_model, tiny_tokenizer, ["a", ""], max_new_tokens=2)


def test_generate_greedy_returns_nothing_for_no_prompts(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert generate_greedy(tiny_model, tiny_tokenizer, [], max_new_tokens=2) == []


def test_generate_greedy_draws_progress_by_prompts_only_when_asked(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
) -> None:
    generate_greedy(
        tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=1, batch_size=2, show_progress=False
    )
    assert capfd.readouterr().err == ""
    generate_greedy(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=1, batch_size=2)
    assert "5/5" in capfd.readouterr().err


def test_evaluate_accuracy_is_the_share_of_scored_prompts_from_half_a_point_on(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, expected: list[str]
) -> None:
    dataset = Dataset.from_dict({"prompt": PROMPTS, "answer": ["v", "w", "x", "y", "z"]})

    def is_correct(
        *, prompts: list[str], completions: list[str], answer: list[str]
    ) -> Sequence[float | None]:
        assert (prompts, completions, answer) == (PROMPTS, expected, ["v", "w", "x", "y", "z"])
        return [0.5, 0.49, None, True, math.nan]

    result = evaluate_accuracy(
        tiny_model, tiny_tokenizer, dataset, is_correct=is_correct, max_new_tokens=12, batch_size=2
    )
    assert result.accuracy == pytest.approx(2 / 3)
    assert (result.num_prompts, result.num_scored) == (5, 3)
    assert result.scores == [0.5, 0.49, None, 1.0, None]
    assert result.completions == expected


def test_evaluate_accuracy_hands_over_messages_when_the_prompts_are_conversations(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [[{"role": "user", "content": text}] for text in ("1+2", "3+4")]
    seen: list[object] = []

    def is_correct(*, prompts: object, completions: object, answer: object) -> list[float]:
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
    [([1.0], "1 scores for 2 completions"), (["yes", 1.0], "returned a str")],
)
def test_evaluate_accuracy_refuses_scores_that_are_not_one_number_a_completion(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    scores: list[float],
    message: str,
) -> None:
    with pytest.raises(RewardError, match=message):
        evaluate_accuracy(
            tiny_model,
            tiny_tokenizer,
            Dataset.from_dict({"prompt": ["a", "b"], "answer": ["c", "d"]}),
            is_correct=lambda **columns: scores,
            max_new_tokens=1,
        )


def length_is_even(*, completions: list[str], **columns: object) -> list[float]:
    return [float(len(text) % 2 == 0) for text in completions]


def evaluate_prompts(folder: Path, *, num_prompts: int, accelerator: Accelerator | None) -> object:
    """Return what is to be the same with any number of processes; see ``main``."""
    from tiny import build_tiny_tokenizer

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dataset = Dataset.from_dict({"prompt": PROMPTS[:num_prompts]})
    result = evaluate_accuracy(
        model,
        build_tiny_tokenizer(),
        dataset,
        is_correct=length_is_even,
        max_new_tokens=12,
        batch_size=1,
        accelerator=accelerator,
    )
    return [result.accuracy, result.num_prompts, result.completions, result.scores]


def test_evaluate_accuracy_is_the_same_with_two_processes_when_prompts_do_not_divide(
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
    # 5 prompts are 3 and 2; 1 prompt leaves the second process without any of its own
    alone = [
        evaluate_prompts(tiny_model_dir, num_prompts=number, accelerator=None) for number in (5, 1)
    ]
    for rank in "01":
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["results"] == alone
        assert found["num_generate_calls"] == 3 + 1


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(folder: Path, out: Path) -> None:
    """One of two processes: evaluate 5 prompts, then 1, and write what came back."""
    calls = count_generate_calls()
    accelerator = Accelerator(cpu=True)
    results = [
        evaluate_prompts(folder, num_prompts=number, accelerator=accelerator) for number in (5, 1)
    ]
    found = {"results": results, "num_generate_calls": len(calls)}
    (out / f"{accelerator.process_index}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def count_generate_calls() -> list[int]:
    calls: list[int] = []
    original = LlamaForCausalLM.generate

    def counted(self: LlamaForCausalLM, *args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(self, *args, **kwargs)

    LlamaForCausalLM.generate = counted
    return calls


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
