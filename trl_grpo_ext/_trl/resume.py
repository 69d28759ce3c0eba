"""TRL's trainer with exact resume: a run that was ended goes on as if it had not been.

transformers saves weights, optimizer, schedule and random numbers. What is added is where the run
was inside a generation: the buffered batch, its place, pending logs, the order of the prompts. A
run that is stopped by a signal saves the state of the last optimizer boundary, and with it what was
generated since.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from trl_grpo_ext._trl.run_state import EXACT, RunStateSeams
from trl_grpo_ext._trl.stopping import StopRequested
from trl_grpo_ext.checkpointing import LAST_GOOD, checkpoint_to_resume
from trl_grpo_ext.errors import CheckpointError, RewardOutageError
from trl_grpo_ext.peers import ending_together
from trl_grpo_ext.randomness import random_state, set_random_state
from trl_grpo_ext.rewards.scores import Score
from trl_grpo_ext.sampling import Completion
from trl_grpo_ext.signals import StopSignals, TrainingInterrupted

logger = logging.get_logger(__name__)


class ResumeSeams(RunStateSeams):
    """``trl.GRPOTrainer`` whose resumed run is the run that was ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Of this run since its last optimizer step, for a checkpoint if it is stopped:
        self._boundary: dict[str, Any] | None = None  # as it was then
        self._ahead: dict[str, Any] | None = None  # as it was when it had generated
        self._turns: list[dict[str, Any]] = []  # what was sampled
        self._scores: list[dict[str, Any]] = []  # of what was sampled, with their metrics
        self._in_steps = False  # whether a step of this session has begun
        self._kept_buffer: Any = None  # the generation in use then, or the one ahead
        self._stopped_state: dict[str, Any] | None = None
        # Of the run that is resumed:
        self._resumed_from: str | None = None
        self._train_sampler: Any = None
        self._resumed: dict[str, Any] | None = None
        self._random_to_set: dict[str, Any] | None = None
        self._random_after_evaluation: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)
        if self.extended:
            self.add_callback(_RestoreCallback(self))

    # Train ----------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001 - transformers' signature
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Train, or go on with a run that was ended.

        Args:
            resume_from_checkpoint: A folder; or ``"last-good"`` (or true) for the newest whole
                checkpoint of ``output_dir``. With ``"last-good"``, a run without one starts anew.
            *args: As in ``transformers.Trainer``.
            **kwargs: As in ``transformers.Trainer``.

        Raises:
            CheckpointError: the checkpoint is damaged, there is none, or one could not be written.
            TrainingInterrupted: SIGTERM or Ctrl-C came, and the state was saved.
            PeerFailed: another process of the run failed.
        """
        if not self.extended:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._boundary, self.last_saved_step = None, None
        self._ahead, self._turns, self._scores, self._stopped_state = None, [], [], None
        self._in_steps = False
        self._pending_metrics.clear()  # of a batch that an earlier call was stopped in
        self._pending_extra_logs.clear()
        self._train_sampler, self._resumed_from, self.epoch_ended_at = None, checkpoint, None
        if checkpoint is None:
            self.num_skipped = self.num_skipped_in_a_row = 0
        self._resumed = None
        together = ending_together(agreed=(TrainingInterrupted,))
        with StopSignals() as self._signals, together:
            try:
                if checkpoint is not None:
                    self.resume_reference(Path(checkpoint))
                    self._resumed = self._read_run_state(Path(checkpoint))
                result = super().train(checkpoint, *args, **kwargs)
                if not self._anywhere(self.is_asked_to_stop())[0]:
                    return result
                self._boundary = None  # the run is over, and saved what it was to save
                raise self._interrupted()
            except StopRequested:
                raise self._interrupted() from None
            except RewardOutageError as outage:
                raise self._ended_by(outage) from None
            finally:
                self._signals = None

    def _checkpoint_to_resume(
        self,
        asked: str | bool | None,  # noqa: FBT001 - what `train` was given
    ) -> str | None:
        """The folder to resume from, checked by the main process for all."""
        found: list[Any] = [None]
        if self.is_world_process_zero():
            try:
                found = [checkpoint_to_resume(asked, Path(str(self.args.output_dir)))]
            except CheckpointError as error:
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        return cast(str | None, found[0])

    def _interrupted(self) -> TrainingInterrupted:
        """Save the state of the last boundary; return the exception that ends the program."""
        received = self._signals.received if self._signals is not None else 0
        local = torch.tensor([received], device=self.accelerator.device)
        number = int(self.accelerator.gather(local).max())  # it may have come to another process
        saved = self._save_boundary()
        if self.is_world_process_zero():
            logger.warning(
                f"{signal.Signals(number).name} stopped the run after step "
                f"{self.state.global_step}. {_how_to_go_on(saved)}"
            )
        return TrainingInterrupted(number, saved)

    def _ended_by(self, outage: RewardOutageError) -> RewardOutageError:
        """Save the state of the last boundary with the scores there are; return what to raise."""
        return RewardOutageError(
            f"After step {self.state.global_step}: {outage} {_how_to_go_on(self._save_boundary())} "
            "Only what has no score is asked for then."
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run TRL's epoch, but not of a resumed run that is over: TRL would train a step more."""
        over = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        if self.extended and over:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # Boundaries: the run between two optimizer steps ----------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run TRL's step; before the first micro-batch of a step, note the state of the run."""
        if self._random_to_set is not None:
            set_random_state(self._random_to_set)
            self._random_to_set = None
        self._in_steps = True
        if self.extended and self._boundary_is_old:
            self._mark_boundary()
        return super().training_step(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's batches; a signal to all processes may have ended the loader's workers."""
        if self._signals is not None and self._in_steps and self._boundary_is_old:
            self._mark_boundary()
        with self._stopping_without_workers():
            return super().get_batch_samples(*args, **kwargs)

    @contextmanager
    def _stopping_without_workers(self) -> Iterator[None]:
        """Stop where a signal has ended the data loader's workers together with this process."""
        try:
            yield
        except RuntimeError:
            if self.is_asked_to_stop():
                self.stop_if_asked()
            raise

    @property
    def _boundary_is_old(self) -> bool:
        return self.state.global_step != (self._boundary or {}).get("step")

    def _mark_boundary(self, **more: Any) -> None:
        now = {"step": self.state.global_step, "random": random_state()}
        self._boundary = self._run_state() | now | more
        self._boundary["logged"] = len(self.state.log_history)
        self._ahead, self._turns, self._scores = None, [], []
        self._kept_buffer = self._buffered_inputs

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not self.extended or self._mode != "train" or self._signals is None:
            return super()._prepare_inputs(generation_batch)
        ahead, resumed = None, self._resumed
        if resumed is not None and (ahead := resumed.pop("ahead", None)) is not None:
            self._buffered_inputs = resumed.pop("buffer")
            self._restore(ahead)
            set_random_state(ahead["random"])
            inputs = self._buffered_inputs[self._step % cast(int, self.args.steps_per_generation)]
        elif self._in_generation and self._buffered_inputs is not None:
            return super()._prepare_inputs(generation_batch)
        else:
            inputs = super()._prepare_inputs(generation_batch)
        if self._at_boundary:
            self._ahead = self._run_state() | {"random": random_state()}
            self._kept_buffer = self._buffered_inputs
        self.stop_if_asked()
        return inputs

    def keep_completions(self) -> None:
        """Note what was sampled, so that a run that stops before it is scored has it."""
        if self._mode == "train" and self._sampled is not None and self._at_boundary:
            rows = [dataclasses.astuple(completion) for completion in self._sampled]
            self._turns.append(
                {
                    "prompts": self._sampled_prompts,
                    "completions": rows,
                    "random": random_state(),
                }
            )

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        turns = self._resumed.get("turns") if self._resumed is not None else None
        if not turns or self._mode != "train" or not self.samples_itself:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if turns[0].get("prompts") != prompt_ids:
            self._forget_turns()
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        turn = turns.pop(0)
        self._sampled = [Completion(*row) for row in turn["completions"]]
        self._sampled_prompts = prompt_ids
        set_random_state(turn["random"])
        self.keep_completions()
        return [completion.ids for completion in self._sampled], None

    def _forget_turns(self) -> None:
        """Draw anew what was kept: the data of the run is not what it was."""
        logger.warning(
            "The completions that the checkpoint kept are of other prompts, so they are drawn and "
            "scored anew. The run is not the undisturbed one; give the data that it began with."
        )
        assert self._resumed is not None
        self._resumed["turns"], self._resumed["scores"] = [], []
        self._known = super().known_scores()

    def known_scores(self) -> list[list[Score] | None]:
        """Return the scores that an interrupted run had of the batch that it kept."""
        resumed = self._resumed or {}
        kept = resumed.get("scores") if resumed.get("turns") and self.samples_itself else None
        known = super().known_scores()
        if kept and self._mode == "train":
            batch = kept.pop(0)
            if batch["names"] == self.reward_func_names:
                known = batch["scores"]
                self.log_again(batch["told"], known)
        if self._mode == "train":
            names = list(self.reward_func_names)
            self._scores.append({"names": names, "scores": known, "told": self._told})
        return known

    def keep_scores(self, scores: list[list[Score] | None]) -> None:
        """Note the scores of the batch, so that a run that stops before it is whole has them."""
        if self._mode == "train":
            self._scores[-1]["scores"] = scores

    @property
    def _at_boundary(self) -> bool:
        """Whether this is the first micro-batch of a step: later generations are drawn again."""
        return self._boundary is not None and self._step == self._boundary["micro_step"]

    @property
    def _in_generation(self) -> bool:
        """Whether the next micro-batch is of a generation that is there already."""
        return self._step % (cast(int, self.args.steps_per_generation) * self.num_iterations) != 0

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run TRL's loop, which a callback of the user's may have asked for after a step."""
        if self.extended and self._signals is not None and self._boundary_is_old:
            self._mark_boundary()
        with self._stopping_without_workers():
            return super().evaluation_loop(*args, **kwargs)

    # Evaluate -------------------------------------------------------------------------------------

    def _evaluate(
        self,
        trial: Any,
        ignore_keys_for_eval: Any,
        skip_scheduler: bool = False,  # noqa: FBT001, FBT002 - transformers' signature
    ) -> dict[str, float]:
        """Evaluate during training; a run stopped meanwhile evaluates again when it goes on."""
        if not self.extended or self._signals is None:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        moment = "start" if skip_scheduler else "step"
        if moment == "start" and self._resumed is not None and self._due != "start":
            return {}  # `eval_on_start` is of the start of the run, which was before
        self._mark_boundary(evaluation=moment, saves=self.control.should_save)
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self._boundary = None
        return metrics

    @property
    def _due(self) -> str | None:
        """Which evaluation the resumed run was in the middle of."""
        return None if self._resumed is None else self._resumed["state"].get("evaluation")

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kw: Any
    ) -> None:
        """Run transformers' method, and note what a log at the end of the epoch repeats."""
        if self.extended and self._signals is not None:
            norm = grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm
            self._last_rates = (norm, kw.get("learning_rate"))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kw)

    def _evaluate_again(self, state: dict[str, Any]) -> None:
        """Do what is left of the step: evaluate, and save if it was to be saved."""
        set_random_state(state["random"])
        self.control.should_evaluate, self.control.should_save = True, state["saves"]
        self._finish_step(state)
        self._random_after_evaluation = random_state()

    def _end_epoch(self, state: dict[str, Any]) -> None:
        """Do what is left of an epoch whose last step was saved."""
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self._finish_step(state)

    def _finish_step(self, state: dict[str, Any]) -> None:
        grad_norm, learning_rate = state["rates"]
        epoch, now = self.state.epoch, time.time()
        self._maybe_log_save_evaluate(
            self._tr_loss,
            grad_norm,
            self.model_wrapped,
            None,
            epoch,
            None,
            now,
            learning_rate=learning_rate,
        )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._random_after_evaluation is None:
            super()._load_rng_state(checkpoint)
        else:
            set_random_state(self._random_after_evaluation)

    # Restore --------------------------------------------------------------------------------------

    def restore_run(self) -> None:
        """Go back to where the resumed checkpoint was; called when the loop is about to begin."""
        self._random_to_set = self._random_after_evaluation = None
        for _ in range(math.floor((self.state.epoch or 0.0) + EXACT)):
            # Each epoch's order comes from one generator; a stream has no sampler.
            next(iter(self._train_sampler or ()), None)
        if self._resumed is None:
            return
        state = self._resumed["state"]
        self.model.train()  # what is logged now is of the training
        self._restore(state)
        if self._resumed.get("ahead") is None:
            self._buffered_inputs = self._resumed.pop("buffer")
        if self._due is None:
            self._random_to_set = state.get("random")
        elif self._due == "step":
            self._evaluate_again(state)
        if state["epoch_ends"]:
            self._end_epoch(state)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    # Save -----------------------------------------------------------------------------------------

    def save_run_state(self, folder: Path) -> None:
        """Write where the run is, or where it was when it is stopped."""
        state = self._stopped_state or self._state_to_save(self._run_state())
        torch.save(state, folder / self.run_state_name)

    def _state_to_save(self, state: dict[str, Any], **more: Any) -> dict[str, Any]:
        keeps = self._in_generation or more.get("ahead") is not None
        return {
            "num_processes": self.accelerator.num_processes,
            "reference": self.reference_source,
            "state": state,
            "buffer": self._buffered_inputs if keeps else None,
        } | more

    def _save_boundary(self) -> str | None:
        """Save the run as it was after its last optimizer step, with what it generated since."""
        self.is_in_train = False
        boundary, final = self._boundary, f"checkpoint-{self.state.global_step}"
        path = str(Path(self._get_output_dir(None)) / final)
        if boundary is None:
            return path if self.last_saved_step == self.state.global_step else None
        resumed = self._resumed or {}
        if resumed.get("ahead") is not None or resumed.get("turns"):
            return self._resumed_from  # it was not used yet, and is all there
        new = self._ahead is not None or self._turns or "evaluation" in boundary
        if self.last_saved_step == self.state.global_step and not new:
            return path
        self.state.num_input_tokens_seen = boundary["num_tokens"]
        self.current_flos = boundary["flos"]
        self._step = boundary["micro_step"]
        self._buffered_inputs = self._kept_buffer
        del self.state.log_history[boundary["logged"] :]
        turns = self._turns if self._ahead is None else []
        scores = [*self._scores, *resumed.get("scores", [])][: len(turns)]
        self._stopped_state = self._state_to_save(
            boundary, ahead=self._ahead, turns=turns, scores=scores
        )
        self._save_checkpoint(self.model_wrapped, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return path


def _how_to_go_on(saved: str | None) -> str:
    where = f"Saved {saved}" if saved else "It had not begun, so nothing is saved"
    return f"{where}. To go on, run the same with `resume_from_checkpoint: {LAST_GOOD}`."


class _RestoreCallback(TrainerCallback):
    """Restores a resumed run when transformers has set up its loop."""

    def __init__(self, trainer: ResumeSeams) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go back to where the checkpoint was."""
        self._trainer.restore_run()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that the end of the epoch came."""
        self._trainer.epoch_ended_at = state.global_step
