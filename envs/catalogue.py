"""The built-in scenarios: one for each built-in task family, under its name, mixes of families, and disturbed runs."""

from __future__ import annotations

from typing import Any

from trimtab.envs.parts import FamilyShare
from trimtab.envs.scenario import DEFAULT_LEVERS, Scenario, default_signals
from trimtab.inner_training.disturbances import DISTURBANCES
from trimtab.inner_training.tasks import BUILT_IN, FAMILIES


def _scenario(identity: str, doc: str, *families: str, **fields: Any) -> Scenario:
    shares = [FamilyShare(name=name) for name in families]
    return Scenario.of({"id": identity, "doc": doc, "families": shares, **fields})


# The shipped policy meets runs of any length, so it does not read the count of steps, which training bounds.
_MIX_SIGNALS = tuple(name for name in default_signals(DEFAULT_LEVERS) if name != "time")

# Beside the usual ones: what tells changing tasks and unlike networks from a run that is merely slow. A gradient and a
# few passes over 32 examples every fifth decision; nothing of the Hessian.
_VARIETY_SIGNALS = (
    *_MIX_SIGNALS,
    "grad_noise_scale",
    "update_ratio_early",
    "update_ratio_late",
    "shift",
    "val_shift",
    "persistence",
    "underfitting",
    "overfitting",
    "activations_available",
    "dormant",
    "effective_rank",
    "curvature_available",
    "overshoot",
)

_DISTURBED_SIGNALS = (
    *default_signals(DEFAULT_LEVERS),
    "shift",
    "persistence",
    "deadline_available",
    "deadline_left",
)

# An edit each fifth decision at most, and what a network costs charged lightly beside how well it does under way.
_GROWING: dict[str, Any] = {
    "levers": ["lr", "width"],
    # Scores are raw, as the policies of docs/learned_structure.md were trained and judged.
    "structure": {"start": 0.2, "most": 0.2, "rest": 5, "budget": 12, "normalisation": "none"},
    "reward": {"progress": 0.0, "trajectory": 1.0, "cost": 0.1},
}

_MIXES = (
    _scenario(
        "mlp-mix",
        "digits in shallow and deep networks and teacher networks, in equal shares",
        "digits-mlp",
        "digits-mlp-deep",
        "teacher-mlp",
        signals=_MIX_SIGNALS,
    ),
    _scenario(
        "variety-mix",
        "perceptrons, convolutions, graphs, a transformer and changing tasks, in equal shares",
        "digits-mlp",
        "digits-mlp-deep",
        "teacher-mlp",
        "regression",
        "graph",
        "sprites-conv",
        "language",
        "permuted-digits",
        signals=_VARIETY_SIGNALS,
    ),
    _scenario(
        "digits-mlp-disturbed",
        "digits-mlp with every kind of disturbance at random, and a deadline half a budget late",
        "digits-mlp",
        signals=_DISTURBED_SIGNALS,
        disturbances=[{"kind": kind, "rate": 0.3} for kind in DISTURBANCES],
        deadline=0.5,
    ),
    _scenario(
        "growing-digits",
        "digits-mlp from a fifth of its units, with a lever that prunes and grows; the average height of the loss counts",
        "digits-mlp",
        **_GROWING,
    ),
    _scenario(
        "growing-sprites",
        "sprites-conv from a fifth of its channels, with a lever that prunes and grows; the average height of the loss counts",
        "sprites-conv",
        **_GROWING,
    ),
    _scenario(
        "growing-head",
        "sprites-head from a fifth of its hidden units above a dense trunk, with the lever of growing-sprites",
        "sprites-head",
        **_GROWING,
    ),
    _scenario(
        "growing-mix",
        "mlp-mix from a fifth of its units, with a lever that prunes and grows beside the usual ones; the average height of the loss "
        "counts, and work costs",
        "digits-mlp",
        "digits-mlp-deep",
        "teacher-mlp",
        **{
            **_GROWING,
            "levers": [*DEFAULT_LEVERS, "width"],
            "signals": tuple(name for name in default_signals((*DEFAULT_LEVERS, "width")) if name != "time"),
            "reward": {"progress": 0.0, "trajectory": 1.0, "cost": 0.2},
        },
    ),
)

SCENARIOS: dict[str, Scenario] = {
    scenario.id: scenario for scenario in (*(_scenario(name, FAMILIES[name].doc, name) for name in BUILT_IN), *_MIXES)
}
