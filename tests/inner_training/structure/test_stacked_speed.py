"""Two-Speed and rewinding in populations: against steps taken by hand, undone, rolled back, and free for those without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import trimtab
from tests.inner_training.structure.populations import assert_held, differing, family_of, picture, stacked
from trimtab.errors import UserError
from trimtab.inner_training.networks import MLP, build_module
from trimtab.inner_training.structure.newborn_state import two_speed
from trimtab.inner_training.structure.stacked import Stacked


def entries_of_newborns(structure: Stacked, window: int) -> Tensor:
    """(N, P) bool by each group's members, parameter by parameter."""
    layout = structure.population.layout
    found = torch.zeros(structure._num_runs, layout.width, dtype=torch.bool)
    views = layout.views(found)
    for one in structure._flat:
        born = structure._units.born[:, one.span]
        young = (born >= 0) & (structure._units.updates[:, None] - born < window) & structure.active[one.name]
        for run in range(structure._num_runs):
            units = young[run].nonzero()[:, 0]
            for member in one.group.members:
                if member.parameter in views:
                    views[member.parameter][run] |= member.mask(layout.shapes[member.parameter], units)
    return found


@pytest.mark.parametrize("rule", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "vit"])
def test_newborns_go_faster_for_their_window_and_others_do_not(name: str, rule: str) -> None:
    fast, plain = (stacked(name, (rule,), runs=3) for _ in range(2))
    factors = np.array([5.0, 1.0, 2.0])
    for one in (fast, plain):
        one.remove({group: (torch.arange(units) % 2 == 0).expand(3, -1) for group, units in one.groups.items()})
    fast.two_speed(factors, window=3)
    for structure in (fast, plain):
        structure.grow(0.5, "random")
    differed = 0
    for step in range(5):
        before = fast.population._learner
        plain.population._learner = before
        speed = torch.where(entries_of_newborns(fast, 3), torch.tensor(factors, dtype=torch.float32)[:, None], 1.0)
        assert bool((speed > 1).any()) == (step < 3)
        for structure in (fast, plain):
            structure.population.advance(1)
        found, usual = fast.population._learner, plain.population._learner
        torch.testing.assert_close(found.parameters, two_speed(before.parameters, usual.parameters, speed))
        assert torch.equal(found.parameters[1], usual.parameters[1]) and torch.equal(found.first, usual.first)
        differed += int((found.parameters != usual.parameters).any())
    assert differed == 3
    assert_held(fast)


def test_an_interval_ends_the_window_where_it_lies_inside() -> None:
    ends = []
    for steps in ((7,), (1,) * 7, (2, 4, 1)):
        structure = stacked("mlp", ("sgd",), width=0.5)
        structure.two_speed(4.0, window=5)
        structure.grow(0.5, "random")
        for count in steps:
            structure.population.advance(count)
        ends.append(structure.population._learner.parameters)
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


def test_the_window_counts_steps_that_were_not_rolled_back() -> None:
    structure, everyone = stacked("mlp", ("sgd",), width=0.5), np.ones(3, dtype=bool)
    runs = structure.population
    structure.two_speed(4.0, window=5)
    structure.grow(0.5, "random")
    for _ in range(2):
        runs.snapshot(everyone)
    runs.advance(4)
    runs.restore(everyone)
    left = runs._feed.fast_until - runs._feed.step[:, None]
    assert left.max() == 5
    runs.reset([1], [family_of("mlp").made(9, "sgd", 0.5)])
    assert (runs._feed.fast_until.amax(1) > 0).tolist() == [True, False, True]


def test_populations_without_two_speed_have_none_in_their_step() -> None:
    structure = stacked("mlp")
    programs = structure.population._programs
    structure.grow(0.3, "random")
    assert structure.population._programs is programs and structure.population._feed.speed is None


@pytest.mark.parametrize(
    ("factor", "message"), [(0.0, "above 0"), (np.ones(2), "one for each of 3 runs"), (np.nan, "above 0")]
)
def test_bad_factors_are_refused(factor: float | np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stacked("mlp").two_speed(factor)
    with pytest.raises(UserError, match="window"):
        stacked("mlp").two_speed(2.0, window=0)


# --- rewinding ------------------------------------------------------------------------------------------------------


def first_values(structure: Stacked) -> Tensor:
    given = [one.parameters for one in structure.population.instances if one is not None]
    return torch.from_numpy(structure.population.layout.rows(given))


@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "vit", "graph"])
def test_survivors_have_their_first_values_and_no_state(name: str) -> None:
    structure, only = stacked(name, steps=3), np.array([True, False, True])
    structure.prune(0.5, structure.score("magnitude"))
    before, held = structure.population._learner, structure._flat.entries(~structure._units.active)
    active = structure._units.active
    edit = structure.rewind(runs=only)
    now = structure.population._learner
    assert torch.equal(now.parameters[only], first_values(structure).masked_fill(held, 0.0)[only])
    assert not now.first[only].any() and not now.second[only].any()
    for field in range(3):
        assert torch.equal(now[field][1], before[field][1])
    assert torch.equal(structure._units.active, active)
    structure.population.advance(2)
    assert_held(structure)
    assert edit.undo().tolist() == only.tolist()


def test_a_rewound_run_trains_as_one_that_was_always_small() -> None:
    late, early = stacked("mlp", ("sgd",), steps=4), stacked("mlp", ("sgd",), steps=0)
    gone = {name: (torch.arange(units) % 3 == 0).expand(3, -1) for name, units in late.groups.items()}
    for structure in (late, early):
        structure.remove(gone)
    late.rewind()
    early.population._feed.step += 4  # the same batches from here on
    for structure in (late, early):
        structure.population.advance(3)
    torch.testing.assert_close(late.population._learner.parameters, early.population._learner.parameters)


def test_units_that_the_instance_lacks_keep_their_weights() -> None:
    structure = stacked("mlp", width=0.5)
    structure.grow(0.25, "random")
    structure.population.advance(2)
    others = structure._flat.entries(structure._units.born >= 0)
    before = structure.population._learner.parameters
    structure.rewind()
    now = structure.population._learner.parameters
    assert others.any() and torch.equal(now[others], before[others])
    assert torch.equal(now[~others], first_values(structure)[~others])


def test_a_rewind_is_undone_bit_for_bit() -> None:
    structure = stacked("conv", steps=3)
    before = picture(structure)
    structure.rewind().undo()
    assert differing(before, picture(structure)) == []


# --- insertion scale ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random", "random-parked"])
def test_the_scale_is_that_of_the_newborns_columns_alone(method: str) -> None:
    ends = []
    for scale in (1.0, 3.0):
        structure = stacked("mlp", width=0.5, steps=0)
        structure.grow(0.25, method, scale=scale, groups=["layers.1"])
        group = structure._flat["layers.1"]
        values = structure.population._learner.parameters
        born = (structure._units.born[:, group.span] >= 0)[..., None]
        ends.append((born, *(part.of(values) for part in (group.columns, group.incoming))))
    (born, columns, rows), (same, longer, others) = ends
    assert torch.equal(born, same) and born.any() and torch.equal(rows, others)
    torch.testing.assert_close(longer, torch.where(born, 3 * columns, columns))
    assert (longer != columns).any()


def test_the_scale_of_a_plain_module_is_that_of_woken_columns_too() -> None:
    ends = []
    for scale in (1.0, 3.0):
        model = build_module(lambda: MLP(5, 8, 3, depth=2), seed=0)
        structure = trimtab.gates(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.zeros(1, 5))
        parked = model.layers[2].weight.detach().clone()
        structure.prune(0.5, "magnitude", groups=["layers.1"])
        edit = structure.grow(0.25, "random-parked", groups=["layers.1"], scale=scale)
        born = edit.units["layers.1"]
        torch.testing.assert_close(model.layers[2].weight[:, born], scale * parked[:, born])
        ends.append(model.layers[1].weight.detach().clone())
        edit.undo()
        assert int((model.layers[2].weight != 0).any(0).sum()) == 4
    assert torch.equal(ends[0], ends[1])
