"""Levers of events, for tests of the rules that govern them where the lever table does not have them."""

from __future__ import annotations

import pytest

from trimtab.inner_training.levers import LEVERS, Lever

EVENTS = ("rollback", "reset_moments", "anchor")


def offer_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts stand-ins into the lever table until the test is over."""
    for name in EVENTS:
        if name not in LEVERS:
            lever = Lever(name=name, hyperparameter=name, doc="a stand-in", low=0.1, high=1.0, rate=1.0)
            monkeypatch.setitem(LEVERS, name, lever)
