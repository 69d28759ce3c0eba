"""Candidates on disk: what was written is read, what a kill cut off is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from rejection.made import candidate, group

from trl_grpo_ext.errors import CheckpointError, ConfigurationError
from trl_grpo_ext.rejection.candidates import Group
from trl_grpo_ext.rejection.shards import (
    ShardWriter,
    check_made_with,
    located_prompts,
    read_group,
    write_made_with,
)

SCORES = {"math": None, "api": 0.5}
GROUPS = [
    group(
        candidate(0, "a line\nbreak, \u2028, \x00, 答 and \ud800", scores=SCORES),
        candidate(1, "cut", finished=False, scored=False, scores=SCORES),
        prompt_index=5,
    ),
    group(candidate(0, "7", special_tokens=("<pad>",)), prompt_index=2, answer=None),
]


def written(path: Path, *groups: Group) -> Path:
    with ShardWriter(path) as writer:
        writer.append(groups)
    return path


def everything(folder: Path) -> dict[int, Group]:
    found = located_prompts(folder)
    return {index: read_group(path, offset) for index, (path, offset, _) in found.items()}


def test_groups_come_back_as_they_were(tmp_path: Path) -> None:
    written(tmp_path / "shards" / "00000.jsonl", *GROUPS)
    assert everything(tmp_path / "shards") == {5: GROUPS[0], 2: GROUPS[1]}
    ids = {index: mark for index, (_, _, mark) in located_prompts(tmp_path / "shards").items()}
    assert ids == {5: "id5", 2: "id2"}


def test_half_a_line_is_not_read_and_makes_room_for_the_next(tmp_path: Path) -> None:
    path = written(tmp_path / "00000.jsonl", *GROUPS)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(0, len(whole), 9):
        path.write_bytes(whole[:size])
        expected = {5: GROUPS[0]} if size >= first else {}
        assert everything(tmp_path) == expected
        written(path, *(one for one in GROUPS if one.prompt_index not in expected))
        assert everything(tmp_path) == {5: GROUPS[0], 2: GROUPS[1]}


def test_prompt_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    other = group(candidate(0, "another"), prompt_index=2)
    written(tmp_path / "00001.jsonl", other)
    written(tmp_path / "00000.jsonl", *GROUPS)
    assert everything(tmp_path)[2] == GROUPS[1]


@pytest.mark.parametrize("damage", [b"\x00" * 40, b"{}", b"[1]", b"null", b'{"prompt_index": 1}'])
def test_whole_line_that_is_damaged_is_told(tmp_path: Path, damage: bytes) -> None:
    path = written(tmp_path / "00000.jsonl", *GROUPS)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + damage + b"\n")
    with pytest.raises(CheckpointError, match=rf"line at byte {size} .* Remove the file"):
        located_prompts(tmp_path)


def test_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl"
    with ShardWriter(path), pytest.raises(CheckpointError, match="written by another run"):
        ShardWriter(path)
    written(path, *GROUPS)


def test_candidates_of_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    settings = {"seed": 0, "temperature": 1.0, "rewards": ["math"], "generation_kwargs": {"a": 1}}
    check_made_with(tmp_path, settings)
    write_made_with(tmp_path, settings)
    check_made_with(tmp_path, settings)
    with pytest.raises(ConfigurationError) as caught:
        check_made_with(tmp_path, {**settings, "seed": 1, "rewards": ["x" * 500]})
    text = str(caught.value)
    assert "seed: 0, now 1" in text
    assert 'rewards: ["math"], now ["xxx' in text
    assert "temperature" not in text
    assert len(text) < 500
    write_made_with(tmp_path, {"seed": 9})  # what is there stays
    check_made_with(tmp_path, settings)
