"""The command line: what it imports, what it refuses, and how it says so."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from trimtab import cli
from trimtab.agents.audit_report import Reported
from trimtab.errors import UnknownNameError

COMMANDS = ("train", "bench", "export", "inspect", "check", "report", "list")
HEAVY = {"torch", "gymnasium", "stable_baselines3", "numpy", "pydantic", "rich", "yaml", "importlib.metadata"}


def spy(monkeypatch: pytest.MonkeyPatch, module: str, function: str, result: Any = None) -> list[Any]:
    """Replaces `module` by one whose `function` records its calls, and returns the list of calls."""
    calls: list[Any] = []

    def record(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        if isinstance(result, BaseException):
            raise result
        return result

    fake = types.ModuleType(module)
    setattr(fake, function, record)
    monkeypatch.setitem(sys.modules, module, fake)
    return calls


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import json, sys\nfrom trimtab.cli import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: trimtab")
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert loaded.isdisjoint(HEAVY), loaded & HEAVY


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import trimtab

    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"trimtab {trimtab.__version__}\n"


def test_module_entry_point() -> None:
    done = subprocess.run([sys.executable, "-m", "trimtab", "list", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("trimtab: unknown table 'x'; ")


def test_train_passes_everything_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = spy(monkeypatch, "trimtab.agents.train", "run_train", tmp_path)
    argv = ["train", "digits-mlp", "--timesteps", "5", "--seed", "3", "--out", str(tmp_path), "--resume"]
    assert cli.main([*argv, "--num-envs", "2", "--mode", "eager"]) == 0
    options = {"algo": "ppo", "timesteps": 5, "seed": 3, "out": tmp_path, "resume": True, "num_envs": 2}
    assert calls == [(("digits-mlp",), {**options, "device": "cpu", "mode": "eager"})]


def test_bench_passes_everything_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = spy(monkeypatch, "trimtab.agents.benchmark", "run_bench")
    argv = ["bench", "--policies", "cosine", "m:f", "--scenarios", "a", "b.yaml", "--runs", "4", "--out", str(tmp_path)]
    assert cli.main([*argv, "--tuned"]) == 0
    options = {"runs": 4, "seed": 0, "out": tmp_path, "tuned": True, "device": "cpu", "mode": "auto"}
    assert calls == [((["cosine", "m:f"], ["a", "b.yaml"]), options)]


@pytest.mark.parametrize(
    ("argv", "module", "function", "expected"),
    [
        (["export", "x.zip", "--out", "b", "--onnx"], "trimtab.agents.export", "run_export", ("x.zip", "b", True)),
        (["export", "x", "--out", "b"], "trimtab.agents.export", "run_export", ("x", "b", False)),
        (["inspect", "b"], "trimtab.policies.bundle", "describe", ("b",)),
        (["check", "b"], "trimtab.agents.check", "run_check", ("b",)),
    ],
)
def test_file_commands_print_what_they_get(
    argv: list[str],
    module: str,
    function: str,
    expected: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = spy(monkeypatch, module, function, "the answer")
    assert cli.main(argv) == 0
    assert calls == [(tuple(Path(x) if isinstance(x, str) else x for x in expected), {})]
    assert capsys.readouterr().out == "the answer\n"


def test_report_prints_what_it_gets_and_its_code_tells_of_broken_chains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for broken, code, said in (((), 0, ""), (("a: broken", "b: too"), 1, "trimtab: a: broken; b: too\n")):
        done = Reported(text="the answer", broken=broken)
        calls = spy(monkeypatch, "trimtab.agents.audit_report", "run_report", done)
        assert cli.main(["report", "a", "--against", "b", "--out", "p"]) == code
        assert calls == [((Path("a"), [Path("b")], Path("p")), {})]
        assert capsys.readouterr() == ("the answer\n", said)


TRAIN = ["train", "digits-mlp", "--out", "unused"]
BENCH = ["bench", "--policies", "cosine", "--scenarios", "digits-mlp", "--out", "unused"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "digits-mlp"], "the following arguments are required: --out; see: trimtab train --help"),
        ([*TRAIN, "--speed", "9"], "unrecognized arguments: --speed 9"),
        ([*TRAIN, "--timesteps", "many"], "invalid int value: 'many'"),
        ([*TRAIN, "--timesteps", "0"], "--timesteps is 0; it must be at least 1"),
        ([*TRAIN, "--num-envs", "-1"], "--num-envs is -1; it must be between 1 and 100000"),
        ([*TRAIN, "--seed", "-1"], "--seed is -1; it must be at least 0"),
        ([*TRAIN, "--mode", "fast"], "invalid choice: 'fast'"),
        ([*TRAIN, "--device", "cpuu"], "unknown device 'cpuu'; did you mean 'cpu'? allowed: cpu, cuda, cuda:0, mps"),
        ([*TRAIN, "--device", "cuda:4096"], "device 'cuda:4096' is not present on this machine; use 'cpu'"),
        ([*BENCH, "--runs", "0"], "--runs is 0; it must be between 1 and 1000000"),
        ([*BENCH, "--runs", "9" * 12], "--runs is 999999999999; it must be between 1 and 1000000"),
        ([*BENCH, "--seed", "-3"], "--seed is -3; it must be at least 0"),
        (
            ["list", "signal"],
            "unknown table 'signal'; did you mean 'signals'? allowed: scenarios, signals, measurements",
        ),
        (["check", ""], "argument BUNDLE_OR_CONFIG: it is an empty text; give a path; see: trimtab check --help"),
        (["inspect", ""], "argument BUNDLE: it is an empty text"),
        (["export", "", "--out", "b"], "argument DIR_OR_ZIP: it is an empty text"),
        (["export", "a", "--out", ""], "argument --out: it is an empty text"),
        (["report", "", "--out", "p"], "argument FILE: it is an empty text"),
        (["report", "a", "--against", "b", "", "--out", "p"], "argument --against: it is an empty text"),
        (["report", "a", "--out", ""], "argument --out: it is an empty text"),
        (["train", "digits-mlp", "--out", ""], "argument --out: it is an empty text; give a path; see: trimtab train"),
        (["train", "", "--out", "unused"], "unknown scenario ''; allowed: digits-mlp,"),
        (["bench", "--scenarios", "digits-mlp", "--out", ""], "argument --out: it is an empty text"),
        ([*BENCH, "--scenarios", ""], "unknown scenario ''; allowed: digits-mlp,"),
        ([*BENCH, "--policies", ""], "unknown policy ''; allowed: constant,"),
        (
            [*BENCH, "--policies", "../a.py:f"],
            "'../a.py:f' names a file, but objects are taken from modules; give 'a:f'",
        ),
        (
            [*BENCH, "--policies", "a.py:f"],
            "policy 'a.py:f' names a file, but objects are taken from modules; give 'a:f'",
        ),
        (["check", "no-such-thing"], "no file or folder 'no-such-thing'; give a bundle's folder"),
        (["check", __file__], "is neither a bundle nor a scenario; give a bundle's folder"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("trimtab: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


def test_user_errors_of_a_command_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spy(monkeypatch, "trimtab.policies.bundle", "describe", UnknownNameError("first\n  second"))
    assert cli.main(["inspect", "b"]) == 2
    assert capsys.readouterr().err == "trimtab: first second\n"


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spy(monkeypatch, "trimtab.policies.bundle", "describe", KeyboardInterrupt())
    assert cli.main(["inspect", "b"]) == 130
    assert capsys.readouterr().err == "trimtab: interrupted\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "out/a"), "'out/a': No space left on device"),
        (OSError("the archive is torn"), "the archive is torn"),
        (MemoryError(), "there is not enough memory for that many runs; take fewer"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "there is not enough memory for that many runs"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "there is not enough memory"),
    ],
    ids=repr,
)
def test_what_the_machine_refuses_is_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spy(monkeypatch, "trimtab.policies.bundle", "describe", error)
    assert cli.main(["inspect", "b"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"trimtab: {message}") and said.count("\n") == 1


@pytest.mark.parametrize("words", ["list signals", "check own.yaml"])
def test_a_reader_that_has_seen_enough_gets_no_traceback(words: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("id: own\nextends: digits-mlp\n")
    command = f"{sys.executable} -m trimtab {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_modules_of_the_working_folder_can_be_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as the console script leaves it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trimtab_own_task.py").write_text("def make():\n    raise KeyError('inside')\n")
    (tmp_path / "json.py").write_text("1 / 0")  # hides nothing
    (tmp_path / "own.yaml").write_text("id: own\nfamilies: ['trimtab_own_task:make']\n")
    assert cli.main(["check", "own.yaml"]) == 2
    assert capsys.readouterr().err == "trimtab: task family 'trimtab_own_task:make' raised KeyError: 'inside'\n"
    assert sys.path[-1] == str(tmp_path)


def test_a_network_that_cannot_be_stacked_is_refused_by_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trimtab_normed_task.py").write_text(
        "import numpy as np\nfrom torch import nn\nfrom trimtab.inner_training.tasks.arrays import ArrayTask\n"
        "def network():\n"
        "    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))\n"
        "def make():\n"
        "    return ArrayTask('normed', network, np.random.rand(80, 2), np.arange(80) % 2)\n"
    )
    (tmp_path / "own.yaml").write_text("id: own\nfamilies: ['trimtab_normed_task:make']\n")
    assert cli.main(["check", "own.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("trimtab: the module of 'normed' changes its buffer") and said.count("\n") == 1


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    spy(monkeypatch, "trimtab.policies.bundle", "describe", RuntimeError("a fault of trimtab"))
    with pytest.raises(RuntimeError, match="a fault of trimtab"):
        cli.main(["inspect", "b"])


@pytest.mark.parametrize("table", cli._TABLES)
def test_list_names_every_entry(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    module, attribute = cli._TABLES[table]
    entries = getattr(importlib.import_module(module), attribute)
    assert cli.main(["list", table]) == 0
    printed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert entries
    assert set(entries) <= printed
    for entry in entries.values():
        assert entry.doc and "\n" not in entry.doc


def test_the_list_of_signals_says_what_a_measured_one_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["list", "signals"]) == 0
    rows = {line.split()[0]: line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["loss_slope"].endswith("  host")
    assert rows["sharpness"].endswith("  a gradient, every 5 decisions")
    assert rows["energy"].endswith("two reads of a meter")
