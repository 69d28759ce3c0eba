"""What docs/reward_protocols.md shows is what is sent, and it names each option."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_grpo_ext.rewards.api.protocols import PROTOCOLS, make_protocol
from trl_grpo_ext.rewards.api.wire import Item

PAGE = (Path(__file__).parents[3] / "docs" / "reward_protocols.md").read_text(encoding="utf-8")
ITEMS = [
    Item("What is 2 + 2?", "```python\nprint(4)\n```", columns={"answer": "4"}),
    Item("What is 2 + 2?", "5", columns={"answer": "4"}),
]


def section(name: str) -> str:
    return PAGE.partition(f"\n## `{name}`")[2].partition("\n## ")[0]


def block(name: str, language: str) -> str:
    return re.search(rf"```{language}\n(.*?)\n```\n", section(name), re.DOTALL)[1]


def agree(shown: Any, real: Any) -> bool:
    """Equal, but for texts that the page ends with an ellipsis."""
    if isinstance(shown, dict) and isinstance(real, dict):
        return list(shown) == list(real) and all(agree(shown[key], real[key]) for key in shown)
    if isinstance(shown, list) and isinstance(real, list):
        return len(shown) == len(real) and all(map(agree, shown, real))
    if isinstance(shown, str) and shown.endswith("…"):
        return isinstance(real, str) and real.startswith(shown[:-1])
    return bool(shown == real)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_body_that_the_page_shows_is_sent(name: str) -> None:
    reward = yaml.safe_load(block(name, "yaml"))
    assert reward.pop("protocol") == name
    request = make_protocol(name, **reward).requests(ITEMS)[0]
    path, _, body = block(name, "json").partition("\n")
    assert path == f"// POST {request.path}"
    assert agree(json.loads(body), request.payload)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_page_names_each_option(name: str) -> None:
    missing = [
        o.name for o in fields(PROTOCOLS[name]) if not re.search(rf"`{o.name}[`:]", section(name))
    ]
    assert missing == []


def test_the_table_has_each_protocol() -> None:
    assert re.findall(r"^\| \[`(\w+)`\]", PAGE, re.MULTILINE) == sorted(PROTOCOLS)
