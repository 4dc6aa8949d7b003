"""What keeps a network able to learn when its task changes many times?

    python -m experiments.plasticity [--small] [--keep DIR] [--out FILE.json] [--page FILE.md] [--png FILE.png]

Perceptrons of two hidden layers go through 40 phases of 60 steps of Adam: digits with random labels that are new in each
phase, digits whose pixels get a new order, and digits to which nothing happens. Every arm is tuned over six settings on two
seeds by its mean online accuracy, and reported on five others. `--keep` holds what has been played, so that an interrupted study
goes on; `--small` is a short one, for a look.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from experiments.pages import filled
from experiments.plasticity.figure import draw
from experiments.plasticity.page import tables_of
from experiments.plasticity.study import SMALL, Size, played_rows, result


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="8 phases of 20 steps, one tuning seed, two others")
    parser.add_argument("--keep", type=Path, help="folder for what has been played")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--page", type=Path, help="page whose tables are made anew")
    parser.add_argument("--png", type=Path, help="picture of the accuracy by phase")
    return parser.parse_args()


def main() -> None:
    """Plays, prints and writes."""
    options = parsed()
    torch.set_num_threads(1)
    size = replace(SMALL if options.small else Size(), keep=options.keep)
    found: dict[str, Any] = result(size, *played_rows(size, lambda line: print(line, flush=True)))
    for name, lines in tables_of(found).items():
        print(f"\n{name}", *lines, sep="\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    if options.page:
        options.page.write_text(filled(options.page.read_text(), tables_of(found)))
    if options.png:
        draw(found, options.png)


if __name__ == "__main__":
    main()
