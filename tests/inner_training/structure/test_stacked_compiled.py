"""Evidence in compiled populations: the same numbers, and eager ones with a line in the log where compiling fails."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.inner_training.structure.populations import BATCH, family_of, stacked
from trimtab.inner_training.population import Population
from trimtab.inner_training.structure import stacked_evidence
from trimtab.inner_training.structure.stacked import Stacked


def compiled(name: str) -> Stacked:
    family = family_of(name)
    runs = Population(family, 2, rules=("adamw",), mode="compile")
    runs.reset(range(2), [family.made(seed, "adamw", 1.0, BATCH - seed % 2) for seed in range(2)])
    runs.advance(2)
    return Stacked(runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "conv", "residual"])
def test_compiled_evidence_is_that_of_eager_runs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    fast, slow = compiled(name), stacked(name, runs=2)
    if fast.population.mode != "compile":
        pytest.skip("there is no compiler here")
    slow.population._learner = fast.population._learner
    for _ in range(2):
        for (group, one), (_, other) in zip(fast.score("agf").items(), slow.score("agf").items(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=group)
        fast.prune(0.3, fast.score("magnitude"))
        slow.prune(0.3, slow.score("magnitude"))
    assert not [record for record in caplog.records if record.name == "trimtab"]
    assert fast.diagnostics().keys() == slow.diagnostics().keys()


def test_a_failing_compiler_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(function: object) -> object:
        raise RuntimeError("no compiler\nbut a long story")

    structure = stacked("mlp")
    expected = structure.score("agf")
    structure._gatherers = stacked_evidence.Gatherers(compile=True)
    monkeypatch.setattr(stacked_evidence, "compiled", broken)
    with caplog.at_level(logging.WARNING, logger="trimtab"):
        for _ in range(2):
            scores = structure.score("agf")
    assert [record.message.endswith("gathered eagerly: no compiler") for record in caplog.records] == [True]
    assert all(torch.equal(scores[name], expected[name]) for name in expected)
