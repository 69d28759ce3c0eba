"""vLLM samples where it can, our sampler elsewhere; who asks for vLLM is told what is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import ModelConfig

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rejection.collect import candidates_folder, collect_candidates
from trl_grpo_ext.rejection.option_checks import rejection_problems
from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rejection.provenance import made_with
from trl_grpo_ext.rejection.samplers import Chosen, choose_sampler, load_draw
from trl_grpo_ext.rejection.sampling import make_sampler
from trl_grpo_ext.rejection.shards import located_prompts, read_group, write_made_with

ROWS = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{n}"}]} for n in range(3)])


def options(**changes: Any) -> RejectionArguments:
    return RejectionArguments(**{"output_dir": "out"} | changes)


def chosen(model: str = "some/model", **changes: Any) -> Chosen:
    return choose_sampler(options(**changes), model=model)


def problems(model: str = "some/model", **changes: Any) -> str:
    return "\n".join(rejection_problems(options(**changes), model=model))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CUDA devices, as far as one asks for them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_auto_takes_vllm_where_it_is_there(vllm: ModuleType, device: None) -> None:
    assert str(chosen()) == "vllm, which is installed, and there is a CUDA device"
    assert chosen(sampler="group_sample").name == "group_sample"
    assert problems() == problems(sampler="vllm") == ""


def test_auto_takes_ours_without_a_device_and_vllm_says_what_to_do(
    vllm: ModuleType, no_device: None
) -> None:
    assert str(chosen()) == "group_sample, and not vLLM: there is no CUDA device"
    assert problems() == ""
    assert problems(sampler="vllm") == (
        "there is no CUDA device, so vLLM cannot sample. Run it where there is one, or set "
        "`sampler: group_sample`."
    )


def test_auto_takes_ours_without_vllm_and_vllm_says_what_to_do(
    device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert str(chosen()) == "group_sample, and not vLLM: vLLM is not installed"
    assert "Install it (pip install 'trl[vllm]'), or set" in problems(sampler="vllm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_cpu": True}, "`use_cpu` is set, so vLLM cannot sample. Remove it"),
        ({"max_live_tokens": 99}, "`max_live_tokens` is set, which vLLM has no use for"),
        ({"generation_kwargs": {"typical_p": 0.9}}, "`generation_kwargs` has typical_p, which"),
        ({"temperature": 2.5}, "temperature must be in [0, 2], got 2.5"),
        ({"vllm_tensor_parallel_size": 3}, "is 3 and there are 2 CUDA devices"),
    ],
)
def test_what_vllm_cannot_do_is_refused_and_auto_leaves_it_to_ours(
    vllm: ModuleType, device: None, changes: dict[str, Any], message: str
) -> None:
    assert problems(**changes) == ""
    assert chosen(**changes).name == "group_sample"
    assert message in problems(**changes, sampler="vllm")


def test_options_of_vllm_alone_are_refused_by_ours(vllm: ModuleType, device: None) -> None:
    alone = {"generation_kwargs": {"min_tokens": 2}}
    assert problems(**alone) == problems(**alone, sampler="vllm") == ""
    assert "`min_tokens` are not honoured" in problems(**alone, sampler="group_sample")


def test_sharding_and_several_processes_exclude_each_other(
    vllm: ModuleType, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"sampler": "vllm", "vllm_tensor_parallel_size": 2}
    assert problems(**changes) == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "`vllm_tensor_parallel_size` is 2 and processes were launched" in problems(**changes)


def test_adapter_is_refused_with_the_way_out(
    vllm: ModuleType, device: None, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert chosen(str(tmp_path)).name == "group_sample"
    assert "is the folder of an adapter" in problems(str(tmp_path), sampler="vllm")
    assert "`merge_and_unload`" in problems(str(tmp_path), sampler="vllm")


def test_broken_vllm_is_one_that_cannot_be_imported(
    vllm: ModuleType, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(vllm, "SamplingParams")
    assert "vLLM cannot be imported" in chosen().why


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "sglang"}, "Use auto or group_sample or vllm"),
        ({"vllm_gpu_memory_utilization": 1.5}, "is 1.5, which is no share"),
        ({"vllm_tensor_parallel_size": 0}, "`vllm_tensor_parallel_size` is 0"),
        ({"vllm_max_model_length": 0}, "`vllm_max_model_length` is 0"),
    ],
)
def test_values_that_mean_nothing_are_told(changes: dict[str, Any], message: str) -> None:
    assert message in problems(**changes)


def test_auto_goes_on_with_what_made_the_replies(
    vllm: ModuleType, no_device: None, tmp_path: Path
) -> None:
    given = {"output_dir": str(tmp_path)}
    write_made_with(candidates_folder(tmp_path), {"sampler": "vllm"})
    assert str(chosen(**given)) == "vllm, which made the replies that are there already"
    assert problems(**given) == ""
    with pytest.raises(ConfigurationError, match="there is no CUDA device, so vLLM cannot sample"):
        load(chosen(**given), Path("some/model"), options(**given))


def load(sampler: Chosen, model: Path, given: RejectionArguments) -> Any:
    state: Any = SimpleNamespace(device=torch.device("cpu"), print=print)
    return load_draw(
        sampler, str(model), model=ModelConfig(dtype="float32"), options=given, state=state
    )


def test_run_samples_goes_on_and_refuses_another_sampler(
    vllm: ModuleType,
    device: None,
    tmp_path: Path,
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state: Any = SimpleNamespace(
        process_index=0, num_processes=1, is_main_process=True, wait_for_everyone=lambda: None
    )

    def collect(**changes: Any) -> Path:
        plain = {"output_dir": str(tmp_path), "num_generations": 2, "max_completion_length": 4}
        given = options(**plain | changes)
        sampler = choose_sampler(given, model=str(tiny_model_dir))

        def make() -> Any:
            draw, tokenizer = load(sampler, tiny_model_dir, given)
            return make_sampler(draw, tokenizer, ROWS, rewards=[], options=given)

        settings = made_with(
            given, model=ModelConfig(), weights="w", rewards=[], sampler=sampler.name
        )
        return collect_candidates(ROWS, options=given, made_with=settings, make=make, state=state)

    folder = collect()
    assert capsys.readouterr().out.startswith("Sampling with vllm, which is installed")
    found = located_prompts(folder)
    assert sorted(found) == [0, 1, 2]
    for path, offset, _ in found.values():
        one, other = read_group(path, offset).candidates
        assert 1 <= one.num_tokens <= 4
        assert one.text != other.text
    collect()
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigurationError, match=r'sampler: "vllm", now "group_sample"'):
        collect(sampler="group_sample")
