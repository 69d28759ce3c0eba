"""What reward models are trained on: pairs of replies, and solutions with a label a step.

The replies are the policy's own, so that the reward model reads what it will have to score, beside
replies made to be wrong by little: what a policy writes before training is mostly wrong by its
form, and a model that saw no others would reward the form alone.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.evaluation.heldout import CORRECT_THRESHOLD
from trl_grpo_ext.rewards.completion import Message, completion_text
from trl_grpo_ext.rewards.models.steps import split_steps, step_text
from trl_grpo_ext.rewards.models.sums import AfterError, Sum, judge_steps, solve, solve_wrongly
from trl_grpo_ext.rewards.models.training_options import RewardModelArguments
from trl_grpo_ext.rewards.scores import checked_scores
from trl_grpo_ext.sampling import group_sample

Row = dict[str, Any]

_LAST_NUMBER = re.compile(r"\d+(?!.*\d)", re.DOTALL)


def make_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    options: RewardModelArguments,
    is_correct: Callable[..., object] | None,
    seed: int = 0,
) -> Dataset:
    """Return what a reward model is trained or measured on, the same in every process.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        rows: Of the task.
        options: Of the reward model.
        is_correct: The reward that judges replies; a process model needs none.
        seed: Of the sampling, the choice and the errors.

    Returns:
        As :func:`preference_pairs` or :func:`step_solutions`.

    Raises:
        ConfigurationError: There is no pair.
    """
    replies = sample_replies(
        model,
        tokenizer,
        rows,
        num_replies=options.num_candidates,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=seed,
    )
    if options.kind == "process":
        return step_solutions(
            rows,
            replies,
            num_solutions=options.num_solutions,
            separator=options.step_separator,
            after_error=options.after_error,
            seed=seed,
        )
    assert is_correct, "training_options asks for a reward"
    return preference_pairs(
        rows,
        replies,
        is_correct=is_correct,
        gold_replies=_gold_replies(rows, options),
        num_pairs=options.num_pairs,
        num_near_misses=options.num_near_misses,
        seed=seed,
    )


# The policy's replies ---------------------------------------------------------------------------


def sample_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    num_replies: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[str]]:
    """Return replies of the model to each prompt, the same in every process.

    Several processes share out the prompts. Each reply has random numbers of its own, so neither
    their number nor ``batch_size`` changes it.

    Args:
        model: A causal language model.
        tokenizer: With a chat template, if the prompts are conversations.
        rows: With a column ``prompt``.
        num_replies: To each prompt; 0 for none.
        max_new_tokens: Tokens a reply at most.
        temperature: Of the sampling.
        seed: Of the sampling.
        batch_size: Replies that are sampled at a time.

    Returns:
        ``num_replies`` texts a prompt, in the order of the rows.
    """
    if not num_replies:
        return [[] for _ in range(rows.num_rows)]
    state, prompts = PartialState(), list(rows["prompt"])
    width = max(batch_size // num_replies, 1)
    own = list(range(state.process_index, len(prompts), state.num_processes))
    batches = [own[start : start + width] for start in range(0, len(own), width)]
    replies: list[tuple[int, list[str]]] = []
    for indices in tqdm(batches, desc="sampling", unit="batch", disable=not state.is_main_process):
        samples = group_sample(
            model,
            tokenizer,
            [prompts[index] for index in indices],
            num_generations=num_replies,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            prompt_indices=indices,
        )
        for place, index in enumerate(indices):
            start = place * num_replies
            replies.append((index, samples.completions[start : start + num_replies]))
    return [texts for _, texts in sorted(gather_object(replies))]


# Pairs for an outcome model ---------------------------------------------------------------------


def preference_pairs(
    rows: Dataset,
    replies: Sequence[Sequence[str]],
    *,
    is_correct: Callable[..., object],
    gold_replies: Sequence[str],
    num_pairs: int,
    num_near_misses: int,
    seed: int = 0,
) -> Dataset:
    """Return pairs of a right and a wrong reply to the same prompt.

    The right ones are those of the policy that the reward calls right; where there is none, the
    gold reply. The wrong ones are those that it calls wrong, and near misses: a right reply with
    its last number changed by 1 to 3, where the reward calls that wrong. A reply without a score
    is left out, and a prompt without a right or without a wrong reply has no pair.

    Args:
        rows: ``P`` rows with the column ``prompt`` (messages) and those that the reward reads.
        replies: Of the policy, any number a prompt.
        is_correct: A reward function, called as TRL does; at least 0.5 is right.
        gold_replies: ``P`` replies with the gold answer, written out.
        num_pairs: With wrong replies of the policy, a prompt at most.
        num_near_misses: Pairs with a near miss, a prompt at most.
        seed: Of the choice.

    Returns:
        Columns ``prompt``, ``chosen``, ``rejected`` (all lists of messages) and ``source``:
        ``sampled``, or ``near_miss``.
    """
    rng, distinct = random.Random(seed), [sorted(set(texts)) for texts in replies]
    judged = judge_replies(rows, distinct, is_correct=is_correct)
    rights, wrongs = _sorted_out(distinct, judged, right=True), _sorted_out(distinct, judged)
    golds = judge_replies(rows, [[gold] for gold in gold_replies], is_correct=is_correct)
    for right, gold, (score,) in zip(rights, gold_replies, golds, strict=True):
        right += [gold] if not right and score else []
    near = [[_near_miss(text, rng) for text in _cycled(r, num_near_misses)] for r in rights]
    missed = _sorted_out(near, judge_replies(rows, near, is_correct=is_correct))
    pairs: list[Row] = []
    for prompt, right, wrong, close in zip(rows["prompt"], rights, wrongs, missed, strict=True):
        both = list(itertools.product(right, wrong))
        chosen = rng.sample(both, min(num_pairs, len(both)))
        pairs += [_pair(prompt, *pair, source="sampled") for pair in chosen]
        close_pairs = zip(_cycled(right, len(close)), close, strict=True) if right else ()
        pairs += [_pair(prompt, *pair, source="near_miss") for pair in close_pairs]
    if not pairs:
        raise ConfigurationError([_no_pairs(rows.num_rows)])
    return Dataset.from_list(pairs)


def judge_replies(
    rows: Dataset, replies: Sequence[Sequence[str]], *, is_correct: Callable[..., object]
) -> list[list[bool | None]]:
    """Return whether each reply is right, ``None`` for one that the reward could not score.

    The reward is called once, as TRL calls it.

    Args:
        rows: One a list of replies: the column ``prompt`` and those that the reward reads.
        replies: Texts.
        is_correct: A reward function; at least 0.5 is right.

    Raises:
        RewardError: It did not return one number or ``None`` a reply.
    """
    counts = [len(texts) for texts in replies]
    indices = [index for index, count in enumerate(counts) for _ in range(count)]
    if not indices:
        return [[] for _ in replies]
    columns = {name: list(values) for name, values in rows[indices].items()}
    flat = [_assistant(text) for texts in replies for text in texts]
    values = is_correct(
        prompts=columns.pop("prompt"),
        completions=flat,
        completion_ids=[[] for _ in flat],
        trainer_state=None,
        log_extra=_ignore,
        log_metric=_ignore,
        **columns,
    )
    name = getattr(is_correct, "__name__", type(is_correct).__name__)
    scores, _ = checked_scores(values, name=name, num_completions=len(flat))
    right = iter([None if score is None else score >= CORRECT_THRESHOLD for score in scores])
    return [list(itertools.islice(right, count)) for count in counts]


def gold_reply(template: str, *, prompt: Sequence[Message], answer: str, pattern: str) -> str:
    r"""Return the gold answer, written out as a reply.

    Args:
        template: ``{answer}`` stands for the gold answer, ``{question}`` for what the pattern finds
            last in the last message.
        prompt: Messages.
        answer: The gold answer.
        pattern: A regular expression.

    Example:
        >>> prompt = [{"role": "user", "content": "How much is 2 + 3 ="}]
        >>> gold_reply("{question} {answer}", prompt=prompt, answer="5", pattern=r"\d.*=")
        '2 + 3 = 5'
    """
    found = [match[0] for match in re.finditer(pattern, completion_text(prompt))]
    return template.replace("{question}", found[-1] if found else "").replace("{answer}", answer)


# Steps for a process model ----------------------------------------------------------------------


def step_solutions(
    rows: Dataset,
    replies: Sequence[Sequence[str]],
    *,
    num_solutions: int,
    separator: str,
    after_error: AfterError = "wrong",
    seed: int = 0,
) -> Dataset:
    """Return solutions of sums with a label for each of their steps.

    Args:
        rows: With a column ``prompt`` (messages), whose last message ends with a sum.
        replies: Of the policy, any number a prompt; the same one counts once.
        num_solutions: Made for each prompt: a right one, and the others with an error.
        separator: Between the steps of a reply.
        after_error: As for :func:`judge_steps`.
        seed: Of the errors.

    Returns:
        Columns ``prompt``, ``completions`` (the steps), ``labels`` (whether each is right) and
        ``source``: ``made``, or ``sampled``.
    """
    rng, solutions = random.Random(seed), []
    for prompt, texts in zip(rows["prompt"], replies, strict=True):
        question = Sum.in_text(completion_text(prompt))
        assert question, "training_problems lets only sums through"
        made = [
            solve_wrongly(question, rng) if index else solve(question)
            for index in range(num_solutions)
        ]
        written = [_steps(text, separator) for text in sorted(set(texts)) if text.strip()]
        for source, steps in [*_with("made", made), *_with("sampled", written)]:
            labels = judge_steps(question, steps, after_error=after_error)
            solutions.append(
                {"prompt": prompt, "completions": steps, "labels": labels, "source": source}
            )
    return Dataset.from_list(solutions)


def _steps(text: str, separator: str) -> list[str]:
    return [step_text(step, separator) for step in split_steps(text, separator)]


def _with(source: str, solutions: Sequence[list[str]]) -> Iterator[tuple[str, list[str]]]:
    return ((source, steps) for steps in solutions)


def _gold_replies(rows: Dataset, options: RewardModelArguments) -> list[str]:
    answers = rows["answer"] if "answer" in rows.column_names else [""] * rows.num_rows
    return [
        gold_reply(
            options.gold_reply, prompt=prompt, answer=answer, pattern=options.question_pattern
        )
        for prompt, answer in zip(rows["prompt"], answers, strict=True)
    ]


def _no_pairs(num_prompts: int) -> str:
    return (
        f"None of the {num_prompts} prompts has a right and a wrong reply, so there is no pair to "
        "learn from. Raise `num_candidates` or `num_near_misses`, see that `gold_reply` is one "
        "that the first of the `rewards` calls right, or choose an easier or a harder task."
    )


# Small pieces -----------------------------------------------------------------------------------


def _near_miss(text: str, rng: random.Random) -> str:
    """Return the text with its last number changed by 1 to 3; as it is without a number."""

    def changed(number: re.Match[str]) -> str:
        by = rng.choice([-3, -2, -1, 1, 2, 3])
        return str(abs(int(number[0]) + by)) if int(number[0]) + by >= 0 else str(abs(by))

    return _LAST_NUMBER.sub(changed, text, count=1)


def _sorted_out(
    replies: Sequence[Sequence[str]],
    judged: Sequence[Sequence[bool | None]],
    *,
    right: bool = False,
) -> list[list[str]]:
    """Return the replies that are right, or those that are wrong."""
    pairs = [zip(texts, labels, strict=True) for texts, labels in zip(replies, judged, strict=True)]
    return [[text for text, label in group if label is right] for group in pairs]


def _cycled(texts: Sequence[str], count: int) -> list[str]:
    return list(itertools.islice(itertools.cycle(texts), count))


def _pair(prompt: Sequence[Message], chosen: str, rejected: str, *, source: str) -> Row:
    return {
        "prompt": prompt,
        "chosen": _assistant(chosen),
        "rejected": _assistant(rejected),
        "source": source,
    }


def _assistant(text: str) -> list[Mapping[str, str]]:
    return [{"role": "assistant", "content": text}]


def _ignore(*_: object, **__: object) -> None:
    """Stand in for the trainer's ``log_extra`` and ``log_metric``."""
