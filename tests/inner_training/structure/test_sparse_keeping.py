"""Sparse training of plain modules: every optimizer, the gradient that growth goes by, saving, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.inner_training.structure.zoo import OPTIMIZERS, make, mean_square
from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.structure import state
from trimtab.inner_training.structure.sparse_keeping import SparseKeeper
from trimtab.inner_training.structure.sparse_methods import SPARSE_TRAINING
from trimtab.inner_training.structure.structure import Structure

TOTAL = 24
Made = tuple[nn.Module, torch.optim.Optimizer, Any, Structure]


def ready(name: str = "perceptron", optimizer: str = "adam") -> Made:
    model, example = make(name)
    chosen = OPTIMIZERS[optimizer](list(model.parameters()))
    return model, chosen, example, trimtab.gates(model, chosen, example)


def batch_of(example: Tensor, step: int) -> Tensor:
    return example + 0.1 * torch.randn(example.shape, generator=torch.Generator().manual_seed(step))


def run(keeper: SparseKeeper, made: Made, steps: int, begin: int = 0) -> list[bool]:
    model, optimizer, example, _ = made
    found = []
    for step in range(begin, begin + steps):
        optimizer.zero_grad()
        mean_square(model, batch_of(example, step)).backward()
        optimizer.step()
        found.append(keeper.step())
    return found


def counts(structure: Structure) -> dict[str, int]:
    return {name: int(live.sum()) for name, live in structure.masks.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["perceptron", "convolutional"])
def test_masked_weights_stay_zero_under_every_optimizer(name: str, optimizer: str) -> None:
    made = ready(name, optimizer)
    model, chosen, _, structure = made
    keeper = SparseKeeper(structure, "rigl", total_steps=TOTAL, density=0.4, every=4)
    first, masks = counts(structure), structure.masks
    for begin in range(TOTAL):
        run(keeper, made, 1, begin)
        for key, live in structure.masks.items():
            weight = model.get_parameter(key)
            assert not weight[~live].any()
            for kind, value in state.entries(chosen, weight).items():
                if not (isinstance(chosen, torch.optim.Rprop) and kind == "step_size"):
                    assert (value[~live] == state.neutral(chosen, weight, kind)).all(), (key, kind)
    assert counts(structure) == first
    assert any(not torch.equal(live, masks[key]) for key, live in structure.masks.items())


@pytest.mark.parametrize("method", SPARSE_TRAINING)
def test_every_method_keeps_a_model(method: str) -> None:
    made = ready("convolutional", "momentum")
    structure, one = made[3], SPARSE_TRAINING[method]
    settings = {} if method == "static" else {"every": 4, "end": 0.5 if method == "set" else 0.75}
    keeper = SparseKeeper(structure, method, total_steps=TOTAL, density=0.3, **settings)
    first, masks = counts(structure), structure.masks
    due = [step for step, done in enumerate(run(keeper, made, TOTAL), 1) if done]
    assert due == (
        [] if method == "static" else [4, 8, 12, 16, 18] if one.thins else [4, 8] if method == "set" else [4, 8, 12, 16]
    )
    if one.thins:
        sizes = {name: made[0].get_parameter(name).numel() for name in keeper.layers}
        assert not masks and sum(counts(structure).values()) == pytest.approx(0.3 * sum(sizes.values()), abs=3)
    else:
        assert counts(structure) == first
        changed = any(not torch.equal(live, masks[name]) for name, live in structure.masks.items())
        assert changed == bool(one.grows)


def test_growth_goes_by_the_gradient_of_the_step_itself() -> None:
    made = ready(optimizer="momentum")
    model, _, example, structure = made
    keeper = SparseKeeper(structure, "rigl", total_steps=TOTAL, density=0.3, every=4, alpha=0.9)
    run(keeper, made, 3)
    open_model, masks = copy.deepcopy(model), structure.masks
    mean_square(open_model, batch_of(example, 3)).backward()
    slopes = {name: one.grad for name, one in open_model.named_parameters()}
    run(keeper, made, 1, 3)
    grown = 0
    for name, live in structure.masks.items():
        born, idle = live & ~masks[name], ~live & ~masks[name]
        slope = slopes[name]
        assert slope is not None
        if born.any() and idle.any():
            assert slope[born].abs().min() >= slope[idle].abs().max()
        grown += int(born.sum())
    assert grown > 5
    assert structure.editor.gates.noted is None  # nothing is kept of the steps between


def test_a_batch_may_be_looked_at_instead_without_a_trace() -> None:
    made = ready("convolutional", "adam")
    model, optimizer, example, structure = made
    keeper = SparseKeeper(structure, "rigl", total_steps=TOTAL, density=0.3, every=4)
    run(keeper, made, 3)
    mean_square(model, example).backward()
    before = {
        name: (one.detach().clone(), one.grad.clone()) for name, one in model.named_parameters() if one.grad is not None
    }
    modes, masks = [one.training for one in model.modules()], structure.masks
    assert keeper.step(example, mean_square)
    assert [one.training for one in model.modules()] == modes
    for name, (value, slope) in before.items():
        one = model.get_parameter(name)
        same = structure.masks[name] == masks[name] if name in masks else torch.ones_like(value, dtype=torch.bool)
        assert one.grad is not None and torch.equal(one[same], value[same]) and torch.equal(one.grad[same], slope[same])
    assert len(optimizer.state) and any(not torch.equal(live, masks[name]) for name, live in structure.masks.items())


def test_accumulated_gradients_add_up() -> None:
    found = []
    for parts in (1, 2):
        model, optimizer, example, structure = ready(optimizer="sgd")
        masks = {"0.weight": torch.arange(model[0].weight.numel()).view(model[0].weight.shape) % 3 == 0}  # type: ignore[index]
        keeper = SparseKeeper(
            structure, "rigl", total_steps=TOTAL, masks=masks, layers=["0.weight"], every=1, alpha=0.9
        )
        for part in example.chunk(parts):
            (mean_square(model, part) / parts).backward()
        optimizer.step()
        keeper.step()
        found.append(structure.masks["0.weight"])
    assert torch.equal(*found)


def test_a_saved_state_goes_on_as_if_nothing_had_been() -> None:
    """Bit for bit, with models, optimizers and structures saved beside it."""
    for method in ("rigl", "set", "prune-magnitude"):
        made = ready(optimizer="adam")
        keeper = SparseKeeper(made[3], method, total_steps=TOTAL, density=0.3, every=4)
        run(keeper, made, 7)
        saved = copy.deepcopy([one.state_dict() for one in (made[0], made[1], made[3], keeper)])
        other = ready(optimizer="adam")
        again = SparseKeeper(other[3], method, total_steps=TOTAL, density=0.3, every=4, seed=5)
        for one, part in zip((other[0], other[1], other[3], again), saved, strict=True):
            one.load_state_dict(part)
        run(keeper, made, TOTAL - 7, 7)
        run(again, other, TOTAL - 7, 7)
        for one, two in zip(made[0].parameters(), other[0].parameters(), strict=True):
            assert torch.equal(one, two)
        assert all(torch.equal(live, other[3].masks[name]) for name, live in made[3].masks.items())
    with pytest.raises(MismatchError, match="this keeper does rigl"):
        SparseKeeper(ready()[3], "rigl", total_steps=TOTAL).load_state_dict(keeper.state_dict())


def test_edits_of_units_go_beside_it_and_are_undone() -> None:
    made = ready(optimizer="adam")
    model, _, _, structure = made
    keeper = SparseKeeper(structure, "rigl", total_steps=TOTAL, density=0.5, every=4)
    edit = structure.prune(0.4, "magnitude")
    gone = ~structure.active["0"]
    run(keeper, made, 9)
    assert not model[0].weight[gone].any()  # type: ignore[index]
    edit.undo()
    run(keeper, made, 9, 9)
    for name, live in structure.masks.items():
        assert not model.get_parameter(name)[~live].any()


def test_a_compacted_model_needs_another_keeper() -> None:
    made = ready()
    keeper = SparseKeeper(made[3], "set", total_steps=TOTAL, every=1)
    made[3].prune(0.4, "magnitude", "layer")
    made[3].compact()
    with pytest.raises(UserError, match="make a new keeper"):
        run(keeper, made, 1)


def test_what_does_not_fit_is_refused() -> None:
    model, _, example, structure = ready()
    with pytest.raises(UserError, match="did you mean 'static'"):
        SparseKeeper(structure, "statik", total_steps=TOTAL)
    with pytest.raises(UserError, match="total_steps"):
        SparseKeeper(structure, "set", total_steps=0)
    with pytest.raises(UserError, match="setting of static"):
        SparseKeeper(structure, "static", total_steps=TOTAL, every=4)
    with pytest.raises(UserError, match="made? it by trimtab.gates|make it by trimtab.gates"):
        SparseKeeper(model, "static", total_steps=TOTAL)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="give those of"):
        SparseKeeper(structure, "static", total_steps=TOTAL, masks={})
    assert not structure.masks
    keeper = SparseKeeper(structure, "rigl", total_steps=TOTAL, every=1)
    with pytest.raises(UserError, match=r"no gradient of 0\.weight was seen"):
        keeper.step()
    assert example.ndim


def test_an_unseen_layer_is_refused_and_frozen_ones_are_left_alone() -> None:
    model, example = make("perceptron")
    optimizer = torch.optim.SGD([model[0].weight], lr=0.1)  # type: ignore[index]
    structure = trimtab.gates(model, optimizer, example)
    assert SparseKeeper(structure, "static", total_steps=TOTAL).layers == ("0.weight",)


def test_several_processes_have_no_gradient_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for method, one in SPARSE_TRAINING.items():
        structure = ready()[3]
        if one.grows == "gradient":
            with pytest.raises(UserError, match="in each of several processes"):
                SparseKeeper(structure, method, total_steps=TOTAL)
        else:
            SparseKeeper(structure, method, total_steps=TOTAL)
