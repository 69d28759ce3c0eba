"""The model card: TRL's, with what the run was; rendered from plain values alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from trl_grpo_ext.hub.record import is_repo_id
from trl_grpo_ext.hub.shown import shown, without_secrets
from trl_grpo_ext.report.history import History
from trl_grpo_ext.report.markdown import code_span, fenced, section, table
from trl_grpo_ext.report.plots import PLOTS

CARD = "README.md"
_SCORE = re.compile(r"eval_(.*[/_])?(accuracy|pass@\d+|maj@\d+|reward)")
_MAX_SCORES = 40
_ORIGIN = re.compile(r"^This model is a fine-tuned version of .*$", re.MULTILINE)  # in TRL's card


@dataclass(frozen=True)
class RunFacts:
    """What a model card says of a run.

    Attributes:
        imitates: Whether it was fine-tuned on traces, not on rewards.
        base_model: Name on the Hub, of a package, or of a folder.
        dataset: Name on the Hub, or what the run calls its data.
        rewards: Name and weight of each reward function.
        settings: By name; secrets are left out when they are written.
        reference: Kind of the reference and, where it was measured, how faithful it was.
        log_history: ``trainer.state.log_history``.
        summary: ``summary.json`` of the report, if there is one.
        versions: Of the libraries.
        command: That started the run.
        secrets: That must not be in the card.
    """

    imitates: bool = False
    base_model: str | None = None
    dataset: str | None = None
    rewards: Sequence[tuple[str, float]] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    reference: Sequence[str] = ()
    log_history: Sequence[Mapping[str, object]] = ()
    summary: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    secrets: Sequence[str] = field(default=(), repr=False)


@dataclass(frozen=True)
class Score:
    """A row of the evaluation table: a metric, before training if known, and after."""

    name: str
    before: float | None
    after: float


def write_card(folder: Path, facts: RunFacts) -> None:
    """Add to the card in ``folder``, which TRL wrote, what the run was; list its plots."""
    path = folder / CARD
    drawn = {plot.stem for plot in (folder / "plots").glob("*.png")}
    card = ModelCard(path.read_text(encoding="utf-8"))
    _describe(card, facts)
    before, citations, after = str(card).partition("## Citations")
    mended = _ORIGIN.sub(lambda _: _origin(facts), before)
    text = f"{mended.rstrip()}\n\n{render(facts, drawn=drawn)}\n{citations}{after}"
    path.write_text(without_secrets(text, known=facts.secrets), encoding="utf-8")


def hub_id(name: str | None) -> str | None:
    """Return ``owner/name`` if this is one: the Hub refuses a card that names a folder.

    Example:
        >>> hub_id("Qwen/Qwen3-0.6B"), hub_id("/data/my model"), hub_id("out/a/b")
        ('Qwen/Qwen3-0.6B', None, None)
    """
    given = name or ""
    fits = given.count("/") == 1 and is_repo_id(given) and not Path(given).exists()
    return given if fits else None


def scores(facts: RunFacts) -> list[Score]:
    """Return the evaluation table: accuracy of the report, then the metrics of evaluations."""
    found = []
    after = facts.summary.get("accuracy_after")
    if _is_number(after):
        before = facts.summary.get("accuracy_before")
        found.append(Score("accuracy", _number(before), float(str(after))))
    history = History.of(facts.log_history)
    for name in sorted(filter(_SCORE.fullmatch, history.values)):
        values = history.logged(name)
        if values:
            found.append(Score(name, values[0] if len(values) > 1 else None, values[-1]))
    return found[:_MAX_SCORES]


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(float(str(value)))


def _number(value: object) -> float | None:
    return float(str(value)) if _is_number(value) else None


def _describe(card: ModelCard, facts: RunFacts) -> None:
    """Put into the metadata what the Hub reads, and only names that it takes."""
    data = card.data
    named = data.get("base_model")
    data["base_model"] = hub_id(facts.base_model) or (hub_id(named) if "/" in str(named) else named)
    data["datasets"] = [name] if (name := hub_id(facts.dataset)) else None
    data["model_name"] = data.get("model_name") or "model"
    results: dict[str, EvalResult] = {}  # the Hub takes one value a metric: the report's is first
    for score in scores(facts):
        found = _result(score, facts)
        results.setdefault(found.metric_type, found)
    data["eval_results"] = list(results.values()) or None


def _result(score: Score, facts: RunFacts) -> EvalResult:
    dataset = hub_id(facts.dataset)
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset or "custom",
        dataset_name=dataset or "held-out prompts of the run",
        metric_type=score.name.removeprefix("eval_"),
        metric_value=score.after,
    )


def render(facts: RunFacts, *, drawn: set[str]) -> str:
    """Return the sections that are added to TRL's card.

    Args:
        facts: Text in it is shown as it is, but cannot break out of its place.
        drawn: Names of the plots that are in ``plots/``.
    """
    sections = [
        _rewards(facts),
        section("Reference", "\n\n".join(facts.reference)) if facts.reference else "",
        _evaluation(facts),
        _plots(drawn),
        section("Limitations", "\n".join(f"- {line}" for line in _limitations(facts))),
        _command(facts),
        _table("Settings", ("setting", "value"), facts.settings),
        _table("Versions and device", ("", "version"), facts.versions),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _table(title: str, header: tuple[str, str], values: Mapping[str, object]) -> str:
    plain = shown(values)
    assert isinstance(plain, dict)
    return section(title, table(header, sorted(plain.items()))) if plain else ""


def _origin(facts: RunFacts) -> str:
    """What TRL's card says first, where it would link to a folder as if it were on the Hub."""
    model = _link(facts.base_model, "") if facts.base_model else "an unnamed model"
    data = f", trained on {_link(facts.dataset, 'datasets/')}" if facts.dataset else ""
    return f"This model is a fine-tuned version of {model}{data}."


def _link(name: str, kind: str) -> str:
    found = hub_id(name)
    return f"[{found}](https://huggingface.co/{kind}{found})" if found else code_span(name)


def _rewards(facts: RunFacts) -> str:
    if not facts.rewards:
        return ""
    return section("Rewards", table(("reward", "weight"), facts.rewards))


def _evaluation(facts: RunFacts) -> str:
    rows = [(score.name, score.before, score.after) for score in scores(facts)]
    if not rows:
        return section("Evaluation", "No evaluation was recorded in this run.")
    prompts = facts.summary.get("num_eval_prompts")
    note = f"`accuracy` is of {prompts} held-out prompts.\n\n" if isinstance(prompts, int) else ""
    return section("Evaluation", note + table(("metric", "first", "last"), rows))


def _plots(drawn: set[str]) -> str:
    images = [f"![{plot.title}](plots/{plot.name}.png)" for plot in PLOTS if plot.name in drawn]
    return section("Plots", "\n\n".join(images)) if images else ""


def _limitations(facts: RunFacts) -> Iterator[str]:
    what = "traces" if facts.imitates else "prompts"
    data = f"{what} of {code_span(facts.dataset)}" if facts.dataset else f"the {what} of the run"
    if facts.imitates:
        yield (
            f"It was fine-tuned to imitate {data} alone. What they do not show was not trained, "
            "and may be worse than in the base model; their errors are imitated too."
        )
    else:
        yield (
            f"It was trained by reinforcement learning on {data} alone. What the rewards do not "
            "measure was not trained, and may be worse than in the base model."
        )
        yield "Rewards can be gamed: a completion with a high reward need not be a good answer."
    if scores(facts):
        yield (
            "The evaluation is of prompts like those of the training, judged by its rewards. It "
            "says nothing of other tasks, of safety, or of other languages."
        )
    yield "Licence, biases and knowledge are those of the base model."


def _command(facts: RunFacts) -> str:
    return section("Command", fenced(facts.command, language="bash")) if facts.command else ""
