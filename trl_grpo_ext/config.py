"""The configuration: every option of ``trl.GRPOConfig`` and ours, checked before a model loads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any, Literal, get_args

from trl.trainer.grpo_config import GRPOConfig

from trl_grpo_ext.advantages import (
    STD_EPS,
    AdvantageBaseline,
    RewardAggregation,
    RewardScale,
    StepBaseline,
)
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.evaluation.options import EvaluationOptions, evaluation_problems
from trl_grpo_ext.hub.options import HubOptions, hub_problems
from trl_grpo_ext.log_options import LogOptions, log_problems
from trl_grpo_ext.losses import (
    LOSS_TYPE_REDUCTIONS,
    ImportanceLevel,
    KLEstimator,
    kl_gradient_problem,
)
from trl_grpo_ext.reference.build import EmbeddingQuantization
from trl_grpo_ext.reference.options import (
    BLOCK_SIZES,
    Compensation,
    ReferenceKind,
    ReferenceOptions,
    reference_problems,
)
from trl_grpo_ext.reference.quantized import QuantizationType
from trl_grpo_ext.rewards.options import OnOutage, RewardOptions, reward_option_problems
from trl_grpo_ext.robustness import RobustnessOptions, robustness_problems
from trl_grpo_ext.sampling.settings import generation_keys, unsupported_generation_keys

GroupSampler = Literal["auto", "shared_prefill", "continuous_batching", "vllm", "transformers"]
SharedPrefixMode = Literal["auto", "always", "never"]
OldLogprobs = Literal["sampler", "recompute"]


@dataclass
class ExtensionOptions(
    ReferenceOptions, EvaluationOptions, RewardOptions, RobustnessOptions, LogOptions, HubOptions
):
    """What this package adds to ``trl.GRPOConfig``.

    With the defaults, given completions get the log-probabilities, losses and gradients of plain
    TRL, up to rounding, and completions are drawn from the same distribution, by other random
    numbers. Two things differ: groups of equal rewards teach exactly nothing, and rewards that are
    NaN or infinite are left out.

    Those of a subject stand with it: :class:`~trl_grpo_ext.reference.options.ReferenceOptions`,
    :class:`~trl_grpo_ext.evaluation.options.EvaluationOptions`,
    :class:`~trl_grpo_ext.rewards.options.RewardOptions`,
    :class:`~trl_grpo_ext.robustness.RobustnessOptions`,
    :class:`~trl_grpo_ext.log_options.LogOptions` and
    :class:`~trl_grpo_ext.hub.options.HubOptions`.
    """

    extensions: bool = field(
        default=True,
        metadata={
            "help": "Whether anything of trl_grpo_ext is used; false runs TRL's code untouched."
        },
    )
    group_sampler: GroupSampler = field(
        default="auto",
        metadata={
            "help": "What samples the completions: 'shared_prefill' (each prompt computed once a "
            "group), 'continuous_batching' (transformers' generate_batch), 'vllm' (with "
            "use_vllm=true), 'transformers' (TRL's own generate), or 'auto' (the fastest of them "
            "that serves the run; the log says which and why)."
        },
    )
    max_live_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens whose keys and values 'shared_prefill' keeps at a time; what does not "
            "fit runs in a later wave. None for what fits into the GPU's free memory, "
            "no limit on a CPU."
        },
    )
    cuda_graphs: bool = field(
        default=True,
        metadata={
            "help": "Whether 'shared_prefill' repeats its steps as CUDA graphs, where the model "
            "can be captured; false launches each kernel from Python, which is slower. No effect "
            "on a CPU."
        },
    )
    shared_prefix: SharedPrefixMode = field(
        default="auto",
        metadata={
            "help": "Whether forward passes compute a prompt once for its group: 'auto' (where "
            "that is exact, else padded rows as in TRL), 'always' (an error where it is not), "
            "'never'."
        },
    )
    verify_shared_prefix: bool = field(
        default=True,
        metadata={
            "help": "Whether a few completions of the first batch of each model are also computed "
            "in TRL's padded rows; if log-probabilities differ by more than rounding, padded rows "
            "are used from then on."
        },
    )
    old_logprobs: OldLogprobs = field(
        default="sampler",
        metadata={
            "help": "Where the log-probabilities of the policy that sampled come from when it has "
            "moved since: 'sampler' (kept while sampling; in float32 without dropout, else "
            "recomputed), or "
            "'recompute' (a forward pass, as in TRL)."
        },
    )
    onednn_linear: bool = field(
        default=True,
        metadata={
            "help": "Whether float32 linear layers run in oneDNN on a CPU that is not Intel's: "
            "twice as fast there as torch's default, equal up to rounding."
        },
    )
    advantage_baseline: AdvantageBaseline = field(
        default="mean",
        metadata={
            "help": "What a completion is compared with: 'mean' of its group, or 'leave_one_out'."
        },
    )
    step_baseline: StepBaseline = field(
        default="group",
        metadata={
            "help": "With `process_advantages`, what a step is compared with: the mean of all "
            "steps of the 'group' (DeepSeekMath), or of its steps at the same 'position'."
        },
    )
    advantage_eps: float = field(
        default=STD_EPS,
        metadata={
            "help": "Added to the deviation that advantages are divided by, "
            "in reward units; TRL's is 1e-4."
        },
    )
    kl_estimator: KLEstimator = field(
        default="k3",
        metadata={
            "help": "Estimator of the KL to the reference: 'k1', 'k2' or 'k3' (TRL's). k1 needs "
            "use_bias_correction_kl=true, k2 needs false."
        },
    )
    kl_clamp: float | None = field(
        default=None,
        metadata={
            "help": "Largest |log pi_ref - log pi| that the KL counts, "
            "in nats (10 to 20); none if not set."
        },
    )

    @classmethod
    def of(cls, config: GRPOConfig) -> ExtensionOptions:
        """Return our options of a configuration; the defaults for a plain ``trl.GRPOConfig``."""
        return cls(
            **{f.name: getattr(config, f.name) for f in fields(cls) if hasattr(config, f.name)}
        )


@dataclass
class ExtGRPOConfig(ExtensionOptions, GRPOConfig):
    """``trl.GRPOConfig`` with the options of :class:`ExtensionOptions`.

    Raises:
        ConfigurationError: settings that cannot work, all at once.

    Example:
        >>> config = ExtGRPOConfig(
        ...     output_dir="out", use_cpu=True, bf16=False, beta=0.02, kl_clamp=10.0, report_to=[]
        ... )
        >>> config.kl_estimator, config.kl_clamp
        ('k3', 10.0)
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "reward_gates", "reward_clip"]  # noqa: RUF012

    def __post_init__(self) -> None:
        self.reward_gates, self.reward_clip = map(_read_json, (self.reward_gates, self.reward_clip))
        problems = list(configuration_problems(self))
        group_problem = _group_problem(self)
        try:
            super().__post_init__()
        except (ValueError, ZeroDivisionError) as error:
            if group_problem is None or "num_generations" not in str(error):
                problems.append(str(error))
        if group_problem is not None:
            problems.append(group_problem)
        if problems:
            raise ConfigurationError(problems)


def configuration_problems(config: GRPOConfig) -> Iterator[str]:
    """Yield what cannot work in our options, and in TRL's where it would say so after loading."""
    options = ExtensionOptions.of(config)
    yield from _unknown_values(config, options)
    if not options.advantage_eps >= 0:
        yield (
            f"`advantage_eps` is {options.advantage_eps}; "
            "it is added to a deviation: use 0 or more (TRL's is 1e-4)."
        )
    if options.kl_clamp is not None and not options.kl_clamp > 0:
        yield (
            f"`kl_clamp` is {options.kl_clamp}; "
            "use a positive number of nats (10 to 20), or leave it out."
        )
    if problem := kl_gradient_problem(
        options.kl_estimator, bias_correction=config.use_bias_correction_kl
    ):
        yield problem
    yield from _sampler_problems(config, options)
    yield from log_problems(options)
    if options.extensions:
        yield from hub_problems(
            options,
            push_to_hub=config.push_to_hub,
            log_completions=config.log_completions,
            output_dir=config.output_dir,
            hub_model_id=config.hub_model_id,
            hub_token=config.hub_token,
        )
    yield from reward_option_problems(options)
    yield from robustness_problems(options)
    yield from evaluation_problems(
        options,
        num_generations=config.num_generations or 1,
        num_generations_eval=config.num_generations_eval,
        metric_for_best_model=config.metric_for_best_model,
    )
    yield from _options_in_vain(config, options)
    if options.extensions and config.enable_jit_checkpoint:
        yield (
            "`enable_jit_checkpoint` is true, but this trainer saves on SIGTERM and Ctrl-C by "
            "itself, and exactly; two handlers would get in each other's way. Set "
            "`enable_jit_checkpoint: false`."
        )
    yield from reference_problems(
        options,
        beta=config.beta,
        mixes=config.sync_ref_model,
        mixup_alpha=config.ref_model_mixup_alpha,
    )


def _unknown_values(config: GRPOConfig, options: ExtensionOptions) -> Iterator[str]:
    # TRL still takes the booleans of its older versions.
    booleans: dict[object, str] = {True: "group", False: "none"}
    scale = booleans.get(config.scale_rewards, config.scale_rewards)
    for name, value, known in (
        ("advantage_baseline", options.advantage_baseline, get_args(AdvantageBaseline)),
        ("step_baseline", options.step_baseline, get_args(StepBaseline)),
        ("group_sampler", options.group_sampler, get_args(GroupSampler)),
        ("shared_prefix", options.shared_prefix, get_args(SharedPrefixMode)),
        ("old_logprobs", options.old_logprobs, get_args(OldLogprobs)),
        ("kl_estimator", options.kl_estimator, get_args(KLEstimator)),
        ("on_outage", options.on_outage, get_args(OnOutage)),
        ("reference", options.reference, get_args(ReferenceKind)),
        (
            "reference_quantization",
            options.reference_quantization,
            (None, *get_args(QuantizationType)),
        ),
        (
            "reference_embedding_quantization",
            options.reference_embedding_quantization,
            (None, *get_args(EmbeddingQuantization)),
        ),
        (
            "reference_compensation",
            options.reference_compensation,
            (None, *get_args(Compensation)),
        ),
        ("reference_block_size", options.reference_block_size, (None, *BLOCK_SIZES)),
        ("scale_rewards", scale, get_args(RewardScale)),
        (
            "multi_objective_aggregation",
            config.multi_objective_aggregation,
            get_args(RewardAggregation),
        ),
        ("importance_sampling_level", config.importance_sampling_level, get_args(ImportanceLevel)),
        ("loss_type", config.loss_type, tuple(LOSS_TYPE_REDUCTIONS)),
    ):
        if value not in known:
            listed = ", ".join(str(choice) for choice in known if choice is not None)
            hint = " (YAML reads off and no as false.)" if value is False else ""
            yield f"`{name}` is {value!r}, which is not known. Use one of: {listed}.{hint}"


def _sampler_problems(config: GRPOConfig, options: ExtensionOptions) -> Iterator[str]:
    sampler, limit = options.group_sampler, options.max_live_tokens
    if config.max_completion_length is not None and config.max_completion_length < 1:
        yield (
            f"`max_completion_length` is {config.max_completion_length}, so completions would have "
            "no token to learn from. Set it to at least 1."
        )
    if not config.temperature > 0:
        yield (
            f"`temperature` is {config.temperature}, but the loss divides by it. Set it above 0 (1 "
            "is the model's own distribution)."
        )
    if config.use_vllm and sampler not in ("auto", "vllm"):
        yield (
            f"`use_vllm` is true, but `group_sampler` is {sampler!r}. "
            "Set `group_sampler: vllm` (or auto), or `use_vllm: false`."
        )
    if sampler == "vllm" and not config.use_vllm:
        yield (
            "`group_sampler` is 'vllm', but `use_vllm` is false, so there is no vLLM to sample "
            "with. Set `use_vllm: true`, or `group_sampler: auto`."
        )
    if limit is not None and limit < 1:
        yield f"`max_live_tokens` is {limit}; use at least the tokens of one prompt and completion."
    if limit is not None and sampler not in ("auto", "shared_prefill"):
        yield (
            f"`max_live_tokens` is set, but `group_sampler` is {sampler!r}, which does not read "
            "it. Set `group_sampler: shared_prefill`, or remove `max_live_tokens`."
        )
    if (sampler == "vllm" or config.use_vllm) and find_spec("vllm") is None:
        yield (
            "`use_vllm` is true, or `group_sampler` is 'vllm', but vLLM is not installed. Install "
            "it (pip install 'trl[vllm]'), or set `use_vllm: false` and `group_sampler: auto`."
        )
    given = config.generation_kwargs if isinstance(config.generation_kwargs, dict) else {}
    unknown = [name for name in given if name not in generation_keys()]
    if unknown and not config.use_vllm:
        yield (
            f"`generation_kwargs` has {', '.join(f'`{name}`' for name in unknown)}, which "
            "`generate` does not know and would ignore. Correct the name, or remove it."
        )
    names = [name for name in unsupported_generation_keys(given) if name not in unknown]
    if names and sampler in ("shared_prefill", "continuous_batching"):
        yield (
            f"`group_sampler: {sampler}` does not honour {', '.join(f'`{n}`' for n in names)} in "
            "`generation_kwargs`, so completions would not be what was asked for. "
            "Set `group_sampler: transformers` (or auto), or remove what is set."
        )


def _options_in_vain(config: GRPOConfig, options: ExtensionOptions) -> Iterator[str]:
    changed = [f.name for f in fields(options) if getattr(options, f.name) != f.default]
    streamed = [name for name in changed if name == "reference_on_disk"]
    quantized = [name for name in changed if name.startswith("reference_") and name not in streamed]
    penalty = [name for name in changed if name.startswith(("reference", "kl_"))]
    if options.reference == "none":
        penalty.remove("reference")
    others = [name for name in changed if name != "extensions"]
    if config.beta == 0.0 and penalty:
        yield (
            f"`beta` is 0, so there is no KL penalty and no reference, but {_named(penalty)} set. "
            "Set `beta` above 0 (0.01 to 0.05 is usual), or remove what is set."
        )
    for kinds, details in ((("quantized",), quantized), (("streamed", "auto"), streamed)):
        if options.reference not in kinds and details:
            yield (
                f"`reference` is {options.reference!r}, but {_named(details)} set. "
                f"Set `reference: {kinds[0]}`, or remove what is set."
            )
    if not options.extensions and others:
        yield (
            f"`extensions` is false, but {_named(others)} set. "
            "Set `extensions: true`, or remove what is set."
        )


def _group_problem(config: GRPOConfig) -> str | None:
    """TRL's check of the group size with what to do about it; ``None`` if TRL itself must judge."""
    group_size, processes = config.num_generations, int(os.environ.get("WORLD_SIZE", "1"))
    if not isinstance(group_size, int) or group_size < 2:
        return (
            f"`num_generations` is {group_size}; "
            "a group needs at least 2 completions to be compared. 8 is usual."
        )
    per_step = config.per_device_train_batch_size * processes
    if config.generation_batch_size is not None:
        batch, made_of = config.generation_batch_size, "`generation_batch_size`"
    else:
        steps = config.steps_per_generation or config.gradient_accumulation_steps
        name = (
            "steps_per_generation" if config.steps_per_generation else "gradient_accumulation_steps"
        )
        batch = per_step * steps
        made_of = (
            f"`per_device_train_batch_size`={config.per_device_train_batch_size} x "
            f"{processes} process{'' if processes == 1 else 'es'} x `{name}`={steps}"
        )
    if batch % group_size == 0:
        return None
    divisors = [str(size) for size in range(2, min(batch, 64) + 1) if batch % size == 0]
    return (
        f"`num_generations`={group_size} does not divide "
        f"the generation batch of {batch} completions ({made_of}), so a group would be split. "
        f"Use {', '.join(divisors) or 'a larger batch'}, or change the batch size."
    )


def _read_json(value: Any) -> Any:
    """Return a mapping that was written on the command line; all else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value  # which `configuration_problems` refuses


def _named(names: list[str]) -> str:
    listed = ", ".join(f"`{name}`" for name in names)
    return f"{listed} {'is' if len(names) == 1 else 'are'}"
