"""TRL's trainer with our sampler, where it can serve the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel
from trl.trainer import grpo_trainer

from trl_grpo_ext._trl.run import RunSeams
from trl_grpo_ext.sampling import Completion, CompletionKey, SamplingNeeds, SamplingSettings
from trl_grpo_ext.sampling.decoding import check_prompts
from trl_grpo_ext.sampling.gathered import gathered_weights
from trl_grpo_ext.sampling.prompt_states import takes_cache

_TURN = 1 << 32  # prompts, more than a turn has


class SamplingSeams(RunSeams):
    """``trl.GRPOTrainer`` with hooks for the sampler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sampled: list[Completion] | None = None
        self._sampled_prompts: list[list[int]] = []
        self._awaits_old_logprobs = False  # whether the next pass may be the old policy's
        self._turn = 0  # of this generation: a rollout function may sample several times
        self._num_evaluated = 0
        self._num_drawn = 0  # prompts that this generation drew in earlier rounds
        super().__init__(*args, **kwargs)

    def sample_completions(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        keys: list[CompletionKey],
        step: int,
    ) -> list[Completion]:
        """Return one completion a prompt, if :attr:`samples_itself`.

        Args:
            model: The policy, unwrapped.
            prompts: Token ids, each prompt as often as it has completions.
            keys: What the random numbers of each completion depend on.
            step: Number of the generation; 0 in evaluation, so that evaluations are comparable.
        """
        raise NotImplementedError

    def completion_finished(self, index: int, completion: Completion) -> None:
        """Take note of a completion of the batch, while others are still sampled."""

    @property
    def samples_itself(self) -> bool:
        """Whether :meth:`sample_completions` takes TRL's place."""
        return False

    # What the engine must serve -------------------------------------------------------------------

    def sampling_needs(self) -> SamplingNeeds:
        """Return what decides about the engine of this run."""
        if self.use_vllm:
            return SamplingNeeds(uses_vllm=True)
        if (problem := self._only_transformers()) is not None:
            return SamplingNeeds(only_transformers=problem)
        asked = self.args.use_transformers_continuous_batching
        wanted = asked or self.accelerator.device.type == "cuda"
        if self.options.group_sampler != "continuous_batching" and (
            not wanted or self.options.max_live_tokens is not None
        ):
            return SamplingNeeds()
        problem, drawback = self._against_continuous_batching()
        return SamplingNeeds(
            prefers_continuous_batching=wanted,
            continuous_batching_problem=problem,
            continuous_batching_drawback=None if asked else drawback,
        )

    def _against_continuous_batching(self) -> tuple[str | None, str | None]:
        """Why ``generate_batch`` cannot serve the run, and why it would be slow."""
        if not hasattr(ContinuousBatchingConfig, "return_logprobs"):
            return "this version of transformers returns no log-probabilities from it", None
        from trl_grpo_ext.sampling import continuous_batching as engine

        settings = self.sampling_settings(self.model)
        if unsupported := engine.unsupported_by_continuous_batching(settings):
            return f"it does not honour {', '.join(unsupported)}", None
        if self.accelerator.mixed_precision != "no" and self.policy_dtype == torch.float32:
            return f"float32 weights compute in {self.accelerator.mixed_precision} (autocast)", None
        problem = engine.continuous_batching_problem(self.model)
        return problem, engine.continuous_batching_drawback(self.model)

    def _only_transformers(self) -> str | None:
        """Why only TRL's own path can sample; ``None`` if ours can."""
        if self.tools or self.environment_factories is not None:
            return "completions call tools"
        if self.reads_images:
            return "prompts may hold images"
        if self.shards_weights and (problem := self._against_gathering()) is not None:
            return problem
        if len({parameter.device for parameter in self.model.parameters()}) > 1:
            return "the weights are on several devices"
        if self.learns_prompts:
            return "the adapter adds virtual tokens"
        if not takes_cache(self._causal_lm(self.model)):
            return "the model keeps no keys and values"
        if self.args.transformers_continuous_batching_config:
            return "`transformers_continuous_batching_config` is for TRL's own path"
        try:
            self.sampling_settings(self.model)
        except ValueError as error:
            return str(error)
        return None

    def _against_gathering(self) -> str | None:
        """Why sharded weights are not whole on each process while it samples."""
        problem = "the weights are sharded, so that all processes must decode in step"
        if self._dist.is_zero3:
            if self.args.ds3_gather_for_generation:
                return None
            return f"{problem} (`ds3_gather_for_generation` is false)"
        if self._dist.fsdp_version == 2:  # TRL does not gather them, so it is for the user to ask
            if self.options.group_sampler == "shared_prefill":
                return None
            return f"{problem} (`group_sampler: shared_prefill` would gather them on each)"
        return problem

    def sampling_settings(self, model: PreTrainedModel) -> SamplingSettings:
        """Return what shapes the draws, as TRL's options and the model's own say."""
        return SamplingSettings.from_generation_config(
            self.generation_config, defaults=model.generation_config
        )

    # Sampling -------------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self._sampled, self._turn, self._awaits_old_logprobs = None, 0, True
        with self._phase("generation"):
            output = super()._generate(*args, **kwargs)
        self._forget_if_changed(output[0], output[1])
        return output

    def _forget_if_changed(self, prompts: list[list[int]], completions: list[list[int]]) -> None:
        """A rollout function may have changed what was sampled, or after which prompt."""
        if self._sampled is None:
            return
        if (prompts, completions) != (self._sampled_prompts, [row.ids for row in self._sampled]):
            self._sampled = None

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if not (self.extended and self.samples_itself):
            if self.extended and self._prompts_are_those_of_the_data:
                check_prompts(
                    self._causal_lm(self.model),
                    prompt_ids,
                    max_new_tokens=cast(int, self.max_completion_length),
                )
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        keys, step = self._completion_keys(len(prompt_ids))
        with self._generation_model() as model:
            self._sampled = self.sample_completions(model, prompt_ids, keys, step)
        self._sampled_prompts = prompt_ids
        return [completion.ids for completion in self._sampled], None

    @property
    def _prompts_are_those_of_the_data(self) -> bool:
        """Whether TRL's ``generate`` gets them as they are: no turns of tools, no vLLM."""
        return not (self.use_vllm or self.tools or self.environment_factories is not None)

    @contextmanager
    def _generation_model(self) -> Iterator[PreTrainedModel]:
        """The policy as TRL prepares it for generation."""
        with (
            grpo_trainer.unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self._checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            gathered_weights(self.model_wrapped),
        ):
            yield cast(PreTrainedModel, model)

    def _completion_keys(self, num_local: int) -> tuple[list[CompletionKey], int]:
        """Place of this process's completions among those of all, and the generation's number."""
        accelerator = self.accelerator
        first = accelerator.process_index * num_local
        if self._mode == "train":
            group_size = cast(int, self.num_generations)
            step = 1 + self._num_micro_steps // (
                cast(int, self.args.steps_per_generation) * self.num_iterations
            )
        else:
            group_size, step = cast(int, self.num_generations_eval), 0
            first += self._num_evaluated
            self._num_evaluated += accelerator.num_processes * num_local
        drawn, self._turn = self._num_drawn + self._turn * _TURN, self._turn + 1
        rows = range(first, first + num_local)
        return [CompletionKey(drawn + row // group_size, row % group_size) for row in rows], step

    @property
    def _num_micro_steps(self) -> int:
        """Micro-batches since training began, also in earlier runs that this one resumes."""
        accumulation = self.args.gradient_accumulation_steps
        return self.state.global_step * accumulation + self._step % accumulation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run TRL's loop; each evaluation gives its completions the same keys."""
        self._num_evaluated = 0
        return super().evaluation_loop(*args, **kwargs)
