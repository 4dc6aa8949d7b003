"""Do the signals for shifts and for noisy data find what they are named after? The two tables of docs/signals.md.

    python experiments/detectors.py [--seed 7]

Training instances with their own rates and batch sizes, constant schedules and no policy.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import spearmanr

from trimtab.inner_training.population import Population
from trimtab.inner_training.reading import Memory
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.signals import observe, resolve_signals
from trimtab.inner_training.task import Instance
from trimtab.inner_training.tasks import resolve_family

INTERVAL, VAL_EXAMPLES = 10, 128
SHIFTS = ("shift", "shift_window", "val_shift")
JUMP, SCORE, WITHIN = (
    0.3,
    0.5,
    5,
)  # a change raises ln loss by this; a detection has this score, within so many decisions
LEARNED = 0.7  # of the first loss


def play(name: str, runs: int, steps: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, list[Instance]]:
    """Signals by name and ln mean losses of the intervals, (decisions, runs) each, and the instances."""
    family = resolve_family(name)
    drawn = [family.draw(seed * 1_000_000 + number, held_out=False) for number in range(runs)]
    instances = [replace(one, schedule=BaseSchedule()) for one in drawn]
    population, memory = Population(family, runs, clip=False), Memory(runs)
    population.reset(range(runs), instances)
    names = (*SHIFTS, "noisy_data")
    signals, seen, losses = resolve_signals(names), [], []
    for _ in range(steps // INTERVAL):
        measured = population.advance(INTERVAL).to_host()
        validation = population.evaluate("validation", VAL_EXAMPLES).double().numpy()
        memory.begin()
        seen.append(observe(signals, population.reading(measured, validation), memory))
        losses.append(np.log(np.maximum(measured.losses.mean(0), 1e-12)))
    return dict(zip(names, np.array(seen).transpose(2, 0, 1), strict=True)), np.array(losses), instances


def shifts(name: str, runs: int, steps: int, seed: int) -> None:
    """One row: changes that were found, and the share of other decisions with a score as high."""
    seen, losses, instances = play(name, runs, steps, seed)
    changes, near = [], np.zeros(losses.shape, dtype=bool)
    for run, instance in enumerate(instances):
        for phase in instance.phases[1:]:
            at = phase.first_step // INTERVAL
            near[at : at + WITHIN + 1, run] = True
            if at + WITHIN > len(losses):
                continue
            if losses[at : at + 2, run].mean() - losses[at - 2 : at, run].mean() > JUMP:
                changes.append((at, run))
    cells = []
    for signal in SHIFTS:
        found = sum(bool((seen[signal][at : at + WITHIN, run] >= SCORE).any()) for at, run in changes)
        elsewhere = (seen[signal][~near] >= SCORE).mean()
        cells.append(f"{found} of {len(changes)} | {elsewhere:.1%}")
    print(f"| `{name}` | {runs} | {steps} | {' | '.join(cells)} |", flush=True)


def noise(name: str, runs: int, seed: int) -> None:
    """One row: rank correlation of ``noisy_data`` with the label noise after 40, 100 and 200 steps."""
    seen, losses, instances = play(name, runs, 200, seed)
    share = np.array([one.traits["label_noise"] for one in instances])
    cells = []
    for steps in (40, 100, 200):
        at = steps // INTERVAL - 1
        finite = np.isfinite(losses[: at + 1]).all(0)
        learned = finite & (losses[at] - losses[0] < np.log(LEARNED))
        one, other = (spearmanr(seen["noisy_data"][at, who], share[who]).statistic for who in (finite, learned))
        cells.append(f"{one:.2f} ({other:.2f})")
    print(f"| `{name}` | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| family | runs | steps |", " | ".join(f"`{one}` | elsewhere" for one in SHIFTS), "|")
    print("|---|---|---|" + "---|" * 2 * len(SHIFTS))
    for name in ("digits-mlp", "teacher-mlp", "regression"):
        shifts(name, 48, 400, options.seed)
    for name in ("permuted-digits", "drifting-digits", "shifted-digits"):
        shifts(name, 48, 800, options.seed)
    print("\n| family | 40 steps | 100 steps | 200 steps |", "|---|---|---|---|", sep="\n")
    for name in ("digits-mlp", "digits-mlp-deep", "teacher-mlp"):
        noise(name, 192, options.seed)


if __name__ == "__main__":
    main()
