"""Compaction: the same outputs from smaller tensors, with the optimizer carried over; all or nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.inner_training.structure.test_edits import differing, picture
from tests.inner_training.structure.zoo import OPTIMIZERS, ZOO, make, mean_square, train
from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.structure.structure import Structure


def pruned(name: str, optimizer: str = "adamw-amsgrad") -> tuple[nn.Module, torch.optim.Optimizer, Any, Structure]:
    model, example = make(name)
    chosen = OPTIMIZERS[optimizer](list(model.parameters()))
    train(model, chosen, example, 2)
    structure = trimtab.gates(model, chosen, example)
    structure.prune(0.4, "magnitude", "layer")
    train(model, chosen, example, 2)
    return model, chosen, example, structure


@pytest.mark.parametrize("name", ZOO)
def test_outputs_stay_and_training_goes_on_as_if_gated(name: str) -> None:
    """The compacted module is also trained like the gated one, in training mode, to rounding."""
    model, chosen, example, structure = pruned(name)
    twin = copy.deepcopy(model)
    twin_optimizer = OPTIMIZERS["adamw-amsgrad"](twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(chosen.state_dict()))
    gates = structure._gates
    held = {key: gates.held(key).clone() for key, _ in twin.named_parameters()}
    for key, one in twin.named_parameters():  # deep copies have no hooks
        one.register_hook(lambda slope, key=key: slope.masked_fill(held[key], 0))
    size = sum(one.numel() for one in model.parameters())
    assert structure.compact() is model
    assert sum(one.numel() for one in model.parameters()) < size or name == "encoder"
    for one, optimizer in ((model, chosen), (twin, twin_optimizer)):
        one.eval()
        for _ in range(2):
            optimizer.zero_grad()
            mean_square(one, example).backward()
            optimizer.step()
    outputs, expected = model(example), twin(example)
    assert (outputs - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_state_is_cut_like_the_weights() -> None:
    model, chosen, _, structure = pruned("residual")
    before = picture(model, chosen)
    stem, first = structure.active["stem"], structure.active["first"]
    structure.compact()
    after = picture(model, chosen)
    for kind in ("model", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "grad"):
        assert torch.equal(after[f"{kind}.first.weight"], before[f"{kind}.first.weight"][first][:, stem])
        assert torch.equal(after[f"{kind}.second.weight"], before[f"{kind}.second.weight"][stem][:, first])
        flat = stem.repeat_interleave(4)
        assert torch.equal(after[f"{kind}.head.weight"], before[f"{kind}.head.weight"][:, flat])
    assert torch.equal(after["model.norm1.running_var"], before["model.norm1.running_var"][first])
    assert after["step.stem.weight"] == before["step.stem.weight"]


@pytest.mark.parametrize("name", ZOO)
def test_stock_layers_know_their_sizes(name: str) -> None:
    model, _, _, structure = pruned(name)
    structure.compact()
    for part in model.modules():
        if isinstance(part, nn.Linear):
            assert part.weight.shape == (part.out_features, part.in_features)
        elif isinstance(part, nn.modules.conv._ConvNd):
            sides = (part.in_channels, part.out_channels) if part.transposed else (part.out_channels, part.in_channels)
            assert part.weight.shape[:2] == (sides[0], sides[1] // part.groups)
        elif isinstance(part, nn.modules.batchnorm._BatchNorm):
            assert part.num_features == len(part.running_mean)
        elif isinstance(part, nn.PReLU):
            assert part.num_parameters == part.weight.numel()


def test_group_norms_and_grouped_convolutions_lose_whole_groups() -> None:
    model, _, _, structure = pruned("group-norms")
    structure.compact()
    assert (model.norm0.num_groups, model.norm0.num_channels) == (2, 8)
    assert (model.norm2.num_groups, model.norm2.num_channels) == (2, 4)
    model, _, _, structure = pruned("grouped")
    structure.compact()
    assert (model.grouped.groups, model.grouped.in_channels, model.grouped.out_channels) == (2, 8, 4)
    assert model.depthwise.groups == model.depthwise.in_channels == 5


def test_stock_attention_keeps_its_heads_as_gates() -> None:
    model, chosen, example, structure = pruned("encoder")
    shape = model[1].self_attn.in_proj_weight.shape  # type: ignore[index]
    idle = ~structure.active["1.self_attn.heads"]
    structure.compact()
    assert model[1].self_attn.in_proj_weight.shape == shape  # type: ignore[index]
    assert structure.groups == {"1.self_attn.heads": 2, "1.linear1": 7}
    train(model, chosen, example, 3)
    rows = model[1].self_attn.in_proj_weight.view(3, 2, 4, 8)  # type: ignore[index]
    assert not rows[:, idle].any() and rows[:, ~idle].any()


def test_averages_are_cut_too() -> None:
    model, _, example, structure = pruned("residual")
    average = torch.optim.swa_utils.AveragedModel(model)
    structure.compact(copies=[average])
    assert torch.equal(average(example), model(example))
    average.update_parameters(model)
    with pytest.raises(MismatchError, match="does not fit the model"):
        structure.prune(0.3, "magnitude")
        structure.compact(copies=[make("residual")[0]])


def test_the_structure_goes_on_after_compaction() -> None:
    model, chosen, example, structure = pruned("residual")
    last = structure._editor._history[-1].edit
    structure.compact()
    with pytest.raises(UserError, match="compacted, loaded or rolled back"):
        last.undo()
    edit = structure.prune(0.3, "magnitude")
    gone = sum(map(len, edit.units.values()))
    structure.grow(0.3, "net2wider")
    size = sum(structure.groups.values())
    structure._editor._history[-1].edit.undo()
    structure.compact()
    assert sum(structure.groups.values()) == size - gone
    train(model, chosen, example, 2)


class FixedSize(nn.Module):
    """A module whose forward relies on the number of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Linear(6 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)).reshape(-1, 24))


class FixedScale(nn.Module):
    """A module whose outputs depend on the number of its units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(h) / h.shape[-1]


def test_what_relies_on_sizes_is_refused_and_put_back() -> None:
    for model, example in ((FixedSize(), torch.randn(4, 3, 4, 4)), (FixedScale(), torch.randn(4, 3))):
        chosen = OPTIMIZERS["momentum"](model.parameters())
        structure = trimtab.gates(model, chosen, example)
        train(model, chosen, example, 2)
        structure.prune(0.4, "magnitude")
        objects = [*model.parameters(), *chosen.param_groups[0]["params"], *chosen.state]
        before, layers = picture(model, chosen), str(model)
        with pytest.raises(UserError, match="does not work without its inactive units"):
            structure.compact()
        assert differing(before, picture(model, chosen)) == [] and str(model) == layers
        after = [*model.parameters(), *chosen.param_groups[0]["params"]]
        assert all(one is other for one, other in zip(after, objects, strict=False))
        assert {id(one) for one in chosen.state} == {id(one) for one in model.parameters()}
        structure._editor._history[-1].edit.undo()


def test_unknown_state_is_refused() -> None:
    model, chosen, _, structure = pruned("perceptron")
    chosen.state[model[0].weight]["extra"] = torch.zeros(3)  # type: ignore[index]
    before = picture(model, chosen)
    with pytest.raises(UserError, match="the state 'extra' of AdamW for 0.weight"):
        structure.compact()
    assert differing(before, picture(model, chosen)) == []
