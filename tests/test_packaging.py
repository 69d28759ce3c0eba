"""What ships, and that the files which say so agree."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trl_grpo_ext.cli import RECIPE_PATTERNS

ROOT = Path(__file__).parent.parent


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"]


def requirements(*, extras: tuple[str, ...]) -> list[Requirement]:
    """What the package needs to run, and what the given extras add."""
    config = setup_cfg()
    sections = [config["options"]["install_requires"]]
    sections += [config["options.extras_require"][extra] for extra in extras]
    return [Requirement(line) for section in sections for line in lines(section)]


def make(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run make as from a shell, even if make itself runs these tests."""
    env = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def shipped_files() -> list[str]:
    """The recipes on disk, relative to their folder."""
    return sorted(
        path.relative_to(ROOT / "recipes").as_posix()
        for path in (ROOT / "recipes").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )


def test_packages_are_those_on_disk() -> None:
    on_disk = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in (ROOT / "trl_grpo_ext").rglob("*.py")
    }
    listed = set(lines(setup_cfg()["options"]["packages"]))
    assert listed == on_disk | {"trl_grpo_ext._recipes"}


def test_package_data_holds_every_file_of_the_recipes() -> None:
    patterns = lines(setup_cfg()["options.package_data"]["trl_grpo_ext._recipes"])
    matched = {
        path.relative_to(ROOT / "recipes").as_posix()
        for pattern in patterns
        for path in (ROOT / "recipes").glob(pattern)
    }
    assert matched == set(shipped_files())
    assert {"grpo.py", "configs/quickstart.yaml"} <= matched
    assert patterns == list(RECIPE_PATTERNS)


def test_every_requirement_admits_its_pin() -> None:
    pins = [Requirement(line) for line in lines((ROOT / "constraints.txt").read_text())]
    version_of = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    assert all(re.fullmatch(r"==[0-9.]+(\.post\d+)?", str(pin.specifier)) for pin in pins)
    for requirement in requirements(extras=("docs", "math", "quickstart", "serve", "test", "dev")):
        if requirement.name != "trl-grpo-ext":
            assert requirement.specifier.contains(version_of[canonicalize_name(requirement.name)])


def test_every_package_that_is_imported_is_required() -> None:
    # vllm and deepspeed need a GPU machine of their own and are imported only where they are found.
    optional = {"vllm", "deepspeed"}
    required = {
        canonicalize_name(requirement.name)
        for requirement in requirements(extras=("math", "quickstart", "serve"))
    }
    distributions = packages_distributions()
    for path in (ROOT / "trl_grpo_ext").rglob("*.py"):
        for module in imported_roots(path) - set(sys.stdlib_module_names) - optional:
            names = {canonicalize_name(name) for name in distributions.get(module, [])}
            assert module == "trl_grpo_ext" or names & required, f"{path.name} imports {module}"


def imported_roots(path: Path) -> set[str]:
    """The packages that a file imports, those in functions included."""
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.partition(".")[0])
    return roots


def test_every_requirement_has_its_reason_in_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    reasons = set(re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE))
    extras = ("docs", "math", "quickstart", "serve")
    named = {requirement.name for requirement in requirements(extras=extras)}
    assert reasons == named


def test_trl_is_held_to_one_minor_version() -> None:
    (trl,) = [requirement for requirement in requirements(extras=()) if requirement.name == "trl"]
    assert set(str(trl.specifier).split(",")) == {">=1.16", "<1.17"}


def test_pyproject_holds_no_metadata() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(pyproject) == {"build-system", "tool"}
    assert "setuptools" not in pyproject["tool"]
    assert not {"mypy", "tool:pytest", "flake8"} & set(setup_cfg())


def test_make_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    shown = make(cwd=ROOT).stdout
    assert re.findall(r"^  ([a-z-]+) +\S", shown, re.MULTILINE) == phony[1].split()


@pytest.mark.parametrize("found", ["3.10", "3.15"])
def test_make_install_refuses_a_python_out_of_range(tmp_path: Path, found: str) -> None:
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {found}\n")
    python.chmod(0o755)
    made = make("install", f"PYTHON={python}", cwd=tmp_path)
    assert made.returncode != 0
    assert f"is Python {found}, and the pinned packages need 3.11 to 3.14" in made.stderr
    assert "make PYTHON=" in made.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_install_says_what_to_do_without_python(tmp_path: Path) -> None:
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    made = make("install", "PYTHON=no-such-python", cwd=tmp_path)
    assert made.returncode != 0
    assert "'no-such-python' does not run. Install Python 3.11 to 3.14" in made.stderr


def test_ci_run_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from that sdist."""
    source = tmp_path_factory.mktemp("source") / "trl_grpo_ext"
    unwanted = shutil.ignore_patterns(
        ".venv", ".git", "outputs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=unwanted)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source]
    subprocess.run(command, check=True, capture_output=True)
    return source / "dist"


@pytest.mark.slow
def test_sdist_holds_what_a_contributor_needs(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"} <= names
    assert {"constraints.txt", "tests/conftest.py", "recipes/grpo.py"} <= names


@pytest.mark.slow
def test_wheel_holds_recipes_type_marker_and_license(distributions: Path) -> None:
    with zipfile.ZipFile(next(distributions.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read("trl_grpo_ext-0.1.0.dist-info/METADATA").decode()
    assert {f"trl_grpo_ext/_recipes/{name}" for name in shipped_files()} <= names
    assert {"trl_grpo_ext/py.typed", "trl_grpo_ext/_trl/contract.py"} <= names
    assert {name.partition("/")[0] for name in names} == {
        "trl_grpo_ext",
        "trl_grpo_ext-0.1.0.dist-info",
    }
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: <3.15,>=3.11\n" in metadata


@pytest.mark.slow
def test_installed_wheel_copies_its_recipes(distributions: Path, tmp_path: Path) -> None:
    wheel = next(distributions.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", tmp_path / "site", wheel], check=True)
    program = (
        "import trl_grpo_ext, trl_grpo_ext.cli as cli; print(trl_grpo_ext.__file__); cli.app()"
    )
    copied = subprocess.run(
        [sys.executable, "-c", program, "recipes", "copy", "mine"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert copied.stdout.startswith(str(tmp_path / "site"))
    mine = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    assert sorted(path.relative_to(tmp_path / "mine").as_posix() for path in mine) == (
        shipped_files()
    )
