"""The contract holds on the installed TRL, and a TRL that breaks it is named, member by member."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer
from trl.trainer import grpo_trainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from trl_grpo_ext._trl.contract import (
    SEAMS,
    TESTED_TRL_VERSIONS,
    check_contract,
    contract_problems,
    is_tested_version,
)
from trl_grpo_ext.errors import ContractError

OWNERS = {"GRPOTrainer": GRPOTrainer, "Trainer": Trainer}
RELIED_ON = [
    pytest.param(OWNERS[seam.owner], seam.name, kind, name, id=f"{seam.owner}-{seam.name}-{name}")
    for seam in SEAMS
    for kind, names in (
        ("its parameter `{}`", seam.parameters),
        ("its use of `{}`", seam.names),
        ("its key '{}'", seam.constants),
    )
    for name in names
]


def without(method: Callable[..., Any], word: str) -> types.FunctionType:
    """Return TRL's function as if it had been written with another word instead of ``word``."""
    function = inspect.unwrap(method)
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(
        _renamed(function.__code__, word),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _renamed(value: Any, word: str) -> Any:
    if isinstance(value, types.CodeType):
        return value.replace(
            co_names=_renamed(value.co_names, word),
            co_varnames=_renamed(value.co_varnames, word),
            co_cellvars=_renamed(value.co_cellvars, word),
            co_freevars=_renamed(value.co_freevars, word),
            co_consts=_renamed(value.co_consts, word),
        )
    if isinstance(value, tuple):
        return tuple(_renamed(item, word) for item in value)
    return "another_word" if value == word else value


def install_trl_as(version: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the metadata of the installed TRL say another version."""
    metadata = folder / f"trl-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_the_contract_holds_on_the_installed_trl() -> None:
    assert contract_problems() == []
    assert is_tested_version()
    check_contract()  # a warning would be an error


@pytest.mark.parametrize(("owner", "method", "message", "name"), RELIED_ON)
def test_a_trl_that_lost_what_is_relied_on_is_named(
    owner: type, method: str, message: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, method, without(getattr(owner, method), name))
    [problem] = contract_problems()
    assert problem.startswith(f"{owner.__name__}.{method} lost its ")
    assert message.format(name) in problem


def test_a_method_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    assert contract_problems() == ["GRPOTrainer._calculate_rewards is gone"]


def test_a_method_that_is_only_the_base_class_s_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GRPOTrainer, "training_step")
    assert contract_problems() == ["GRPOTrainer.training_step lost its use of `_step`"]


def test_everything_a_method_lost_is_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def rewritten(self: Any, model: Any, batch: Any) -> Any:
        return self.beta, self.importance_sampling_level, self.current_gradient_accumulation_steps

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", rewritten)
    assert contract_problems() == [
        "GRPOTrainer._compute_loss lost its parameter `inputs`, its use of "
        "`use_bias_correction_kl`, its use of `loss_type`, its use of `steps_per_generation`, "
        "its use of `_get_per_token_logps_and_entropies`, its key 'compute_entropy', "
        "its key 'compute_aux_loss', its key 'ref_per_token_logps', its key 'old_per_token_logps', "
        "its key 'completion_mask', its key 'tool_mask', its key 'num_items_in_batch', its key 'kl'"
    ]


def test_a_member_counts_if_an_inner_function_or_a_decorated_one_uses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        return (lambda: self._step % self.current_gradient_accumulation_steps)()

    @functools.wraps(training_step)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        return training_step(*args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "training_step", decorated)
    assert contract_problems() == []


def test_a_key_counts_if_an_inner_function_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def _compute_loss(self: Any, model: Any, inputs: Any) -> Any:
        self.use_bias_correction_kl = self.importance_sampling_level = self.beta
        self.loss_type = self.steps_per_generation = inputs["tool_mask"]
        return lambda: (
            self._get_per_token_logps_and_entropies(compute_entropy=True, compute_aux_loss=True),
            self.current_gradient_accumulation_steps,
            [inputs["ref_per_token_logps"], inputs["old_per_token_logps"]],
            [inputs["completion_mask"], inputs["num_items_in_batch"], inputs["kl"]],
        )

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", _compute_loss)
    assert contract_problems() == []


@pytest.mark.parametrize("name", ["create_model_from_path", "unwrap_model_for_generation"])
def test_a_function_that_is_gone_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(grpo_trainer, name)
    assert contract_problems() == [f"trl.trainer.grpo_trainer.{name} is gone"]


def test_a_function_that_lost_a_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", lambda batch: batch)
    assert contract_problems() == ["shuffle_sequence_dict lost its parameter `seq_dict`"]


def test_a_configuration_field_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(GRPOConfig.__dataclass_fields__, "sync_ref_model")
    assert contract_problems() == ["GRPOConfig.sync_ref_model is gone"]


def test_contract_error_names_every_change_and_the_version_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_trl_as("1.17.0", tmp_path, monkeypatch)
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    monkeypatch.delitem(GRPOConfig.__dataclass_fields__, "beta")
    with warnings.catch_warnings(), pytest.raises(ContractError) as caught:
        check_contract()
    assert str(caught.value) == (
        "trl 1.17.0 changed 2 of the members that trl_grpo_ext relies on: "
        "GRPOTrainer._calculate_rewards is gone; GRPOConfig.beta is gone. Install a tested version "
        f"(trl=={', '.join(TESTED_TRL_VERSIONS)}), or follow 'Widening the TRL range' in "
        "CONTRIBUTING.md."
    )


def test_a_change_of_transformers_names_its_tested_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(Trainer, "_run_epoch")
    with pytest.raises(ContractError, match=r"Trainer\._run_epoch is gone.*transformers==5\."):
        check_contract()


def test_an_untested_trl_is_let_through_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_trl_as("1.16.9", tmp_path, monkeypatch)
    assert not is_tested_version()
    with pytest.warns(UserWarning, match="not tested") as caught:
        check_contract()
    [warning] = caught
    assert str(warning.message) == (
        "trl 1.16.9 has every member that trl_grpo_ext relies on but was not tested with it. If "
        "numbers look wrong, install a tested version "
        f"(trl=={', '.join(TESTED_TRL_VERSIONS)})."
    )
    assert warning.filename == __file__  # where the caller stands


def test_the_trainer_cannot_be_imported_on_a_trl_that_breaks_the_contract(tmp_path: Path) -> None:
    script = tmp_path / "broken_trl.py"
    script.write_text(
        "from trl.trainer.grpo_trainer import GRPOTrainer\n"
        "del GRPOTrainer._calculate_rewards\n"
        "from trl_grpo_ext.errors import ContractError\n"
        "try:\n"
        "    import trl_grpo_ext.trainer\n"
        "except ContractError as error:\n"
        "    print(error)\n"
        "else:\n"
        "    print('imported')\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "GRPOTrainer._calculate_rewards is gone" in result.stdout
    assert "imported" not in result.stdout
