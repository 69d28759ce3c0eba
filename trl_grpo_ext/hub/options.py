"""The options of a run on the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import get_token, is_offline_mode

from trl_grpo_ext.hub.record import is_repo_id


@dataclass
class HubOptions:
    """What is uploaded beside the model, and how long the end of a run waits for it."""

    push_completions: bool = field(
        default=False,
        metadata={
            "help": "With `push_to_hub`, whether the logged completions are uploaded as a dataset, "
            "MODEL-completions; needs `log_completions`."
        },
    )
    hub_wait_s: float = field(
        default=3600.0,
        metadata={
            "help": "Longest time [s] that the end of a run waits for uploads under way; for a Hub "
            "that does not answer, a minute. What is left then is named, with the command that "
            "uploads it."
        },
    )


def hub_problems(
    options: HubOptions,
    *,
    push_to_hub: bool,
    log_completions: bool,
    output_dir: str | None,
    hub_model_id: str | None,
    hub_token: str | None,
) -> Iterator[str]:
    """Yield what cannot work in the options of the Hub, or would only fail after training.

    Example:
        >>> given = dict(output_dir="out", hub_model_id=None, hub_token=None)
        >>> list(hub_problems(HubOptions(), push_to_hub=False, log_completions=False, **given))
        []
    """
    if not options.hub_wait_s >= 0:
        yield (
            f"`hub_wait_s` is {options.hub_wait_s}; the end of the run waits that many seconds for "
            "uploads: use 0 or more (3600 is usual)."
        )
    if options.push_completions and not (push_to_hub and log_completions):
        yield (
            "`push_completions` is true, but `push_to_hub` or `log_completions` is not, so there "
            "is nothing to upload. Set both to true, or remove `push_completions`."
        )
    if push_to_hub:
        name = hub_model_id or Path(output_dir or "").absolute().name
        yield from repo_problems(name, hub_token=hub_token)


def repo_problems(
    name: str, *, hub_token: str | None = None, option: str = "hub_model_id"
) -> Iterator[str]:
    """Yield why nothing could be uploaded to a repository of this name.

    Args:
        name: ``OWNER/NAME``, or a name.
        hub_token: If one is given.
        option: Which sets the name.
    """
    if not is_repo_id(name):
        yield (
            f"`push_to_hub` is true, but {name!r} cannot be the name of a repository. Set "
            f"`{option}` to OWNER/NAME, of letters, digits, '-', '_' and '.'."
        )
    is_main = os.environ.get("RANK", "0") == "0"  # the only one that needs a token
    if is_main and not is_offline_mode() and hub_token is None and get_token() is None:
        yield (
            "`push_to_hub` is true, but there is no token, so nothing could be uploaded. Run "
            "`hf auth login`, set HF_TOKEN, or set `push_to_hub: false`."
        )
