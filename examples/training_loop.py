"""GRPO as a loop of your own, from the pieces of this package and without a trainer.

Each step draws a group of completions for each of a few prompts, scores them, compares each with
its group, and takes one step of the optimizer on the GRPO objective with a KL penalty. It departs
from a real run in what it leaves out: learning-rate schedule, micro-batches, checkpoints, several
devices. ``ExtGRPOTrainer`` has those.

    python examples/training_loop.py  # a tiny random model: some 10 seconds, no download
    python examples/training_loop.py --model HuggingFaceTB/SmolLM2-135M --learning-rate 1e-5

Expected: the share of digits in what the tiny model writes rises from 0.2 to above 0.9.
"""

from __future__ import annotations

import argparse
import logging
import random
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trl_grpo_ext import build_reference
from trl_grpo_ext.functional import (
    compute_rewards,
    group_sample,
    grpo_loss,
    multi_reward_advantages,
    token_logprobs,
)

logger = logging.getLogger(__name__)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward_funcs: Sequence[Callable[..., Any]],
    *,
    steps: int,
    prompts_per_step: int = 4,
    num_generations: int = 8,
    max_new_tokens: int = 16,
    learning_rate: float = 3e-3,
    beta: float = 0.02,
    reference: Literal["resident", "quantized"] = "resident",
    seed: int = 0,
) -> list[float]:
    """Train the model in place and return the mean reward of each step."""
    device, rng = model.device, random.Random(seed)
    frozen = build_reference(model, kind=reference)  # the policy as it is before the first step
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    mean_rewards = []
    for step in range(steps):
        batch = rng.sample(prompts, k=min(prompts_per_step, len(prompts)))
        sampling = {"num_generations": num_generations, "max_new_tokens": max_new_tokens}
        samples = group_sample(model, tokenizer, batch, **sampling, seed=seed + step)
        rewards_BR = compute_rewards(
            reward_funcs, prompts=samples.prompts, completions=samples.completions
        )
        with torch.no_grad():
            ref_logprobs_BT = token_logprobs(frozen, samples)
        objective = grpo_loss(
            token_logprobs(model, samples),
            old_logprobs_BT=samples.policy_logprobs_BT.to(device),
            ref_logprobs_BT=ref_logprobs_BT,
            advantages_B=multi_reward_advantages(rewards_BR, group_size=num_generations).to(device),
            mask_BT=samples.mask_BT.to(device),
            beta=beta,
        )
        optimizer.zero_grad()
        objective.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        mean_rewards.append(rewards_BR.nanmean().item())
        logger.info("step %3d  reward %.2f  kl %.3f", step, mean_rewards[-1], objective.kl)
    return mean_rewards


def digit_share(*, completions: Sequence[str], **_: Any) -> list[float]:
    """Return the share of digits among the characters of each completion; 0 for an empty one."""
    return [sum(c in string.digits for c in text) / max(len(text), 1) for text in completions]


def build_tiny(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return a random Llama of two layers and a tokenizer with one token a character."""
    characters = ["<eos>", *string.digits, *string.ascii_lowercase, *" +-*=?."]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config), tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a model to write digits."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", help="name or folder of a model; a tiny random one if not given")
    parser.add_argument("--reference", choices=["resident", "quantized"], default="resident")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args(arguments))
    if name := args.pop("model"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        model, tokenizer = build_tiny(args["seed"])
    prompts = [f"{a} + {b} =" for a in range(10) for b in range(10)]
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    train(model, tokenizer, prompts, [digit_share], **args)


if __name__ == "__main__":
    main()
