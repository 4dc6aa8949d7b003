"""The pages on signals and levers name every entry of their tables, with its formula."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.inner_training.disturbances import DISTURBANCES
from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.measurements import MEASUREMENTS
from trimtab.inner_training.signals import SIGNALS
from trimtab.inner_training.tasks.recipe import OPTIMIZER_KINDS
from trimtab.inner_training.update_rules import UPDATE_RULES

DOCS = Path(__file__).parents[2] / "docs"
BAR = chr(92) + "|"  # inside a table


@pytest.mark.parametrize("name", SIGNALS)
def test_every_signal_has_a_row(name: str) -> None:
    signal = SIGNALS[name]
    doc, missing = signal.doc.replace("|", BAR), signal.missing or "never"
    row = f"| {signal.group} | `{name}` | {doc} | {missing} | {signal.cost} | {signal.source} |"
    assert row in (DOCS / "signals.md").read_text()


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_has_a_row(name: str) -> None:
    one = MEASUREMENTS[name]
    row = f"| `{name}` | {one.doc.replace('|', BAR)} | {one.cost} | {'yes' if one.live else 'no'} |"
    assert row in (DOCS / "signals.md").read_text()


@pytest.mark.parametrize("name", LEVERS)
def test_every_lever_has_a_row(name: str) -> None:
    lever = LEVERS[name]
    row = f"| `{name}` | {lever.doc} | {lever.low:g} to {lever.high:g} | {lever.rate:g} | {lever.target_low:g} |"
    assert row in (DOCS / "levers.md").read_text()


@pytest.mark.parametrize("name", DISTURBANCES)
def test_every_disturbance_has_a_row(name: str) -> None:
    kind = DISTURBANCES[name]
    severity = "none | none | none"
    if kind.unit:
        drawn = f"{kind.severity[0]:g} to {kind.severity[1]:g}"
        severity = f"{kind.unit} | {drawn} | {kind.lowest:g} to {kind.highest:g}"
    row = f"| `{name}` | {kind.doc} | {severity} | {kind.steps[0]} to {kind.steps[1]} |"
    assert row in (DOCS / "disturbances.md").read_text()


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_every_update_rule_has_a_row(name: str) -> None:
    rule = UPDATE_RULES[name]
    decay = "decoupled" if rule.decoupled else "coupled"
    page = (DOCS / "update_rules.md").read_text()
    assert f"| `{name}` | {rule.doc} | {rule.momentum} | {decay} |" in page
    assert all(f"`{kind}`" in page for kind in OPTIMIZER_KINDS)
