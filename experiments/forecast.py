"""What should I watch? Which signals, read early in a run, forecast how it ends.

    python experiments/forecast.py [--families digits-mlp ...] [--instances 30] [--rates 6] [--steps 400] [--out FILE.json]

Every instance is trained with a constant recipe at several learning rates and no policy. The outcome of a run is its
final ln test loss above the best of its instance over the rates, so 0 is the best rate's; a run has failed when it ends
no better than it began. Signals are read at 10 %, 25 % and 50 % of the budget, of the runs that are still finite.
Intervals are bootstrapped over instances; a model that is judged on instances that it has not seen gives the
permutation importance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.inspection import permutation_importance
from sklearn.model_selection import GroupKFold
from sklearn.tree import DecisionTreeRegressor

from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.levers import LEVERS, resolve_levers
from trimtab.inner_training.measurements import needs_of
from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.signals import SIGNALS, resolve_signals
from trimtab.inner_training.steering import Steering
from trimtab.inner_training.stepping import Mode
from trimtab.inner_training.task import Instance
from trimtab.inner_training.tasks import resolve_family
from trimtab.inner_training.tasks.recipe import RecipeRange
from trimtab.inner_training.update_rules import UPDATE_RULES

INTERVAL, VAL_EXAMPLES, MOMENTS = 10, 128, (0.1, 0.25, 0.5)
FAMILIES = ("digits-mlp", "digits-mlp-deep", "teacher-mlp", "regression", "graph")
REPETITIONS, TREES = 200, 60


@dataclass(frozen=True)
class Table:
    """Runs of several families.

    Attributes:
        names: the signals.
        seen: (moments, runs, signals), NaN where a run was not finite any more.
        family, instance: (runs,) numbers.
        regret: (runs,) final ln test loss above the best of the instance.
        failed: (runs,) bool.
        noise: (runs,) share of wrong training labels, NaN where there is no such thing.
    """

    names: tuple[str, ...]
    seen: np.ndarray
    family: np.ndarray
    instance: np.ndarray
    regret: np.ndarray
    failed: np.ndarray
    noise: np.ndarray


# --- runs -------------------------------------------------------------------------------------------------------


def instances(name: str, count: int, rates: int, steps: int, seed: int) -> list[Instance]:
    """``count`` instances of a family, each at ``rates`` learning rates, spread over the range of its recipes."""
    family, rng, found = resolve_family(name), np.random.default_rng(seed), []
    ranges = getattr(family, "recipe", RecipeRange())
    for number in range(count):
        drawn = family.draw(seed * 1_000_000 + number, held_out=False)
        low, high = ranges.adam_lr if UPDATE_RULES[drawn.optimizer.rule].adaptive else ranges.sgd_lr
        for place in (np.arange(rates) + rng.random(rates)) / rates:
            settings = replace(drawn.optimizer, lr=float(low * (high / low) ** place))
            found.append(replace(drawn, optimizer=settings, schedule=BaseSchedule(), steps=steps))
    return found


def train(name: str, chosen: list[Instance], mode: Mode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trains instances of a family side by side.

    Returns:
        The signals (moments, runs, signals), and ln bounded test loss (runs,) at the start and at the end.
    """
    family, runs, steps = resolve_family(name), len(chosen), chosen[0].steps
    population = Population(family, runs, mode=mode, clip=False)
    population.measure(needs_of(SIGNALS.values()))
    population.reset(range(runs), chosen)
    steering = Steering(
        resolve_levers(tuple(LEVERS)), resolve_signals(tuple(SIGNALS)), GuardConfig(rollback=False), runs
    )
    steering.reset(np.ones(runs, dtype=bool), population.base)
    read_at = [max(1, round(moment * steps / INTERVAL)) for moment in MOMENTS]
    seen, first = [], log_test_loss(population)
    for decision in range(1, steps // INTERVAL + 1):
        measured = population.advance(INTERVAL).to_host()
        reading = population.reading(measured, population.evaluate("validation", VAL_EXAMPLES).double().numpy())
        health = steering.assess(reading)
        observed = steering.observe(reading).astype(np.float64)
        seen += [np.where(health.lost[:, None], np.nan, observed)] * read_at.count(decision)
    return np.array(seen), first, log_test_loss(population)


def log_test_loss(population: Population) -> np.ndarray:
    return np.log(population.family.bounded(population.evaluate("test").double().numpy()))


def collect(families: list[str], options: argparse.Namespace) -> Table:
    """Trains all families, and puts their runs one below the other."""
    parts: list[dict[str, np.ndarray]] = []
    for number, name in enumerate(families):
        chosen = instances(name, options.instances, options.rates, options.steps, options.seed)
        seen, first, last = train(name, chosen, options.mode)
        best = last.reshape(-1, options.rates).min(1).repeat(options.rates)
        part = {
            "seen": seen,
            "family": np.full(len(chosen), number),
            "instance": np.arange(len(chosen)) // options.rates + number * options.instances,
            "regret": last - best,
            "failed": last >= first,
            "noise": np.array([one.traits.get("label_noise", np.nan) for one in chosen]),
        }
        parts.append(part)
        print(f"{name}: {len(chosen)} runs, {part['failed'].mean():.0%} failed, "
              f"{np.isnan(seen[-1, :, 0]).mean():.0%} not finite at {MOMENTS[-1]:.0%}", flush=True)  # fmt: skip
    joined = {name: np.concatenate([part[name] for part in parts], axis=int(name == "seen")) for name in parts[0]}
    return Table(names=tuple(SIGNALS), **joined)


# --- statistics -------------------------------------------------------------------------------------------------


def spearman(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rank correlation of each column of (n, S) with (n,); 0 for a constant."""
    ranks = np.column_stack([rankdata(values, axis=0), rankdata(target)])
    ranks -= ranks.mean(0)
    scale = np.sqrt((ranks**2).sum(0))
    return ranks[:, :-1].T @ ranks[:, -1] / np.maximum(scale[:-1] * scale[-1], 1e-12)


def auc(values: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """Chance that a column of (n, S) is larger in a run that failed than in one that did not, minus 1/2."""
    bad, good = int(failed.sum()), int((~failed).sum())
    if bad == 0 or good == 0:
        return np.full(values.shape[1], np.nan)
    ranks = rankdata(values, axis=0)[failed].sum(0)
    return (ranks - bad * (bad + 1) / 2) / (bad * good) - 0.5


def by_family(
    table: Table, moment: int, target: np.ndarray, measure: Callable[[np.ndarray, np.ndarray], np.ndarray], seed: int
) -> np.ndarray:
    """A measure averaged over families, with its 95 % interval over resampled instances: (3, signals)."""
    rng, seen = np.random.default_rng(seed), table.seen[moment]
    usable = np.isfinite(seen).all(1) & np.isfinite(target)
    groups: list[list[np.ndarray]] = []
    for family in np.unique(table.family):
        runs = np.flatnonzero(usable & (table.family == family))
        groups.append([runs[table.instance[runs] == one] for one in np.unique(table.instance[runs])])

    def average(chosen: list[np.ndarray]) -> np.ndarray:
        found = np.array([measure(seen[runs], target[runs]) for runs in chosen])
        known = found[~np.isnan(found).all(1)]  # a family in which no run failed says nothing of failure
        return known.mean(0) if len(known) else np.full(seen.shape[1], np.nan)

    middle = average([np.concatenate(group) for group in groups if group])
    resampled = [
        average(
            [np.concatenate([group[i] for i in rng.integers(0, len(group), len(group))]) for group in groups if group]
        )
        for _ in range(REPETITIONS)
    ]
    known = [one for one in resampled if not np.isnan(one).all()]
    return np.stack([middle, *(np.quantile(known, [0.025, 0.975], axis=0) if known else (middle, middle))])


def place(table: Table, runs: np.ndarray) -> np.ndarray:
    """Rank (n,) of each run's outcome among those of its family, in (0, 1]."""
    found = np.empty(len(runs))
    for family in np.unique(table.family[runs]):
        here = table.family[runs] == family
        found[here] = rankdata(table.regret[runs[here]]) / here.sum()
    return found


def models(table: Table, moment: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """What a model forecasts of the rank of the outcome, on instances that it has not seen.

    Returns:
        R^2 of each signal alone in a shallow tree, which also sees that both ends are bad (signals,); the R^2 that a
        forest of all signals loses when this one is shuffled (signals,); and the R^2 of that forest.
    """
    runs = np.flatnonzero(np.isfinite(table.seen[moment]).all(1))
    values, target, groups = table.seen[moment][runs], place(table, runs), table.instance[runs]
    alone, lost, whole = [], [], []
    for fit, held_out in GroupKFold(5).split(values, target, groups):
        shuffle = {"n_repeats": 3, "random_state": seed}
        forest = ExtraTreesRegressor(TREES, min_samples_leaf=3, random_state=seed).fit(values[fit], target[fit])
        whole.append(forest.score(values[held_out], target[held_out]))
        lost.append(permutation_importance(forest, values[held_out], target[held_out], **shuffle).importances_mean)
        alone.append([one_signal(values[:, [i]], target, fit, held_out) for i in range(values.shape[1])])
    return np.mean(alone, axis=0), np.mean(lost, axis=0), float(np.mean(whole))


def one_signal(values: np.ndarray, target: np.ndarray, fit: np.ndarray, held_out: np.ndarray) -> float:
    """R^2 on ``held_out`` of a tree whose leaves hold a twentieth of the runs at least."""
    tree = DecisionTreeRegressor(min_samples_leaf=0.05, random_state=0).fit(values[fit], target[fit])
    return float(tree.score(values[held_out], target[held_out]))


def plain(values: np.ndarray) -> Any:
    """Numbers for JSON, None for NaN."""
    known = np.where(np.isfinite(values), np.round(values, 4), None)
    return known.tolist()


def study(table: Table, seed: int = 0) -> dict[str, Any]:
    """Everything about every signal that was not the same in all runs, by moment; the best forecast first."""
    found: dict[str, Any] = {}
    for moment, share in enumerate(MOMENTS):
        rank = by_family(table, moment, table.regret, spearman, seed)
        fail = by_family(table, moment, table.failed.astype(np.float64), lambda v, t: auc(v, t > 0.5), seed)
        noise = (
            by_family(table, moment, table.noise, spearman, seed) if np.isfinite(table.noise).any() else rank * np.nan
        )
        alone, lost, explained = models(table, moment, seed)
        alive = np.flatnonzero(np.nanstd(table.seen[moment], axis=0) > 0)
        rows = {
            table.names[i]: {
                "alone": plain(alone[i]),
                "spearman": plain(rank[:, i]),
                "auc": plain(fail[:, i] + 0.5),
                "importance": plain(lost[i]),
                "label_noise": plain(noise[:, i]),
            }
            for i in alive[np.argsort(-alone[alive])]
        }
        found[f"{share:.0%}"] = {
            "runs": int(np.isfinite(table.seen[moment]).all(1).sum()),
            "explained": round(explained, 4),
            "signals": rows,
        }
    return found


def show(found: dict[str, Any], top: int) -> None:
    """One Markdown table per moment, and who ranks label noise."""

    def interval(values: list[Any], form: str) -> str:
        if values[0] is None:
            return ""
        low, middle, high = (format(values[i], form) for i in (1, 0, 2))
        return f"{middle} [{low}, {high}]"

    for moment, part in found.items():
        print(f"\n### Read at {moment} of the budget\n")
        print(f"{part['runs']} runs; all signals together explain {part['explained']:.2f}.\n")
        print(
            "| signal | explains alone | rank correlation | AUC for failure | importance |",
            "|---|---|---|---|---|",
            sep="\n",
        )
        for name, row in list(part["signals"].items())[:top]:
            rank, fail = interval(row["spearman"], "+.2f"), interval(row["auc"], ".2f")
            print(f"| `{name}` | {row['alone']:.2f} | {rank} | {fail} | {row['importance']:.3f} |")
        ranked = [one for one in part["signals"].items() if one[1]["label_noise"][0] is not None]
        noisy = sorted(ranked, key=lambda one: -abs(one[1]["label_noise"][0]))[:3]
        words = (f"`{name}` {interval(row['label_noise'], '+.2f')}" for name, row in noisy)
        print("\nRank correlation with the label noise of the instance:", ", ".join(words))


def main() -> None:
    """Trains, prints the tables, and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--instances", type=int, default=30)
    parser.add_argument("--rates", type=int, default=6)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", default="auto", choices=("auto", "compile", "eager"))
    parser.add_argument("--top", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = study(collect(options.families, options), options.seed)
    show(found, options.top)
    if options.out is not None:
        settings = {name: value for name, value in vars(options).items() if name not in ("out", "top")}
        options.out.write_text(json.dumps({"settings": settings, "moments": found}) + "\n")


if __name__ == "__main__":
    main()
