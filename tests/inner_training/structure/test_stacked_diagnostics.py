"""Diagnostics of all runs: their values beside slow ones, and what they are where there is nothing to tell."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.inner_training.structure.populations import NETWORKS, stacked
from trimtab.inner_training.structure.selections import dynamic_range
from trimtab.inner_training.structure.stacked_diagnostics import DIAGNOSTICS, NEEDS, PARITY

PAGE = (Path(__file__).parents[3] / "docs" / "structure.md").read_text()


@pytest.mark.parametrize("name", NETWORKS)
def test_all_are_finite_numbers_of_each_run(name: str) -> None:
    structure = stacked(name)
    found = structure.diagnostics()
    assert list(found) and found.keys() == DIAGNOSTICS.keys()
    assert all(
        value.shape == (3,) and value.dtype == torch.float32 and value.isfinite().all() for value in found.values()
    )
    for unknown in (
        "parity_known",
        "scored",
        "overlap_known",
        "log_gradient_parity",
        "log_activation_parity",
        "overlap",
    ):
        assert not found[unknown].any()
    assert found["active_share"].eq(1).all() and found["newborn_share"].eq(0).all()


def test_values_are_those_of_the_definitions() -> None:
    structure = stacked("mlp", steps=5)
    structure.prune(0.5, structure.score("random"), scope="layer")
    structure.population.advance(3)
    edit = structure.grow(0.25, "random")
    structure.population.advance(2)
    first, second = structure.score("magnitude"), structure.score("agf")
    evidence = structure.evidence(NEEDS)
    found = structure.diagnostics(evidence)
    for run in range(3):
        logs: dict[str, list[float]] = {"pre_grad": [], "active": []}
        dormant, ages, active = 0, [], 0
        for name, one in evidence.items():
            born, live = edit.units[name][run], structure.active[name][run]
            for field, values in logs.items():
                value = one.read(field)[run]
                new, old = value[born].mean().clamp(min=1e-12), value[live & ~born].mean().clamp(min=1e-12)
                values.append(max(-PARITY, min(PARITY, math.log(new / old))))
            size = one.read("mean_abs")[run][live]
            dormant += int((size <= 0.025 * size.mean()).sum())
            active += int(live.sum())
            ages += [2 if unit in born.nonzero()[:, 0] else 5 for unit in live.nonzero()[:, 0]]
        expected = {
            "log_gradient_parity": sum(logs["pre_grad"]) / 2,
            "log_activation_parity": sum(logs["active"]) / 2,
            "parity_known": 1.0,
            "mean_age": sum(ages) / len(ages),
            "newborn_share": 4 / active,
            "active_share": active / 16,
            "dormant_share": dormant / active,
            "scored": 1.0,
            "overlap_known": 1.0,
        }
        for name, value in expected.items():
            assert float(found[name][run]) == pytest.approx(value, rel=1e-4, abs=1e-6), name
        live = torch.cat([mask[run] for mask in structure.active.values()])
        last, before = (torch.cat([scores[name][run] for name in scores]) for scores in (second, first))
        assert float(found["log_dynamic_range"][run]) == pytest.approx(float(dynamic_range(last[live]).log()), rel=1e-4)
        better = [
            set(torch.where(live, one, -1).argsort(descending=True)[: active // 2].tolist()) for one in (last, before)
        ]
        assert float(found["overlap"][run]) == pytest.approx(len(better[0] & better[1]) / len(better[0] | better[1]))


def test_newborns_without_incumbents_are_not_compared() -> None:
    structure = stacked("mlp")
    structure.reset(structure.active)
    found = structure.diagnostics()
    assert not found["parity_known"].any() and found["newborn_share"].eq(1).all()


def test_newborns_are_backward_starved_when_their_columns_are_zero() -> None:
    structure = stacked("mlp")
    structure.prune(0.25, structure.score("random"), scope="layer")
    structure.grow(0.25, "zero-out")
    found = structure.diagnostics()
    assert (found["log_gradient_parity"] == -PARITY).all() and found["parity_known"].all()


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_every_diagnostic_has_a_row(name: str) -> None:
    doc = DIAGNOSTICS[name].replace("|", chr(92) + "|")
    assert f"| `{name}` | {doc} |" in PAGE.splitlines()
