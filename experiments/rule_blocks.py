"""Which block of a rule earns its place? From no rule over a careful one to everything on, one block at a time.

    python experiments/rule_blocks.py ladder [--runs 64] [--scenarios NAME ...] [--out FILE.json]
    python experiments/rule_blocks.py alone [...]
    python experiments/rule_blocks.py calibrate [--blocks NAME ...] [...]

`ladder` adds one block after another and compares each rung with the one before. `alone` compares each block with doing
nothing; a block that follows the shared state comes with those that set it. Both play held-out instances. `calibrate` plays
values of each block's main options on instances of training only, and chooses the value with the lowest mean over the
scenarios; beside it is the value that would be chosen without each scenario in turn.

Figures are paired differences of the final ln test loss, with 95% bootstrap intervals; below 0 the block helps. Blocks of
levers that a scenario does not have are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.agents.conditions import Conditions
from trimtab.agents.evaluate import Evaluator
from trimtab.agents.evaluation import Evaluation
from trimtab.agents.statistics import paired_difference
from trimtab.envs.scenario import DEFAULT_LEVERS, Scenario, load_scenario
from trimtab.errors import MismatchError
from trimtab.policies.policy import Policy
from trimtab.policies.registry import load_policy
from trimtab.policies.rules.block import Block
from trimtab.policies.rules.blocks import BLOCKS
from trimtab.policies.rules.composite import compose

SCENARIOS = ("digits-mlp", "sprites-conv", "language", "graph", "digits-mlp-disturbed", "shifted-digits")
# From what only softens to what acts: the order in which blocks are added.
LADDER = (
    "zclip", "spike-care", "conservatism", "deceleration", "variance-care", "staged", "edge-cap", "scaled-clip",
    "scaled-decay", "scale-schedule", "saturation-momentum", "palm-rewind", "opt-restart", "restart-rate", "explore",
    "explore-momentum", "rebalance", "anchor", "moment-reset", "warm-return", "plateau-nudge", "hypergradient",
)  # fmt: skip
PARTNERS: Mapping[str, tuple[str, ...]] = {
    "spike-care": ("spike-care", "conservatism"),
    "conservatism": ("spike-care", "conservatism"),
    "opt-restart": ("opt-restart", "restart-rate"),
    "restart-rate": ("opt-restart", "restart-rate"),
    "explore-momentum": ("explore", "explore-momentum"),
    "moment-reset": ("moment-reset", "warm-return"),
    "warm-return": ("moment-reset", "warm-return"),
}
GRIDS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "spike-care": ("z", (2.0, 4.0, 6.0, 9.0)),
    "deceleration": ("threshold", (0.15, 0.3, 0.6)),
    "variance-care": ("threshold", (0.1, 0.2, 0.3)),
    "staged": ("drift", (0.03, 0.1, 0.3)),
    "edge-cap": ("share", (0.25, 0.5, 1.0)),
    "hypergradient": ("rate", (0.03, 0.1, 0.2, 0.3)),
    "plateau-nudge": ("threshold", (0.003, 0.01, 0.03)),
    "autoclip": ("percentile", (10.0, 50.0, 90.0)),
    "zclip": ("z", (1.5, 2.5, 4.0)),
    "sigma-clip": ("sigmas", (2.0, 4.0, 6.0)),
    "explore": ("factor", (1.5, 2.0, 4.0)),
    "rebalance": ("factor", (0.3, 3.0, 10.0)),
    "saturation-momentum": ("factor", (0.5, 2.0, 4.0)),
    "scale-schedule": ("small", (1e2, 1e3, 1e4)),
    "palm-rewind": ("z", (4.0, 6.0, 9.0)),
    "opt-restart": ("rise", (0.3, 0.5, 1.0)),
    "moment-reset": ("rise", (0.5, 1.0, 2.0)),
    "anchor": ("score", (0.3, 0.5, 1.0)),
}


def place(name: str) -> Scenario:
    """A scenario with the usual levers; events happen in any."""
    return load_scenario(name).replace(levers=list(DEFAULT_LEVERS))


def in_turn(names: Sequence[str]) -> list[str]:
    """The blocks in the order of the table."""
    return [name for name in BLOCKS if name in names]


def policy_of(name: str, blocks: Sequence[str | Block], scenario: Scenario) -> Policy | None:
    """The composite, or None where the block ``name`` cannot act in the scenario."""
    try:
        policy = compose(name, blocks, levers=scenario.levers)
    except MismatchError:
        return None
    return policy if name in [block.name for block in policy.blocks] else None


class Arena:
    """One scenario, whose policies all play the same instances."""

    def __init__(self, name: str, runs: int, seed: int, *, held_out: bool) -> None:
        self.scenario = place(name)
        self.evaluator = Evaluator(self.scenario, runs=runs, seed=seed)
        self.conditions, self.seed = Conditions(held_out=held_out), seed

    def play(self, name: str, blocks: Sequence[str | Block]) -> Evaluation | None:
        """An evaluation of blocks among which is ``name``; of doing nothing where there are none."""
        policy = policy_of(name, blocks, self.scenario) if blocks else load_policy("constant")
        return None if policy is None else self.evaluator.play(policy, self.conditions)

    def compare(self, one: Evaluation, other: Evaluation) -> dict[str, Any]:
        """Figures of ``one`` against ``other``."""
        found = paired_difference(one.final_loss, other.final_loss, np.random.default_rng(self.seed))
        return {
            "difference": [found.estimate, found.low, found.high],
            "mean": float(one.final_loss.mean()),
            "diverged": [int(one.diverged.sum()), int(other.diverged.sum())],
            "rollbacks": [int(one.rollbacks.sum()), int(other.rollbacks.sum())],
        }


def cell(figures: Mapping[str, Any] | None) -> str:
    """One comparison as text."""
    if figures is None:
        return "no lever"
    estimate, low, high = figures["difference"]
    return f"{estimate:+.3f} [{low:+.3f}, {high:+.3f}], diverged {figures['diverged'][0]}/{figures['diverged'][1]}"


def ladder(arena: Arena) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each rung against the one before, and the last against doing nothing."""
    nothing = before = arena.play("constant", ())
    assert nothing is not None and before is not None
    for count, name in enumerate(LADDER, 1):
        played = arena.play(name, in_turn(LADDER[:count]))
        if played is None:
            yield name, None
            continue
        yield name, arena.compare(played, before)
        before = played
    yield "all of them against nothing", arena.compare(before, nothing)


def alone(arena: Arena) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each block, with those that it needs, against doing nothing."""
    nothing = arena.play("constant", ())
    assert nothing is not None
    for name in BLOCKS:
        played = arena.play(name, in_turn(PARTNERS.get(name, (name,))))
        yield name, None if played is None else arena.compare(played, nothing)


def calibrate(arena: Arena, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each value of each block's main option against doing nothing."""
    nothing = arena.play("constant", ())
    assert nothing is not None
    for name in names:
        option, values = GRIDS[name]
        for value in values:
            chosen = {option: value}
            with_it = [BLOCKS[one](**chosen) if one == name else one for one in in_turn(PARTNERS.get(name, (name,)))]
            played = arena.play(name, with_it)
            yield f"{name} {option}={value:g}", None if played is None else arena.compare(played, nothing)


def choice(results: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """Prints the chosen value of a block's option, and how the choice depends on each scenario."""
    option, values = GRIDS[name]
    labels = [f"{name} {option}={value:g}" for value in values]
    places = [one for one in results if all(results[one].get(label) for label in labels)]
    if not places:
        return
    table = np.array([[results[one][label]["difference"][0] for label in labels] for one in places])
    best = values[int(table.mean(0).argmin())]
    without = (
        {one: values[int(np.delete(table, row, 0).mean(0).argmin())] for row, one in enumerate(places)}
        if len(places) > 1
        else {}
    )
    print(
        f"{name}: {option}={best:g} (mean {table.mean(0).min():+.3f}); without each: "
        + ", ".join(f"{one} {value:g}" for one, value in without.items())
    )


def main() -> None:
    """Prints one line per comparison as it is made, and writes everything to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("ladder", "alone", "calibrate"))
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--blocks", nargs="+", default=list(GRIDS), choices=list(GRIDS), metavar="NAME")
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    for name in options.scenarios:
        arena = Arena(name, options.runs, options.seed, held_out=options.study != "calibrate")
        steps = {"ladder": ladder, "alone": alone}.get(options.study)
        rows = steps(arena) if steps else calibrate(arena, options.blocks)
        results[name] = {}
        for label, figures in rows:
            results[name][label] = figures
            print(f"{name} | {label} | {cell(figures)}", flush=True)
            if options.out:
                options.out.write_text(
                    json.dumps({"study": options.study, "runs": options.runs, "results": results}, indent=1) + "\n"
                )
    if options.study == "calibrate":
        for block in options.blocks:
            choice(results, block)


if __name__ == "__main__":
    main()
