"""Cost of a population against its number of runs, and against the number of parameters.

    python benchmarks/scaling.py [--out docs/results/scaling.json] [--png docs/results/scaling.png]

MLPs with two hidden layers learn digits with a batch of 64 and SGD with momentum, compiled, on one thread. Time is that
of the process, the best of several rounds. Memory is what the population holds between intervals, and the most that an
interval allocates on top. Where cost is linear, the time of an interval grows in proportion to what is varied: a slope
of 1 between logarithms, which is fitted over the upper half of the points, where fixed costs no longer show.

glibc gives blocks above 32 MiB back to the system at once, and getting them anew costs more than a step of ten million
parameters; ``--allocator keep`` starts the script again with settings that keep them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from speed.architectures import full_size
from speed.loops import INTERVAL, best, population_loop

from trimtab.inner_training.networks import MLP
from trimtab.inner_training.population import Population
from trimtab.inner_training.tasks.arrays import ArrayTask
from trimtab.inner_training.tasks.recipe import RecipeRange

INPUTS, CLASSES = 64, 10
RUNS = tuple(2**power for power in range(11))
PARAMETERS = (10**3, 10**4, 10**5, 10**6, 10**7)
FIXED_PARAMETERS, FIXED_RUNS = 10**4, 4
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}


@dataclass(frozen=True)
class Cost:
    """Cost of a population.

    Attributes:
        runs, parameters: its size; parameters are those of one run.
        seconds: of an interval of ten steps.
        held: bytes that it holds.
        on_top: most bytes that an interval allocates besides.
    """

    runs: int
    parameters: int
    seconds: float
    held: int
    on_top: int

    @property
    def run_steps_per_second(self) -> float:
        """Steps of all runs together, per second."""
        return self.runs * INTERVAL / self.seconds


def hidden_units(parameters: int) -> int:
    """Units of two equal hidden layers that give an MLP about so many parameters."""
    # h^2 + (inputs + classes + 2) h + classes = parameters
    half = (INPUTS + CLASSES + 2) / 2
    return max(1, round(math.sqrt(half**2 + parameters - CLASSES) - half))


def digits(parameters: int) -> ArrayTask:
    """The digits and an MLP of about so many parameters."""
    images, classes = load_digits(return_X_y=True)
    hidden = hidden_units(parameters)
    recipe = RecipeRange(kinds=("sgd-momentum",), batch=(64, 64))
    return ArrayTask(
        f"digits-{parameters}", lambda: MLP(INPUTS, hidden, CLASSES, depth=2), images / 16, classes, recipe=recipe
    )


def most_on_top(population: Population) -> int:
    """Most bytes that an interval allocates on top of what was held before it, as the profiler reports them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        population.advance(INTERVAL)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def cost(runs: int, parameters: int, mode: str, rounds: int, seconds: float) -> Cost:
    """Measures one population."""
    family = digits(parameters)
    population = Population(family, runs, rules=("sgd",), mode=mode, clip=False)
    population.reset(range(runs), full_size(family, runs, "sgd", 0.05))
    loop = population_loop(population)
    per_run_step = best({"population": loop}, rounds, time.process_time, seconds)["population"]
    interval = per_run_step * runs * INTERVAL
    return Cost(runs, population.parameter_count, interval, population.state_bytes(), most_on_top(population))


def slope(x: list[int], y: list[float]) -> float:
    """Slope of log y over log x by least squares, over the upper half of the points.

    >>> round(slope([1, 2, 4, 8], [5.0, 6.0, 8.0, 16.0]), 3)
    1.0
    """
    half = min(len(x) // 2, len(x) - 2)
    return float(np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)[0])


def draw(sweeps: dict[str, list[Cost]], path: Path) -> None:
    """Plots speed and memory of both sweeps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for (name, costs), column in zip(sweeps.items(), axes.T, strict=True):
        x = [getattr(one, name) for one in costs]
        speeds = np.log10([one.run_steps_per_second for one in costs])
        column[0].loglog(x, 10**speeds, "o-", color="#1f6f8b")
        column[0].set_ylim(10 ** np.floor(speeds.min()), 10 ** np.ceil(speeds.max()))
        column[0].set_ylabel("steps of all runs per second")
        for label, style, values in (
            ("held between intervals", "o-", [one.held for one in costs]),
            ("with what an interval allocates", "s--", [one.held + one.on_top for one in costs]),
        ):
            column[1].loglog(x, [value / 2**20 for value in values], style, label=label)
        column[1].set_ylabel("MiB")
        column[1].legend(frameon=False)
        other = "parameters" if name == "runs" else "runs"
        fixed = getattr(costs[0], other)
        column[0].set_title(f"{fixed:,} {other}{' per run' if name == 'runs' else ''}")
        column[1].set_xlabel("runs" if name == "runs" else "parameters per run")
        for axis in column:
            axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(costs: list[Cost], name: str) -> Table:
    """The table of one sweep, with its slopes in the title."""
    x = [getattr(one, name) for one in costs]
    time_slope = slope(x, [one.seconds for one in costs])
    memory_slope = slope(x, [float(one.held + one.on_top) for one in costs])
    title = f"against {name}: time grows with the power {time_slope:.2f}, memory with {memory_slope:.2f}"
    table = Table(title=title)
    for column in ("runs", "parameters", "us per run-step", "run-steps/s", "MiB held", "MiB on top"):
        table.add_column(column, justify="right")
    for one in costs:
        micros = one.seconds / (one.runs * INTERVAL) * 1e6
        mib = (f"{value / 2**20:.1f}" for value in (one.held, one.on_top))
        table.add_row(str(one.runs), f"{one.parameters:,}", f"{micros:.1f}", f"{one.run_steps_per_second:,.0f}", *mib)
    return table


def main() -> None:
    """Measures, prints both tables, writes JSON and draws if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=int, default=RUNS)
    parser.add_argument("--parameters", nargs="+", type=int, default=PARAMETERS)
    parser.add_argument("--mode", choices=("compile", "eager"), default="compile")
    parser.add_argument("--allocator", choices=("default", "keep"), default="default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="that one measurement takes at the least")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    if options.allocator == "keep" and not KEEP.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(1)
    how = (options.mode, options.rounds, options.seconds)
    sweeps = {
        "runs": [cost(runs, FIXED_PARAMETERS, *how) for runs in options.runs],
        "parameters": [cost(FIXED_RUNS, parameters, *how) for parameters in options.parameters],
    }
    for name, costs in sweeps.items():
        Console(width=120).print(show(costs, name))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        found = {name: [asdict(one) for one in costs] for name, costs in sweeps.items()}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.png:
        draw(sweeps, options.png)


if __name__ == "__main__":
    main()
