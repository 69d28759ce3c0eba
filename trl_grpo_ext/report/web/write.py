"""Writing the page of one run, or of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.files import write_atomically
from trl_grpo_ext.report.web.page import render
from trl_grpo_ext.report.web.run_folder import read_runs

MAX_COMPLETIONS = 2000  # some megabytes, where they are long


def write_web_report(
    folders: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    max_completions: int = MAX_COMPLETIONS,
) -> Path:
    """Write one HTML file that shows a run, or compares several, and fetches nothing.

    Args:
        folders: The ``output_dir`` of each run; the first is what the others are compared with.
        output: Where to write; ``report.html`` in the folder of a run, ``comparison.html`` here
            for several.
        max_completions: Most completions to show, at evenly spaced steps; 0 for none.

    Returns:
        The path of the page.

    Raises:
        ConfigurationError: Folders that are not there or hold no run; a page that cannot be
            written.
    """
    paths = [Path(folder) for folder in folders]
    alone = paths[0] / "report.html" if len(paths) == 1 else Path("comparison.html")
    path = Path(output) if output is not None else alone
    page = render(read_runs(paths, max_completions=max_completions))
    try:
        write_atomically(path, page)
    except OSError as error:
        raise ConfigurationError(
            [
                f"{path} cannot be written ({error.strerror or error}), so there is no report. "
                "Name another file with `--output`."
            ]
        ) from error
    return path
