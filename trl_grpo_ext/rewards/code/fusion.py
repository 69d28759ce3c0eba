"""Cases of input and output run by a SandboxFusion server instead of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.api.reward import APIReward
from trl_grpo_ext.rewards.code.cases import Asserts, Case
from trl_grpo_ext.rewards.code.jail import SandboxError
from trl_grpo_ext.rewards.code.limits import MEBIBYTE, Limits
from trl_grpo_ext.rewards.code.verdicts import Verdict


class FusionServer:
    """Runs programs on a SandboxFusion server, and compares here what they print.

    Asserts are not run: they would have to stand in the program's own process, which could read
    what they expect.

    Args:
        service: ``base_url``, and other options of :class:`~trl_grpo_ext.rewards.APIReward`.
        limits: Time and memory are passed on; the others are the server's.
        name: Of the reward, for messages.

    Raises:
        ConfigurationError: There is no ``base_url``, or an option cannot work.
    """

    name = "sandbox_fusion"

    def __init__(self, service: Mapping[str, Any], *, limits: Limits, name: str) -> None:
        if not service.get("base_url"):
            raise ConfigurationError([_no_address(name)])
        self._reward = APIReward(
            protocol="sandbox_fusion",
            column="expected",
            stdin_column="stdin",
            language="python",
            run_timeout_s=limits.time_limit_s,
            memory_limit_mb=limits.memory_bytes // MEBIBYTE,
            **service,
        )

    def verdict(self, program: str, tests: list[Case] | Asserts) -> Verdict:
        """Return in how many cases the program prints what is expected.

        Raises:
            SandboxError: The server did not run all of them.
        """
        if isinstance(tests, Asserts):
            return Verdict(0, 0, "unjudgeable")
        scores = self._reward(
            prompts=[""] * len(tests),
            completions=[_fenced(program)] * len(tests),
            stdin=[case.stdin for case in tests],
            expected=[case.expected for case in tests],
        )
        return Verdict(_passed(scores), len(tests))

    def close(self) -> None:
        """Close the connections."""
        self._reward.close()


def _passed(scores: Sequence[float | None]) -> int:
    if None in scores:
        raise SandboxError("the SandboxFusion server did not run every case")
    return sum(score == 1 for score in scores)


def _fenced(program: str) -> str:
    longest = max(map(len, re.findall("`+", program)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}python\n{program}\n{fence}"


def _no_address(name: str) -> str:
    return (
        f"reward '{name}' has `sandbox`='sandbox_fusion' and no `base_url` in `service`, so there "
        "is no server to run programs. Set `service: {base_url: http://...}` in the `arguments` of "
        "this reward, or another `sandbox`."
    )
