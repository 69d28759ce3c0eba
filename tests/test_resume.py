"""A run that was ended and resumed is the run that was left alone, bit for bit."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from runs import settings, vowels
from transformers import Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.checkpointing import damage
from trl_grpo_ext.errors import CheckpointError, ReferenceModelError
from trl_grpo_ext.reference.store import fingerprint
from trl_grpo_ext.signals import StopSignals, TrainingInterrupted

# 17 prompts, 4 a generation: an epoch has 4 generations of 4 micro-batches, used twice: 16 steps of
# 2 micro-batches. The logs and the checkpoints fall into each other's middle.
STEPS = 20
OPTIONS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_completion_length": 5,
    "logging_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
}
ENGINES = ("shared_prefill", "transformers")
TIMED = ("time", "runtime", "per_second", "train_loss")


def build(model: Path, out: Path, reward: Any = vowels, **changes: Any) -> ExtGRPOTrainer:
    config = ExtGRPOConfig(**settings(out, **OPTIONS | {"output_dir": str(out)} | changes))
    prompts = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(17)]})
    evaluated = prompts.select(range(3)) if config.eval_strategy != "no" else None
    return ExtGRPOTrainer(str(model), reward, config, prompts, evaluated)


def outcome(trainer: ExtGRPOTrainer) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What the run logged, without times, and its weights."""
    history = [
        {key: value for key, value in entry.items() if not any(word in key for word in TIMED)}
        for entry in trainer.state.log_history
    ]
    return history, trainer.model.state_dict()


def assert_same(trainer: ExtGRPOTrainer, undisturbed: ExtGRPOTrainer) -> None:
    (history, weights), (expected, wanted) = outcome(trainer), outcome(undisturbed)
    assert history == expected
    for name, value in wanted.items():
        assert torch.equal(weights[name], value), name


@pytest.fixture(scope="module", params=ENGINES)
def undisturbed(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> ExtGRPOTrainer:
    """A finished run with all its checkpoints."""
    out = tmp_path_factory.mktemp("undisturbed")
    trainer = build(tiny_model_dir, out, group_sampler=request.param)
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [3, 9, 18])
def test_resume_from_a_checkpoint(
    undisturbed: ExtGRPOTrainer, tiny_model_dir: Path, tmp_path: Path, step: int
) -> None:
    """Step 3: within a generation and between logs; 9: in a generation's reuse; 18: epoch 2."""
    sampler = undisturbed.options.group_sampler
    trainer = build(tiny_model_dir, tmp_path, group_sampler=sampler)
    trainer.train(f"{undisturbed.args.output_dir}/checkpoint-{step}")
    assert_same(trainer, undisturbed)


def test_resume_at_the_end_of_an_epoch_with_workers(
    undisturbed: ExtGRPOTrainer, tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = {"group_sampler": undisturbed.options.group_sampler, "save_steps": 16}
    options |= {"dataloader_num_workers": 2}
    alone = build(tiny_model_dir, tmp_path / "alone", **options)
    alone.train()
    resumed = build(tiny_model_dir, tmp_path / "resumed", **options)
    resumed.train(f"{alone.args.output_dir}/checkpoint-16")
    assert_same(resumed, alone)


class Signal:
    """Sends SIGTERM to this process when it has been called ``at`` times."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, *_: object, **__: object) -> None:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


class SignalCallback(TrainerCallback):
    """Sends it at the ``at``-th event of a kind."""

    def __init__(self, event: str, at: int) -> None:
        setattr(self, event, Signal(at))


def interrupted(trainer: ExtGRPOTrainer, *args: Any) -> TrainingInterrupted:
    with pytest.raises(TrainingInterrupted) as ended:
        trainer.train(*args)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return ended.value


def scoring(trainer: ExtGRPOTrainer) -> None:
    """While the second generation is scored: it is kept."""
    send = Signal(2)
    trainer.reward_funcs = [lambda **kw: (send(), vowels(**kw))[1]]


def sampling(trainer: ExtGRPOTrainer) -> None:
    """Between two tokens of the first generation."""
    trainer.model.register_forward_hook(Signal(3))


def between_micro_batches(trainer: ExtGRPOTrainer) -> None:
    """With half a step's gradients there, of the first use of a generation."""
    trainer.add_callback(SignalCallback("on_substep_end", 5))


def after_a_step(trainer: ExtGRPOTrainer) -> None:
    """Within the reuse of a generation, and in the second epoch."""
    trainer.add_callback(SignalCallback("on_step_end", 18))


@pytest.mark.parametrize("when", [scoring, sampling, between_micro_batches, after_a_step])
def test_sigterm_saves_the_last_boundary(
    undisturbed: ExtGRPOTrainer,
    tiny_model_dir: Path,
    tmp_path: Path,
    when: Callable[[ExtGRPOTrainer], None],
) -> None:
    sampler = undisturbed.options.group_sampler
    trainer = build(tiny_model_dir, tmp_path, group_sampler=sampler)
    when(trainer)
    ended = interrupted(trainer)
    assert damage(Path(ended.checkpoint)) is None
    resumed = build(tiny_model_dir, tmp_path, group_sampler=sampler)
    resumed.train("last-good")
    assert_same(resumed, undisturbed)


def test_what_was_scored_is_not_scored_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    calls = []

    def counted(*, completions: list[str], **_: Any) -> list[float]:
        calls.append(completions)
        return vowels(completions=completions)

    alone = build(tiny_model_dir, tmp_path / "alone", counted)
    alone.train()
    expected = list(calls)
    calls.clear()
    first = build(tiny_model_dir, tmp_path / "ended", counted)
    between_micro_batches(first)
    interrupted(first)
    resumed = build(tiny_model_dir, tmp_path / "ended", counted)
    resumed.train("last-good")
    assert_same(resumed, alone)
    assert calls == expected


def test_what_a_service_said_of_kept_scores_is_logged(tiny_model_dir: Path, tmp_path: Path) -> None:
    class Service:
        on_missing, __name__ = "exclude", "vowels"

        def __init__(self, send: Callable[[], None]) -> None:
            self.send, self.calls = send, 0

        def __call__(
            self, *, completions: list[str], log_metric: Any, **_: Any
        ) -> list[float | None]:
            self.calls += 1
            log_metric("rewards/vowels/cost", len("".join(completions)) / 100)
            self.send()
            return list(vowels(completions=completions))

    services = [Service(lambda: None), Service(Signal(2)), Service(lambda: None)]
    alone = build(tiny_model_dir, tmp_path / "alone", services[0])
    alone.train()
    interrupted(build(tiny_model_dir, tmp_path / "ended", services[1]))
    resumed = build(tiny_model_dir, tmp_path / "ended", services[2])
    resumed.train("last-good")
    assert services[1].calls + services[2].calls == services[0].calls  # none is asked again
    assert "rewards/vowels/cost" in alone.state.log_history[0]
    assert_same(resumed, alone)


@pytest.mark.parametrize("engine", ENGINES)
def test_interrupted_twice_and_with_kept_completions(
    tiny_model_dir: Path, tmp_path: Path, engine: str
) -> None:
    """The second time before the kept generation is used up."""
    alone = build(tiny_model_dir, tmp_path / "alone", group_sampler=engine)
    alone.train()
    for begin in (scoring, lambda t: t.add_callback(SignalCallback("on_substep_end", 1))):
        trainer = build(tiny_model_dir, tmp_path / "ended", group_sampler=engine)
        begin(trainer)
        interrupted(trainer, "last-good")
    resumed = build(tiny_model_dir, tmp_path / "ended", group_sampler=engine)
    resumed.train("last-good")
    assert_same(resumed, alone)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("at", [1, 5])
def test_interrupted_evaluation_is_done_again(
    tiny_model_dir: Path, tmp_path: Path, at: int, engine: str
) -> None:
    """1: the one before training; 5: the one after step 4, before the checkpoint of that step."""
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "eval_on_start": True}
    options |= {"max_steps": 6, "per_device_eval_batch_size": 4, "group_sampler": engine}
    alone = build(tiny_model_dir, tmp_path / "alone", **options)
    alone.train()
    send = Signal(at)

    def reward(**columns: Any) -> list[float]:
        if not trainer.model.training:
            send()
        return vowels(**columns)

    trainer = build(tiny_model_dir, tmp_path / "ended", reward, **options)
    trainer.reward_func_names = ["vowels"]
    interrupted(trainer)
    resumed = build(tiny_model_dir, tmp_path / "ended", **options)
    resumed.train("last-good")
    assert_same(resumed, alone)
    steps = sorted(path.name for path in (tmp_path / "ended").glob("checkpoint-*"))
    assert steps == (["checkpoint-0"] if at == 1 else []) + ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("asked", [True, False])
def test_a_signal_that_ends_the_workers_of_an_evaluation_too(
    tiny_model_dir: Path, tmp_path: Path, asked: bool
) -> None:
    trainer = build(tiny_model_dir, tmp_path, eval_strategy="steps", eval_on_start=True)

    def without_workers(*_: object, **__: object) -> None:
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    trainer.prediction_step = without_workers
    if asked:
        interrupted(trainer)
    else:
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            trainer.train()


@pytest.mark.parametrize("at", [None, 3])
def test_the_end_of_an_epoch_is_not_lost(
    tiny_model_dir: Path, tmp_path: Path, at: int | None
) -> None:
    """It comes after the checkpoint of the epoch's last step; at 3, in the middle of it."""
    options = {"max_steps": 18, "save_steps": 16, "logging_strategy": "epoch"}
    options |= {"eval_strategy": "epoch", "per_device_eval_batch_size": 4}
    alone = build(tiny_model_dir, tmp_path / "alone", **options)
    alone.train()
    checkpoint = f"{alone.args.output_dir}/checkpoint-16"
    if at is not None:
        send = Signal(at)

        def reward(**columns: Any) -> list[float]:
            if not trainer.model.training:
                send()
            return vowels(**columns)

        trainer = build(tiny_model_dir, tmp_path / "ended", reward, **options)
        trainer.reward_func_names = ["vowels"]
        checkpoint = interrupted(trainer).checkpoint
    resumed = build(tiny_model_dir, tmp_path / "resumed", **options)
    resumed.train(checkpoint)
    assert_same(resumed, alone)


def test_generations_within_a_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Two generations a step; the signal comes while the second one is scored."""
    options = {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 1}
    options |= {"max_steps": 4, "save_steps": 9}
    alone = build(tiny_model_dir, tmp_path / "alone", **options)
    alone.train()
    for at in (4, 6):
        send = Signal(at)
        trainer = build(tiny_model_dir, tmp_path / f"ended-{at}", **options)
        trainer.reward_funcs = [lambda send=send, **kw: (send(), vowels(**kw))[1]]
        interrupted(trainer)
        resumed = build(tiny_model_dir, tmp_path / f"ended-{at}", **options)
        resumed.train("last-good")
        assert_same(resumed, alone)


def test_a_trainer_that_was_interrupted_goes_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    """In the same process, as in a notebook; its later checkpoints are its own."""
    alone = build(tiny_model_dir, tmp_path / "alone", max_steps=9)
    alone.train()
    trainer = build(tiny_model_dir, tmp_path / "ended", max_steps=9)
    between_micro_batches(trainer)
    interrupted(trainer)
    trainer.train("last-good")
    assert_same(trainer, alone)
    resumed = build(tiny_model_dir, tmp_path / "resumed", max_steps=9)
    resumed.train(str(tmp_path / "ended" / "checkpoint-6"))
    assert_same(resumed, alone)


def test_a_finished_run_trains_no_further(tiny_model_dir: Path, tmp_path: Path) -> None:
    alone = build(tiny_model_dir, tmp_path, max_steps=3)
    alone.train()
    again = build(tiny_model_dir, tmp_path, max_steps=3)
    again.train("last-good")
    assert again.state.global_step == 3
    for name, value in alone.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_signal_in_the_last_step_ends_the_program(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = build(tiny_model_dir, tmp_path, max_steps=3)
    trainer.add_callback(SignalCallback("on_step_end", 3))
    assert interrupted(trainer).checkpoint == str(tmp_path / "checkpoint-3")
    assert damage(tmp_path / "checkpoint-3") is None


def test_evaluation_stops_between_batches(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "group_sampler": "transformers"}
    options |= {"per_device_eval_batch_size": 4, "max_steps": 2}
    calls = []

    def reward(**columns: Any) -> list[float]:
        if not trainer.model.training:
            calls.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return vowels(**columns)

    trainer = build(tiny_model_dir, tmp_path, reward, **options)
    interrupted(trainer)
    assert len(calls) == 1


def test_a_stream_is_resumed_in_its_second_epoch(tiny_model_dir: Path, tmp_path: Path) -> None:
    prompts = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(8)]})

    def streamed(out: str) -> ExtGRPOTrainer:
        given = OPTIONS | {"max_steps": 20, "save_steps": 18, "output_dir": str(tmp_path / out)}
        config = ExtGRPOConfig(**settings(tmp_path, **given))
        return ExtGRPOTrainer(str(tiny_model_dir), vowels, config, prompts.to_iterable_dataset())

    alone, resumed = streamed("alone"), streamed("resumed")
    alone.train()
    resumed.train(str(tmp_path / "alone" / "checkpoint-18"))
    for name, value in alone.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_what_a_reward_logs_can_be_read_back(tiny_model_dir: Path, tmp_path: Path) -> None:
    def reward(*, completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        log_extra("half", [np.float64(0.5) for _ in completions])
        log_extra("kind", [signal.SIGTERM for _ in completions])
        return vowels(completions=completions)

    build(tiny_model_dir, tmp_path, reward, max_steps=3).train()
    resumed = build(tiny_model_dir, tmp_path, reward, max_steps=4)
    resumed.train("last-good")
    assert resumed.state.global_step == 4


def test_last_good_starts_anew_where_there_is_none(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = build(tiny_model_dir, tmp_path, max_steps=1)
    assert trainer.train("last-good").global_step == 1
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        build(tiny_model_dir, tmp_path / "other", max_steps=1).train(resume_from_checkpoint=True)


def test_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    alone = build(tiny_model_dir, tmp_path, max_steps=6)
    alone.train()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    resumed = build(tiny_model_dir, tmp_path, max_steps=6)
    with pytest.raises(CheckpointError, match=r"checkpoint-6 is damaged: optimizer.pt has 0 bytes"):
        resumed.train(str(tmp_path / "checkpoint-6"))
    resumed.train("last-good")
    assert_same(resumed, alone)
    assert damage(tmp_path / "checkpoint-6") is None


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond: what a full disk looks like to the one who writes."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_full_disk_is_an_error_that_leaves_the_last_good_checkpoint(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    steady = {"lr_scheduler_type": "constant"}
    build(tiny_model_dir, tmp_path, max_steps=3, **steady).train()
    trainer = build(tiny_model_dir, tmp_path, max_steps=6, **steady)
    with files_of_at_most(30_000), pytest.raises(CheckpointError) as error:
        trainer.train("last-good")
    message = str(error.value)
    assert "checkpoint-6 could not be written" in message
    assert "`resume_from_checkpoint: last-good`" in message
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-3"]
    resumed = build(tiny_model_dir, tmp_path, max_steps=6, **steady)
    resumed.train("last-good")
    alone = build(tiny_model_dir, tmp_path / "alone", max_steps=6, **steady)
    alone.train()
    assert_same(resumed, alone)


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_rotation_push_and_best_model_know_whole_checkpoints_only(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(
        tiny_model_dir,
        tmp_path,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=3,
        max_steps=9,
        metric_for_best_model="eval_reward",
        load_best_model_at_end=True,
        per_device_eval_batch_size=4,
    )
    pushed = []

    def push(self: Trainer, folder: str) -> None:
        pushed.append((Path(folder).name, damage(Path(folder))))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer.args.push_to_hub = True
    left = tmp_path / "_unfinished" / "checkpoint-99"
    left.mkdir(parents=True)
    trainer.train()
    assert pushed == [(f"checkpoint-{step}", None) for step in (3, 6, 9)]
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert damage(best) is None
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == [best.name]
    text = (best / "trainer_state.json").read_text()
    assert f'"best_model_checkpoint": "{best}"' in text
    assert not left.exists()


def test_checkpoint_of_plain_trl_is_resumed_as_plain_trl_does(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = settings(tmp_path, **OPTIONS | {"max_steps": 3, "output_dir": str(tmp_path)})
    prompts = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(17)]})
    GRPOTrainer(str(tiny_model_dir), vowels, GRPOConfig(**options), prompts).train()
    trainer = build(tiny_model_dir, tmp_path, max_steps=4)
    trainer.train(str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 4
    assert "checkpoint-3 is resumed as plain TRL does: it has no run_state_0.pt" in caplog.text


def test_trls_own_reference_is_loaded_again_from_where_the_run_had_it(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = build(tiny_model_dir, tmp_path, max_steps=4, save_steps=2)
    whole.train()
    assert json.loads((tmp_path / "checkpoint-2" / "reference.json").read_text()) == {
        "reference": None,
        "kind": "resident",
        "on_disk": False,
        "path": str(tiny_model_dir),
        "weights": fingerprint(whole.ref_model),
    }
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = build(tmp_path / "checkpoint-2", tmp_path, max_steps=4, save_steps=2)
    assert whole.reference_source != resumed.reference_source
    resumed.train("last-good")
    assert "goes on with" not in caplog.text
    assert whole.reference_source == resumed.reference_source
    assert fingerprint(whole.ref_model) == fingerprint(resumed.ref_model)
    assert_same(resumed, whole)


def test_a_model_that_has_moved_is_the_same_reference(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    initial = shutil.copytree(tiny_model_dir, tmp_path / "initial")
    build(initial, tmp_path, max_steps=3).train()
    moved = initial.rename(tmp_path / "moved")
    build(moved, tmp_path, max_steps=4).train("last-good")
    assert "goes on with" not in caplog.text


@pytest.mark.parametrize("given", ["initial", "checkpoint"])
def test_a_model_that_has_changed_is_another_reference(
    given: str, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    initial = shutil.copytree(tiny_model_dir, tmp_path / "initial")
    first = build(initial, tmp_path, max_steps=3)
    first.train()
    checkpoint = tmp_path / "checkpoint-3"
    first.model.save_pretrained(initial)  # over what the run began with
    model = {"initial": initial, "checkpoint": checkpoint}[given]
    build(model, tmp_path, max_steps=4).train("last-good")
    here = {"initial": f"{initial} as it is now", "checkpoint": checkpoint}[given]
    assert (
        f"The run began with the reference 'resident, loaded from {initial}' and goes on "
        f"with 'resident, loaded from {here}', so its KL is another one." in caplog.text
    )
    note = json.loads((tmp_path / "checkpoint-4" / "reference.json").read_text())
    assert note["path"] == str(model)


def test_without_the_state_of_a_run_another_reference_is_told_too(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    initial = shutil.copytree(tiny_model_dir, tmp_path / "initial")
    build(initial, tmp_path, max_steps=3, save_only_model=True).train()
    shutil.rmtree(initial)
    checkpoint = tmp_path / "checkpoint-3"
    resumed = build(checkpoint, tmp_path, max_steps=4, save_only_model=True)
    resumed.train(str(checkpoint))
    assert f"{initial} does not hold what the run's reference was loaded from" in caplog.text


def test_auto_goes_on_with_a_copy_that_the_run_has_saved(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = build(tiny_model_dir, tmp_path, max_steps=4, save_steps=2, reference="resident")
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = build(tmp_path / "checkpoint-2", tmp_path, max_steps=4, save_steps=2)
    resumed.train("last-good")
    assert "goes on with" not in caplog.text
    assert fingerprint(whole.ref_model) == fingerprint(resumed.ref_model)
    assert_same(resumed, whole)


@pytest.mark.parametrize("given", ["initial", "checkpoint"])
def test_a_copy_that_was_asked_for_later_is_of_the_initial_model(
    given: str, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = build(tiny_model_dir, tmp_path, max_steps=4, save_steps=2)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    model = {"initial": tiny_model_dir, "checkpoint": tmp_path / "checkpoint-2"}[given]
    changes = {"max_steps": 4, "save_steps": 2, "reference": "resident"}
    resumed = build(model, tmp_path, **changes)
    resumed.train("last-good")
    assert "goes on with" not in caplog.text
    assert_same(resumed, whole)
    first = build(tiny_model_dir, tmp_path, **changes)
    assert resumed.reference_keeper.key == first.reference_keeper.key
    assert fingerprint(resumed.ref_model) == fingerprint(first.ref_model)
    note = json.loads((tmp_path / "checkpoint-4" / "reference.json").read_text())
    assert note["reference"] == first.reference_keeper.key
    assert note["path"] == str(tiny_model_dir)


def test_another_kind_than_trls_own_copy_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    build(tiny_model_dir, tmp_path, max_steps=3).train()
    other = build(tiny_model_dir, tmp_path, max_steps=4, reference="streamed")
    with pytest.raises(ReferenceModelError, match=r"kind: 'resident', here 'streamed'"):
        other.train("last-good")


def test_another_reference_than_the_run_began_with_is_told(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    initial = shutil.copytree(tiny_model_dir, tmp_path / "initial")
    build(initial, tmp_path, max_steps=3).train()
    checkpoint = tmp_path / "checkpoint-3"
    build(initial, tmp_path, max_steps=3).train("last-good")
    assert "goes on with" not in caplog.text
    shutil.rmtree(initial)
    build(checkpoint, tmp_path, max_steps=3).train("last-good")
    assert (
        f"The run began with the reference 'resident, loaded from {initial}' and goes on "
        f"with 'resident, loaded from {checkpoint}', so its KL is another one." in caplog.text
    )


def test_the_first_signal_is_a_wish_and_the_second_an_end() -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals() as signals:
            assert signals.received == 0
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == signal.SIGINT
            for number in (signal.SIGINT, signal.SIGTERM):
                assert signal.getsignal(number) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)


def test_workers_of_the_data_loader_leave_signals_to_the_run() -> None:
    with StopSignals():
        if not (child := os.fork()):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_workers_that_end_with_the_run_raise_nothing_afterwards() -> None:
    def fails(*_: object) -> None:  # as torch's handler
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    previous = signal.signal(signal.SIGCHLD, fails)
    try:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGCHLD)
        with StopSignals():
            signal.signal(signal.SIGCHLD, fails)
        with pytest.raises(RuntimeError):  # nobody asked that run to stop
            os.kill(os.getpid(), signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, previous)


def test_ignored_signals_stay_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == 0
    finally:
        signal.signal(signal.SIGINT, previous)
