"""Do winning tickets win on digits? Iterative magnitude pruning with rewinding, beside its controls.

    python experiments/lottery.py [--tasks 24] [--rounds 14] [--steps 1000] [--out docs/results/lottery.json]
    python experiments/lottery.py --read docs/results/lottery.json --figure docs/results/lottery.png

Tasks are training instances of `digits-mlp` (64-64-10) with at least eight classes, 500 examples and no wrong labels; all have 64 units,
Adam at 1.2e-3 (Frankle & Carbin, arXiv 1803.03635), batches of 32. Each round trains every arm of every task for the whole budget and
prunes a fifth of the remaining weights of all layers together. All runs are in one population:

    ticket       magnitude, survivors go back to their initial values
    ticket@k     the same, back to step k = 5 % of the budget
    fresh        the mask of `ticket`, other initial values
    fresh@k      the mask of `ticket@k`, other initial values, from step k of their own dense training
    shuffled     as many weights in each layer as `ticket`, at random places, the initial values of `ticket`
    random       as many weights in all as `ticket`, at random places in all layers alike, the same initial values
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.agents.statistics import Interval, bootstrap_interval, mean, paired_difference
from trimtab.inner_training.networks import MLP, initial_parameters
from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.structure.lottery import Lottery
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.task import Instance, OptimizerSettings, TaskFamily
from trimtab.inner_training.tasks import make_family

ARMS = {"ticket": "ticket", "ticket@k": "ticket", "fresh": "fresh", "fresh@k": "fresh", "shuffled": "shuffled", "random": "random"}  # fmt: skip
EARLY, BATCH, RATE, SHOWN = 0.05, 32, 1.2e-3, (3, 6, 9, 11, 13)
CLASSES, EXAMPLES = 8, 500


def tasks(family: TaskFamily, count: int, steps: int) -> Iterator[tuple[Instance, Instance]]:
    """Instances with one recipe, each with initial values and with other ones."""
    assert isinstance(family.module, MLP)
    optimizer, found, seed = OptimizerSettings(rule="adam", lr=RATE), 0, 0
    while found < count:
        drawn = family.draw(seed, held_out=False)
        traits, seed = drawn.traits, seed + 1
        if traits["label_noise"] or traits["classes"] < CLASSES or traits["examples"] < EXAMPLES:
            continue
        found += 1
        both = []
        for draw in (0, 1):
            values, gates = initial_parameters(family.module, np.random.default_rng([seed, draw]), 64, 1.0)
            both.append(
                replace(drawn, parameters=values, buffers=gates, input_scale=1.0, steps=steps, batch_size=BATCH,
                        optimizer=optimizer, schedule=BaseSchedule())
            )  # fmt: skip
        yield both[0], both[1]


def game(family: TaskFamily, count: int, steps: int) -> tuple[Lottery, Population]:
    """All arms of all tasks, in one population, arm after arm."""
    pairs = list(tasks(family, count, steps))
    names = [name for name in ARMS for _ in pairs]
    instances = [pair[ARMS[name] == "fresh"] for name in ARMS for pair in pairs]
    places = list(ARMS)
    tickets = [
        places.index("ticket@k" if name.endswith("@k") else "ticket") * count + one
        for name in ARMS
        for one in range(count)
    ]
    population = Population(family, len(names), rules=("adam",))
    population.reset(range(len(names)), instances)
    early = max(1, round(EARLY * steps))
    rewind = [early if name.endswith("@k") else 0 for name in names]
    return Lottery(Stacked(population), [ARMS[name] for name in names], tickets, rewind=rewind), population


def play(family: TaskFamily, count: int, rounds: int, steps: int) -> dict[str, Any]:
    """Density, test accuracy and bounded test loss (rounds, arms, tasks) at the end of each round."""
    lottery, population = game(family, count, steps)
    taken: dict[str, list[np.ndarray]] = {"density": [], "accuracy": [], "loss": []}
    for number in range(rounds):
        lottery.begin()
        population.advance(steps - lottery.latest)
        taken["density"].append(lottery.density.numpy())
        taken["accuracy"].append(population.evaluate("test", score=True).double().numpy())
        taken["loss"].append(family.bounded(population.evaluate("test").double().numpy()))
        lottery.prune()
        print(f"round {number}: density {taken['density'][-1][0]:.3f}, accuracy "
              + ", ".join(f"{name} {value:.3f}" for name, value in zip(ARMS, by_arm(taken["accuracy"][-1]).mean(1), strict=True)),
              flush=True)  # fmt: skip
    return {name: np.stack([by_arm(one) for one in rows]) for name, rows in taken.items()}


def by_arm(values: np.ndarray) -> np.ndarray:
    """(arms, tasks) of (runs,)."""
    return values.reshape(len(ARMS), -1)


def rounded(interval: Interval) -> list[float]:
    """An estimate with its interval, to four places."""
    return [round(value, 4) for value in interval]


def summary(traces: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Of each round: density, mean accuracy and loss of each arm, and what each control's accuracy is below its ticket's."""
    rng, names, rows = np.random.default_rng(0), list(ARMS), []
    for number, accuracy in enumerate(traces["accuracy"]):
        row: dict[str, Any] = {"round": number, "density": round(float(traces["density"][number].mean()), 4)}
        for place, name in enumerate(names):
            ticket = names.index("ticket@k" if name.endswith("@k") else "ticket")
            row[name] = {
                "accuracy": rounded(bootstrap_interval(mean, accuracy[place], rng)),
                "loss": rounded(bootstrap_interval(mean, traces["loss"][number][place], rng)),
                "minus_dense": rounded(paired_difference(accuracy[place], traces["accuracy"][0][place], rng)),
            }
            if place != ticket:
                row[name]["minus_ticket"] = rounded(paired_difference(accuracy[place], accuracy[ticket], rng))
        row["ticket@k"]["minus_ticket"] = rounded(paired_difference(accuracy[1], accuracy[0], rng))
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: accuracies of the ticket, and what each other arm has more, in percent."""
    others = [name for name in ARMS if name != "ticket"]
    lines = [
        "| weights left | ticket | "
        + " | ".join(f"{name} - {'ticket@k' if name == 'fresh@k' else 'ticket'}" for name in others)
        + " |"
    ]
    lines.append("|---" * (len(others) + 2) + "|")
    for row in (row for row in rows if row["round"] == 0 or row["round"] in SHOWN):
        cells = [f"{100 * row['density']:.1f} %", shown(row["ticket"]["accuracy"], "")]
        lines.append(f"| {' | '.join(cells + [shown(row[name]['minus_ticket'], '+') for name in others])} |")
    return lines


def shown(interval: list[float], sign: str) -> str:
    """In percent."""
    middle, low, high = (100 * value for value in interval)
    return f"{middle:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy of the arms over the share of weights that is left, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    left = [100 * row["density"] for row in rows]
    for name in ARMS:
        middle, low, high = (100 * np.array([row[name]["accuracy"] for row in rows])).T
        (line,) = axes.plot(left, middle, label=name, linestyle="--" if name.endswith("@k") else "-")
        axes.fill_between(left, low, high, alpha=0.12, color=line.get_color())
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks([100, 50, 25, 10, 5], ["100", "50", "25", "10", "5"])
    axes.minorticks_off()
    axes.set(xlabel="weights left, %", ylabel="test accuracy, %")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Plays, prints the table, and writes everything to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=14, help="trainings, the dense one included")
    parser.add_argument("--steps", type=int, default=1000, help="budget of a training")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--read", type=Path, help="a JSON file of before, instead of playing")
    parser.add_argument("--figure", type=Path, help="PNG file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.read:
        rows = json.loads(options.read.read_text())["rounds"]
    else:
        rows = summary(play(make_family("digits-mlp"), options.tasks, options.rounds, options.steps))
    print(*table(rows), sep="\n")
    if options.figure:
        draw(rows, options.figure)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"tasks": options.tasks, "steps": options.steps, "rounds": rows}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
