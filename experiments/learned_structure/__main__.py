"""Does a learned policy that moves structure and hyperparameters beat fixed rules of structure, at equal compute?

    python -m experiments.learned_structure --learned LABEL=BUNDLE [LABEL=BUNDLE ...] [--beside LABEL=POLICY ...] [--runs 64]
        [--families NAME ...] [--training] [--out FILE.json] [--page FILE.md]

Each rule plays every run at five sizes: a fixed width, growth in steps, growth that waits for newborns (`newborn-aware`), pruning in
steps and along a cubic, and `rewire`, which removes and grows as RigL does. Rules that grow and learned policies begin with a fifth of
the units, rules that prune with all of the instance's. By themselves rules leave the hyperparameters alone; `--beside` names policies that move
them besides. The height of a run is the mean of its ln validation loss over the budget. A rule is compared at the same mean work, between
its sizes by a straight line. All learning rates are the instances' own, drawn at random. `--training` plays instances of training.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments.learned_structure.arms import Arm, learned_arms, rule_arms
from experiments.learned_structure.measure import Played, at_equal_work, over_families
from experiments.pages import publish, span, table

from trimtab.agents.conditions import Conditions
from trimtab.agents.evaluate import Evaluator
from trimtab.envs.catalogue import SCENARIOS
from trimtab.errors import UserError

FAMILIES = ("tabular-mlp", "digits-mlp-tanh", "regression", "graph")


class Arena:
    """The same runs of one family for every arm.

    Args:
        family: its name.
        runs: how many.
        seed: of the instances.
        held_out: held-out instances, or those of training.
    """

    def __init__(self, family: str, runs: int, seed: int, held_out: bool) -> None:
        self._family, self._runs, self._seed, self._held_out = family, runs, seed, held_out
        self._evaluators: dict[float, Evaluator] = {}

    def play(self, arm: Arm) -> Played:
        """Every run under one arm."""
        if arm.start not in self._evaluators:
            base = SCENARIOS["growing-mix"]
            assert base.structure is not None
            scenario = base.replace(
                id=f"growing-{self._family}",
                families=[{"name": self._family}],
                structure={**base.structure.model_dump(), "start": arm.start},
            )
            self._evaluators[arm.start] = Evaluator(scenario, runs=self._runs, seed=self._seed, batch_of_runs=64)
        found = self._evaluators[arm.start].play(arm.policy, Conditions(held_out=self._held_out))
        return Played(np.asarray(found.measures["mean_active_work"]), np.asarray(found.trajectory))


def compared(played: Mapping[str, Mapping[str, Sequence[Played]]], learned: Sequence[str], seed: int) -> dict[str, Any]:
    """Differences by learned policy, rule and family, and over all families."""
    table: dict[str, Any] = {}
    for label in learned:
        rules = [name for name in next(iter(played.values())) if name not in learned]
        for rule in rules:
            rng, row, samples = np.random.default_rng(seed), {}, []
            for family, arms in played.items():
                difference, found = at_equal_work(arms[label][0], arms[rule], rng)
                row[family] = vars(difference)
                samples.append(found)
            estimate, low, high = over_families(samples)
            row["all"] = {"estimate": estimate, "low": low, "high": high}
            table.setdefault(label, {})[rule] = row
    return table


def tables_of(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """The lines of the tables of docs/learned_structure.md: the differences, and what each arm did."""
    families = list(content["played"])
    titles = [f"`{one}`" for one in families]
    found = {}
    for label, rules in content["differences"].items():
        rows = [[rule, *(_difference(row[one]) for one in (*families, "all"))] for rule, row in rules.items()]
        found[label] = table([f"`{label}` minus", *titles, "all"], rows)
    rows = []
    for name, sizes in content["played"][families[0]].items():
        for place, size in enumerate(sizes):
            cells = [content["played"][one][name][place] for one in families]
            text = [f"{cell['height']:.2f} ({cell['work']:.2f})" for cell in cells]
            rows.append([name, "" if size["level"] is None else str(size["level"]), *text])
    return {**found, "played": table(["height (work)", "size", *titles], rows)}


def _difference(row: Mapping[str, Any]) -> str:
    star = "" if row.get("within", True) else " *"
    return span([row[name] for name in ("estimate", "low", "high")]) + star


def main() -> None:
    """Plays everything, prints the tables, and keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learned", nargs="+", required=True, metavar="LABEL=BUNDLE")
    parser.add_argument("--beside", nargs="+", default=[], metavar="LABEL=POLICY")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="page whose tables are made anew")
    options = parser.parse_args()
    if wrong := [one for one in (*options.learned, *options.beside) if "=" not in one]:
        raise UserError(f"{wrong[0]!r} has no label; give LABEL=POLICY")
    torch.set_num_threads(1)
    bundles = dict(one.split("=", 1) for one in options.learned)
    beside = dict(one.split("=", 1) for one in options.beside)
    arms = [*learned_arms(bundles), *rule_arms(None)]
    arms += [arm for label, path in beside.items() for arm in rule_arms(path, label)]
    played: dict[str, dict[str, list[Played]]] = {}
    for family in options.families:
        arena = Arena(family, options.runs, options.seed, not options.training)
        for arm in arms:
            found = arena.play(arm)
            played.setdefault(family, {}).setdefault(arm.name, []).append(found)
            print(
                f"{family}  {arm.name} {arm.level}: {found.height.mean():+.3f} at {found.work.mean():.2f}", flush=True
            )
    levels: dict[str, list[float | None]] = {}
    for arm in arms:
        levels.setdefault(arm.name, []).append(None if np.isnan(arm.level) else arm.level)
    content = {
        "runs": options.runs,
        "seed": options.seed,
        "held_out": not options.training,
        "differences": compared(played, list(bundles), options.seed),
        "played": {
            family: {
                name: [
                    {"level": level, "height": float(one.height.mean()), "work": float(one.work.mean())}
                    for level, one in zip(levels[name], sizes, strict=True)
                ]
                for name, sizes in found.items()
            }
            for family, found in played.items()
        },
    }
    publish(content, tables_of(content), options.out, options.page)


if __name__ == "__main__":
    main()
