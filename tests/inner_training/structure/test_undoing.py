"""Edits that are undone after others have been made over them, as a controller makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.inner_training.structure.test_edits import trained
from tests.inner_training.structure.test_gating import assert_held
from tests.inner_training.structure.zoo import train
from trimtab.errors import RangeError, UserError


@pytest.mark.parametrize("scale", [float("nan"), -1.0, "a", float("inf")])
def test_scales_that_would_spoil_the_weights_are_refused(scale: Any) -> None:
    model, _, _, structure = trained("perceptron", "sgd")
    structure.prune(0.4, "magnitude")
    with pytest.raises(RangeError, match="scale is"):
        structure.grow(0.2, "random", scale=scale)
    assert all(one.isfinite().all() for one in model.parameters())


def test_undoing_after_steps_goes_on_with_own_steps_of_other_units() -> None:
    """The reset forgets the newborns' own steps in one layer, while those of another layer go on."""
    model, optimizer, example, structure = trained("convolutional", "adamw-amsgrad")
    structure.prune(0.5, "magnitude", "layer")
    train(model, optimizer, example, 1)
    structure.grow(0.3, "random", newborn_state="fresh-step")
    train(model, optimizer, example, 1)
    edit = structure.reset({"0": structure.active["0"]})
    train(model, optimizer, example, 1)
    edit.undo()
    train(model, optimizer, example, 2)
    assert_held(structure, optimizer)


@pytest.mark.parametrize("kind", ["prune", "reset", "grow"])
def test_undoing_leaves_alone_what_counts_as_training(kind: str) -> None:
    """An edit that was settled since keeps its units gone, with what they had parked; and those of it that were born live."""
    model, optimizer, example, structure = trained("perceptron", "adamw-amsgrad")
    editor = structure.editor
    first, second = torch.tensor([1, 2]), torch.tensor([4, 5])
    if kind == "grow":
        editor.settle(editor.remove({"0": first}))
        edit = structure.grow(0.25, "random", groups="0")
        assert edit.units["0"].tolist() == [1, 2]
    else:
        edit = editor.remove({"0": first}) if kind == "prune" else structure.reset({"0": first})
    train(model, optimizer, example, 2)
    values = model.get_parameter("0.weight").detach()[second].clone()
    editor.settle(editor.remove({"0": second, "2": torch.tensor([3])}))
    train(model, optimizer, example, 2)
    edit.undo()
    idle = [1, 2, 4, 5] if kind == "grow" else [4, 5]
    assert (~structure.active["0"]).nonzero()[:, 0].tolist() == idle
    assert (~structure.active["2"]).nonzero()[:, 0].tolist() == [3]
    assert_held(structure, optimizer)
    train(model, optimizer, example, 2)
    assert_held(structure, optimizer)
    assert torch.equal(structure._gates.virtual("0.weight")[second], values)
    if kind != "grow":
        assert bool(model.get_parameter("2.weight").detach()[0, first].all() or kind == "reset")


def test_undoing_growth_keeps_the_least_units() -> None:
    model, _, _, structure = trained("perceptron", "sgd")
    editor = structure.editor
    editor.settle(editor.remove({"0": torch.arange(4)}))
    edit = structure.grow(0.5, "random", groups="0")
    editor.settle(editor.remove({"0": torch.arange(4, 8)}))
    with pytest.raises(UserError, match="have gone since"):
        edit.undo()
    assert int(structure.active["0"].sum()) == 4 and bool(model.get_parameter("0.weight").isfinite().all())


def test_undoing_leaves_own_steps_of_later_newborns() -> None:
    """Those of a keeper, whose resets count as training; those that the edit ended come back."""
    model, optimizer, example, structure = trained("convolutional")
    editor, own = structure.editor, structure.editor._own_steps
    structure.prune(0.5, "magnitude", "layer")
    structure.grow(0.3, "random", newborn_state="fresh-step", groups="0")
    before = {name: sorted(where.tolist()) for name, where, _ in own.cohorts}
    edit = structure.reset({"0": structure.active["0"]})
    assert "0.weight" in before and all(name != "0.weight" for name, _, _ in own.cohorts)
    train(model, optimizer, example, 1)
    unit = structure.active["3"].nonzero()[:1, 0]
    editor.settle(structure.reset({"3": unit}, newborn_state="fresh-step"))
    train(model, optimizer, example, 1)
    edit.undo()
    now = {name: sorted(where.tolist()) for name, where, _ in own.cohorts}
    assert now["0.weight"] == before["0.weight"] and "3.bias" in now
    train(model, optimizer, example, 1)
    assert_held(structure, optimizer)
