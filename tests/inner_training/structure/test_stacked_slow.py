"""Stacked edits beside a slow reference: each run as a module of its own, edited like a user's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.inner_training.structure.populations import NETWORKS, stacked
from trimtab.inner_training.structure.collect import weights_of
from trimtab.inner_training.structure.draft import Draft
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.editing import Editor
from trimtab.inner_training.structure.evidence import Evidence, run_of
from trimtab.inner_training.structure.gating import Gates
from trimtab.inner_training.structure.growth import resolve_growth
from trimtab.inner_training.structure.known import known_groups
from trimtab.inner_training.structure.newborn_state import resolve_newborn_state
from trimtab.inner_training.structure.stacked import Stacked

each_network = pytest.mark.parametrize("name", NETWORKS)


class Slow:
    """The runs of a population as modules with Adam, and the same units inactive."""

    def __init__(self, structure: Stacked) -> None:
        self.structure, self.editors = structure, []
        runs = structure.population
        flat = (Draft(structure._flat, runs._learner, structure._units).values, *runs._learner[1:3])
        values, first, second = (runs.layout.views(one) for one in flat)
        for run in range(runs.num_runs):
            model = copy.deepcopy(runs.family.module)
            model.load_state_dict({**model.state_dict(), **{name: value[run] for name, value in values.items()}})
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            for name, parameter in model.named_parameters():
                moments = {"exp_avg": first[name][run].clone(), "exp_avg_sq": second[name][run].clone()}
                optimizer.state[parameter] = {"step": torch.tensor(9.0), **moments}
            gates = Gates(model, optimizer, known_groups(model))
            editor = Editor(gates, {})
            for name, active in structure.active.items():
                gates.active[name] = active[run].clone()
                gates.refresh(gates.entries(gates.groups[name], (~active[run]).nonzero()[:, 0]))
            self.editors.append(editor)

    def remove(self, units: dict[str, Tensor]) -> None:
        for run, editor in enumerate(self.editors):
            editor.remove({name: gone[run].nonzero()[:, 0] for name, gone in units.items() if gone[run].any()})

    def grow(self, share: float, method: str, state: str, seeds: dict[str, Tensor]) -> None:
        chosen, mode = resolve_growth(method), resolve_newborn_state(state)
        for run, editor in enumerate(self.editors):
            for name, group in editor.gates.groups.items():
                count = min(round(share * group.units), int((~editor.gates.active[name]).sum()))
                if not count:
                    continue
                alone = Evidence(**weights_of(editor.gates, group))  # type: ignore[arg-type]
                stacked_up = Evidence(**{key: value[None] for key, value in alone.given().items()})
                # As many as the run with the most room gets: what is drawn for one depends on how many there are.
                most = round(share * group.units)
                counts = torch.tensor([count])
                born = chosen.make(stacked_up, most, seeds[name][run : run + 1], counts)
                values = {key: value[0] for key, value in vars(born).items() if isinstance(value, Tensor)}
                editor.bear(name, type(born)(**values), mode, alone)

    def assert_same(self) -> None:
        runs = self.structure.population
        now = [runs.layout.views(flat) for flat in runs._learner[:3]]
        for run, editor in enumerate(self.editors):
            gates = editor.gates
            for name, active in self.structure.active.items():
                assert torch.equal(gates.active[name], active[run])
            for name, parameter in gates.model.named_parameters():
                held = gates.optimizer.state[parameter]
                close(now[0][name][run], parameter.detach(), name)
                close(now[1][name][run], held["exp_avg"], name)
                close(now[2][name][run], held["exp_avg_sq"], name)


def close(one: Tensor, other: Tensor, name: str) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=lambda message: f"{name}: {message}")


@pytest.mark.parametrize("scope", ["global", "layer"])
@each_network
def test_removal(name: str, scope: str) -> None:
    structure = stacked(name)
    slow = Slow(structure)
    scores = structure.score("magnitude")
    edit = structure.prune(0.4, scores, scope=scope)
    for run in range(3):
        expected = slowest(structure, {key: value[run] for key, value in scores.items()}, 0.4, scope)
        assert {key: units[run].nonzero()[:, 0].tolist() for key, units in edit.units.items()} == expected
    slow.remove(edit.units)
    slow.assert_same()


def slowest(structure: Stacked, scores: dict[str, Tensor], share: float, scope: str) -> dict[str, list[int]]:
    """The lowest units of a run in which all are active, one after the other."""
    gone: dict[str, list[int]] = {name: [] for name in scores}
    pools = [list(scores)] if scope == "global" else [[name] for name in scores]
    for pool in pools:
        for _ in range(round(share * sum(len(scores[name]) for name in pool))):
            able = [
                (float(value), place, unit, name)
                for place, name in enumerate(pool)
                for unit, value in enumerate(scores[name])
                if unit not in gone[name] and len(scores[name]) - len(gone[name]) > structure._flat[name].group.minimum
            ]
            if able:
                _, _, unit, name = min(able)
                gone[name].append(unit)
    return {name: sorted(units) for name, units in gone.items()}


@pytest.mark.parametrize("state", ["zero", "transplant"])
@pytest.mark.parametrize("method", ["random", "pairing", "net2wider", "zero-in", "random-parked"])
@each_network
def test_growth(name: str, method: str, state: str) -> None:
    structure = stacked(name)
    structure.prune(0.5, structure.score("random"))
    structure.population.advance(2)
    slow, seeds = Slow(structure), {one.name: structure._seeds(one) for one in structure._flat}
    slow.grow(0.4, method, state, seeds)
    edit = structure.grow(0.4, method, newborn_state=state)
    assert edit.counts.sum() > 0
    slow.assert_same()


def test_renewed_rows_are_drawn_as_linear_layers_draw_them() -> None:
    structure = stacked("mlp")
    structure.remove({"layers.0": torch.arange(8).expand(3, 8) >= 6})
    one = structure._flat["layers.1"]
    draws = Draws(structure._seeds(one), (3,), torch.device("cpu"))
    drawn = 2 * draws.uniform(8, 1, 8)[:, :, 0] - 1
    chosen = torch.arange(8).expand(3, 8) == 4
    structure.reset({"layers.1": chosen})
    rows = structure.population.layout.views(structure.population._learner.parameters)["layers.1.weight"]
    expected = torch.where(torch.arange(8) < 6, drawn / 6**0.5, 0.0)
    torch.testing.assert_close(rows[chosen], expected[chosen])


def test_evidence_of_single_runs_scores_alike() -> None:
    structure = stacked("conv")
    evidence = structure.evidence({"agf", "weights_in"})
    scores = structure.score("agf", evidence=evidence)
    for name, one in evidence.items():
        for run in range(3):
            assert torch.equal(scores[name][run], run_of(one, run).read("agf"))
