"""Do resets of units help a learned policy where tasks change, and does it use them better than a fixed rule?

    python -m experiments.learned_structure.changing --joint BUNDLE --hyper BUNDLE [--runs 64] [--families NAME ...] [--training]
        [--out FILE.json] [--page FILE.md]

The joint policy moves the hyperparameters and resets units; `hyper` learned the same way without resets. Beside them play the joint
policy with its resets held back, no policy, the shipped default, and the rule `dormant-reset` at several thresholds: alone, beside `hyper`, and beside the default. No arm changes how many
units there are, so all do the same work. The height of a run is the mean of its ln validation loss over the budget, through all phases of the task.
Differences are paired by run, with bootstrap intervals over runs; over families each counts alike. `--training` plays instances of training.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments.learned_structure.together import Together, Without
from experiments.pages import publish, span, table

from trimtab.agents.conditions import Conditions
from trimtab.agents.evaluate import Evaluator
from trimtab.envs.scenario import load_scenario
from trimtab.policies.policy import Policy
from trimtab.policies.registry import load_policy

HERE = Path(__file__).parent
FAMILIES = ("drifting-digits", "class-pairs", "changing-regression", "class-incremental-digits")
THRESHOLDS = (0.0, 0.1, 0.3)  # dormant share above which the rule resets; 0 wherever any unit is dormant
REPETITIONS = 2000


def arms(joint: str, hyper: str) -> dict[str, Policy]:
    """Who plays, by name."""
    found = {"joint": load_policy(joint), "hyper": load_policy(hyper), "default": load_policy("default")}
    found["joint without resets"] = Without(found["joint"], "reset")
    found["constant"] = load_policy("constant")
    for name, beside in (("constant", None), ("hyper", hyper), ("default", "default")):
        for threshold in THRESHOLDS:
            rule = load_policy("dormant-reset", threshold=threshold)
            called = f"dormant-reset {threshold:g}" + (f" + {name}" if beside else "")
            found[called] = Together(called, [rule, load_policy(beside)]) if beside else rule
    return found


def difference(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mean of the paired differences of (runs,), and its bootstrap samples behind it: (1 + ``REPETITIONS``,)."""
    runs = len(one)
    counts = np.concatenate([np.ones((1, runs)), rng.multinomial(runs, np.full(runs, 1 / runs), REPETITIONS)]) / runs
    return np.asarray(counts @ (one - other))


def interval(samples: np.ndarray) -> list[float]:
    """Estimate and the ends of its 95 % interval.

    >>> interval(np.array([0.5, 0.0, 1.0]))
    [0.5, 0.025, 0.975]
    """
    low, high = np.quantile(samples[1:], [0.025, 0.975])
    return [round(float(value), 4) for value in (samples[0], low, high)]


def compared(
    heights: Mapping[str, Mapping[str, np.ndarray]], label: str, seed: int
) -> dict[str, dict[str, list[float]]]:
    """By arm and family, and over ``all``: the height of ``label`` minus that of the arm; below 0 ``label`` is better."""
    found: dict[str, dict[str, list[float]]] = {}
    for arm in next(iter(heights.values())):
        if arm == label:
            continue
        rng = np.random.default_rng(seed)
        samples = {family: difference(played[label], played[arm], rng) for family, played in heights.items()}
        rows = {family: interval(one) for family, one in samples.items()}
        found[arm] = {**rows, "all": interval(np.mean(list(samples.values()), axis=0))}
    return found


def tables_of(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """The lines of the tables of docs/learned_structure.md that this study makes."""
    families: Sequence[str] = list(content["heights"])
    titles = [f"`{one}`" for one in families]
    rows = [[arm, *(span(row[one]) for one in (*families, "all"))] for arm, row in content["joint minus"].items()]
    found = {"changing": table(["joint minus", *titles, "all"], rows)}
    arms_played = list(content["heights"][families[0]])
    rows = [
        [arm, *(f"{content['heights'][one][arm]:.2f} ({content['edits'][one][arm]:.0f})" for one in families)]
        for arm in arms_played
    ]
    return {**found, "changing heights": table(["height (resets)", *titles], rows)}


def main() -> None:
    """Plays everything, prints the tables, and keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--joint", required=True, metavar="BUNDLE")
    parser.add_argument("--hyper", required=True, metavar="BUNDLE")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="page whose tables are made anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, policies = load_scenario(HERE / "changing.yaml"), arms(options.joint, options.hyper)
    heights: dict[str, dict[str, np.ndarray]] = {}
    edits: dict[str, dict[str, float]] = {}
    for family in options.families:
        scenario = base.replace(id=f"changing-{family}", families=[{"name": family}])
        evaluator = Evaluator(scenario, runs=options.runs, seed=options.seed, batch_of_runs=64)
        for name, policy in policies.items():
            found = evaluator.play(policy, Conditions(held_out=not options.training))
            heights.setdefault(family, {})[name] = np.asarray(found.trajectory)
            edits.setdefault(family, {})[name] = round(float(np.mean(found.measures["edits"])), 2)
            print(f"{family}  {name}: {np.mean(found.trajectory):+.3f}", flush=True)
    content = {
        "runs": options.runs,
        "seed": options.seed,
        "held_out": not options.training,
        "joint minus": compared(heights, "joint", options.seed),
        "heights": {family: {arm: round(float(one.mean()), 4) for arm, one in played.items()} for family, played in heights.items()},
        "edits": edits,
    }  # fmt: skip
    publish(content, tables_of(content), options.out, options.page)


if __name__ == "__main__":
    main()
