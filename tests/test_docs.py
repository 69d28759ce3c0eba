"""What the documentation says holds: its commands, its code, its quotes, its figures, its site.

A command stands in a block of bash. It runs here, unless the line before says what it needs:
``*Needs 8 GPUs:*``. Then its programs, files, options and, of a recipe, all settings are checked.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from trl import ModelConfig, SFTConfig

from trl_grpo_ext.cli import app
from trl_grpo_ext.config import ExtGRPOConfig
from trl_grpo_ext.data import TaskArguments
from trl_grpo_ext.recipe import RunArguments
from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rewards.models.training_options import RewardModelArguments
from trl_grpo_ext.sft.options import SFTArguments

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PROGRAMS = ("make", "python", "pytest", "pip", "accelerate", "torchrun", "trl", "trl-grpo-ext")
RECIPE_OPTIONS = (
    RunArguments,
    TaskArguments,
    RejectionArguments,
    RewardModelArguments,
    SFTArguments,
)
OPTIONS: Any = (*RECIPE_OPTIONS, ModelConfig, ExtGRPOConfig, SFTConfig)
# Their reward model must be trained first; tests/test_reward_model_recipe.py reads them. A dry run
# of r1.py starts a program a stage; tests/pipeline/test_stages.py reads the settings of each.
ELSEWHERE = ("quickstart_outcome_model", "quickstart_process_model", "r1_mini")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and what the line before says that it needs."""

    page: str
    language: str
    text: str
    needs: str

    @property
    def commands(self) -> list[list[str]]:
        """Its lines as words, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def read_blocks() -> Iterator[Block]:
    fence = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in fence.finditer(text):
            before = text[: match.start()].rstrip().rpartition("\n")[2]
            needs = re.fullmatch(r"\*Needs (.+):\*", before)
            name = page.relative_to(ROOT).as_posix()
            yield Block(name, match[2], match[3], needs[1] if needs else "")


BLOCKS = list(read_blocks())
BASH = [block for block in BLOCKS if block.language == "bash"]


def of(language: str) -> list[Any]:
    found = [block for block in BLOCKS if block.language == language]
    return [pytest.param(block, id=f"{block.page}-{n}") for n, block in enumerate(found)]


# Commands ---------------------------------------------------------------------------------------


def test_commands_stand_in_blocks_of_bash() -> None:
    plain = [block for block in BLOCKS if not block.language]
    assert [block for block in plain if block.text.partition(" ")[0] in PROGRAMS] == []


def test_what_needs_something_is_a_block_of_commands() -> None:
    texts = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(re.findall(r"^\*Needs ", texts, re.MULTILINE)) == len([b for b in BASH if b.needs])


def inline_commands() -> Iterator[list[str]]:
    """Commands between backquotes, in the text of a page."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for code in re.findall(r"`([^`\n]+)`", text):
            if code.partition(" ")[0] in PROGRAMS and " " in code:
                yield shlex.split(code)


def command_problem(words: list[str]) -> str | None:
    """What is wrong with a command, as far as that shows without running it."""
    if words[0] == "make":
        targets = [word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)]
        known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return next((f"no target {t}" for t in targets if t not in known), None)
    if words[0] == "trl-grpo-ext":
        return option_problem(words[1:])
    files = [w for w in words if w.partition("/")[0] in ("recipes", "benchmarks", "examples")]
    files += [w for w in words if w.startswith(("docs/", "tests/"))]
    return next((f"no file {f}" for f in files if not (ROOT / f).exists()), None)


def option_problem(words: list[str]) -> str | None:
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    if hasattr(command, "commands") and words != ["--help"]:
        return f"{command.name} needs one of {sorted(command.commands)}"
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    return f"no option {sorted(given - known)}" if given - known else None


def test_commands_name_what_is_there() -> None:
    commands = [*inline_commands(), *(words for block in BASH for words in block.commands)]
    assert len(commands) > 60
    problems = {shlex.join(words): command_problem(words) for words in commands}
    assert {words: problem for words, problem in problems.items() if problem} == {}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what commands read, to run them in."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


# By what they run, so that each runs once, however often it stands in the docs.
RUNNING = {str(block.commands): block.text for block in BASH if not block.needs}


@pytest.mark.parametrize("text", RUNNING.values(), ids=lambda text: " ".join(text.split()[:4]))
def test_command_of_the_docs_runs(text: str, checkout: Path, tmp_path: Path) -> None:
    shutil.copytree(checkout, tmp_path, dirs_exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-euo", "pipefail", "-c", text]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout


def recipe_commands() -> list[tuple[str, ...]]:
    """Recipe and arguments of each command that trains the packaged model, once."""
    commands = [*inline_commands(), *(words for block in BASH for words in block.commands)]
    found = set()
    for words in commands:
        script = next((n for n, w in enumerate(words) if re.match(r"recipes/\w+\.py", w)), None)
        config = ROOT / dict(itertools.pairwise(words)).get("--config", "none")
        if script is None or config.stem in ELSEWHERE or not config.is_file():
            continue
        if yaml.safe_load(config.read_text()).get("model_source") == "package":
            found.add(tuple(word for word in words[script:] if word != "--dry_run"))
    return sorted(found)


@pytest.mark.parametrize("command", recipe_commands(), ids=" ".join)
def test_recipe_of_the_docs_passes_a_dry_run(
    command: tuple[str, ...],
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = ["--model_name_or_path", str(tiny_model_dir), "--model_source", "auto"]
    monkeypatch.setattr(sys, "argv", [*command, *model, "--dry_run"])
    monkeypatch.chdir(ROOT)
    num_threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command[0], run_name="__main__")
    torch.set_num_threads(num_threads)
    assert ended.value.code == 0, capfd.readouterr().err


# Code -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of("python"))
def test_code_of_the_docs_imports_what_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("trl_grpo_ext"):
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert missing == [], node.module


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_of_the_docs_has_keys_that_exist(block: Block) -> None:
    keys = yaml.safe_load(block.text)
    known = {field.name for options in OPTIONS for field in fields(options)}
    if isinstance(keys, dict) and "protocol" not in keys:  # those are arguments of a reward
        assert set(keys) - known == set()


# torch says so of a loader that pins memory, transformers' default, where there is no GPU.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_script_of_the_start_page_trains(tiny_model_dir: Path, tmp_path: Path) -> None:
    (block,) = (b for b in BLOCKS if b.page == "docs/start.md" and b.language == "python")
    packaged = 'prepare_model("HuggingFaceTB/SmolLM2-135M-Instruct", source="package")'
    assert packaged in block.text
    script = block.text.replace(packaged, repr(str(tiny_model_dir)))
    script = script.replace("outputs/script", str(tmp_path / "out"))
    trained = {"__name__": "start"}
    exec(script, trained)
    trainer: Any = trained["trainer"]
    assert trainer.state.global_step == 2


# Claims -----------------------------------------------------------------------------------------


def messages() -> list[str]:
    """Every text in the code of the package, with dots in the place of what is filled in."""
    found = []
    for path in (ROOT / "trl_grpo_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(\.\d)?[sdg]", "…", node.value))
    return found


def test_troubleshooting_quotes_what_the_package_says() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = re.findall(r"^> (.+)$", page, re.MULTILINE)
    assert len(quotes) > 40
    texts = "\n".join(message.replace("\n", " ") for message in messages())
    stale = [
        quote
        for quote in quotes
        if not re.search(".*".join(map(re.escape, re.split(r"\s*…\s*", quote))), texts)
    ]
    assert stale == []


def test_figures_of_the_why_page_stand_in_the_benchmarks() -> None:
    rows = re.findall(r"^\|.*\d.*\|$", (DOCS / "why.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 10
    measured = (DOCS / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in rows if row not in measured] == []


def test_formulas_name_functions_of_the_files_that_they_link() -> None:
    text = " ".join((DOCS / "how_it_works.md").read_text(encoding="utf-8").split())
    named = re.findall(r"((?:`\w+`(?:, | and )?)+) in \[[\w.]+\]\(\.\./([\w/.]+)\)", text)
    assert len(named) > 10
    for functions, path in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        defined = {getattr(node, "name", None) for node in tree.body}
        assert set(re.findall(r"\w+", functions)) - {"and"} <= defined, path


def test_papers_name_what_the_package_has() -> None:
    rows = [line.split("|") for line in (DOCS / "papers.md").read_text().splitlines()]
    named = {n for row in rows if len(row) > 4 for n in re.findall(r"`(\w+)`", row[3])}
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "trl_grpo_ext").rglob("*.py")]
    defined = set(re.findall(r"^(?:def|class) (\w+)", "\n".join(code), re.MULTILINE))
    assert named - defined - {"openai_ranking"} == set()


DOCSTRING = r"""Return :func:`~a.b.mean` of :math:`x`.

.. math:: y = \frac{1}{2}
    + x

Args:
    x: See :class:`Tensor`.

References:
    [1] One.
    [2] Two.

Example:
    >>> mean(x)
"""
AS_MARKDOWN = r"""Return `mean` of $x$.

$$
y = \frac{1}{2} + x
$$

Args:
    x: See `Tensor`.

**References:** [1] One. [2] Two.

Examples:
    >>> mean(x)
"""


def test_docstrings_of_the_site_are_plain_markdown() -> None:
    as_markdown = runpy.run_path(str(DOCS / "_site.py"))["as_markdown"]
    assert as_markdown(DOCSTRING) == AS_MARKDOWN


# The site ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


def test_site_asks_no_other_server_for_anything(site: Path) -> None:
    pattern = r"<(?:link|script|img|iframe|source)\b[^>]*(?:href|src)=\"(?:https?:)?//[^\"]+"
    for page in site.rglob("*.html"):
        assert re.findall(pattern, page.read_text(encoding="utf-8")) == [], page.name


def test_site_shows_formulas_without_a_script(site: Path) -> None:
    for name, least in (("how_it_works.html", 10), ("api/advantages.html", 2), ("rewards.html", 1)):
        text = (site / name).read_text(encoding="utf-8")
        assert text.count("<math") >= least, name
        assert not re.search(r"\\frac|class=\"arithmatex\"|:math:|:func:|:class:", text), name


def test_site_documents_every_public_name(site: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    shown = set(re.findall(r'id="trl_grpo_ext[\w.]*\.(\w+)"', pages))
    for path in (ROOT / "trl_grpo_ext").glob("**/__init__.py"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        module = importlib.import_module(package)
        names = getattr(module, "__all__", [])
        public = {name for name in names if is_code(getattr(module, name))}
        assert public - shown == set(), package
    assert {name for name in shown if re.match(r"_[a-z]", name)} == set()


def is_code(value: object) -> bool:
    return inspect.isclass(value) or inspect.isroutine(value)
