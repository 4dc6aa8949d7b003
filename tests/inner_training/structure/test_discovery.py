"""Groups that are found in modules, and reasons for those that are not offered."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.inner_training.structure.zoo import ZOO, GatedLinear, HandWrittenAttention, make
from trimtab.errors import MissingExtraError, UserError
from trimtab.inner_training.structure import probing
from trimtab.inner_training.structure.discovery import discover
from trimtab.inner_training.structure.groups import Group

UNITS = {
    "perceptron": {"0": 8, "2": 7},
    "convolutional": {"0": 6, "3": 4},
    "residual": {"stem": 8, "first": 6},
    "dense": {"a": 4, "b": 6, "c": 8, "d": 5},
    "group-norms": {"a": 4, "b": 8, "c": 3},
    "grouped": {"a": 8, "b": 3, "c": 6},
    "gated-linear": {"a": 8},
    "one-dimensional": {"0": 6},
    "transposed": {"0": 2},
    "encoder": {"1.self_attn.heads": 2, "1.linear1": 12},
    "own-mlp": {"layers.0": 8, "layers.1": 8},
    "own-crelu": {"layers.0": 4, "layers.1": 4},
    "own-convnet": {"layers.0": 4, "layers.1": 6},
    "own-residual": {"stem": 2, "blocks.0.first": 2, "blocks.1.first": 2},
    "own-language": {"blocks.0.heads": 4, "blocks.0.up": 12, "blocks.1.heads": 4, "blocks.1.up": 12},
    "own-vision": {"blocks.0.heads": 4, "blocks.0.up": 12},
}


def found(model: nn.Module, example: Any) -> tuple[dict[str, Group], dict[str, str]]:
    groups, refused = discover(model, example)
    return {group.name: group for group in groups}, refused


def snapshot(model: nn.Module) -> dict[str, Any]:
    modes = {name: part.training for name, part in model.named_modules()}
    needs = {name: one.requires_grad for name, one in model.named_parameters()}
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    return {"modes": modes, "needs": needs, "hooks": hooks, "random": torch.get_rng_state().tolist()}


@pytest.mark.parametrize("name", ZOO)
def test_units_of_the_zoo(name: str) -> None:
    model, example = make(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = snapshot(model)
    groups, _ = found(model, example)
    assert {key: group.units for key, group in groups.items()} == UNITS[name]
    assert snapshot(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize("name", ZOO)
def test_every_position_belongs_to_one_unit_at_most(name: str) -> None:
    model, example = make(name)
    owned: dict[tuple[str, int], Tensor] = {}
    for group in found(model, example)[0].values():
        for member in group.members:
            assert member.index.shape[0] == group.units
            flat = member.index.flatten()
            before = owned.get((member.parameter, member.axis), torch.zeros(0, dtype=torch.int64))
            owned[member.parameter, member.axis] = torch.cat([before, flat])
    for (name_, axis), flat in owned.items():
        tensor = dict(model.named_parameters()) | dict(model.named_buffers())
        assert len(flat.unique()) == len(flat) and int(flat.max()) < tensor[name_].shape[axis]


def test_members_follow_a_flattening_and_a_product_of_halves() -> None:
    model, example = make("residual")
    members = {(one.parameter, one.role): one.index for one in found(model, example)[0]["stem"].members}
    assert torch.equal(members["head.weight", "column"], torch.arange(32).view(8, 4))
    assert {"norm0.running_var", "norm2.running_mean"} <= {name for name, role in members if role == "statistic"}
    halves = found(GatedLinear(), torch.randn(2, 6))[0]["a"].of_role("row")[0]
    assert torch.equal(halves.index, torch.stack([torch.arange(8), torch.arange(8) + 8], 1))


def test_heads_of_separate_projections_and_appended_keys() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, kdim=5, vdim=4, add_bias_kv=True, batch_first=True)

        def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attend(x, key, value, need_weights=False)[0]

    groups, _ = found(Cross(), (torch.randn(2, 3, 8), torch.randn(2, 4, 5), torch.randn(2, 4, 4)))
    assert groups["attend.heads"].kept
    assert {member.parameter for member in groups["attend.heads"].members} == {
        "attend.q_proj_weight", "attend.k_proj_weight", "attend.v_proj_weight", "attend.in_proj_bias",
        "attend.bias_k", "attend.bias_v", "attend.out_proj.weight",
    }  # fmt: skip


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.b(torch.relu(self.a(x)))))))


class FromInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x + self.a(x))


class Hidden(nn.Module):
    """Units that also reach the output by a way that no gradient shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(h) + h.detach().sum()


class Mixing(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).softmax(-1))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (Twice(), "a", "called 2 times"),
        (FromInput(), "a", "connection from the model's input"),
        (Hidden(), "a", "by other ways"),
        (Mixing(), "a", "influence each other"),
        (tied(), "0", "is tied to"),
        (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), "0", "LayerNorm 1 normalises over its units"),
        (nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 2)), "0", "influence each other"),
        (nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2)), "0", "single unit"),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), "2", "the model's outputs"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2)), "0", "beside its own weights"),
    ],
    ids=["twice", "input", "output", "softmax", "tied", "layer-norm", "rms-norm", "single", "last", "weight-norm"],
)  # fmt: skip
def test_what_cannot_move_is_refused_with_a_reason(model: nn.Module, name: str, reason: str) -> None:
    groups, refused = found(model, torch.randn(5, 4))
    assert name not in groups
    assert reason in refused[name]


def test_attention_by_hand_gives_its_other_units() -> None:
    groups, refused = found(HandWrittenAttention(), torch.randn(2, 5, 6))
    assert {name: group.units for name, group in groups.items()} == {"embed": 8, "up": 16}
    assert "influence each other" in refused["q"]


def test_frozen_layers_are_followed_and_stay_frozen() -> None:
    model, example = make("convolutional")
    model[0].requires_grad_(False)  # type: ignore[index]
    assert {name: group.units for name, group in found(model, example)[0].items()} == UNITS["convolutional"]
    assert not any(one.requires_grad for one in model[0].parameters())  # type: ignore[index]


def test_without_the_probe_a_wrong_group_would_be_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing.Probe, "_verdict", lambda self, groups: None)
    assert {"a"} <= found(Hidden(), torch.randn(5, 4))[0].keys()


def test_arguments_by_name_and_by_place() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, scale: float) -> dict[str, Tensor]:
            return {"y": self.b(functional.relu(self.a(x)) * scale)}

    for example in ((torch.randn(3, 4), 2.0), {"x": torch.randn(3, 4), "scale": 2.0}):
        assert found(Two(), example)[0]["a"].units == 6


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(UserError, match="does not run on the example input"):
        discover(nn.Linear(4, 2), torch.randn(3, 5))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"trimtab\[structure\]"):
        discover(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(3, 4))


class Recurrent(nn.Module):
    """A recurrent layer, whose parts torch's graph does not tell apart, before layers that can be edited."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.a, self.cells, self.b, self.c = (
            nn.Linear(5, 8),
            kind(8, 6, batch_first=True),
            nn.Linear(6, 9),
            nn.Linear(9, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.cells(self.a(x))[0][:, -1])))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_units_behind_recurrent_layers_are_offered(kind: type[nn.RNNBase]) -> None:
    groups, refused = found(Recurrent(kind), torch.randn(3, 4, 5))
    assert {name: group.units for name, group in groups.items()} == {"b": 9}
    assert "a" in refused
