"""Edits of all runs at once: what they change, what they leave alone, and what takes them back."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.inner_training.structure.populations import (
    NETWORKS,
    assert_held,
    differing,
    family_of,
    held,
    picture,
    stacked,
)
from trimtab.errors import UserError
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.structure.stacked_edit import StackedEdit

each_network = pytest.mark.parametrize("name", NETWORKS)
each_kind = pytest.mark.parametrize("kind", ["prune", "grow", "reset"])


def made(structure: Stacked, kind: str, **options: object) -> StackedEdit:
    if kind == "prune":
        return structure.prune(0.3, structure.score("magnitude"), **options)  # type: ignore[arg-type]
    if kind == "grow":
        return structure.grow(0.3, "net2wider", **options)  # type: ignore[arg-type]
    first = {name: active & (active.cumsum(1) == 1) for name, active in structure.active.items()}
    return structure.reset(first)


@each_kind
@each_network
def test_undo_is_exact(name: str, kind: str) -> None:
    structure = stacked(name)
    structure.prune(0.3, structure.score("random"))
    structure.population.advance(2)
    before = picture(structure)
    edit = made(structure, kind)
    assert edit.counts.sum() > 0 and differing(before, picture(structure))
    assert edit.undo().tolist() == [True] * 3
    assert differing(before, picture(structure)) == []
    with pytest.raises(UserError, match="already undone"):
        edit.undo()


@each_kind
@each_network
def test_survivors_keep_everything(name: str, kind: str) -> None:
    structure = stacked(name)
    structure.prune(0.3, structure.score("random"))
    structure.population.advance(2)
    before, learner = held(structure), structure.population._learner
    method = {"prune": None, "grow": "pairing", "reset": None}[kind]
    edit = structure.grow(0.3, method) if method else made(structure, kind)
    touched = structure._flat.entries(structure._flat.joined(edit.units, False))
    for old, new in zip(learner[:3], structure.population._learner[:3], strict=True):
        assert torch.equal(old[~touched], new[~touched])
    assert not structure.population._learner.first[touched].any()
    assert not structure.population._learner.second[touched].any()
    assert_held(structure)
    assert torch.equal(held(structure) & ~touched, before & ~touched)


def test_what_newborns_would_read_of_inactive_units_is_parked_anew() -> None:
    structure = stacked("mlp")
    structure.prune(0.5, structure.score("random"), scope="layer")
    edit = structure.grow(0.3, "pairing", groups=list(structure.groups)[1:2])
    born = structure._flat.entries(structure._flat.joined(edit.units, False))
    shared = born & held(structure)
    assert shared.any()
    assert not structure._units.parked[shared].any()  # newborns have no weights from inputs that nobody used


@each_kind
def test_other_runs_are_left_alone(kind: str) -> None:
    structure = stacked("conv")
    structure.prune(0.3, structure.score("random"))
    before = picture(structure)
    only = np.array([False, True, False])
    if kind == "reset":
        chosen = {name: active & torch.from_numpy(only)[:, None] for name, active in structure.active.items()}
        edit = structure.reset(chosen)
    else:
        edit = made(structure, kind, runs=only)
    assert (edit.counts > 0).tolist() == only.tolist()
    assert differing(before, picture(structure), torch.from_numpy(~only)) == []
    assert edit.undo().tolist() == only.tolist()
    assert differing(before, picture(structure)) == []


def test_each_run_has_a_share_of_its_own() -> None:
    structure = stacked("mlp")
    edit = structure.prune(np.array([0.0, 0.25, 0.5]), structure.score("random"), scope="layer")
    assert edit.counts.tolist() == [0, 4, 8]
    assert structure.grow(np.array([0.5, 0.25, 0.125])).counts.tolist() == [0, 4, 2]


def test_the_lowest_go_and_minima_stay() -> None:
    structure = stacked("mlp")
    scores = {"layers.0": torch.arange(8.0).expand(3, 8), "layers.1": 10 + torch.arange(8.0).flip(0).expand(3, 8)}
    structure.prune(0.5, scores, scope="layer")
    assert structure.active["layers.0"][0].tolist() == [False] * 4 + [True] * 4
    assert structure.active["layers.1"][0].tolist() == [True] * 4 + [False] * 4
    structure.prune(0.5, scores, scope="global")
    assert structure.active["layers.0"][0].tolist() == [False] * 7 + [True]
    assert structure.active["layers.1"][0].tolist() == [True] * 3 + [False] * 5
    structure.prune(1.0, scores, scope="global")
    assert {name: active.sum(1).tolist() for name, active in structure.active.items()} == {
        "layers.0": [1, 1, 1],
        "layers.1": [1, 1, 1],
    }
    assert_held(structure)


def test_removal_of_chosen_units() -> None:
    structure = stacked("mlp")
    chosen = torch.zeros(3, 8, dtype=torch.bool)
    chosen[0, 2], chosen[1] = True, True
    edit = structure.remove({"layers.0": chosen})
    assert edit.counts.tolist() == [1, 0, 0]  # the second run would lose all units of the layer
    assert structure.active["layers.0"][0].tolist() == [True, True, False] + [True] * 5


@pytest.mark.parametrize("method", ["zero-out", "zero-in", "pairing", "net2wider"])
@each_network
def test_growth_preserves_the_function(name: str, method: str) -> None:
    structure = stacked(name)
    runs = structure.population
    structure.prune(0.4, structure.score("random"))
    before = runs.evaluate("train")
    edit = structure.grow(0.4, method)
    assert (edit.counts > 0).all()
    if name == "residual" and method != "zero-out":
        return  # a group norm between rows and columns makes something of a row of zeros, and of copies
    torch.testing.assert_close(runs.evaluate("train"), before, rtol=1e-4, atol=1e-5)


def test_what_was_pruned_is_parked_and_can_be_woken() -> None:
    structure = stacked("mlp")
    learner = structure.population._learner
    chosen = {"layers.0": torch.arange(8).expand(3, 8) < 2}
    structure.remove(chosen)
    edit = structure.grow(0.25, "random-parked", groups=["layers.0"])
    assert torch.equal(edit.units["layers.0"], chosen["layers.0"])
    torch.testing.assert_close(structure.population._learner.parameters, learner.parameters, rtol=0, atol=0)
    assert not torch.equal(structure.population._learner.first, learner.first)


def test_units_beyond_the_first_width_are_parked_like_newborns() -> None:
    structure = stacked("mlp", width=0.5)
    assert structure.active["layers.0"][0].sum() == 4
    edit = structure.grow(0.25, "random-parked")
    assert edit.counts.tolist() == [4, 4, 4]
    views = structure.population.layout.views(structure.population._learner.parameters)
    rows = views["layers.0.weight"]
    born = edit.units["layers.0"]
    assert (rows[born].norm(dim=1) > 0.1).all()
    assert structure.population._feed.buffers["gate0"][born].eq(1).all()


def test_growth_never_exceeds_the_room() -> None:
    structure = stacked("mlp")
    structure.prune(0.2, structure.score("random"))
    assert structure.grow(1.0).counts.tolist() == [3, 3, 3]
    assert structure.grow(1.0).counts.tolist() == [0, 0, 0]
    assert all(active.all() for active in structure.active.values())


@pytest.mark.parametrize("state", ["zero", "transplant"])
def test_newborn_states(state: str) -> None:
    structure = stacked("mlp")
    structure.prune(0.25, structure.score("random"), scope="layer")
    structure.population.advance(2)
    edit = structure.grow(0.25, "net2wider", newborn_state=state)
    one = structure._flat["layers.0"]
    born = edit.units["layers.0"]
    rows, moments = (
        one.incoming.of(flat)
        for flat in (structure.population._learner.parameters, structure.population._learner.first)
    )
    if state == "zero":
        assert not moments[born].any()
        return
    for run in range(3):
        for unit in born[run].nonzero()[:, 0]:
            twins = (rows[run] == rows[run, unit]).all(1) & ~born[run]
            assert twins.sum() == 1 and torch.equal(moments[run, unit], moments[run, twins][0])
            assert moments[run, unit].any()


def test_a_count_of_steps_for_each_weight_is_refused_by_name() -> None:
    structure = stacked("mlp")
    with pytest.raises(UserError, match="'fresh-step' needs a count of steps for each weight"):
        structure.grow(0.1, newborn_state="fresh-step")


def test_ages_count_steps() -> None:
    structure = stacked("mlp", steps=3)
    structure.population.advance(4)
    assert structure.age["layers.0"][0].tolist() == [4] * 8  # since the structure was made
    structure.remove({"layers.0": torch.arange(8).expand(3, 8) == 1})
    structure.population.advance(2)
    assert structure.age["layers.0"][0].tolist() == [6, -1] + [6] * 6
    structure.grow(0.125, groups=["layers.0"])
    structure.population.advance(5)
    assert structure.age["layers.0"][0].tolist() == [11, 5] + [11] * 6
    assert structure.newborn["layers.0"][0].tolist() == [False, True] + [False] * 6


def test_newborns_of_one_group_are_read_by_those_of_the_next() -> None:
    structure = stacked("mlp")
    structure.prune(0.5, structure.score("random"), scope="layer")
    structure.grow(0.5, "random")
    weight = structure.population.layout.views(structure.population._learner.parameters)["layers.1.weight"]
    assert (weight != 0).all()


def test_reset_compensates() -> None:
    structure = stacked("mlp", steps=20)
    evidence = structure.evidence({"mean", "weights_out"}, groups=["layers.1"])
    runs = structure.population
    before = runs.parameters_of(0)
    chosen = torch.arange(8).expand(3, 8) < 2
    edit = structure.reset({"layers.1": chosen}, compensate=evidence)
    after = runs.parameters_of(0)
    given = (before["layers.2.weight"][:, :2] * evidence["layers.1"].read("mean")[0, :2]).sum(1)
    torch.testing.assert_close(after["layers.2.bias"], before["layers.2.bias"] + given)
    assert not after["layers.2.weight"][:, :2].any() and not after["layers.1.bias"][:2].any()
    bound = 8**-0.5
    fresh = after["layers.1.weight"][:2]
    assert (fresh.abs() <= bound).all() and fresh.abs().max() > bound / 2
    assert torch.equal(after["layers.1.weight"][2:], before["layers.1.weight"][2:])
    edit.undo()
    assert all(torch.equal(value, before[name]) for name, value in runs.parameters_of(0).items())


def test_repair_lowers_the_loss_of_a_removal() -> None:
    structure = stacked("mlp", steps=40)
    runs = structure.population
    scores = structure.score("random")
    evidence = structure.evidence({"output_cov"}, batches=3)
    plain = structure.prune(0.3, scores)
    without = runs.evaluate("train")
    plain.undo()
    before = picture(structure)
    edit = structure.prune(0.3, scores, repair=evidence)
    assert runs.evaluate("train").mean() < without.mean()
    assert_held(structure)
    edit.undo()
    assert differing(before, picture(structure)) == []


def test_undo_after_training_gives_back_what_was_touched() -> None:
    structure = stacked("conv")
    before = structure.population._learner
    edit = structure.prune(0.4, structure.score("random"))
    touched = edit._before.entries
    structure.population.advance(3)
    trained = structure.population._learner
    edit.undo()
    now = structure.population._learner
    for old, middle, new in zip(before[:3], trained[:3], now[:3], strict=True):
        assert torch.equal(new[touched], old[touched]) and torch.equal(new[~touched], middle[~touched])


def test_only_the_latest_edit_of_a_run_is_undone() -> None:
    structure = stacked("mlp")
    first = structure.prune(0.2, structure.score("random"))
    structure.prune(np.array([0.2, 0.0, 0.0]), structure.score("random"))
    assert first.undo().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.prune(1.2, s.score("random")), "share is 1.2"),
        (lambda s: s.prune(np.ones(2), s.score("random")), "one for each of 3 runs"),
        (lambda s: s.prune(0.1, s.score("random"), scope="layers"), "unknown scope 'layers'"),
        (lambda s: s.prune(0.1, {"layer": torch.ones(3, 8)}), "unknown group 'layer'"),
        (lambda s: s.grow(0.1, "pairs"), "unknown growth method 'pairs'"),
        (lambda s: s.grow(0.1, runs=np.ones(3)), "give a mask"),
        (lambda s: s.score("agfs"), "unknown criterion 'agfs'"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    structure = stacked("mlp")
    before = picture(structure)
    with pytest.raises(UserError, match=message):
        call(structure)  # type: ignore[operator]
    assert differing(before, picture(structure)) == []


# --- as the population goes ---------------------------------------------------------------------------------------

ALL = np.ones(3, dtype=bool)


def test_a_rollback_takes_units_and_ages_back() -> None:
    structure = stacked("residual")
    runs = structure.population
    structure.prune(0.4, structure.score("random"))
    runs.advance(2)
    for _ in range(2):
        runs.snapshot(ALL)
    then, ages = picture(structure), structure.age
    structure.grow(0.5)
    runs.advance(3)
    structure.prune(0.5, structure.score("random"))
    only = np.array([True, False, True])
    now = picture(structure)
    runs.fire("rollback", only)
    back = torch.from_numpy(only)
    after = picture(structure)
    assert differing(then, after, back) == [] and differing(now, after, ~back) == []
    assert all(torch.equal(age[back], ages[name][back]) for name, age in structure.age.items())
    runs.advance(2)
    assert_held(structure)


def test_an_edit_from_before_a_snapshot_is_undone_after_a_rollback() -> None:
    structure = stacked("mlp")
    runs = structure.population
    before = structure.active
    edit = structure.prune(0.4, structure.score("random"))
    for _ in range(2):
        runs.snapshot(ALL)
    later = structure.grow(0.3)
    runs.restore(ALL)
    assert later.undo().tolist() == [False] * 3
    assert edit.undo().tolist() == [True] * 3
    assert all(torch.equal(active, before[name]) for name, active in structure.active.items())


def test_what_was_given_up_can_be_taken_up_again() -> None:
    structure = stacked("conv")
    runs = structure.population
    for _ in range(2):
        runs.snapshot(ALL)
    structure.prune(0.5, structure.score("random"))
    runs.advance(2)
    given_up = picture(structure)
    runs.restore(ALL, keep=ALL)
    assert all(active.all() for active in structure.active.values())
    runs.resume(ALL)
    assert differing(given_up, picture(structure)) == []
    runs.advance(2)
    assert_held(structure)


def test_a_reset_run_starts_with_its_own_widths() -> None:
    structure = stacked("conv")
    runs, family = structure.population, family_of("conv")
    structure.prune(0.5, structure.score("agf"))
    structure.score("agf")
    others = picture(structure)
    runs.reset([1], [family.made(7, "adamw", width=0.5)])
    assert structure.active["layers.0"].sum(1)[1] == 2 and structure.active["layers.1"].sum(1)[1] == 3
    assert structure.age["layers.0"][1].tolist() == [0, 0, -1, -1]
    assert structure.diagnostics()["scored"].tolist() == [1.0, 0.0, 1.0]
    assert differing(others, picture(structure), torch.tensor([True, False, True])) == []
    runs.advance(3)
    assert_held(structure)
    runs.snapshot(ALL)
    structure.grow(0.5)
    runs.restore(np.array([False, True, False]))
    assert structure.active["layers.0"].sum(1)[1] == 2


def test_anchors_pull_survivors_only() -> None:
    structure = stacked("mlp")
    runs = structure.population
    for _ in range(2):
        runs.snapshot(ALL)
    structure.prune(0.4, structure.score("random"))
    runs.fire("anchor", ALL)
    runs.advance(1)
    assert_held(structure)
    edit = structure.prune(0.2, structure.score("random"))
    runs.advance(2)
    assert_held(structure)
    assert edit.counts.sum() > 0
    assert (~runs._anchors._weights.isnan()).any(1).all()


def test_reset_moments_leaves_ages_alone() -> None:
    structure = stacked("mlp")
    structure.population.advance(3)
    structure.population.fire("reset_moments", ALL)
    assert structure.age["layers.0"][0].tolist() == [3] * 8


def test_phases_that_begin_with_a_new_head_keep_units_away() -> None:
    from trimtab.inner_training.population import Population
    from trimtab.inner_training.tasks import make_family

    family = make_family("class-pairs")
    runs = Population(family, 2, mode="eager", rules=("sgd", "adam", "adamw"))
    instances = [family.draw(seed, held_out=False) for seed in range(2)]
    runs.reset(range(2), instances)
    structure = Stacked(runs)
    structure.prune(0.5, structure.score("agf"))
    first = instances[0].phases[1].first_step
    runs.advance(first - int(runs.steps_done[0]))
    edit = structure.grow(0.2, "pairing", batches=1)
    runs.advance(3)
    assert edit.counts.sum() > 0
    assert_held(structure)


class NoWaiting(TorchDispatchMode):
    """Fails on operations whose outcome the host must wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"), name
        return func(*args, **(kwargs or {}))


@each_network
def test_nothing_waits_for_the_device(name: str) -> None:
    structure = stacked(name)
    for strict in (False, True):
        with NoWaiting() if strict else nullcontext():
            structure.prune(0.3, structure.score("agf"))
            structure.prune(0.3, structure.score("magnitude", normalisation="mean"), scope="layer")
            edit = structure.grow(0.3, "pairing", newborn_state="transplant")
            structure.diagnostics()
            edit.undo()
            structure.grow(0.2, "random-parked")
            structure.reset(structure.newborn)
            structure.population.restore(ALL)
