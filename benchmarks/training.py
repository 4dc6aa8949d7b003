"""Environment steps per second of a whole training, PPO updates and evaluations included.

    python benchmarks/training.py [--scenario digits-mlp] [--runs 64]

Two trainings of different length take the same time to prepare (compile, first evaluation), so the difference of their
times over the difference of their steps is the steady rate. Beside it, in the same process: what a plain PyTorch loop
manages, which needs ten optimizer steps for one environment step and learns nothing about control.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from speed.architectures import ARCHITECTURES, family_of, full_size
from speed.loops import INTERVAL, plain_loop

from trimtab.agents.train import run_train

SHORT, LONG, PLAIN = 40_000, 120_000, 200  # environment steps; intervals of the plain loop


def seconds(scenario: str, runs: int, timesteps: int, out: Path) -> float:
    """Wall time of one training."""
    start = time.perf_counter()
    run_train(scenario, timesteps=timesteps, seed=0, out=out, num_envs=runs)
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", default="digits-mlp")
    parser.add_argument("--runs", type=int, default=64)
    options = parser.parse_args()
    architecture = ARCHITECTURES["mlp-sgd"]
    family = family_of(architecture)
    plain = plain_loop(architecture, family, full_size(family, 1, architecture.rule, architecture.lr)[0])
    plain.run(10)
    start = time.perf_counter()
    plain.run(PLAIN)
    plain_rate = PLAIN / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        seconds(options.scenario, options.runs, SHORT, Path(folder) / "warm")  # fills the compiler's cache
        short = seconds(options.scenario, options.runs, SHORT, Path(folder) / "short")
        long = seconds(options.scenario, options.runs, LONG, Path(folder) / "long")
    rate = (LONG - SHORT) / (long - short)
    print(
        f"{options.scenario}, {options.runs} runs: {rate:,.0f} environment steps/s, {rate * INTERVAL:,.0f} run-steps/s"
    )
    print(
        f"plain PyTorch loop: {plain_rate:,.0f} environment steps' worth of training a second; ratio {rate / plain_rate:.1f}"
    )


if __name__ == "__main__":
    main()
