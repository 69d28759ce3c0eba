"""What a run stands on."""

from __future__ import annotations

import sys

from trl_grpo_ext.report import library_versions


def test_library_versions_names_every_library_and_the_device() -> None:
    versions = library_versions()
    assert versions["python"] == sys.version.split()[0]
    assert {"torch", "trl", "transformers", "accelerate", "datasets", "device"} <= set(versions)
    assert all(versions.values())
