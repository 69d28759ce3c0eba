"""The accuracy that a recipe measures with a trainer's model, before and after training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import Trainer

from trl_grpo_ext.checkpointing import LAST_GOOD
from trl_grpo_ext.errors import RewardOutageError
from trl_grpo_ext.evaluation.heldout import Accuracy, evaluate_accuracy
from trl_grpo_ext.rewards.missing import excludes_without
from trl_grpo_ext.rewards.registry import RewardFunction


def measure_accuracy(
    trainer: Trainer,
    rows: Dataset,
    is_correct: RewardFunction,
    *,
    max_new_tokens: int,
    num_samples: int = 0,
    temperature: float = 1.0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_unscored_fraction: float = 0.1,
) -> Accuracy:
    """Return the accuracy of a trainer's model, by a reward function.

    Of no prompt where FSDP or DeepSpeed shards the weights: `eval_strategy` measures there.

    Args:
        trainer: Whose model, tokenizer and processes it is measured with.
        rows: The held-out prompts.
        is_correct: As for :func:`evaluate_accuracy`, like the other arguments.
        max_new_tokens: Tokens of a reply at most.
        num_samples: Replies a prompt; 0 for the greedy one.
        temperature: Of sampled replies.
        chat_template_kwargs: More arguments of the chat template.
        max_unscored_fraction: Largest share of replies that may be without a score.

    Raises:
        RewardOutageError: More have none.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    tokenizer: Any = trainer.processing_class
    model: Any = trainer.model
    accuracy = evaluate_accuracy(
        model,
        tokenizer,
        rows.select([]) if sharded else rows,
        is_correct=is_correct,
        max_new_tokens=max_new_tokens,
        batch_size=64,
        num_samples=num_samples,
        temperature=temperature,
        chat_template_kwargs=chat_template_kwargs,
        accelerator=trainer.accelerator,
    )
    refuse_outage(accuracy, is_correct, rows, most=max_unscored_fraction)
    return accuracy


def refuse_outage(accuracy: Accuracy, reward: object, rows: Dataset, *, most: float) -> None:
    """Refuse an accuracy for which a service left too much without a score.

    Args:
        accuracy: As measured with the reward.
        reward: The first one of the recipe.
        rows: Of the prompts; those that the reward does not apply to do not count.
        most: The largest share that may be missing.

    Raises:
        RewardOutageError: more is missing.
    """
    size = len(accuracy.scores) // max(len(rows), 1)
    asked = [
        score
        for at, score in enumerate(accuracy.scores)
        if excludes_without(reward, rows[at // size])
    ]
    num_missing = asked.count(None)
    if num_missing <= most * len(asked):
        return
    name, failure = getattr(reward, "__name__", "reward"), getattr(reward, "failure", "")
    raise RewardOutageError(
        f"the reward '{name}' has no score for {num_missing} of the {len(asked)} replies "
        f"by which accuracy is measured{f' ({failure})' if failure else ''}, so it would say "
        "nothing. See that the service answers (`trl-grpo-ext check-reward`), and run the same "
        f"again, with `resume_from_checkpoint: {LAST_GOOD}` if it had trained."
    )
