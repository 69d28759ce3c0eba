"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from trl.trainer import grpo_trainer

import trl_grpo_ext

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trl_grpo_ext"
MODULES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))

PURE = ("advantages", "losses")
# The top of the package: what nothing below may import.
TOP = {"trl_grpo_ext", "trl_grpo_ext.trainer", "trl_grpo_ext.environment", "trl_grpo_ext.cli"}
MAX_RECIPE_LINES = 150


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


OURS = {module_name(path) for path in MODULES}


def imported_names(tree: ast.AST, *, types: bool = True) -> Iterator[str]:
    """What a file imports, ``from a.b import c`` as ``a.b.c``; imports in functions included.

    With ``types=False``, without what only type checkers import.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif types or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from imported_names(node, types=types)


def imported_modules(path: Path, *, types: bool = True) -> set[str]:
    """The modules of this package that a file imports; its version is no import of a module."""
    found = set()
    for name in imported_names(parsed(path), types=types):
        while name and name not in OURS and name != "trl_grpo_ext.__version__":
            name = name.rpartition(".")[0]
        found.add(name)
    return found & OURS


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_components_do_not_import_the_top(path: Path) -> None:
    if module_name(path) not in TOP:
        assert not imported_modules(path) & TOP


def test_imports_form_no_cycle() -> None:
    imports = {module_name(path): imported_modules(path, types=False) for path in MODULES}
    while leaves := [name for name, found in imports.items() if not found & set(imports) - {name}]:
        for name in leaves:
            del imports[name]
    assert imports == {}


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_torch_and_our_errors_only(name: str) -> None:
    roots = set()
    for imported in imported_names(parsed(PACKAGE / f"{name}.py")):
        ours = imported.startswith("trl_grpo_ext")
        roots.add(".".join(imported.split(".")[:2]) if ours else imported.partition(".")[0])
    assert roots - set(sys.stdlib_module_names) <= {"torch", "trl_grpo_ext.errors"}


@pytest.mark.parametrize("path", [*MODULES, *RECIPES], ids=lambda path: path.stem)
def test_modules_of_trl_are_imported_in_one_place(path: Path) -> None:
    if "_trl" in path.parts:
        return
    allowed = {"trl.trainer.grpo_config.GRPOConfig"} if path == PACKAGE / "config.py" else set()
    from_trl = {name for name in imported_names(parsed(path)) if name.split(".")[0] == "trl"}
    private = {name for name in from_trl if name.count(".") > 1 or "._" in name}
    assert private <= allowed


def private_names_of_trl() -> set[str]:
    """The private methods and attributes of ``GRPOTrainer`` that its source mentions."""
    source = ast.parse(Path(grpo_trainer.__file__).read_text(encoding="utf-8"))
    (trainer,) = [node for node in source.body if getattr(node, "name", "") == "GRPOTrainer"]
    return {name for name in named_members(trainer) if name.startswith("_") and "__" not in name}


def named_members(tree: ast.AST) -> set[str]:
    """Names that a class defines as methods or reads from ``self``, ``super()`` and trainers."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in {
            "self",
            "super()",
            "trainer",
        }:
            names.add(node.attr)
    return names


@pytest.mark.parametrize("path", [*MODULES, *RECIPES], ids=lambda path: path.stem)
def test_private_members_of_trl_are_named_in_one_place(path: Path) -> None:
    if "_trl" in path.parts:
        return
    trainers = [
        node
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith("GRPOTrainer") for base in node.bases)
    ]
    private = private_names_of_trl()
    assert {"_compute_loss", "_buffered_inputs", "_metrics"} <= private
    assert not {name for node in trainers for name in named_members(node)} & private


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_short_and_hold_no_training_logic(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    assert len(source.splitlines()) < MAX_RECIPE_LINES
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            assert any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    called = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not called & {"backward", "zero_grad", "no_grad", "inference_mode"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_import_public_names_only(path: Path) -> None:
    ours = [name for name in imported_names(parsed(path)) if name.startswith("trl_grpo_ext")]
    assert not [name for name in ours if "._" in name]


@pytest.mark.parametrize("module", ["trl_grpo_ext", "trl_grpo_ext.cli"])
def test_import_loads_nothing_heavy(module: str) -> None:
    heavy = ["torch", "trl", "transformers", "datasets", "accelerate", "matplotlib", "numpy"]
    program = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(json.loads(ran.stdout)) & set(heavy)


@pytest.mark.parametrize("name", trl_grpo_ext.__all__)
def test_public_name_is_what_its_module_defines(name: str) -> None:
    value = getattr(trl_grpo_ext, name)
    assert value.__name__ == name
    assert value.__module__.startswith("trl_grpo_ext.")


def test_public_names_are_the_same_for_type_checkers() -> None:
    tree = parsed(PACKAGE / "__init__.py")
    imported = {name for name in imported_names(tree) if name.startswith("trl_grpo_ext.")}
    lazy = {f"trl_grpo_ext.{module}.{name}" for name, module in trl_grpo_ext._MODULES.items()}
    assert imported == lazy
    assert sorted(trl_grpo_ext._MODULES) == sorted(trl_grpo_ext.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'GRPOTrainerExt'"):
        _ = trl_grpo_ext.GRPOTrainerExt
