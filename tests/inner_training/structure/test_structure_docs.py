"""The page on structure names every criterion, normalisation, growth method and newborn state, with its formula."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from trimtab.inner_training.networks.plastic_mlp import PLASTIC_ACTIVATIONS
from trimtab.inner_training.structure.criteria import CRITERIA
from trimtab.inner_training.structure.densities import DISTRIBUTIONS
from trimtab.inner_training.structure.evidence import NEEDS
from trimtab.inner_training.structure.growth import GROWTH
from trimtab.inner_training.structure.lottery import ARMS
from trimtab.inner_training.structure.maintenance import MAINTENANCE
from trimtab.inner_training.structure.newborn_state import NEWBORN_STATES
from trimtab.inner_training.structure.normalisations import NORMALISATIONS
from trimtab.inner_training.structure.sparse_methods import SPARSE_TRAINING

PAGE = (Path(__file__).parents[3] / "docs" / "structure.md").read_text()
BAR = chr(92) + "|"  # inside a table


def fields(names: frozenset[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def criterion_row(name: str) -> str:
    one = CRITERIA[name]
    weights = "no" if one.weight is None else f"per {one.within}" if one.weight_needs == one.needs else f"per {one.within}: {fields(one.weight_needs)}"  # fmt: skip
    return f"| `{name}` | {one.doc.replace('|', BAR)} | {fields(one.needs)} | {weights} | {one.source} |"


def growth_row(name: str) -> str:
    one = GROWTH[name]
    needs = fields(one.needs - {"weights_in", "weights_out", "bias"})
    return f"| `{name}` | {one.doc} | {'yes' if one.preserves else 'no'} | {needs} | {one.source} |"


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_has_a_row(name: str) -> None:
    assert criterion_row(name) in PAGE.splitlines()
    assert CRITERIA[name].needs | CRITERIA[name].weight_needs <= NEEDS


@pytest.mark.parametrize("name", GROWTH)
def test_every_growth_method_has_a_row(name: str) -> None:
    assert growth_row(name) in PAGE.splitlines()
    assert GROWTH[name].needs <= NEEDS


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_every_normalisation_has_a_row(name: str) -> None:
    one = NORMALISATIONS[name]
    assert f"| `{name}` | {one.doc.replace('|', BAR)} | {fields(one.needs)} | {one.source} |" in PAGE.splitlines()


@pytest.mark.parametrize("name", NEWBORN_STATES)
def test_every_newborn_state_has_a_row(name: str) -> None:
    one = NEWBORN_STATES[name]
    assert f"| `{name}` | {one.doc} | {one.source} |" in PAGE.splitlines()


@pytest.mark.parametrize("name", MAINTENANCE)
def test_every_maintenance_has_its_rows(name: str) -> None:
    one = MAINTENANCE[name]
    assert f"| `{name}` | {one.acts_on} | {one.doc.replace('|', BAR)} | {one.source} |" in PAGE.splitlines()
    for own in one.settings:
        span = f"{own.low:g} to {own.high:g}"
        assert f"| `{name}` | `{own.name}` | {own.default:g} | {span} | {own.source} |" in PAGE.splitlines()
    assert one.needs <= NEEDS


@pytest.mark.parametrize("name", PLASTIC_ACTIVATIONS)
def test_every_plastic_activation_has_a_row(name: str) -> None:
    one = PLASTIC_ACTIVATIONS[name]
    assert f"| `{name}` | {one.doc.replace('|', BAR)} | {one.source} |" in PAGE.splitlines()


def test_every_field_of_the_evidence_is_named() -> None:
    assert all(f"`{name}`" in PAGE for name in NEEDS)


@pytest.mark.parametrize("name", SPARSE_TRAINING)
def test_every_method_of_sparse_training_has_its_rows(name: str) -> None:
    one = SPARSE_TRAINING[name]
    assert f"| `{name}` | {one.doc} | {one.source} |" in PAGE.splitlines()
    for own in one.settings:
        span = f"{own.low:g} to {own.high:g}"
        assert f"| `{name}` | `{own.name}` | {own.default:g} | {span} | {own.source} |" in PAGE.splitlines()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_has_a_row(name: str) -> None:
    one = DISTRIBUTIONS[name]
    assert f"| `{name}` | {one.doc} | {one.source} |" in PAGE.splitlines()


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_of_a_lottery_has_a_row(name: str) -> None:
    assert f"| `{name}` | {ARMS[name]} |" in PAGE.splitlines()


def test_the_example_of_a_users_own_model_runs(tmp_path: Path) -> None:
    section = PAGE.partition("## Your own model")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    script = tmp_path / "example.py"
    script.write_text("\n".join(blocks))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runpy.run_path(str(script))
