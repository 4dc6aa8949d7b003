"""Criteria: which units should stay? Every pruning criterion against a random choice, before and after fine-tuning.

    python -m experiments.criteria [--small] [--tasks NAME ...] [--seeds 8] [--keep DIR] [--out DIR] [--page FILE.md]

Three tasks: convolutions, a vision transformer and a language model; by name also the vision transformer with its attention
heads pruned beside its hidden units (`--tasks sprites-vit-heads`). Each seed is trained dense once; then 50, 75, 90 and 97 % of
its units go, chosen by each criterion, and the rest is trained on. `--keep` holds tasks that are done, so that an interrupted
study goes on. `--small` is a matter of two minutes and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from experiments.criteria.arms import SPARSITIES, Plan
from experiments.criteria.figure import draw
from experiments.criteria.figures import figures
from experiments.criteria.page import tables_of
from experiments.criteria.study import study
from experiments.criteria.tasks import TASKS
from experiments.pages import filled

WHOLE = Plan(seeds=8, steps=0, tuning=0, rate=0.0, sparsities=SPARSITIES, slots=40)
PUBLISHED = ("sprites-conv", "sprites-vit", "language")
SMALL = Plan(seeds=2, steps=20, tuning=10, rate=0.0, sparsities=(0.5, 0.97), slots=32)


def say(line: str) -> None:
    """Prints a line at once, with the time."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny study, to see that all of it works")
    parser.add_argument("--tasks", nargs="+", default=PUBLISHED, choices=TASKS, metavar="NAME")
    parser.add_argument("--seeds", type=int, help="dense runs of each task, at least 2")
    parser.add_argument("--keep", type=Path, help="folder for what has been played")
    parser.add_argument("--out", type=Path, help="folder for criteria.json and the pictures")
    parser.add_argument("--page", type=Path, help="page whose tables are made anew")
    return parser.parse_args()


def main() -> None:
    """Plays, prints and writes."""
    options = parsed()
    torch.set_num_threads(1)
    plan = SMALL if options.small else WHOLE
    if options.seeds:
        plan = Plan(**{**vars(plan), "seeds": options.seeds})
    result: dict[str, Any] = {
        "plan": {name: value for name, value in vars(plan).items() if name not in ("rate", "steps", "tuning")},
        "tasks": {},
    }
    for name in options.tasks:
        keep = options.keep / f"{name}.json" if options.keep else None
        raw = study(TASKS[name], plan, say, keep)
        result["tasks"][name] = {**{key: raw[key] for key in raw if key != "arms"}, **figures(raw, plan)}
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "criteria.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
    for name, lines in tables_of(result).items():
        print(f"\n{name}", *lines, sep="\n")
    if options.out:
        draw(result, options.out)
    if options.page:
        options.page.write_text(filled(options.page.read_text(), tables_of(result)))


if __name__ == "__main__":
    main()
