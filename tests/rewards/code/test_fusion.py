from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rewards.api.services import Asked, Service, serving

from trl_grpo_ext.rewards.code.reward import CodeReward


def doubling(asked: Asked) -> tuple[int, dict[str, str], bytes]:
    """A server that knows two programs: one doubles, the other breaks the sandbox."""
    if "broken" in asked.payload["code"]:
        return 200, {}, json.dumps({"status": "SandboxError"}).encode()
    stdout = f"{2 * int(asked.payload['stdin'])}\n"
    run = {"status": "Finished", "return_code": 0, "stdout": stdout}
    return 200, {}, json.dumps({"status": "Success", "run_result": run}).encode()


@pytest.fixture
def service() -> Iterator[Service]:
    with serving(doubling) as found:
        yield found


def rewarding(service: Service, folder: Path, **options: Any) -> CodeReward:
    address = {"base_url": service.url, "cache_dir": str(folder), "max_attempts": 1}
    return CodeReward(sandbox="sandbox_fusion", service=address, num_workers=2, **options)


def test_fusion_server_runs_each_case_and_what_it_prints_is_compared_here(
    service: Service, tmp_path: Path
) -> None:
    tests = {"inputs": ["1", "21", "3"], "outputs": ["2", "42", "7"]}
    with rewarding(service, tmp_path, time_limit_s=4.0) as reward:
        scores = reward(completions=["```python\nprint('`')\n```"], tests=[tests])
    assert scores == [2 / 3]
    assert sorted(asked.payload["stdin"] for asked in service.asked) == ["1", "21", "3"]
    payload = service.asked[0].payload
    assert payload["code"] == "print('`')"
    assert (payload["run_timeout"], payload["memory_limit_MB"]) == (4.0, 1024)
    assert "42" not in json.dumps([asked.payload for asked in service.asked])


def test_fusion_server_gives_no_score_when_it_fails_or_when_asserts_would_be_readable(
    service: Service, tmp_path: Path
) -> None:
    tests: list[Any] = [{"inputs": ["1"], "outputs": ["2"]}, "assert f(1) == 2"]
    with rewarding(service, tmp_path) as reward:
        scores = reward(completions=["broken", "def f(x): return 2"], tests=tests)
    assert scores == [None, None]
    assert all("assert" not in asked.payload["code"] for asked in service.asked)
