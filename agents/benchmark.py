"""`trimtab bench`: every policy on the same instances, as a table, files and a page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from trimtab.agents.contestants import Competition, Contestant, count_evaluations, make_contestants
from trimtab.agents.evaluate import Evaluator, check_fits, fitting_policy
from trimtab.agents.files import write_atomically
from trimtab.agents.report_page import COLUMNS, cells, draw_figure, measure, notes, to_html
from trimtab.agents.results import ScenarioResult, summarise, to_csv, to_json
from trimtab.envs.scenario import Scenario, load_scenario
from trimtab.errors import ConfigError, MismatchError, OutputExistsError, UserError
from trimtab.inner_training.stepping import Mode
from trimtab.policies.names import rules
from trimtab.policies.registry import DEFAULT, DEFAULT_BUNDLE

WIDE = 165  # characters that the whole table takes
NARROW_COLUMNS = ("policy", "final loss", "minus reference", "better", "diverged")


def run_bench(
    policies: Sequence[str],
    scenarios: Sequence[str | Path],
    *,
    runs: int = 64,
    seed: int = 0,
    out: str | Path,
    tuned: bool = False,
    device: str = "cpu",
    mode: Mode = "auto",
) -> tuple[ScenarioResult, ...]:
    """Compares policies on held-out instances; everything is checked before anything is computed.

    Writes ``results.json`` and ``results.csv`` after each scenario, and at the end ``report.html`` and, where matplotlib
    is installed, ``figure.png``.

    Args:
        policies: what ``load_policy`` takes, each optionally with ``@tuned`` or ``@oracle`` behind it; empty is every
            rule and the policy that comes with trimtab.
        scenarios: ids or paths of YAML files.
        runs: instances of each scenario, >= 1.
        seed: of the instances and of the resampling, >= 0.
        out: folder for the results; it must not exist or be empty.
        tuned: add constant and cosine with a tuned learning rate, and the oracle of each.
        device, mode: as for ``Population``.

    Returns:
        One result for each scenario, as written.

    Raises:
        UserError: an unknown name, a number out of range, a policy that does not fit, or a folder that is not empty.
    """
    places = [load_scenario(scenario) for scenario in scenarios]
    _check_scenarios(places)
    names = tuple(policies) or _default_policies(places)
    fields = [make_contestants(names, place, tuned=tuned) for place in places]
    evaluators = [Evaluator(place, runs=runs, seed=seed, device=device, mode=mode) for place in places]
    options = {"runs": runs, "seed": seed, "device": device, "mode": mode, "out": out}
    about = {
        "command": _command(names, scenarios, tuned, options),
        **{name: options[name] for name in ("runs", "seed", "device", "mode")},
        "sources": {one.label: one.source for one in fields[0]},
        "provenance": {one.label: one.provenance for one in fields[0] if one.learned},
    }
    folder = _empty_folder(Path(out))
    results: tuple[ScenarioResult, ...] = ()
    for result in _compete(fields, evaluators):
        results = (*results, result)
        _write_numbers(folder, results, about)  # an interruption keeps the scenarios that are finished
    _write_report(folder, results, about)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)  # a file or a pipe has no width of its own
    for result in results:
        print_table(result, console)
    console.print(Text(f"report: {folder / 'report.html'}"), soft_wrap=True)
    return results


def _compete(fields: Sequence[Sequence[Contestant]], evaluators: Sequence[Evaluator]) -> Iterator[ScenarioResult]:
    total = sum(count_evaluations(field) * one.runs for field, one in zip(fields, evaluators, strict=True))
    with Watch(total) as watch:
        for contestants, evaluator in zip(fields, evaluators, strict=True):
            evaluator.tick = watch.tick
            scenario, competition, entries = evaluator.scenario, Competition(evaluator), []
            for contestant in contestants:
                watch.say(f"{scenario.id}: {contestant.label}")
                entries.append(competition.play(contestant))
            yield summarise(entries, scenario.id, scenario.model_dump(mode="json"), evaluator.seed)


def _default_policies(scenarios: Sequence[Scenario]) -> tuple[str, ...]:
    """Every rule and the policy that comes with trimtab, where they fit the scenarios; nobody asked for them by name."""
    candidates = (*([DEFAULT] if DEFAULT_BUNDLE.exists() else []), *rules())
    fitting = []
    for name in candidates:
        try:
            for scenario in scenarios:
                check_fits(fitting_policy(name, scenario), scenario)
            fitting.append(name)
        except MismatchError as error:
            Console(stderr=True).print(Text(f"without {name}: {error}"), soft_wrap=True)
    return tuple(fitting)


def _check_scenarios(scenarios: Sequence[Scenario]) -> None:
    if not scenarios:
        raise UserError("no scenario is given; see: trimtab list scenarios")
    ids = [scenario.id for scenario in scenarios]
    for one in ids:
        if ids.count(one) > 1:
            raise ConfigError(f"scenario {one!r} is given twice; name each one once")


def _empty_folder(out: Path) -> Path:
    """Makes the folder now, so that a run that could not be written is not computed first."""
    if out.is_file():
        raise OutputExistsError(f"--out {str(out)!r} is a file; give a new folder")
    if out.is_dir() and any(out.iterdir()):
        held = "another run's results" if (out / "results.json").exists() else "files"
        raise OutputExistsError(f"folder {str(out)!r} already holds {held}; give --out a new folder, or empty this one")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make folder {str(out)!r}: {error.strerror}; give --out another place") from error
    return out


def _command(names: Sequence[str], scenarios: Sequence[str | Path], tuned: bool, options: Mapping[str, Any]) -> str:
    """The command line that repeats the run."""
    words = ["trimtab", "bench", "--policies", *names, "--scenarios", *map(str, scenarios)]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return shlex.join([*words, *(["--tuned"] if tuned else [])])


class Watch:
    """How far a benchmark is: a live bar on a terminal, one line for each contestant elsewhere.

    Args:
        total: runs to come.
    """

    def __init__(self, total: int) -> None:
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
        self._task = self._bar.add_task("bench", total=total)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def tick(self, ended: int) -> None:
        """So many runs have just ended."""
        self._bar.advance(self._task, ended)

    def say(self, what: str) -> None:
        """Says what comes next."""
        self._bar.update(self._task, description=what)
        if not self._console.is_terminal:
            self._console.print(what, markup=False, highlight=False, soft_wrap=True)


def _write_numbers(folder: Path, results: Sequence[ScenarioResult], about: Mapping[str, Any]) -> None:
    write_atomically(folder / "results.csv", to_csv(results))
    write_atomically(folder / "results.json", to_json(results, about))


def _write_report(folder: Path, results: Sequence[ScenarioResult], about: Mapping[str, Any]) -> None:
    figure = draw_figure(results)
    if figure is not None:
        write_atomically(folder / "figure.png", figure)
    write_atomically(folder / "report.html", to_html(results, about["command"], figure))


def _measures_table(result: ScenarioResult) -> Table:
    """Interquartile means of what a scenario measures beside losses; the order is that of the other table."""
    names = tuple(result.summaries[0].measures)
    table = Table(title=f"{result.scenario}: further measures", title_justify="left", box=None, pad_edge=False)
    for name in ("policy", *names):
        table.add_column(name.replace("_", " "), justify="left" if name == "policy" else "right", no_wrap=True)
    for row in result.summaries:
        table.add_row(row.label, *(measure(row, name) for name in names), style="bold yellow" if row.learned else "")
    return table


def print_table(result: ScenarioResult, console: Console) -> None:
    """Prints one scenario's table, best first.

    Args:
        result: what to print.
        console: where to; a narrow one gets the columns that matter most.
    """
    narrow = console.width < WIDE
    wanted = NARROW_COLUMNS if narrow else tuple(COLUMNS)
    table = Table(title=result.scenario, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in wanted:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in result.summaries:
        text = cells(row, result.reference, digits=2 if narrow else 3)
        table.add_row(*(Text(text[name]) for name in wanted), style="bold yellow" if row.learned else "")
    console.print(table)
    for note in notes(result):
        console.print(Text(note, style="dim"), soft_wrap=True)
    if any(row.measures for row in result.summaries):
        console.print(_measures_table(result))
    console.print()
