"""The command line: reads arguments, then imports what one command needs, and no more.

Bad input ends with exit code 2 and one line on standard error; an audit whose chain is broken with 1; an interrupt with 130.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from trimtab.errors import UserError, out_of_range, unknown
from trimtab.printing import printable, printable_lines

MOST_ENVS, MOST_RUNS = 100_000, 1_000_000  # more is a slip of the keyboard, and would fill the memory before it failed

# What `trimtab list` can show -> (module, its mapping name -> entry with a one-line `.doc`).
_TABLES = {
    "scenarios": ("trimtab.envs.catalogue", "SCENARIOS"),
    "signals": ("trimtab.inner_training.signals", "SIGNALS"),
    "measurements": ("trimtab.inner_training.measurements", "MEASUREMENTS"),
    "levers": ("trimtab.inner_training.levers", "LEVERS"),
    "edits": ("trimtab.inner_training.edits", "EDITS"),
    "rules": ("trimtab.policies.rules", "RULES"),
    "blocks": ("trimtab.policies.rules.blocks", "BLOCKS"),
    "rewards": ("trimtab.envs.rewards", "TERMS"),
    "disturbances": ("trimtab.inner_training.disturbances", "DISTURBANCES"),
    "update-rules": ("trimtab.inner_training.update_rules", "UPDATE_RULES"),
    "criteria": ("trimtab.inner_training.structure.criteria", "CRITERIA"),
    "growth": ("trimtab.inner_training.structure.growth", "GROWTH"),
    "maintenance": ("trimtab.inner_training.structure.maintenance", "MAINTENANCE"),
    "sparse": ("trimtab.inner_training.structure.sparse_methods", "SPARSE_TRAINING"),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`s, so that they too end in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see: {self.prog} --help")


def _within(low: int, high: int | None = None, **values: int) -> None:
    for name, value in values.items():
        if value < low or (high is not None and value > high):
            raise out_of_range("--" + name.replace("_", "-"), value, low, high)


def _train(args: argparse.Namespace) -> None:
    _within(1, timesteps=args.timesteps)
    _within(1, MOST_ENVS, num_envs=args.num_envs)
    _within(0, seed=args.seed)
    from trimtab.agents.train import run_train
    from trimtab.inner_training.device import check_device

    check_device(args.device)
    run_train(
        args.scenario,
        algo=args.algo,
        timesteps=args.timesteps,
        seed=args.seed,
        out=args.out,
        resume=args.resume,
        num_envs=args.num_envs,
        device=args.device,
        mode=args.mode,
    )


def _bench(args: argparse.Namespace) -> None:
    _within(1, MOST_RUNS, runs=args.runs)
    _within(0, seed=args.seed)
    from trimtab.agents.benchmark import run_bench
    from trimtab.inner_training.device import check_device

    check_device(args.device)
    run_bench(
        args.policies,
        args.scenarios,
        runs=args.runs,
        seed=args.seed,
        out=args.out,
        tuned=args.tuned,
        device=args.device,
        mode=args.mode,
    )


def _export(args: argparse.Namespace) -> None:
    from trimtab.agents.export import run_export

    print(printable(run_export(args.source, args.out, args.onnx)))


def _inspect(args: argparse.Namespace) -> None:
    from trimtab.policies.bundle import describe

    print(printable_lines(describe(args.bundle)))


def _check(args: argparse.Namespace) -> None:
    from trimtab.agents.check import run_check

    print(printable_lines(run_check(args.path)))


def _report(args: argparse.Namespace) -> int:
    from trimtab.agents.audit_report import run_report

    done = run_report(args.file, args.against, args.out)
    print(printable_lines(done.text), flush=True)
    return _tell("; ".join(done.broken), 1) if done.broken else 0


def _list(args: argparse.Namespace) -> None:
    if args.table not in _TABLES:
        raise unknown("table", args.table, _TABLES)
    module, attribute = _TABLES[args.table]
    entries: Mapping[str, Any] = getattr(importlib.import_module(module), attribute)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column(args.table, no_wrap=True)
    table.add_column("what it is")
    costs = {name: Text(_cost(entry)) for name, entry in entries.items() if hasattr(entry, "cost")}
    if costs:
        table.add_column("cost")
    for name, entry in entries.items():
        table.add_row(Text(name), Text(entry.doc), costs.get(name, Text()))
    Console().print(table)


def _cost(entry: Any) -> str:
    """What an entry costs; of a signal that needs a measurement, what this one does."""
    from trimtab.inner_training.measurements import MEASUREMENTS, PROBE_EVERY

    needed = [f"{MEASUREMENTS[name].cost}, every {PROBE_EVERY} decisions" for name in getattr(entry, "needs", ())]
    return "; ".join(needed) or str(entry.cost)


def _path(given: str) -> Path:
    """A path; an empty text is none, though ``Path`` would make the working folder of it."""
    if not given:
        raise argparse.ArgumentTypeError("it is an empty text; give a path")
    return Path(given)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of everything random (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps (default: cpu)")
    parser.add_argument(
        "--mode",
        choices=("auto", "compile", "eager"),
        default="auto",
        help="how inner runs step: compiled, eager, or compiled where a compiler is present (default: auto)",
    )


def _add_train(commands: Any) -> None:
    parser = commands.add_parser("train", help="train a policy on a scenario")
    parser.add_argument("scenario", metavar="SCENARIO|FILE.yaml", help="a scenario's id, or a scenario in a file")
    parser.add_argument("--algo", default="ppo", help="ppo, or recurrent-ppo (default: ppo)")
    parser.add_argument(
        "--timesteps", type=int, default=200_000, metavar="N", help="environment steps in all (default: 200000)"
    )
    parser.add_argument("--num-envs", type=int, default=64, metavar="N", help="runs side by side (default: 64)")
    parser.add_argument("--out", type=_path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    _add_machine(parser)
    parser.set_defaults(command=_train)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="compare policies on tasks that none of them has seen")
    parser.add_argument(
        "--policies",
        nargs="+",
        default=[],
        metavar="NAME|BUNDLE|module:object",
        help="rules by name, bundles by path, or your own factories (default: every rule, and the default policy)",
    )
    parser.add_argument("--scenarios", nargs="+", required=True, metavar="S", help="ids or YAML files")
    parser.add_argument("--runs", type=int, default=64, metavar="N", help="runs per scenario (default: 64)")
    parser.add_argument("--tuned", action="store_true", help="add the rules tuned globally, and the oracle per task")
    parser.add_argument("--out", type=_path, required=True, metavar="DIR", help="folder for the results")
    _add_machine(parser)
    parser.set_defaults(command=_bench)


def _add_files(commands: Any) -> None:
    parser = commands.add_parser("export", help="turn a trained agent into a bundle")
    parser.add_argument("source", type=_path, metavar="DIR_OR_ZIP", help="the --out folder of train, or a checkpoint")
    parser.add_argument("--out", type=_path, required=True, metavar="BUNDLE", help="folder for the bundle")
    parser.add_argument("--onnx", action="store_true", help="also write policy.onnx (needs the extra 'onnx')")
    parser.set_defaults(command=_export)

    parser = commands.add_parser("inspect", help="say what a bundle holds")
    parser.add_argument("bundle", type=_path, metavar="BUNDLE")
    parser.set_defaults(command=_inspect)

    parser = commands.add_parser("check", help="verify a bundle, or a scenario's YAML file")
    parser.add_argument("path", type=_path, metavar="BUNDLE_OR_CONFIG")
    parser.set_defaults(command=_check)

    parser = commands.add_parser("report", help="draw the audit of a run as a page")
    parser.add_argument("file", type=_path, metavar="FILE", help="an audit, as attach(audit=...) wrote it")
    parser.add_argument(
        "--against", type=_path, nargs="+", default=[], metavar="FILE", help="audits of another project"
    )
    parser.add_argument("--out", type=_path, required=True, metavar="report.html", help="the page")
    parser.set_defaults(command=_report)

    parser = commands.add_parser("list", help="list what is built in")
    parser.add_argument("table", metavar="|".join(_TABLES))
    parser.set_defaults(command=_list)


class _Version(argparse.Action):
    """Prints the version; looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import trimtab

        print(f"trimtab {trimtab.__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line; parsing sets `command` to the function to call."""
    parser = _Parser(prog="trimtab", description="A learned controller for neural-network training.")
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_bench(commands)
    _add_files(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; None takes those of the process.

    Returns:
        The exit code: 0 done, 1 done but an audit is not as it was written, or nobody reads the output any more, 2 bad
        input, 130 interrupted.

    Raises:
        SystemExit: with code 0, after `--help` and `--version`.
    """
    _import_from_here()
    _prepare_output()
    try:
        args = build_parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int | None] = args.command
        code = command(args) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        sys.stdout = _nowhere()
        return 1
    except UserError as error:
        return _tell(str(error), 2)
    except OSError as error:  # a disk that is full, a folder that may not be written
        try:
            sys.stdout.flush()
        except OSError:  # what is still in the buffer would fail once more at exit
            sys.stdout = _nowhere()
        where = f"{error.filename!r}: " if error.filename is not None else ""
        return _tell(f"{where}{error.strerror or error}", 2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        return _tell("there is not enough memory for that many runs; take fewer with --num-envs or --runs", 2)
    except KeyboardInterrupt:
        print("trimtab: interrupted", file=sys.stderr)
        return 130
    return code


def _tell(message: str, code: int) -> int:
    print(f"trimtab: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _nowhere() -> TextIO:
    """Output that is thrown away; Python would complain at exit of one that it cannot flush."""
    return open(os.devnull, "w")


def _prepare_output() -> None:
    """Makes sure that there is output, which a process may be started without, and that it takes every character."""
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _import_from_here() -> None:
    """Lets ``module:object`` name a file of the working folder; last, so that it hides no installed module."""
    with contextlib.suppress(FileNotFoundError):  # the folder was deleted under our feet
        here = os.getcwd()
        if not {"", here} & set(sys.path):
            sys.path.append(here)
