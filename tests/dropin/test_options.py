"""Each option of ``GRPOConfig``: our run beside plain TRL's."""

from __future__ import annotations

from pathlib import Path

import pytest
from dropin.cases import GIVEN, SAMPLED, Case
from dropin.compare import Run, assert_same_run, differ, ours, rollout, trl_run


@pytest.mark.parametrize("case", GIVEN.values(), ids=GIVEN.keys())
def test_given_completions_train_as_in_trl(
    tiny_model_dir: Path, tmp_path: Path, folder: Path, case: Case
) -> None:
    base = {"rollout_func": rollout, **case.base}
    options = base | case.changes
    expected = trl_run(tiny_model_dir, folder, **options)
    assert expected.moves
    assert not case.acts or differ(expected, trl_run(tiny_model_dir, folder, **base))
    found = Run.of(ours(tiny_model_dir, tmp_path, shared_prefix="always", **options))
    assert_same_run(found, expected, but=case.but)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("case", SAMPLED.values(), ids=SAMPLED.keys())
def test_likeliest_completions_train_as_in_trl(
    tiny_model_dir: Path, tmp_path: Path, folder: Path, case: Case
) -> None:
    options = case.base | case.changes
    expected = trl_run(tiny_model_dir, folder, **options)
    assert expected.moves
    assert not case.acts or differ(expected, trl_run(tiny_model_dir, folder, **case.base))
    assert_same_run(Run.of(ours(tiny_model_dir, tmp_path, **options)), expected, but=case.but)
