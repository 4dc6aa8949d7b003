"""Fault table: faults of every kind befall runs; who recovers, how soon, and at what cost?

    python -m experiments.faults [--families NAME ...] [--policies NAME ...] [--runs 100] [--seed 0] [--training]
        [--studies faults shifts sequences] [--keep DIR] [--out FILE.json] [--page FILE.md] [--png FILE.png]

Every run of a family has the same budget, and the learning rate that is best for instances of training. One fault befalls it
between 20 and 60 % of its budget, as long and as severe as the kind's own ranges have it (docs/disturbances.md). The same
runs, with the same data in the same order, are played undisturbed, and with a *perfect rollback*: the moment before the fault
comes back when it is over, so that nothing but its steps is lost. `--keep` holds what has been played, so that an interrupted
study goes on. `--training` plays instances of training, for whoever changes the guard or a rule.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments.faults import measure
from experiments.faults.figure import draw
from experiments.faults.measure import Outcome
from experiments.faults.page import LEGEND, cells, tables_of
from experiments.faults.studies import (
    FAMILIES,
    POLICIES,
    SEQUENCES,
    SHIFTING,
    TRANSIENT,
    Faults,
    Setting,
    faults,
    forgetting,
    shifts,
)
from experiments.pages import filled
from rich.console import Console
from rich.table import Table

from trimtab.inner_training.disturbances import DISTURBANCES

STUDIES = ("faults", "shifts", "sequences")
WIDE = 150


def rows_of(found: dict[str, Faults], seed: int) -> dict[str, Any]:
    """Figures by family and kind, over all transient kinds, and of runs to which nothing happens."""
    policies = list(next(iter(found.values())).outcomes)

    def joined(families: list[str], kinds: tuple[str, ...], policy: str) -> Outcome:
        return Outcome.joined([found[one].outcomes[policy][kind] for one in families for kind in kinds])

    groups = {"all": list(found), **{name: [name] for name in found}}
    return {
        "transient": {
            group: {policy: measure.figures(joined(names, TRANSIENT, policy), seed) for policy in policies}
            for group, names in groups.items()
        },
        "kinds": {
            group: {
                kind: {policy: measure.figures(joined(names, (kind,), policy), seed) for policy in policies}
                for kind in DISTURBANCES
                if len(joined(names, (kind,), policies[0]).recovered)  # none may end in time in a very short study
            }
            for group, names in groups.items()
        },
        "calm": {
            name: {
                policy: {
                    "minus_bare": measure.compared(one.calm[policy], np.zeros_like(one.calm[policy]), seed),
                    "rollbacks": round(float(one.calm_rollbacks[policy].mean()), 2),
                }
                for policy in policies
            }
            for name, one in found.items()
        },
    }


def show(console: Console, result: dict[str, Any]) -> None:
    """Prints the main table, and the others as they stand on the page."""
    if "transient" in result:
        table = Table(*LEGEND, title=f"transient faults, {result['runs']} of each kind in each family")
        for policy, row in result["transient"]["all"].items():
            table.add_row(policy, *cells(row))
        console.print(table)
    for name, lines in tables_of(result).items():
        if name != "summary":
            console.print(f"\n{name}", *lines, sep="\n", markup=False, highlight=False, soft_wrap=True)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--sequences", nargs="+", default=list(SEQUENCES), metavar="NAME")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), metavar="NAME")
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", action="store_true", help="instances of training in place of held-out ones")
    parser.add_argument("--keep", type=Path, help="folder for what has been played")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--page", type=Path, help="page whose tables are made anew")
    parser.add_argument("--png", type=Path, help="picture of what becomes of runs after a fault")
    return parser.parse_args()


def main() -> None:
    """Plays, prints and writes."""
    options = parsed()
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    policies = tuple(options.policies)
    setting = Setting(
        runs=options.runs, seed=options.seed, held_out=not options.training, policies=policies, keep=options.keep
    )
    result: dict[str, Any] = {"runs": setting.runs, "seed": setting.seed, "held_out": setting.held_out}
    if "faults" in options.studies:
        found, result["families"] = {}, {}
        for name in options.families:
            found[name], result["families"][name] = faults(name, setting)
        result |= rows_of(found, setting.seed)
        if options.png:
            draw(found, options.png)
    if "shifts" in options.studies:
        result["shifts"] = {name: shifts(name, setting) for name in (options.families[0], SHIFTING)}
    if "sequences" in options.studies:
        result["sequences"] = {name: forgetting(name, setting) for name in options.sequences}
    show(console, result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=None, separators=(",", ":")) + "\n")
    if options.page:
        options.page.write_text(filled(options.page.read_text(), tables_of(result)))


if __name__ == "__main__":
    main()
