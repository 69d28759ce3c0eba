"""All prompts are sampled once: from any state on disk, by any number of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from rejection.made import candidate, group

from trl_grpo_ext.errors import CheckpointError, ConfigurationError
from trl_grpo_ext.rejection.candidates import Group
from trl_grpo_ext.rejection.collect import (
    batches_to_do,
    candidates_folder,
    collect_candidates,
    missing_prompts,
)
from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rejection.provenance import prompt_ids
from trl_grpo_ext.rejection.shards import (
    ShardWriter,
    located_prompts,
    read_group,
    read_made_with,
)

ROWS = Dataset.from_dict({"prompt": [f"{n} + 1 =" for n in range(7)]})
IDS = prompt_ids(ROWS)


class Killed(BaseException):
    """Stands for what ends a process at once."""


def made(index: int) -> Group:
    return group(candidate(0, f"reply to {index}"), prompt_index=index, prompt_id=IDS[index])


def collect(
    folder: Path, *, processes: int = 1, kill_after: int = 99, size: int = 2
) -> list[list[int]]:
    """Run processes, as threads, each killed after some batches; return what was sampled."""
    options = RejectionArguments(output_dir=str(folder), prompts_per_batch=size)
    barriers = [threading.Barrier(processes), threading.Barrier(processes)]  # start, end
    sampled: list[list[int]] = []

    def sampler() -> Callable[[Sequence[int]], list[Group]]:
        own: list[list[int]] = []

        def sample(indices: Sequence[int]) -> list[Group]:
            if len(own) == kill_after:
                raise Killed
            own.append(list(indices))
            sampled.append(list(indices))
            return [made(index) for index in indices]

        return sample

    def work(rank: int) -> None:
        waits = iter(barriers)
        state: Any = SimpleNamespace(
            process_index=rank,
            num_processes=processes,
            is_main_process=rank == 0,
            wait_for_everyone=lambda: next(waits).wait(),
        )
        try:
            collect_candidates(ROWS, options=options, made_with={}, make=sampler, state=state)
        except Killed:
            barriers[1].abort()
        except threading.BrokenBarrierError:
            pass

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(sampled)


def on_disk(folder: Path) -> dict[int, Group]:
    found = located_prompts(folder / "candidates")
    return {index: read_group(path, offset) for index, (path, offset, _) in found.items()}


ALL = {index: made(index) for index in range(7)}


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_each_batch_is_sampled_once_whatever_the_number_of_processes(
    tmp_path: Path, processes: int
) -> None:
    assert collect(tmp_path, processes=processes) == [[0, 1], [2, 3], [4, 5], [6]]
    assert on_disk(tmp_path) == ALL
    shards = {path.name for path in (tmp_path / "candidates").glob("*.jsonl")}
    assert shards == {f"{rank:05d}.jsonl" for rank in range(processes)}
    assert collect(tmp_path, processes=1) == []


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 3)])
def test_killed_run_goes_on_with_the_batches_that_are_missing(
    tmp_path: Path, before: int, after: int
) -> None:
    first = collect(tmp_path, processes=before, kill_after=1)
    assert len(first) == before
    second = collect(tmp_path, processes=after)
    assert sorted(first + second) == [[0, 1], [2, 3], [4, 5], [6]]
    assert on_disk(tmp_path) == ALL


def test_kill_at_any_byte_gives_what_the_undisturbed_run_gives(tmp_path: Path) -> None:
    collect(tmp_path, processes=2)
    shards = {p: p.read_bytes() for p in sorted((tmp_path / "candidates").glob("*.jsonl"))}
    for cut, whole in shards.items():
        for size in range(0, len(whole), 29):
            for path, content in shards.items():
                path.write_bytes(content)
            cut.write_bytes(whole[:size])
            again = collect(tmp_path)
            assert on_disk(tmp_path) == ALL
            assert again  # something was missing
            # A batch of which one prompt is left is sampled whole, so that rounding is the same.
            assert all(batch in ([0, 1], [2, 3], [4, 5], [6]) for batch in again)


def test_prompt_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    collect(tmp_path)
    path = tmp_path / "candidates" / "00000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))  # prompts 0, 1 and 2
    assert collect(tmp_path) == [[2, 3], [4, 5], [6]]
    assert path.read_bytes() == b"".join(lines)


def test_another_batch_size_goes_on_too(tmp_path: Path) -> None:
    collect(tmp_path, kill_after=2)
    assert collect(tmp_path, size=3) == [[3, 4, 5], [6]]
    assert on_disk(tmp_path) == ALL


def test_summary_of_an_earlier_run_is_gone_while_candidates_are_sampled(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    collect(tmp_path, kill_after=1)
    assert not (tmp_path / "summary.json").exists()


def test_candidates_of_other_prompts_are_refused_and_of_fewer_are_used(tmp_path: Path) -> None:
    collect(tmp_path)
    made_with = read_made_with(candidates_folder(tmp_path))
    assert missing_prompts(tmp_path, [*IDS, "new"], made_with) == {7}
    assert missing_prompts(tmp_path, IDS[:3], made_with) == set()
    with pytest.raises(ConfigurationError, match=r"answer other prompts .*\(1 of 7\)"):
        missing_prompts(tmp_path, [*IDS[:6], "changed"], made_with)


def test_another_run_is_refused_until_all_processes_are_done(tmp_path: Path) -> None:
    locked: list[bool] = []

    def wait() -> None:  # the others are still sampling
        with pytest.raises(CheckpointError, match="another run"):
            ShardWriter(candidates_folder(tmp_path) / "00000.jsonl")
        locked.append(True)

    waits = iter([lambda: None, wait])
    state: Any = SimpleNamespace(
        process_index=0,
        num_processes=2,
        is_main_process=True,
        wait_for_everyone=lambda: next(waits)(),
    )
    collect_candidates(
        ROWS,
        options=RejectionArguments(output_dir=str(tmp_path), prompts_per_batch=2),
        made_with={},
        make=lambda: lambda indices: [made(index) for index in indices],
        state=state,
    )
    assert locked


def test_batches_are_cut_the_same_whatever_is_missing() -> None:
    assert batches_to_do(set(range(5)), num_prompts=5, prompts_per_batch=2) == [[0, 1], [2, 3], [4]]
    assert batches_to_do({3}, num_prompts=5, prompts_per_batch=2) == [[2, 3]]
    assert batches_to_do(set(), num_prompts=5, prompts_per_batch=2) == []
