"""Growth against pruning while networks train: accuracies, what newborns weigh, and what helps them.

    python -m experiments.growth_stability [--small] [--seeds 5] [--steps 3200] [--studies head perceptron smooth-leaky]
        [--keep DIR] [--out FILE.json] [--page FILE.md] [--png FILE.png]

The protocol of Lillo & Cheney, "On the Stability of Growth in Structural Plasticity" (arXiv 2605.15435), at a small scale
(docs/growth.md). Every treatment gets the best of the same learning rates, by validation loss on seeds of its own; test
accuracy is reported. `--keep` holds what has been played, so that an interrupted study goes on. `--small` is a minute of tiny
runs that says nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from experiments.growth_stability.figure import draw
from experiments.growth_stability.page import tables_of
from experiments.growth_stability.studies import RATES, STUDIES, Setting, study
from experiments.pages import filled


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=Setting.seeds)
    parser.add_argument("--swept", type=int, default=Setting.swept, help="runs of each cell and rate of the sweep")
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--small", action="store_true", help="two seeds, 80 steps, nothing compiled")
    parser.add_argument("--keep", type=Path, help="folder for what has been played")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--page", type=Path, help="page whose tables are made anew")
    parser.add_argument("--png", type=Path, help="picture of accuracies and parities")
    return parser.parse_args()


def setting_of(options: argparse.Namespace) -> Setting:
    """How large the study is."""
    if options.small:
        return Setting(seeds=2, swept=1, steps=80, size=64, compiled=False, keep=options.keep)
    return Setting(seeds=options.seeds, swept=options.swept, steps=options.steps, keep=options.keep)


def main() -> None:
    """Plays, prints and writes."""
    options = parsed()
    torch.set_num_threads(1)
    setting = setting_of(options)
    result: dict[str, Any] = {"seeds": setting.seeds, "steps": setting.steps, "candidates": RATES}
    for name in options.studies:
        begin = time.process_time()
        result[name] = study(name, setting)
        print(f"{name}: {time.process_time() - begin:.0f} s of the processor")
    for name, lines in tables_of(result).items():
        print(f"\n{name}", *lines, sep="\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    if options.png:
        draw(result, options.png)
    if options.page:
        options.page.write_text(filled(options.page.read_text(), tables_of(result)))


if __name__ == "__main__":
    main()
