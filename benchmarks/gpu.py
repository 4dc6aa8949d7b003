"""A population that fills a GPU against the plain PyTorch loop on the same GPU.

    python benchmarks/gpu.py [--archs mlp-sgd transformer] [--device cuda] [--out results/gpu.json]

Populations double until memory is full or twice the runs gain less than 5% per run; the quickest counts. Floating-point
operations are those of the matrix products and convolutions of the network, and their ceiling is the best square
float32 product that this process reaches on the card. Synchronisations are counted by the driver over one interval of
ten steps, and inside its steps, where there must be none. Without a GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from speed.architectures import ARCHITECTURES, family_of, full_size
from speed.card import Point, product_ceiling, quickest, saturating, step_flops, synchronisations_inside, wait_for
from speed.loops import INTERVAL, Loop, best, plain_loop, population_loop

from trimtab.inner_training.population import Population

COLUMNS = ("architecture", "runs", "us per run-step", "plain us", "ratio", "target", "TFLOP/s", "of ceiling", "GiB")
COUNTS = ("synchronisations per interval", "inside its steps")


class Card:
    """Measures architectures on one device.

    Args:
        device: where.
        mode: ``"compile"`` or ``"eager"``.
        rounds: of every measurement.
        seconds: that one measurement takes at the least.
    """

    def __init__(self, device: torch.device, mode: str = "compile", rounds: int = 5, seconds: float = 0.3) -> None:
        self.device, self.mode, self.rounds, self.seconds = device, mode, rounds, seconds

    def time(self, loop: Loop) -> float:
        """Seconds per run and step."""

        def clock() -> float:
            wait_for(self.device)
            return time.perf_counter()

        return best({"loop": loop}, self.rounds, clock, self.seconds)["loop"]

    def population(self, name: str, runs: int) -> Population:
        """A population of an architecture at full size."""
        architecture = ARCHITECTURES[name]
        family = family_of(architecture)
        made = Population(family, runs, rules=(architecture.rule,), device=self.device, mode=self.mode, clip=False)
        made.reset(range(runs), full_size(family, runs, architecture.rule, architecture.lr))
        return made

    def seconds_of(self, name: str, runs: int) -> float | None:
        """Seconds per run and step of so many runs; None when they do not fit into memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            return self.time(population_loop(self.population(name, runs)))
        except torch.OutOfMemoryError:
            return None

    def row(self, name: str, start: int, limit: int, ceiling: float) -> dict[str, object]:
        """Everything about one architecture."""
        architecture = ARCHITECTURES[name]
        family = family_of(architecture)
        instance = full_size(family, 1, architecture.rule, architecture.lr)[0]
        plain = self.time(plain_loop(architecture, family, instance, str(self.device)))
        points = saturating(lambda runs: self.seconds_of(name, runs), start, limit)
        if not points:
            raise SystemExit(f"gpu: {start} runs of {name} do not fit into memory; give a smaller --start")
        top: Point = quickest(points)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        population = self.population(name, top.runs)
        per_interval, inside = synchronisations_inside(population.advance, self.device, INTERVAL)
        used = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else population.state_bytes()
        flops = step_flops(architecture, family, instance) / top.seconds
        return {
            "architecture": name,
            "mode": population.mode,
            "runs": top.runs,
            "us_per_run_step": round(top.seconds * 1e6, 4),
            "plain_us": round(plain * 1e6, 1),
            "ratio": round(plain / top.seconds, 1),
            "target": architecture.gpu_target,
            "tflops": round(flops / 1e12, 3),
            "of_ceiling": round(flops / ceiling, 4),
            "gib": round(used / 2**30, 2),
            "synchronisations_per_interval": per_interval,
            "synchronisations_inside": inside,
            "sizes": {point.runs: round(point.seconds * 1e6, 4) for point in points},
        }


def show(rows: list[dict[str, object]], title: str) -> Table:
    """The table of all rows."""
    table = Table(title=title)
    for column in (*COLUMNS, *COUNTS):
        table.add_column(column, justify="left" if column == "architecture" else "right")
    for row in rows:
        keys = ("architecture", "runs", "us_per_run_step", "plain_us", "ratio", "target", "tflops", "of_ceiling", "gib")
        table.add_row(*(str(row[key]) for key in (*keys, "synchronisations_per_interval", "synchronisations_inside")))
    return table


def main() -> int:
    """Measures, prints the table, and writes JSON if asked; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--start", type=int, default=256, help="runs of the first population")
    parser.add_argument("--limit", type=int, default=2**17, help="runs of the largest")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu: this machine has no CUDA device, so nothing was measured", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    card = Card(device)
    ceiling = product_ceiling(device)
    rows = []
    for name in options.archs:
        rows.append(card.row(name, options.start, options.limit, ceiling))
        print(f"{name}: {rows[-1]['ratio']} times the plain loop", file=sys.stderr, flush=True)
    precision = "TF32" if torch.backends.cuda.matmul.allow_tf32 else "float32"
    about = f"{torch.cuda.get_device_name(device)}, products in {precision}, ceiling {ceiling / 1e12:.1f} TFLOP/s"
    Console(width=160).print(show(rows, about))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"device": about, "ceiling": ceiling, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
