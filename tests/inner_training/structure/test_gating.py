"""Gates of plain modules: inactive units stay exactly zero, whatever trains them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.inner_training.structure.zoo import OPTIMIZERS, ZOO, make, mean_square, train
from trimtab.errors import UserError
from trimtab.inner_training.structure import state
from trimtab.inner_training.structure.structure import Structure

STEPS = 50


def gated(name: str, optimizer: str, share: float = 0.4, warm: int = 2) -> tuple[nn.Module, Any, Any, Structure]:
    """A module that has been trained a little, and its structure with some units of every group taken out."""
    model, example = make(name)
    chosen = OPTIMIZERS[optimizer](list(model.parameters()))
    train(model, chosen, example, warm)
    structure = trimtab.gates(model, chosen, example)
    structure.prune(share, "magnitude", "layer")
    return model, chosen, example, structure


def assert_held(structure: Structure, optimizer: torch.optim.Optimizer) -> None:
    """Everything that touches an inactive unit is zero, and its optimizer state is what it begins at."""
    gates = structure._gates
    for name, group in gates.groups.items():
        idle = (~gates.active[name]).nonzero()[:, 0]
        for member in group.members:
            tensor = gates.tensor(member.parameter)
            if not isinstance(tensor, nn.Parameter):
                continue
            assert not member.of(tensor.detach())[idle].any(), member.parameter
            for key, value in state.entries(optimizer, tensor).items():
                if not (isinstance(optimizer, torch.optim.Rprop) and key == "step_size"):
                    assert (member.of(value)[idle] == state.neutral(optimizer, tensor, key)).all(), (
                        member.parameter,
                        key,
                    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["convolutional", "perceptron"])
def test_gated_units_stay_zero_under_every_optimizer(name: str, optimizer: str) -> None:
    model, chosen, example, structure = gated(name, optimizer)
    before = [one.detach().clone() for one in model.parameters()]
    train(model, chosen, example, STEPS)
    assert_held(structure, chosen)
    held = {id(one) for group in chosen.param_groups for one in group["params"]}
    moved = [not torch.equal(one, old) for one, old in zip(model.parameters(), before, strict=True) if id(one) in held]
    assert all(moved)


@pytest.mark.parametrize("name", ZOO)
def test_gated_units_stay_zero_in_every_module(name: str) -> None:
    model, chosen, example, structure = gated(name, "adamw-amsgrad")
    train(model, chosen, example, 10)
    assert_held(structure, chosen)
    assert all(0 < int(mask.sum()) < len(mask) for mask in structure.active.values())


@pytest.mark.parametrize("name", ZOO)
def test_a_gated_unit_gives_nothing(name: str) -> None:
    """What was in an inactive unit before does not matter to the outputs."""
    model, _, example, structure = gated(name, "sgd")
    model.eval()
    outputs = model(example)
    gates = structure._gates
    with torch.no_grad():
        for key, group in gates.groups.items():
            idle = (~gates.active[key]).nonzero()[:, 0]
            for member in group.members:
                if member.role in ("row", "vector"):
                    tensor = gates.tensor(member.parameter)
                    member.put(tensor, idle, torch.full_like(member.of(tensor)[idle], 0.3))
            for member in group.of_role("column"):
                tensor = gates.tensor(member.parameter)
                member.put(tensor, idle, torch.zeros_like(member.of(tensor)[idle]))
        for key, group in gates.groups.items():  # columns of one group lie in rows of another
            for member in group.of_role("column"):
                idle, tensor = (~gates.active[key]).nonzero()[:, 0], gates.tensor(member.parameter)
                member.put(tensor, idle, torch.zeros_like(member.of(tensor)[idle]))
    assert torch.allclose(model(example), outputs, atol=1e-6)


def test_loss_scaling_and_accumulation() -> None:
    model, chosen, example, structure = gated("residual", "momentum")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = mean_square(model, example) / 2
        scaler.scale(loss).backward()
        if step == 2:
            structure.prune(0.2, "magnitude")  # between two parts of one step
        if step % 2:
            scaler.step(chosen)
            scaler.update()
            chosen.zero_grad()
    assert_held(structure, chosen)


def test_a_gradient_that_is_there_is_masked_and_comes_back() -> None:
    model, example = make("perceptron")
    chosen = OPTIMIZERS["momentum"](model.parameters())
    structure = trimtab.gates(model, chosen, example)
    mean_square(model, example).backward()
    weight = model[0].weight  # type: ignore[index]
    before = weight.grad.clone()
    edit = structure.prune(0.5, "magnitude")
    assert not weight.grad[~structure.active["0"]].any()
    edit.undo()
    assert torch.equal(weight.grad, before)


def test_a_compiled_model_keeps_its_gates() -> None:
    model, example = make("convolutional")
    compiled = torch.compile(model, backend="aot_eager")
    chosen = OPTIMIZERS["adamw-amsgrad"](model.parameters())
    structure = trimtab.gates(compiled, chosen, example)
    train(compiled, chosen, example, 2)
    structure.prune(0.4, "magnitude", "layer")
    train(compiled, chosen, example, 3)
    assert_held(structure, chosen)
    with pytest.raises(UserError, match="compiled"):
        structure.compact()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_distributed_model_keeps_its_gates() -> None:
    inner, example = make("perceptron")
    model = nn.parallel.DistributedDataParallel(inner)
    chosen = OPTIMIZERS["adamw-amsgrad"](model.parameters())
    structure = trimtab.gates(model, chosen, example)
    assert set(structure.groups) == {"0", "2"}
    structure.prune(0.4, "magnitude", "layer")
    train(model, chosen, example, 3)
    assert_held(structure, chosen)
    with pytest.raises(UserError, match="wrapped"):
        structure.compact()


def test_a_frozen_layer_is_held_also_once_it_is_thawed() -> None:
    model, example = make("perceptron")
    model[0].requires_grad_(False)  # type: ignore[index]
    chosen = OPTIMIZERS["momentum"](model.parameters())
    structure = trimtab.gates(model, chosen, example)
    structure.prune(0.4, "magnitude", "layer")
    assert not model[0].weight.requires_grad  # type: ignore[index]
    train(model, chosen, example, 2)
    model[0].requires_grad_(True)  # type: ignore[index]
    train(model, chosen, example, 3)
    assert_held(structure, chosen)


def test_units_that_our_own_gates_leave_out_begin_inactive() -> None:
    model, example = make("own-mlp")
    with torch.no_grad():
        model.gate0[5:] = 0
        expected = model(example)
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), example)
    assert structure.active["layers.0"].tolist() == [True] * 5 + [False] * 3
    assert torch.allclose(model(example), expected, atol=1e-6)
    structure.grow(0.25, "zero-out", groups=["layers.0"])
    assert model.gate0.tolist() == [1.0] * 7 + [0.0]


def test_masked_weights_stay_zero_and_begin_at_zero() -> None:
    model, example = make("perceptron")
    chosen = OPTIMIZERS["adamw-amsgrad"](model.parameters())
    structure = trimtab.gates(model, chosen, example)
    train(model, chosen, example, 2)
    weight: Tensor = model[0].weight  # type: ignore[index]
    before, live = weight.detach().clone(), torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    first = structure.mask({"0.weight": live})
    train(model, chosen, example, 3)
    assert not weight[~live].any() and weight[live].all()
    other = ~live
    other[0] = live[0]
    structure.mask({"0.weight": other})
    woken = other & ~live
    assert not weight[woken].any() and not chosen.state[weight]["exp_avg"][woken].any()
    train(model, chosen, example, 1)
    assert weight[woken].any() and not weight[~other].any()
    assert torch.equal(structure.masks["0.weight"], other)
    with pytest.raises(UserError, match="not the latest"):
        first.undo()
    structure._editor._history[-1].edit.undo()
    first.undo()
    assert torch.equal(weight[~live], before[~live]) and not structure.masks


def test_masks_and_gates_hold_together() -> None:
    model, example = make("perceptron")
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), example)
    weight = model[0].weight  # type: ignore[index]
    live = torch.ones(weight.shape, dtype=torch.bool)
    live[3] = False
    mask = structure.mask({"0.weight": live})
    edit = structure.prune(0.5, "magnitude", groups=["0"])  # unit 3 is the smallest now
    assert not structure.active["0"][3]
    edit.undo()
    assert not weight[3].any()
    mask.undo()
    assert weight[3].all()
