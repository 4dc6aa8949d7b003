"""Learned policies with random weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from trimtab.policies.lstm import LSTMLayer
from trimtab.policies.network import LearnedPolicy

SIGNALS = ("progress", "progress_available", "started", "loss_level", "loss_slope", "grad_cosine", "lr_position")
PROVENANCE = {
    "scenario": "digits-mlp",
    "families": ["digits-mlp"],
    "algorithm": "ppo",
    "timesteps": 40_000,
    "seed": 3,
    "command": "trimtab train digits-mlp --seed 3",
    "versions": {"trimtab": "0.1.0", "torch": "2.8.0", "stable-baselines3": "2.7.0"},
    "settings": {"gamma": 1.0, "n_steps": 32, "target_kl": None, "clip": True},
}


def learned(
    action_kind: str = "box",
    activation: str = "tanh",
    hidden: tuple[int, ...] = (16, 16),
    lstm: tuple[int, ...] = (),
    **changes: Any,
) -> Any:
    """A policy on seven signals and two levers; ``lstm`` are the units of its LSTM layers, ``changes`` replace fields."""
    rng = np.random.default_rng(0)
    outputs = 2 if action_kind == "box" else 6
    widths = [len(SIGNALS), *lstm]
    sizes = [widths[-1], *hidden, outputs]
    layers = [
        (rng.normal(0, 1 / np.sqrt(a), (b, a)).astype(np.float32), rng.normal(0, 0.3, b).astype(np.float32))
        for a, b in pairwise(sizes)
    ]
    recurrent = [
        LSTMLayer(*(rng.normal(0, 0.6, shape).astype(np.float32) for shape in ((4 * b, a), (4 * b, b), (4 * b,))))
        for a, b in pairwise(widths)
    ]
    fields = {
        "name": "made-up",
        "signals": SIGNALS,
        "levers": {"lr": "moves", "momentum": "moves"},
        "decide_every": 10,
        "layers": layers,
        "lstm": recurrent,
        "activation": activation,
        "obs_mean": rng.uniform(-0.5, 0.5, len(SIGNALS)),
        "obs_var": rng.uniform(0.0, 0.5, len(SIGNALS)),
        "obs_clip": 10.0,
        "obs_eps": 1e-8,
        "action_kind": action_kind,
        "obs_low": np.linspace(-1, -0.5, len(SIGNALS)),
        "obs_high": np.linspace(0.5, 1, len(SIGNALS)),
        "provenance": PROVENANCE,
        "results": {"final_loss": -0.45, "scenario": "digits-mlp"},
    }
    return LearnedPolicy(**{**fields, **changes})
