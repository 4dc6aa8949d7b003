"""What signals add to the cost of a population's steps and decisions.

    python benchmarks/signals.py [--families digits-mlp graph] [--runs 64] [--rounds 10] [--no-hessian]

One population of each family takes decisions of ten steps, a validation loss and one transfer. The ways to observe it
differ in their signals alone: none that is computed, those that scenarios observe unasked, each further measurement by
itself at its default interval, and all. Ways alternate within one process, each between two turns of the first one,
because timings on shared machines wander: the figure is the median over rounds of its time over theirs. Time is that
of the processor, so that other programs count little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from trimtab.envs.catalogue import SCENARIOS
from trimtab.envs.scenario import DEFAULT_LEVERS, default_signals
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.levers import resolve_levers
from trimtab.inner_training.measurements import MEASUREMENTS, PROBE_EVERY, needs_of
from trimtab.inner_training.population import Population
from trimtab.inner_training.signals import SIGNALS, resolve_signals
from trimtab.inner_training.steering import Steering
from trimtab.inner_training.tasks import resolve_family

INTERVAL, VAL_EXAMPLES = 10, 128
HESSIAN = ("curvature_max", "curvature_trace")  # only for who asks for them by name


def ways() -> dict[str, tuple[str, ...]]:
    """Names of the signals of each way to observe."""
    nothing, host = ("started",), tuple(name for name, signal in SIGNALS.items() if not signal.needs)
    by_need = {need: tuple(name for name, one in SIGNALS.items() if need in one.needs) for need in MEASUREMENTS}
    return {
        "no signals": nothing,
        "signals observed by default": default_signals(DEFAULT_LEVERS),
        "signals of variety-mix": SCENARIOS["variety-mix"].signals,
        "all on the host": host,
        **{f"measurement {need}": (*nothing, *names) for need, names in by_need.items()},
        "all but the Hessian's": tuple(name for name, one in SIGNALS.items() if not set(HESSIAN) & set(one.needs)),
        "all": tuple(SIGNALS),
    }


class Watched:
    """A population and one way to observe it."""

    def __init__(self, population: Population, signals: tuple[str, ...]) -> None:
        self.population = population
        self.steering = Steering(
            resolve_levers(DEFAULT_LEVERS), resolve_signals(signals), GuardConfig(), population.num_runs
        )
        self.steering.reset(np.ones(population.num_runs, dtype=bool), population.base)

    def seconds(self) -> float:
        """Seconds per decision, over as many as lie from one measurement to the next."""
        population, steering = self.population, self.steering
        population.measure(needs_of(steering.signals))
        start = time.process_time()
        for _ in range(PROBE_EVERY):
            measured = population.advance(INTERVAL).to_host()
            val_loss = population.evaluate("validation", VAL_EXAMPLES).double().cpu().numpy()
            reading = population.reading(measured, val_loss)
            steering.assess(reading)
            steering.observe(reading)
        return (time.process_time() - start) / PROBE_EVERY


def measure(name: str, runs: int, rounds: int, *, hessian: bool) -> list[dict[str, object]]:
    """One row per way; those that multiply with the Hessian take most of the time."""
    family = resolve_family(name)
    population = Population(family, runs, mode="compile")
    population.reset(range(runs), [family.draw(seed, held_out=False) for seed in range(runs)])
    chosen = {
        way: one for way, one in ways().items() if hessian or not set(HESSIAN) & {*needs_of(resolve_signals(one))}
    }
    watched = {way: Watched(population, signals) for way, signals in chosen.items()}
    first, *others = watched
    for one in watched.values():
        one.seconds()
    seconds: dict[str, list[float]] = {way: [] for way in watched}
    ratios: dict[str, list[float]] = {way: [] for way in others}
    for _ in range(rounds):
        seconds[first].append(watched[first].seconds())
        for way in others:
            seconds[way].append(watched[way].seconds())
            before = seconds[first][-1]
            seconds[first].append(watched[first].seconds())
            ratios[way].append(2 * seconds[way][-1] / (before + seconds[first][-1]))
    return [
        {
            "family": name,
            "way": way,
            "signals": len(one.steering.signals),
            "ms_per_decision": round(1e3 * min(seconds[way]), 3),
            "added_percent": round(100 * (statistics.median(ratios[way]) - 1), 1) if way in ratios else 0.0,
        }
        for way, one in watched.items()
    ]


def main() -> None:
    """Measures, prints a table for each family, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["digits-mlp", "graph"])
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-hessian", action="store_true", help="leave out what is measured on request only")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.families:
        rows += (found := measure(name, options.runs, options.rounds, hessian=not options.no_hessian))
        table = Table(title=f"{name}, {options.runs} runs, {options.threads} thread(s), decisions of {INTERVAL} steps")
        for column in ("way", "signals", "ms per decision", "added"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for row in found:
            table.add_row(
                str(row["way"]), str(row["signals"]), str(row["ms_per_decision"]), f"{row['added_percent']} %"
            )
        Console().print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"threads": options.threads, "runs": options.runs, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
