"""Ids of the built-in scenarios, without importing what they are made of."""

from __future__ import annotations

_IDS = ("digits-mlp", "tabular-mlp", "teacher-mlp", "digits-mlp-deep", "digits-mlp-tanh", "mlp-mix")


def scenarios() -> tuple[str, ...]:
    """Ids of the built-in scenarios.

    >>> "digits-mlp" in scenarios()
    True
    """
    return _IDS


def gymnasium_id(scenario_id: str) -> str:
    """Id under which Gymnasium knows a built-in scenario.

    >>> gymnasium_id("digits-mlp")
    'trimtab/DigitsMlp-v0'
    """
    return "trimtab/" + "".join(word.capitalize() for word in scenario_id.split("-")) + "-v0"
