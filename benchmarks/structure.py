"""What edits and scores of a population's units cost beside its steps.

    python benchmarks/structure.py [--archs mlp-sgd transformer] [--runs 64] [--mode compile] [--out results/structure.json]

Two claims are held to: a structure adds at most a tenth to a step, as an inactive unit needs no mask; and an edit costs less
than one training step of each run. An edit is a scoring by activation times gradient on a batch and a removal, or growth by
pairs. It is given as a share of one plain PyTorch step of as many runs, and of a step of the population itself. Everything is
measured in one process, the best of several alternating rounds, by process time: timings on shared machines wander.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from speed.architectures import ARCHITECTURES, family_of, full_size
from speed.loops import INTERVAL, plain_loop

from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.structure.stacked_edit import StackedEdit

EXAMPLES = 16  # of a batch, for the cheaper scoring
STEP_LIMIT, EDIT_LIMIT = 1.1, 1.0
SHARES = ("score and prune", "the same of 16 examples", "grow by pairs", "diagnostics")


def quickest(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Smallest seconds of each piece of work, in alternating rounds after a warm-up; edits are undone off the clock."""
    found = dict.fromkeys(works, float("inf"))
    for place in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            made = work()
            taken = time.process_time() - start
            if place:
                found[name] = min(found[name], taken)
            if isinstance(made, StackedEdit):
                made.undo()
    return found


def measure(name: str, runs: int, mode: str, rounds: int) -> dict[str, object]:
    """One row of the table."""
    architecture = ARCHITECTURES[name]
    family = family_of(architecture)
    instances = full_size(family, runs, architecture.rule, architecture.lr)
    bare, populated = (
        Population(family, runs, rules=(architecture.rule,), mode="compile" if mode == "compile" else "eager")
        for _ in range(2)
    )
    for population in (bare, populated):
        population.reset(range(runs), instances)
    structure, plain = Stacked(populated), plain_loop(architecture, family, instances[0])
    structure.prune(0.3, structure.score("random"))
    few = min(EXAMPLES, family.max_batch)
    seconds = quickest(
        {
            "plain": lambda: plain.run(1),
            "bare": lambda: bare.advance(INTERVAL),
            "with": lambda: populated.advance(INTERVAL),
            "score and prune": lambda: structure.prune(0.1, structure.score("agf")),
            "the same of 16 examples": lambda: structure.prune(0.1, structure.score("agf", examples=few)),
            "grow by pairs": lambda: structure.grow(0.1, "pairing"),
            "diagnostics": structure.diagnostics,
        },
        rounds,
    )
    plain_step, step = seconds["plain"] / INTERVAL * runs, seconds["bare"] / INTERVAL
    return {
        "architecture": name,
        "mode": populated.mode,
        "step with / without": round(seconds["with"] / seconds["bare"], 3),
        "us per run-step": round(step / runs * 1e6, 1),
        **{f"{one} / plain step": round(seconds[one] / plain_step, 3) for one in SHARES},
        **{f"{one} / own step": round(seconds[one] / step, 2) for one in SHARES},
    }


def show(rows: list[dict[str, object]]) -> Table:
    """The table, architectures as columns."""
    table = Table(title="an edit of all runs over one step of all runs")
    table.add_column("")
    for row in rows:
        table.add_column(f"{row['architecture']}\n{row['mode']}", justify="right")
    for key in [key for key in rows[0] if key not in ("architecture", "mode")]:
        table.add_row(key, *(str(row[key]) for row in rows))
    return table


def main() -> None:
    """Measures, prints the table, and writes JSON if asked; exits with 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mode", choices=("compile", "eager"), default="compile")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, given.runs, given.mode, given.rounds) for name in given.archs]
    Console(width=max(80, 32 + 14 * len(rows))).print(show(rows))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(rows, indent=1) + "\n")
    edits = [f"{one} / plain step" for one in SHARES]
    late = [row["architecture"] for row in rows if float(str(row["step with / without"])) > STEP_LIMIT]
    late += [row["architecture"] for row in rows if max(float(str(row[one])) for one in edits) > EDIT_LIMIT]
    if late:
        print(f"more than was claimed: {', '.join(map(str, late))}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
