"""All prompts of a task sampled once, by any number of processes, whatever interrupts them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from datasets import Dataset
from tqdm import tqdm

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.files import SUMMARY_FILE
from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rejection.provenance import prompt_ids
from trl_grpo_ext.rejection.sampling import Sampler
from trl_grpo_ext.rejection.shards import (
    ShardWriter,
    check_made_with,
    located_prompts,
    write_made_with,
)

_PATIENCE = timedelta(days=30)  # that a process waits for the slowest one; who fails ends all


def start_processes(*, use_cpu: bool) -> PartialState:
    """Return the state of the processes that were launched together, and may wait long.

    Args:
        use_cpu: Whether to leave accelerators alone. Without one, it is the CPU in any case.
    """
    return PartialState(cpu=use_cpu or not torch.accelerator.is_available(), timeout=_PATIENCE)


def candidates_folder(output_dir: str | Path) -> Path:
    """Return where all replies of a run are, kept or not."""
    return Path(output_dir) / "candidates"


def missing_prompts(
    output_dir: str | Path,
    ids: Sequence[str],
    made_with: Mapping[str, Any],
    *,
    unknown: Collection[str] = (),
) -> set[int]:
    """Return the numbers of the prompts that are not on disk.

    Args:
        output_dir: Of the run; may be missing.
        ids: Of the prompts, by their number.
        made_with: What decides about the candidates.
        unknown: What of it cannot be told yet.

    Raises:
        ConfigurationError: What is on disk was made with other settings, or answers other prompts.
        CheckpointError: A file is damaged.
    """
    folder = candidates_folder(output_dir)
    check_made_with(folder, made_with, unknown=unknown)
    found = {index: mark for index, (_, _, mark) in located_prompts(folder).items()}
    strange = [index for index, mark in found.items() if index < len(ids) and ids[index] != mark]
    if strange:
        raise ConfigurationError(
            [
                f"the candidates in {folder} answer other prompts than this task has "
                f"({len(strange)} of {len(found)}), so they cannot be gone on with. Set the task's "
                "options back, name another `output_dir`, or remove that folder to sample anew."
            ]
        )
    return set(range(len(ids))) - found.keys()


def batches_to_do(
    missing: set[int], *, num_prompts: int, prompts_per_batch: int
) -> list[list[int]]:
    """Return the batches with a missing prompt, whole: the same cut whatever is there already.

    Products of matrices of another shape are rounded differently, which might tip a token.

    Example:
        >>> batches_to_do({3, 4}, num_prompts=5, prompts_per_batch=2)
        [[2, 3], [4]]
    """
    starts = range(0, num_prompts, prompts_per_batch)
    batches = [list(range(at, min(at + prompts_per_batch, num_prompts))) for at in starts]
    return [batch for batch in batches if missing.intersection(batch)]


def collect_candidates(
    rows: Dataset,
    *,
    options: RejectionArguments,
    made_with: Mapping[str, Any],
    make: Callable[[], Sampler],
    state: PartialState,
) -> Path:
    """Sample the prompts that are not on disk, each batch by one process; return the folder.

    All processes call it; it returns when all prompts are on disk. A batch is written as soon as it
    is scored. On several machines `output_dir` is one that all of them see.

    Args:
        rows: Of the task.
        options: Of the run.
        made_with: What decides about the candidates, from
            :func:`~trl_grpo_ext.rejection.provenance.made_with`.
        make: Makes the sampler. If there is a batch to sample, each process calls it once, even
            one without a batch of its own: engines that start together wait for each other.
        state: Of the processes.

    Raises:
        ConfigurationError: What is on disk was made with other settings, or from other prompts.
        CheckpointError: A file on disk is damaged, or written by another run.
    """
    folder = candidates_folder(options.output_dir)
    missing = missing_prompts(options.output_dir, prompt_ids(rows), made_with)
    batches = batches_to_do(
        missing, num_prompts=rows.num_rows, prompts_per_batch=options.prompts_per_batch
    )
    if state.is_main_process:
        (Path(options.output_dir) / SUMMARY_FILE).unlink(missing_ok=True)
        write_made_with(folder, made_with)
    state.wait_for_everyone()  # all have read what is there before one samples
    if batches:
        own = batches[state.process_index :: state.num_processes]
        with ShardWriter(folder / f"{state.process_index:05d}.jsonl") as writer:
            sample = make()
            for batch in tqdm(own, desc="sampling", unit="batch", disable=state.process_index > 0):
                writer.append([one for one in sample(batch) if one.prompt_index in missing])
            state.wait_for_everyone()  # each keeps its file locked until all are done
    return folder
