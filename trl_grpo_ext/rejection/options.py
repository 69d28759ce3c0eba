"""The options of rejection sampling: one YAML key a field."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rejection.balance import Balance
from trl_grpo_ext.rejection.filters import Rules
from trl_grpo_ext.rejection.selection import Prefer, Selection
from trl_grpo_ext.rewards.format import FormatReward
from trl_grpo_ext.rewards.language import LanguageReward
from trl_grpo_ext.rewards.repetition import RepetitionReward, RepetitionUnit

DATASET_FORMATS = ("prompt_completion", "messages")
SAMPLERS = ("auto", "group_sample", "vllm")


@dataclass
class RejectionArguments:
    """How replies are sampled, and which of them are kept; one YAML key a field."""

    output_dir: str = field(
        metadata={"help": "Where candidates, the dataset and summary.json are written."}
    )
    seed: int = field(default=0, metadata={"help": "Of the draws."})
    use_cpu: bool = field(
        default=False, metadata={"help": "Whether to sample on the CPU where there is a GPU too."}
    )

    # Sampling
    num_generations: int = field(
        default=16, metadata={"help": "Replies that are sampled to each prompt."}
    )
    prompts_per_batch: int = field(
        default=8,
        metadata={
            "help": "Prompts that a process samples at a time, and then scores and writes: what a "
            "kill loses at most."
        },
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Tokens of a reply at most; a longer one is cut off."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Of the sampling; above 0, or all replies were the same."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Share of the probability to draw from."})
    top_k: int = field(default=0, metadata={"help": "Likeliest tokens to draw from; 0 for all."})
    generation_kwargs: dict[str, object] | str | None = field(
        default=None,
        metadata={"help": "More options of `generate`, as in GRPO: a mapping, or JSON."},
    )
    chat_template_kwargs: dict[str, object] | str | None = field(
        default=None, metadata={"help": "More arguments of the chat template: a mapping, or JSON."}
    )
    max_live_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens whose keys and values are kept at a time; by default what fits on a "
            "GPU, all on a CPU."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether the model may bring code of its own."}
    )
    sampler: str = field(
        default="auto",
        metadata={
            "help": "What samples: 'group_sample' (ours), 'vllm', or 'auto': what made the replies "
            "that are there already, else vLLM where it is installed and can do what is asked on a "
            "CUDA device, else ours; it says which and why."
        },
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.9,
        metadata={
            "help": "Share of a GPU's memory that vLLM takes; less where a reward needs some too."
        },
    )
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a prompt and its reply at most, with vLLM; by default what the "
            "model declares."
        },
    )
    vllm_tensor_parallel_size: int = field(
        default=1,
        metadata={"help": "GPUs over which vLLM shards the model; above 1, with one process only."},
    )
    max_unscored_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Largest share of a batch that a reward with `on_missing: exclude`, such as a "
            "service, may leave without a score. Beyond it the run stops, and goes on from there "
            "when it is started again."
        },
    )

    # Which replies are correct and clean
    correct_threshold: float = field(
        default=0.5, metadata={"help": "Least score of the first reward that is a right answer."}
    )
    required_format: dict[str, object] | str | None = field(
        default=None,
        metadata={
            "help": "What replies must look like: `arguments` of the reward format, such as "
            "{structure: think_answer}; null asks for nothing."
        },
    )
    scripts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Scripts that replies must keep to, as in the reward language, such as "
            "[Latin]; null asks for nothing."
        },
    )
    min_script_share: float = field(
        default=1.0, metadata={"help": "Least share of the words in these scripts."}
    )
    max_repetition: float | None = field(
        default=0.2,
        metadata={
            "help": "Largest share of n-grams that repeat an earlier one; null asks for nothing."
        },
    )
    repetition_ngram_size: int = field(
        default=10,
        metadata={
            "help": "Units of such an n-gram: long enough that a reasoned reply does not repeat it."
        },
    )
    repetition_unit: RepetitionUnit = field(
        default="words",
        metadata={
            "help": "'words', or 'characters' for languages that are written without spaces."
        },
    )
    min_tokens: int = field(
        default=1, metadata={"help": "Tokens of a reply at least, with the one that ends it."}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a reply at most; null for no limit."}
    )
    max_characters: int = field(default=50_000, metadata={"help": "Characters of a reply at most."})
    keep_truncated: bool = field(
        default=False, metadata={"help": "Whether replies that were cut off may stay."}
    )
    keep_special_tokens: bool = field(
        default=False,
        metadata={
            "help": "Whether replies may stay that have special tokens before their end, or such "
            "as <|im_end|> written out."
        },
    )
    forbidden_patterns: list[str] = field(
        default_factory=list,
        metadata={"help": "Regular expressions that must not be found in a reply."},
    )

    # Which of them are kept
    best_n: int = field(default=4, metadata={"help": "Replies that are kept of a prompt at most."})
    prefer: Prefer = field(
        default="brevity",
        metadata={
            "help": "What decides between replies of equal reward: 'brevity' (the shortest), or "
            "'diversity' (the least similar to those already taken)."
        },
    )
    max_similarity: float = field(
        default=0.8,
        metadata={
            "help": "From which Jaccard index of their word n-grams on two replies to a prompt are "
            "near-duplicates; above 1, none are, not even equal ones."
        },
    )
    similarity_ngram_size: int = field(default=5, metadata={"help": "Words of these n-grams."})
    balance: Balance = field(
        default="prop2diff",
        metadata={
            "help": "'prop2diff': of an easy prompt fewer are kept, `best_n` times its share of "
            "wrong replies, at least 1; 'uniform': `best_n` of every prompt."
        },
    )
    min_pass_rate: float = field(
        default=0.0, metadata={"help": "Prompts that are solved less often are left out."}
    )
    max_pass_rate: float = field(
        default=1.0,
        metadata={
            "help": "Prompts that are solved more often are left out; 0.99 leaves out those that "
            "are always solved."
        },
    )

    # What is written
    dataset_format: str = field(
        default="prompt_completion",
        metadata={
            "help": "Columns for TRL's SFTTrainer: 'prompt_completion' (prompt and completion; the "
            "loss is on the completion), or 'messages' (one conversation)."
        },
    )
    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Whether the dataset is uploaded to the Hub when it is whole."},
    )
    hub_dataset_id: str | None = field(
        default=None,
        metadata={"help": "OWNER/NAME of the dataset there; the name of `output_dir` by default."},
    )
    hub_private_repo: bool | None = field(
        default=None,
        metadata={"help": "Whether a repository that is created is private: unless this is false."},
    )
    reply_prefix: str = field(
        default="",
        metadata={
            "help": "Put before each reply: what the chat template opens it with, such as "
            "'<think>', if the template of the fine-tuning does not."
        },
    )

    def __post_init__(self) -> None:
        """Bring what a command line gives into the form that YAML gives."""
        for name in MAPPINGS:
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, _parsed(value))

    @property
    def repository(self) -> dict[str, Any]:
        """Name of the dataset on the Hub, and whether it is created private."""
        name = self.hub_dataset_id or Path(self.output_dir).absolute().name
        return {"repo_id": name, "private": self.hub_private_repo is not False}

    def sampling(self) -> dict[str, Any]:
        """Return what shapes the draw of a token, as arguments of ``group_sample``."""
        return {
            "max_new_tokens": self.max_completion_length,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "generation_kwargs": self.generation_kwargs,
        }

    def rules(self) -> Rules:
        """Return what a candidate must be.

        Raises:
            ConfigurationError: The format, the scripts or the n-grams cannot work.
        """
        asked, scripts, repetition = self.required_format, self.scripts, self.max_repetition
        return Rules(
            correct_threshold=self.correct_threshold,
            keep_truncated=self.keep_truncated,
            keep_special_tokens=self.keep_special_tokens,
            min_tokens=self.min_tokens,
            max_tokens=self.max_tokens,
            max_characters=self.max_characters,
            format=None if asked is None else _format(asked),
            language=None if scripts is None else LanguageReward(scripts=scripts, log_as="scripts"),
            min_language=self.min_script_share,
            repetition=None if repetition is None else self._repetition(),
            max_repetition=1.0 if repetition is None else repetition,
            forbidden=[re.compile(pattern) for pattern in self.forbidden_patterns],
        )

    def selection(self, weights: Mapping[str, float]) -> Selection:
        """Return how the correct and clean candidates are thinned out.

        Args:
            weights: Of the rewards, by name.
        """
        return Selection(
            weights=weights,
            best_n=self.best_n,
            prefer=self.prefer,
            ngram_size=self.similarity_ngram_size,
            max_similarity=self.max_similarity,
            balance=self.balance,
            min_pass_rate=self.min_pass_rate,
            max_pass_rate=self.max_pass_rate,
        )

    def _repetition(self) -> RepetitionReward:
        return RepetitionReward(
            ngram_size=self.repetition_ngram_size,
            max_penalty=-1.0,
            unit=self.repetition_unit,
            log_as="repetition_ngram_size",
        )


def _format(arguments: dict[str, object] | str) -> FormatReward:
    try:
        return FormatReward(**{"log_as": "required_format", **mapping(arguments)})
    except TypeError as error:
        raise ConfigurationError(
            [
                f"`required_format` is refused by the reward format ({error}), so no reply can be "
                "checked. Give its `arguments`, such as {structure: think_answer}."
            ]
        ) from error


def mapping(value: dict[str, object] | str | None) -> dict[str, Any]:
    """Return an option that is a mapping; an empty one if it is not set, or none."""
    return dict(value) if isinstance(value, dict) else {}


def _parsed(text: str) -> dict[str, object] | str | None:
    """Return the mapping that the text stands for, or the text if it stands for none.

    The JSON ``null`` stands for nothing that is asked.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if value is None or isinstance(value, dict) else text


MAPPINGS = ("generation_kwargs", "chat_template_kwargs", "required_format")
