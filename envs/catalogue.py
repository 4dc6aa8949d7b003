"""The built-in scenarios."""

from __future__ import annotations

from typing import Any

from trimtab.envs.scenario import DEFAULT_LEVERS, FamilyShare, Scenario, default_signals


def _scenario(identity: str, doc: str, *families: str, **fields: Any) -> Scenario:
    shares = [FamilyShare(name=name) for name in families]
    return Scenario.of({"id": identity, "doc": doc, "families": shares, **fields})


# The shipped policy meets runs of any length, so it does not read the count of steps, which training bounds.
_MIX_SIGNALS = tuple(name for name in default_signals(DEFAULT_LEVERS) if name != "time")

SCENARIOS: dict[str, Scenario] = {
    scenario.id: scenario
    for scenario in (
        _scenario("digits-mlp", "handwritten digits, one hidden layer", "digits-mlp"),
        _scenario("tabular-mlp", "iris, wine and breast cancer, one hidden layer", "tabular-mlp"),
        _scenario("teacher-mlp", "labels of random teacher networks, one hidden layer", "teacher-mlp"),
        _scenario("digits-mlp-deep", "handwritten digits, three hidden layers", "digits-mlp-deep"),
        _scenario("digits-mlp-tanh", "handwritten digits, two hidden layers of tanh units", "digits-mlp-tanh"),
        _scenario(
            "mlp-mix",
            "digits in shallow and deep networks and teacher networks, in equal shares",
            "digits-mlp",
            "digits-mlp-deep",
            "teacher-mlp",
            signals=_MIX_SIGNALS,
        ),
    )
}
