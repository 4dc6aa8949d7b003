"""Families of a user's own: from arrays, registered, or named as module:function."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.inner_training.families import BUILT_IN, draws, each_built_in, images_task, line_task
from trimtab.errors import ConfigError, UserError
from trimtab.inner_training import tasks
from trimtab.inner_training.task import TaskFamily
from trimtab.inner_training.tasks import FAMILIES, make_family, register_task, resolve_family
from trimtab.inner_training.tasks.arrays import ArrayTask

ROOT = Path(__file__).parents[2]


def own(**changes: object) -> dict[str, object]:
    """Arguments of a task that works, with changes."""
    inputs = np.random.default_rng(0).normal(size=(60, 4))
    good: dict[str, object] = {
        "name": "own",
        "module_factory": lambda: nn.Linear(4, 2),
        "inputs": inputs,
        "labels": (inputs[:, 0] > 0).astype(int),
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "cross-entrop"}, "unknown loss 'cross-entrop'; did you mean 'cross-entropy'"),
        ({"labels": np.zeros(59, int)}, r"inputs have shape \(60, 4\) and labels \(59,\)"),
        ({"labels": np.zeros((60, 1), int)}, r"labels \(60, 1\)"),
        ({"inputs": np.zeros(60)}, r"inputs have shape \(60,\)"),
        ({"inputs": np.full((60, 4), np.nan)}, "NaN or infinity"),
        ({"inputs": np.full((60, 4), "a")}, "give numbers"),
        (
            {"inputs": np.zeros((30, 4)), "labels": np.zeros(30, int)},
            "number of examples is 30; it must be at least 40",
        ),
        ({"labels": np.full(60, 0.5)}, "cross-entropy needs integers from 0"),
        ({"labels": np.full(60, -1)}, "cross-entropy needs integers from 0"),
        ({"labels": np.full(60, 2)}, r"maps two examples to shape \(2, 2\); with cross-entropy .* must be \(2, 3\)"),
        ({"loss": "mse"}, r"with mse and these labels it must be \(2, 1\)"),
        ({"module_factory": lambda: nn.Linear(5, 2)}, r"fails on two examples of shape \(2, 4\) \(RuntimeError"),
        ({"module_factory": lambda: nn.LSTM(4, 2)}, "returns a tuple; return one tensor"),
        ({"module_factory": nn.Linear(4, 2)}, "is a Linear; give a function that makes a new module"),
        ({"module_factory": lambda: 3}, "made a int; make an nn.Module"),
        ({"loss_cap": 0.0}, "loss_cap is 0"),
        (
            {"loss": "mse", "labels": np.ones(60), "module_factory": lambda: nn.Linear(4, 1)},
            "labels that are all alike cannot be learned",
        ),
    ],
)
def test_array_task_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ArrayTask(**own(**changes))  # type: ignore[arg-type]


def test_array_task_refuses_modules_that_ignore_the_seed() -> None:
    source = torch.Generator().manual_seed(0)

    def factory() -> nn.Module:
        module = nn.Linear(4, 2)
        nn.init.normal_(module.weight, generator=source)
        return module

    with pytest.raises(UserError, match="starts differently each time"):
        ArrayTask(**own(module_factory=factory))  # type: ignore[arg-type]


def test_array_task_leaves_the_arrays_alone() -> None:
    arguments = own()
    task = ArrayTask(**arguments)  # type: ignore[arg-type]
    drawn = task.draw(0, held_out=False).fingerprint()
    assert isinstance(arguments["inputs"], np.ndarray)
    assert isinstance(arguments["labels"], np.ndarray)
    arguments["inputs"][:] = 0
    arguments["labels"][:] = 0
    assert task.inputs.abs().sum() > 0
    assert task.draw(0, held_out=False).fingerprint() == drawn


def test_array_task_caps_the_squared_error_at_twice_the_variance() -> None:
    labels = np.arange(60.0)
    task = ArrayTask("numbers", lambda: nn.Linear(1, 1), labels[:, None], labels, loss="mse")
    assert task.loss_cap == pytest.approx(2 * (60**2 - 1) / 12)


def test_array_task_scores_classes() -> None:
    task = images_task()
    outputs = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    assert task.score_name == "accuracy"
    assert task.score(outputs, torch.tensor([1, 2])).tolist() == [1.0, 0.0]
    assert line_task().score_name == ""


def test_array_task_recipe_limits_the_batch() -> None:
    assert line_task().max_batch == 8
    assert {instance.batch_size for instance in draws("line", 40, held_out=False)} == {4, 8}


def not_a_family() -> int:
    """Something else."""
    return 3


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the table, so that a test may add to it."""
    monkeypatch.setattr(tasks, "FAMILIES", dict(FAMILIES))
    monkeypatch.setattr(tasks, "_MADE", {})


@each_built_in
def test_make_family(name: str) -> None:
    made = make_family(name)
    assert made is make_family(name) is resolve_family(name)
    assert made.name == name
    assert made.doc == FAMILIES[name].doc


@pytest.mark.usefixtures("table")
def test_register_task() -> None:
    register_task("images", images_task)
    assert make_family("images") is make_family("images")
    assert tasks.FAMILIES["images"].doc == "Three classes of 4 x 4 images."
    register_task("no-family", not_a_family)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match="factory of task family 'no-family' returned a int; it must return a TaskFamily"
    ):
        make_family("no-family")


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("name", "factory", "message"),
    [
        ("digits-mlp", images_task, "'digits-mlp' exists already"),
        ("a:b", images_task, "holds ':'"),
        ("", images_task, "is empty"),
        ("own", 3, "is 3; give a callable"),
        (3, images_task, "3 is empty, no text,"),
    ],
)
def test_register_errors(name: str, factory: Callable[[], TaskFamily], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_task(name, factory)
    assert tasks.FAMILIES.keys() == FAMILIES.keys()


def test_resolve_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "import numpy as np, torch",
        "from trimtab.inner_training.tasks.arrays import ArrayTask",
        "def make():",
        "    return ArrayTask('mine', lambda: torch.nn.Linear(2, 2), np.ones((50, 2)), np.arange(50) % 2)",
        "def other():",
        "    return 'mine'",
        "def torn():",
        "    return 1 / 0",
        "number = 3",
    ]
    (tmp_path / "my_trimtab_tasks.py").write_text("\n".join(lines))
    (tmp_path / "my_broken_tasks.py").write_text("1 / 0")
    (tmp_path / "my_leaving_tasks.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_family("my_trimtab_tasks:make").draw(1, held_out=True).key == "mine/held-out/1"
    for place, message in {
        "my_trimtab_tasks:other": "returned a str; it must return a TaskFamily",
        "my_trimtab_tasks:number": "is a int; name a function",
        "my_trimtab_tasks:torn": "'my_trimtab_tasks:torn' raised ZeroDivisionError: division by zero",
        "sys:exit": "task family 'sys:exit' raised SystemExit",
        "my_leaving_tasks:make": r"cannot import module 'my_leaving_tasks' \(SystemExit: 0\)",
        "my_trimtab_tasks:mak": "has no 'mak'",
        "my_trimtab_tasks:": "has no ''",
        "my_broken_tasks:make": r"cannot import module 'my_broken_tasks' \(ZeroDivisionError: division by zero\)",
        "no_such_module:make": "cannot import module 'no_such_module' .* PYTHONPATH",
        ":make": "cannot import module ''",
        "digits-mpl": "unknown task family 'digits-mpl'; did you mean 'digits-mlp'",
    }.items():
        with pytest.raises(UserError, match=message):
            resolve_family(place)


def test_importing_the_table_is_light() -> None:
    code = (
        "import sys, trimtab.inner_training.tasks as tasks; assert tasks.FAMILIES\n"
        "assert not {'sklearn', 'torch'} & sys.modules.keys()\n"
        "tasks.make_family('teacher-mlp'); assert 'sklearn' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_page_of_families() -> None:
    page = ROOT / "docs" / "tasks.md"
    text = page.read_text(encoding="utf-8")
    for name in BUILT_IN:
        assert f"| `{name}` |" in text
    results = doctest.testfile(str(page), module_relative=False)
    assert results.failed == 0
    assert results.attempted > 0
