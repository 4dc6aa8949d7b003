"""Memory of a process over many episodes: it must stay flat.

    python benchmarks/memory.py [--scenario digits-mlp] [--episodes 1000] [--num-envs 50] [--out results/memory.json]

Plays episodes of a vector environment under random actions, and notes the resident memory of the process each time that
another tenth of them has ended. The first tenth is warm-up: tables, compilers and allocators fill then. Prints the growth
from there to the end, and exits with 1 if it is more than ``--allowed`` MiB.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import trimtab

PAGE = 4096


def resident() -> float:
    """Resident memory of this process in MiB (Linux)."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def play(scenario: str, episodes: int, num_envs: int, seed: int = 0) -> list[tuple[int, float]]:
    """(episodes ended, MiB) at each tenth, under random actions."""
    env = trimtab.make_vec(scenario, num_envs, seed=seed)
    rng, ended, notes = np.random.default_rng(seed), 0, []
    env.reset()
    while ended < episodes:
        actions = rng.uniform(-1, 1, (num_envs, *env.action_space.shape)).astype(np.float32)
        ended += int(env.step(actions)[2].sum())
        if ended >= (len(notes) + 1) * episodes // 10:
            notes.append((ended, resident()))
    env.close()
    return notes


def main() -> None:
    """Plays, prints the table, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", default="digits-mlp")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--num-envs", type=int, default=50)
    parser.add_argument("--allowed", type=float, default=16.0, help="MiB of growth after the first tenth")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    notes = play(options.scenario, options.episodes, options.num_envs)
    table = Table(title=f"{options.scenario}, {options.num_envs} runs at once")
    for column in ("episodes", "MiB", "since the first tenth"):
        table.add_column(column, justify="right")
    for ended, mib in notes:
        table.add_row(str(ended), f"{mib:.1f}", f"{mib - notes[0][1]:+.1f}")
    Console().print(table)
    growth = notes[-1][1] - notes[0][1]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"scenario": options.scenario, "notes": notes, "growth_mib": growth}))
    if growth > options.allowed:
        sys.exit(f"memory grew by {growth:.1f} MiB over {options.episodes} episodes; {options.allowed:g} are allowed")


if __name__ == "__main__":
    main()
