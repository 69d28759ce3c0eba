"""Scores of a file on the terminal, and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.completion import completion_text
from trl_grpo_ext.rewards.score_file import Completions, Scored
from trl_grpo_ext.rewards.scores import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_VALUES = 10  # so many different scores have a bar each; more are put into as many ranges
BAR_WIDTH = 40  # [characters]
SHOWN_CHARACTERS = 160
UNSCORED = "unscored"
PICTURES = (".png", ".pdf", ".svg")


def print_scores(
    scored: Sequence[Scored], found: Completions, console: Console, *, num_examples: int = 5
) -> None:
    """Print the table, and for each reward its histogram, metrics and examples.

    Args:
        scored: What each reward said.
        found: The completions, which are untrusted: no markup and no control character in them
            reaches the terminal.
        console: To print to.
        num_examples: Best ones, and worst ones, of each reward.
    """
    console.print(_table(scored))
    for one in scored:
        console.print(Text(f"Scores of {shortened(one.name)}", style="bold"))
        for line in histogram_lines(one.scores):
            console.print(Text(line), soft_wrap=True)
        for name, value in one.metrics.items():
            console.print(Text(f"  {shortened(name)}: {value:g}", style="dim"), soft_wrap=True)
        for title, places in examples(one.scores, num_examples).items():
            console.print(Text(f"\n{title}", style="bold"))
            for at in places:
                console.print(Text(_example(found, one.scores, at)), soft_wrap=True)
        console.print()


def histogram(scores: Sequence[Score]) -> list[tuple[str, int]]:
    """Return labels and counts: one a value if there are few of them, else one a range.

    Ranges are equally wide and hold their lower end; the last one holds its upper end too.

    Example:
        >>> histogram([1.0, 0.0, 1.0, None])
        [('0', 1), ('1', 2)]
    """
    known = [score for score in scores if score is not None]
    values = Counter(known)
    if len(values) <= MAX_VALUES:
        return [(f"{value:.4g}", values[value]) for value in sorted(values)]
    counts, edges = np.histogram(known, bins=MAX_VALUES)
    labels = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
    return list(zip(labels, map(int, counts), strict=True))


def histogram_lines(scores: Sequence[Score]) -> Iterator[str]:
    r"""Yield the histogram as lines of text, and one for the unscored completions if there are any.

    Example:
        >>> print(*histogram_lines([1.0, 0.0, 1.0, None]), sep="\n")
                 0  ████████████████████ 1
                 1  ████████████████████████████████████████ 2
          unscored  ████████████████████ 1
    """
    bars = _with_unscored(scores)
    longest, width = max(count for _, count in bars), max(10, *(len(label) for label, _ in bars))
    for label, count in bars:
        length = max(1, round(BAR_WIDTH * count / longest)) if count else 0
        yield f"{label:>{width}}  {'█' * length} {count}"


def examples(scores: Sequence[Score], num: int) -> dict[str, list[int]]:
    """Return where the best and the worst scores are; none is among both.

    Example:
        >>> examples([0.5, None, 1.0, 0.0], 1)
        {'Best': [2], 'Worst': [3]}
    """
    known = [(score, at) for at, score in enumerate(scores) if score is not None]
    best = [at for _, at in sorted(known, key=lambda pair: (-pair[0], pair[1]))][:num]
    worst = [at for _, at in sorted(known) if at not in best][:num]
    return {title: places for title, places in (("Best", best), ("Worst", worst)) if places}


def shortened(text: str, *, num_characters: int = SHOWN_CHARACTERS) -> str:
    r"""Return the start and the end of untrusted text, on one line of printable characters.

    Example:
        >>> print(shortened("so\n" + "b" * 90 + "\x1b[31m", num_characters=23))
        so\nbbbbbb … bb\x1b[31m
    """
    half = max(1, (num_characters - 3) // 2)
    if len(text) > num_characters:
        return f"{_printable(text[:half])[:half]} … {_printable(text[-half:])[-half:]}"
    return _printable(text)


def check_plot(path: Path | None) -> None:
    """Raise if a picture could not be written there, before the work of scoring.

    Raises:
        ConfigurationError: It is in no folder, or pictures of this kind cannot be written.
    """
    if path is not None and (path.suffix.lower() not in PICTURES or not path.parent.is_dir()):
        raise ConfigurationError(
            [
                f"`--plot` {path} is no picture in a folder that exists, so it could not be "
                f"written. Give a name that ends in one of {', '.join(PICTURES)}, in such a folder."
            ]
        )


def save_plot(scored: Sequence[Scored], path: Path) -> None:
    """Write the histogram of each reward to a picture, one below the other."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from trl_grpo_ext.report.plots import PLOT_STYLE

    # matplotlib types the keys as a literal of all of its settings.
    styled = cast("Callable[..., AbstractContextManager[None]]", mpl.rc_context)
    with styled(PLOT_STYLE):
        figure = Figure(figsize=(8.5, 0.4 + 4.0 * len(scored)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(scored), squeeze=False)[:, 0]
        for axes, one in zip(panels, scored, strict=True):
            _draw(axes, one)
        figure.savefig(path)


def _draw(axes: Axes, one: Scored) -> None:
    from matplotlib.ticker import MaxNLocator

    from trl_grpo_ext.report.plots import BLUE, GREY

    bars = _with_unscored(one.scores)
    places, counts = range(len(bars)), [count for _, count in bars]
    colours = [GREY if label == UNSCORED else BLUE for label, _ in bars]
    axes.bar_label(axes.bar(places, counts, color=colours), padding=2)
    axes.set_xticks(places, [label.replace(" to ", "\nto ") for label, _ in bars])
    axes.margins(x=0.3 / len(bars), y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False, axis="x")
    name = shortened(one.name, num_characters=40).replace("$", r"\$")
    mean = _number(one.summary()["mean"], "no scores", "mean ")
    axes.set(title=f"{name}: {mean}", xlabel="score", ylabel="completions")


def _with_unscored(scores: Sequence[Score]) -> list[tuple[str, int]]:
    num_unscored = sum(score is None for score in scores)
    return histogram(scores) + ([(UNSCORED, num_unscored)] if num_unscored else [])


def _table(scored: Sequence[Scored]) -> Table:
    table = Table(title="Scores", title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("reward", overflow="fold")
    for title in ("number", "mean", "unscored", "are 0", "are 1", "s", "per s"):
        table.add_column(title, justify="right")
    for one in scored:
        table.add_row(Text(shortened(one.name)), *_cells(one.summary()))
    return table


def _cells(summary: Mapping[str, object]) -> list[str]:
    unscored = f"{summary['unscored']}"
    if summary["non_finite"]:
        unscored += f" ({summary['non_finite']} not finite)"
    return [
        f"{summary['completions']}",
        _number(summary["mean"]),
        unscored,
        _number(summary["share_0"]),
        _number(summary["share_1"]),
        f"{summary['seconds']:.2f}",
        _number(summary["completions_per_second"], form=",.0f"),
    ]


def _number(value: object, otherwise: str = "-", before: str = "", *, form: str = ".3f") -> str:
    return otherwise if value is None else f"{before}{value:{form}}"


def _example(found: Completions, scores: Sequence[Score], at: int) -> str:
    text = shortened(completion_text(found.texts[at]))
    return f"{scores[at]:>8.4g}  row {found.row_of[at]}: {text}"


def _printable(text: str) -> str:
    r"""Return the text with escapes for what a terminal would obey, such as colours.

    Example:
        >>> print(_printable("\x1b[31mrot\nblütenweiß"))
        \x1b[31mrot\nblütenweiß
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
