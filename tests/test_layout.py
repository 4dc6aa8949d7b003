"""One import name, light imports, and the line budget."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

ROOT = Path(__file__).parents[1]
FOLDERS = ("inner_training", "envs", "policies", "agents")
HEAVY = ("torch", "gymnasium", "stable_baselines3", "numpy", "pydantic", "rich")
FILE_LINES, FUNCTION_LINES, PARAMETERS = 320, 60, 10
FACES = {("attach.py", "attach"): 11}  # a public name may take more keywords rather than hide them in another object

LIBRARY = sorted(
    path for folder in (*FOLDERS, "src/trimtab") for path in (ROOT / folder).glob("**/*.py") if path.is_file()
)


def modules_after(code: str) -> set[str]:
    """Names in `sys.modules` after running `code` in a fresh interpreter."""
    code = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests", check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_every_module_has_one_name() -> None:
    loaded = modules_after(
        "import importlib, pkgutil, trimtab\n"
        "for found in pkgutil.walk_packages(trimtab.__path__, 'trimtab.'):\n"
        "    if not found.name.endswith('__main__'):\n"
        "        importlib.import_module(found.name)\n"
    )
    assert {f"trimtab.{folder}" for folder in FOLDERS} <= loaded
    assert loaded.isdisjoint(FOLDERS)


def test_links_point_at_the_root_folders() -> None:
    for folder in FOLDERS:
        assert (ROOT / "src" / "trimtab" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import trimtab; trimtab.__version__; dir(trimtab)", HEAVY),
        ("import trimtab.errors", HEAVY),
        ("import trimtab; assert 'digits-mlp' in trimtab.scenarios()", ("torch", "stable_baselines3")),
        ("import trimtab; assert 'cosine' in trimtab.rules()", ("torch", "gymnasium", "stable_baselines3")),
        ("import trimtab; trimtab.attach, trimtab.load_policy", ("gymnasium", "stable_baselines3")),
    ],
)
def test_light_imports(code: str, heavy: tuple[str, ...]) -> None:
    loaded = modules_after(code)
    assert loaded.isdisjoint(heavy), loaded & set(heavy)


@pytest.mark.parametrize("name", trimtab.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(trimtab, name)
    assert value is not None
    assert name in dir(trimtab)
    if name != "__version__":
        assert callable(value)
        assert value.__doc__


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        trimtab.atach  # noqa: B018


def over_budget(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    rows = []
    if text.count("\n") > FILE_LINES:
        rows.append(f"{path.name}: {text.count(chr(10))} lines")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            parameters = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
            if lines > FUNCTION_LINES:
                rows.append(f"{path.name}:{node.lineno}: {node.name} has {lines} lines")
            if parameters > FACES.get((path.name, node.name), PARAMETERS):
                rows.append(f"{path.name}:{node.lineno}: {node.name} has {parameters} parameters")
    return rows


def test_budget_finds_what_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    body = "\n".join(["    x = 1"] * FUNCTION_LINES)
    many = ", ".join(f"a{i}" for i in range(PARAMETERS + 1))
    path.write_text(f"def f({many}):\n{body}\n" + "\n" * FILE_LINES)
    assert len(over_budget(path)) == 3


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_budget(path: Path) -> None:
    assert over_budget(path) == []
