"""Ids of the built-in scenarios, without importing what they are made of."""

from __future__ import annotations

from trimtab.inner_training.tasks import BUILT_IN

MIXES = (
    "mlp-mix",
    "variety-mix",
    "digits-mlp-disturbed",
    "growing-digits",
    "growing-sprites",
    "growing-head",
    "growing-mix",
)


def scenarios() -> tuple[str, ...]:
    """Ids of the built-in scenarios: one for each built-in task family, under its name, and the others.

    >>> "digits-mlp" in scenarios()
    True
    """
    return (*BUILT_IN, *MIXES)


def gymnasium_id(scenario_id: str) -> str:
    """Id under which Gymnasium knows a built-in scenario.

    >>> gymnasium_id("digits-mlp")
    'trimtab/DigitsMlp-v0'
    """
    return "trimtab/" + "".join(word.capitalize() for word in scenario_id.split("-")) + "-v0"
