"""What a benchmark measures of structure, and policies that move it, from training to a bundle."""

from __future__ import annotations

import numpy as np
import pytest

from tests.envs.test_structural_levers import scenario
from trimtab.agents.diagnostics import STRUCTURE
from trimtab.agents.evaluate import evaluate
from trimtab.errors import MismatchError


def test_active_share_work_and_edits_are_measured() -> None:
    config = scenario(levers=["lr", "width"])
    grown = evaluate("grow-steps", config, runs=3, mode="eager")
    held = evaluate("constant", config, runs=3, mode="eager")
    assert set(STRUCTURE) <= set(grown.measures)
    assert (held.measures["mean_active_share"] == 0.5).all() and not held.measures["edits"].any()
    assert (grown.measures["edits"] >= 4).all() and (grown.measures["mean_active_share"] > 0.6).all()
    assert (grown.measures["mean_active_work"] > held.measures["mean_active_work"]).all()
    # Five steps of 0.06 from 0.5 to 0.8, the first at once: 0.68 on average.
    np.testing.assert_allclose(grown.measures["mean_active_share"], 0.68, atol=0.05)


def test_random_moves_every_lever_of_a_scenario() -> None:
    found = evaluate("random", scenario(levers=["lr", "width", "reset"]), runs=2, mode="eager")
    assert (found.measures["edits"] > 5).all()


def test_what_does_not_fit_is_refused_and_others_measure_nothing() -> None:
    with pytest.raises(MismatchError, match="policy 'grow-steps' moves width, but scenario 'digits-mlp' has only"):
        evaluate("grow-steps", "digits-mlp", runs=1)
