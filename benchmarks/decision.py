"""How long one decision of a learned policy takes: the bundle's runtime, one run, one thread.

    python benchmarks/decision.py [--decisions 10000] [--out FILE.json]

The shipped default policy, and policies with its signals and levers and random weights: both kinds of action, relu, and
LSTMs. Each takes its decisions one after the other, with the state of the last one, after a hundred that do not count;
beside them stands what Stable-Baselines3 needs for the same network (`predict`, normalised observations). The figures
are of the processor's wall clock, and the median is what counts: other programs and the scheduler lengthen the tail.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.policies import ActorCriticPolicy

from trimtab.policies.lstm import LSTMLayer
from trimtab.policies.network import LearnedPolicy
from trimtab.policies.registry import DEFAULT_BUNDLE, load_policy

WARM_UP = 100


def network(like: LearnedPolicy, outputs: int, units: tuple[int, ...] = ()) -> dict[str, object]:
    """Random arrays: LSTM layers of so many units and then 64 units, or without an LSTM the sizes of ``like``."""
    rng = np.random.default_rng(0)
    inputs = [len(like.signals), *units]
    widths = [inputs[-1], *([64] if units else like.sizes[1:-1]), outputs]

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, 1 / np.sqrt(shape[-1]), shape)

    lstm = [LSTMLayer(draw(4 * b, a), draw(4 * b, b), draw(4 * b)) for a, b in itertools.pairwise(inputs)]
    layers = [(draw(b, a), draw(b)) for a, b in itertools.pairwise(widths)]
    return {"lstm": lstm, "layers": layers}


def policies() -> dict[str, LearnedPolicy]:
    """What is measured, by name."""
    shipped = load_policy(DEFAULT_BUNDLE)
    assert isinstance(shipped, LearnedPolicy)
    levers = len(shipped.levers)
    return {
        "shipped default": shipped,
        "the same with relu": replace(shipped, activation="relu"),
        "the same, multi-discrete": replace(shipped, action_kind="multi-discrete", **network(shipped, 3 * levers)),
        "LSTM 64": replace(shipped, **network(shipped, levers, (64,))),
        "LSTM 64, multi-discrete": replace(
            shipped, action_kind="multi-discrete", **network(shipped, 3 * levers, (64,))
        ),
        "LSTM 64, 64": replace(shipped, **network(shipped, levers, (64, 64))),
    }


def decide(policy: LearnedPolicy, rows: np.ndarray) -> Callable[[int], None]:
    """One decision of one run, on the row of a number."""
    state = policy.init(1)

    def step(number: int) -> None:
        nonlocal state
        _, state = policy.act(rows[number], state)

    return step


def predict(policy: LearnedPolicy, rows: np.ndarray) -> Callable[[int], None]:
    """The same network in torch, as Stable-Baselines3 asks it."""
    box = gymnasium.spaces.Box(-10, 10, (len(policy.signals),), np.float32)
    moves = gymnasium.spaces.Box(-1, 1, (len(policy.levers),), np.float32)
    actor = ActorCriticPolicy(box, moves, lambda _: 1e-3, net_arch=policy.sizes[1:-1])

    def step(number: int) -> None:
        actor.predict(rows[number], deterministic=True)

    return step


def measure(step: Callable[[int], None], count: int) -> np.ndarray:
    """(count,) microseconds."""
    times = np.empty(count)
    for number in range(WARM_UP):
        step(number % count)
    for number in range(count):
        begun = time.perf_counter_ns()
        step(number)
        times[number] = time.perf_counter_ns() - begun
    return times / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = policies()
    shipped = chosen["shipped default"]
    draws = np.random.default_rng(0).uniform(-1, 1, (args.decisions, 1, len(shipped.signals))).astype(np.float32)
    steps = {name: decide(policy, draws) for name, policy in chosen.items()}
    steps["Stable-Baselines3's predict, shipped default's size"] = predict(shipped, draws)
    table = Table("us per decision", "parameters", "median", "90 %", "99 %", box=None)
    rows = []
    for name, step in steps.items():
        times = measure(step, args.decisions)
        parameters = chosen.get(name, shipped).parameters
        rows.append([name, parameters, *(round(float(np.quantile(times, share)), 2) for share in (0.5, 0.9, 0.99))])
        table.add_row(*map(str, rows[-1]))
    Console().print(table)
    if args.out is not None:
        args.out.write_text(json.dumps({"decisions": args.decisions, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
