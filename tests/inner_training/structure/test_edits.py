"""Edits: what they leave alone, what newborns begin with, and their undoing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.inner_training.structure.zoo import OPTIMIZERS, ZOO, make, mean_square, train
from trimtab.errors import RangeError, UnknownNameError, UserError
from trimtab.inner_training.structure.structure import Structure


def picture(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of everything that an edit could change."""
    saved: dict[str, Any] = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    for name, one in model.named_parameters():
        saved[f"grad.{name}"] = None if one.grad is None else one.grad.clone()
        for key, value in optimizer.state.get(one, {}).items():
            saved[f"{key}.{name}"] = copy.deepcopy(value)
    return saved


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same, bit for bit."""
    assert one.keys() == other.keys()
    return [
        name
        for name, value in one.items()
        if not (torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name])
    ]


def trained(name: str, optimizer: str = "adamw-amsgrad") -> tuple[nn.Module, torch.optim.Optimizer, Any, Structure]:
    model, example = make(name)
    chosen = OPTIMIZERS[optimizer](list(model.parameters()))
    train(model, chosen, example, 3)
    return model, chosen, example, trimtab.gates(model, chosen, example)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_undo_is_exact_under_every_optimizer(optimizer: str) -> None:
    model, chosen, _, structure = trained("residual", optimizer)
    pictures, edits = [picture(model, chosen)], [structure.prune(0.5, "magnitude")]
    pictures.append(picture(model, chosen))
    edits.append(structure.grow(0.3, "pairing", newborn_state="transplant"))
    pictures.append(picture(model, chosen))
    edits.append(structure.reset({"stem": structure.active["stem"]}))
    for before, edit in zip(reversed(pictures), reversed(edits), strict=True):
        assert differing(before, picture(model, chosen))
        edit.undo()
        assert differing(before, picture(model, chosen)) == []


@pytest.mark.parametrize("name", ZOO)
def test_undo_is_exact_in_every_module(name: str) -> None:
    model, chosen, _, structure = trained(name)
    before = picture(model, chosen)
    edits = [structure.prune(0.5, "magnitude", "layer"), structure.grow(0.5, "random")]
    for edit in reversed(edits):
        edit.undo()
    assert differing(before, picture(model, chosen)) == []
    assert all(bool(mask.all()) for mask in structure.active.values())


def test_undo_before_the_first_step_and_after_it() -> None:
    model, example = make("perceptron")
    chosen = OPTIMIZERS["momentum"](model.parameters())
    structure = trimtab.gates(model, chosen, example)
    weight = model[0].weight  # type: ignore[index]
    before = weight.detach().clone()
    edit = structure.prune(0.5, "magnitude", groups=["0"])
    gone = ~structure.active["0"]
    train(model, chosen, example, 4)
    others = weight.detach().clone()
    edit.undo()
    assert torch.equal(weight[gone], before[gone])
    assert not chosen.state[weight]["momentum_buffer"][gone].any()
    assert torch.equal(weight[~gone], others[~gone])
    train(model, chosen, example, 1)
    assert not torch.equal(weight[gone], before[gone])


def test_undo_out_of_order_or_twice_is_refused() -> None:
    model, chosen, _, structure = trained("perceptron")
    first, second = structure.prune(0.2, "magnitude"), structure.prune(0.2, "magnitude")
    before = picture(model, chosen)
    with pytest.raises(UserError, match="not the latest edit; undo Edit"):
        first.undo()
    assert differing(before, picture(model, chosen)) == []
    second.undo()
    with pytest.raises(UserError, match="already undone"):
        second.undo()
    first.undo()


def test_adjacent_groups_share_weights() -> None:
    """A weight between two inactive units is parked once, and comes back only when both are active."""
    model, _, _, structure = trained("perceptron", "sgd")
    weight = model[2].weight  # type: ignore[index]
    before = weight.detach().clone()
    columns = structure._editor.remove({"0": torch.tensor([1])})
    rows = structure._editor.remove({"2": torch.tensor([2])})
    assert not weight[2].any() and not weight[:, 1].any()
    rows.undo()
    assert torch.equal(weight[2, 2:], before[2, 2:]) and not weight[:, 1].any()
    columns.undo()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("method", ["zero-out", "zero-in", "pairing", "net2wider"])
def test_growth_that_preserves_the_function_does(name: str, method: str) -> None:
    if method == "zero-in" and name == "perceptron":
        return  # it needs act(0) = 0, which a sigmoid is not
    model, chosen, example, structure = trained(name)
    structure.prune(0.5, "magnitude", "layer")
    train(model, chosen, example, 1)
    model.eval()
    with torch.no_grad():
        before = model(example)
        edit = structure.grow(0.5, method)
        assert sum(map(len, edit.units.values())) > 0
        change = (model(example) - before).abs().max() / before.abs().max()
    assert change < 1e-5


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(8),
    "channels alone": lambda: nn.GroupNorm(8, 8),
    "pairs of channels": lambda: nn.GroupNorm(4, 8),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_newborns_behind_a_norm_are_just_open(norm: str, bias: bool, seed: int) -> None:
    """In training mode a norm takes its mean away from what is the same everywhere, and magnifies what is nearly zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=bias), NORMS[norm](), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(36, 3)
        )
    example = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    chosen = OPTIMIZERS["adam"](model.parameters())
    structure = trimtab.gates(model, chosen, example)
    structure.prune(0.5, "random", groups=["0"])
    model.train()
    before = model(example).detach()
    edit = structure.grow(0.25, "zero-in", groups=["0"])
    assert 0 < (model(example) - before).abs().max() < 1e-5 * before.abs().max()
    row = structure._gates.groups["0"].of_role("row")[0]
    born = row.of(structure._gates.tensor(row.parameter).detach())[edit.units["0"]]
    train(model, chosen, example, 3)
    moved = row.of(structure._gates.tensor(row.parameter).detach())[edit.units["0"]] - born
    assert (moved.abs() > 1e-4).any(1).all()


def test_copies_of_units_with_rows_of_zero_keep_the_function_behind_a_norm() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[:4] = 0  # type: ignore[index, union-attr, operator]
        model[0].bias[:4] = torch.linspace(0.1, 1, 4)  # type: ignore[index, union-attr, operator]
        model[1].running_mean[:4] = -1  # type: ignore[index, union-attr, operator]
    model.eval()
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), torch.randn(4, 6))
    structure.editor.remove({"0": torch.tensor([4, 5, 6, 7])})
    example = torch.linspace(-1, 1, 24).reshape(4, 6)
    with torch.no_grad():
        before = model(example)
        structure.grow(0.5, "net2wider")
        assert torch.allclose(model(example), before, atol=1e-5)


@pytest.mark.parametrize("mode", ["zero", "transplant", "fresh-step"])
def test_survivors_keep_values_and_state(mode: str) -> None:
    model, chosen, example, structure = trained("residual")
    structure.prune(0.5, "magnitude", "layer")
    train(model, chosen, example, 2)
    before = picture(model, chosen)
    edit = structure.grow(0.3, "random", newborn_state=mode)
    after = picture(model, chosen)
    gates = structure._gates
    touched: dict[str, Tensor] = {}
    for name, units in edit.units.items():
        for key, mask in gates.entries(gates.groups[name], units).items():
            touched[key] = touched.get(key, torch.zeros_like(mask)) | mask
    for key in before:
        name = key.partition(".")[2]
        if isinstance(before[key], Tensor) and before[key].shape == gates.tensor(name).shape and name in touched:
            assert torch.equal(before[key][~touched[name]], after[key][~touched[name]]), key
        elif isinstance(before[key], Tensor):
            assert torch.equal(before[key], after[key]), key


def test_newborns_get_the_state_of_their_donor() -> None:
    model, chosen, _, structure = trained("perceptron")
    structure.prune(0.5, "magnitude", "layer", groups=["0"])
    edit = structure.grow(0.25, "net2wider", groups=["0"], newborn_state="transplant")
    weight, units = model[0].weight, edit.units["0"]  # type: ignore[index]
    rows = weight.detach()
    for unit in units.tolist():
        (donor,) = [one for one in range(8) if one not in units.tolist() and torch.equal(rows[one], rows[unit])]
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(chosen.state[weight][key][unit], chosen.state[weight][key][donor])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_fresh_steps_are_those_of_a_newborns_own_adam(amsgrad: bool) -> None:
    """Newborns move as in an Adam whose step count began at their birth; survivors as if nothing had happened."""
    model, example = make("perceptron")
    chosen = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, amsgrad=amsgrad)
    structure = trimtab.gates(model, chosen, example)
    structure.prune(0.5, "magnitude", "layer")
    train(model, chosen, example, 20)
    edit = structure.grow(0.5, "random", newborn_state="fresh-step")
    fresh, twin = copy.deepcopy(model), copy.deepcopy(model)
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.01, weight_decay=0.1, amsgrad=amsgrad)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1, amsgrad=amsgrad)
    twin_optimizer.load_state_dict(copy.deepcopy(chosen.state_dict()))
    gates = structure._gates
    born = [gates.entries(gates.groups[name], units) for name, units in edit.units.items()]
    mean_square(model, example)  # so that batches below are the same for all
    for _ in range(5):
        chosen.zero_grad()
        mean_square(model, example).backward()
        for other in (fresh, twin):
            for one, source in zip(other.parameters(), model.parameters(), strict=True):
                one.grad = source.grad.clone() if source.grad is not None else None
        for optimizer in (chosen, fresh_optimizer, twin_optimizer):
            optimizer.step()
    for name, one in model.named_parameters():
        mask = torch.zeros(one.shape, dtype=torch.bool)
        for entries in born:
            mask |= entries.get(name, torch.zeros_like(mask))
        mask &= ~gates.held(name)
        own, stock = fresh.get_parameter(name), twin.get_parameter(name)
        assert torch.allclose(one[mask], own[mask], atol=1e-6)
        assert torch.equal(one[~mask], stock[~mask])
        if mask.any():
            assert not torch.allclose(one[mask], stock[mask], atol=1e-4)


@pytest.mark.parametrize("first", [False, True])
def test_fresh_steps_follow_a_controller_of_the_learning_rate(first: bool) -> None:
    """The learning rate that counts is the one in force during the step, whoever puts another one back after it."""
    model, example = make("perceptron")
    chosen = torch.optim.Adam(model.parameters(), lr=0.01)

    def scale(factor: float) -> Any:
        return lambda *_: chosen.param_groups[0].update(lr=chosen.param_groups[0]["lr"] * factor)

    def attach() -> None:
        chosen.register_step_pre_hook(scale(0.5))
        chosen.register_step_post_hook(scale(2.0))

    if first:
        attach()
    structure = trimtab.gates(model, chosen, example)
    if not first:
        attach()
    structure.prune(0.5, "magnitude", "layer")
    train(model, chosen, example, 10)
    edit = structure.grow(0.25, "random", groups=["0"], newborn_state="fresh-step")
    weight = model[0].weight  # type: ignore[index]
    before = weight.detach()[edit.units["0"]].clone()
    train(model, chosen, example, 1)
    steps = (weight.detach()[edit.units["0"]] - before).abs()
    assert torch.allclose(steps[steps > 1e-4], torch.tensor(0.005), rtol=1e-2)  # Adam's first step is its learning rate
    assert (steps > 1e-4).any()


def test_fresh_steps_are_refused_where_they_are_not_known() -> None:
    model, example = make("perceptron")
    structure = trimtab.gates(model, torch.optim.NAdam(model.parameters()), example)
    structure.prune(0.5, "magnitude")
    with pytest.raises(UserError, match="fresh-step does not know how NAdam"):
        structure.grow(0.2, "random", newborn_state="fresh-step")


def test_woken_units_come_back_with_what_was_parked() -> None:
    model, _, example, structure = trained("perceptron")
    before = model[2].weight.detach().clone()  # type: ignore[index]
    structure.prune(0.4, "magnitude", "layer")
    structure.grow(1.0, "activation-frequency", [example], mean_square)
    assert torch.equal(model[2].weight, before)  # type: ignore[index]
    assert all(bool(mask.all()) for mask in structure.active.values())


def test_undone_growth_leaves_what_was_parked() -> None:
    model, _, _, structure = trained("perceptron")
    before = [one.detach().clone() for one in model.parameters()]
    structure.prune(0.4, "magnitude", "layer")
    structure.grow(0.3, "random").undo()
    structure.grow(1.0, "random-parked")
    assert all(torch.equal(one, old) for one, old in zip(model.parameters(), before, strict=True))


def test_resets_begin_anew_and_compensate() -> None:
    model, chosen, example, structure = trained("perceptron")
    with torch.no_grad():
        model[0].bias[2] = 50.0  # type: ignore[index]
        model[0].weight[2] = 0.0  # type: ignore[index]
        before = model(example)
    edit = structure.reset({"0": [2]}, batches=[example], loss_fn=mean_square, compensate=True)
    first, second = model[0], model[2]  # type: ignore[index]
    assert first.weight[2].any() and first.bias[2].item() == 0.0 and not second.weight[:, 2].any()
    assert not chosen.state[first.weight]["exp_avg"][2].any()
    assert torch.allclose(model(example), before, atol=1e-4)  # a constant unit is made up for entirely
    assert structure.ages["0"].tolist() == [0] * 8
    edit.undo()
    assert torch.equal(model(example), before)


def test_dormant_units_are_found_and_reset() -> None:
    model, _, example, structure = trained("perceptron")
    with torch.no_grad():
        model[0].bias[:] = 1.0  # type: ignore[index]
        model[0].bias[[1, 4]] = -100.0  # type: ignore[index]
    edit = structure.reset(batches=[example], loss_fn=mean_square)
    assert {name: units.tolist() for name, units in edit.units.items()} == {"0": [1, 4]}
    again = structure.reset({}, batches=[example], loss_fn=mean_square)
    assert again.units == {}
    again.undo()


def test_scopes_and_shares() -> None:
    model, _, _, structure = trained("perceptron", "sgd")
    with torch.no_grad():
        model[0].weight.mul_(100)  # type: ignore[index]
    structure.prune(0.25, "magnitude").undo()
    edit = structure.prune(0.25, "magnitude", normalisation="none")
    assert edit.units.keys() == {"2"}  # the layer of small weights alone
    edit.undo()
    edit = structure.prune(0.25, "magnitude")
    assert edit.units.keys() == {"0", "2"}
    edit.undo()
    edit = structure.prune(0.25, "magnitude", "layer")
    assert {name: len(units) for name, units in edit.units.items()} == {"0": 2, "2": 2}


@pytest.mark.parametrize("name", ["perceptron", "convolutional", "encoder"])
def test_repair_makes_up_for_what_goes(name: str) -> None:
    model, chosen, example, structure = trained(name)
    group = list(structure.groups)[-1]
    model.eval()
    with torch.no_grad():
        expected, before, changes = model(example), picture(model, chosen), []
        for repair in (False, True):
            options = {"repair": repair, "groups": [group], "batches": [example], "loss_fn": mean_square}
            edit = structure.prune(0.4, "obs", "layer", **options)  # type: ignore[arg-type]
            changes.append(float((model(example) - expected).square().sum()))
            edit.undo()
            model.eval()
            assert differing(before, picture(model, chosen)) == []
    assert changes[1] < 0.7 * changes[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.prune(0.0, "magnitude"), RangeError, "share is 0"),
        (lambda s: s.prune(1.5, "magnitude"), RangeError, "share is 1.5"),
        (lambda s: s.prune(1.0, "magnitude"), UserError, "have to stay"),
        (lambda s: s.prune(0.99, "magnitude", "layer"), UserError, "at least 1 must stay active"),
        (lambda s: s.prune(0.001, "magnitude"), UserError, "amounts to no unit"),
        (lambda s: s.prune(0.5, "magnitute"), UnknownNameError, "did you mean 'magnitude'"),
        (lambda s: s.prune(0.5, "magnitude", "layr"), UnknownNameError, "did you mean 'layer'"),
        (lambda s: s.prune(0.5), UserError, "criterion 'agf' reads agf; give batches and loss_fn"),
        (lambda s: s.prune(0.5, "agf", batches=[], loss_fn=mean_square), UserError, "give at least one"),
        (lambda s: s.prune(0.5, "magnitude", groups=["1"]), UnknownNameError, "unknown group '1'"),
        (lambda s: s.prune(0.5, "magnitude", groups=["4"]), UserError, "units of 4 are not offered: nothing but"),
        (lambda s: s.prune(0.5, "magnitude", repair=True), UserError, "repair reads output_cov"),
        (lambda s: s.grow(0.5), UserError, "all units of 0, 2 are active"),
        (lambda s: s.grow(0.5, "pairng"), UserError, "active"),
        (lambda s: s.reset({"0": [9]}), UserError, "numbered from 0 to 7"),
        (lambda s: s.reset({"0": torch.ones(3, dtype=torch.bool)}), UserError, "shape"),
        (lambda s: s.reset({"0": [0]}, newborn_state="none"), UnknownNameError, "unknown newborn state"),
        (lambda s: s.mask({"0.wait": torch.ones(1)}), UnknownNameError, "did you mean '0.weight'"),
        (lambda s: s.mask({"0.weight": torch.ones(3)}), UserError, "the mask of 0.weight"),
    ],
)  # fmt: skip
def test_bad_input_changes_nothing(call: Any, error: type[Exception], message: str) -> None:
    model, chosen, _, structure = trained("perceptron")
    before = picture(model, chosen)
    with pytest.raises(error, match=message):
        call(structure)
    assert differing(before, picture(model, chosen)) == []
    assert all(bool(mask.all()) for mask in structure.active.values())


class Strange(torch.optim.SGD):
    """An optimizer whose state does not fall into weights."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for one in group["params"]:
                self.state[one]["preconditioner"] = torch.eye(len(one) + 1)


def test_unknown_optimizer_state_is_refused() -> None:
    model, example = make("perceptron")
    chosen = Strange(model.parameters(), lr=0.1)
    structure = trimtab.gates(model, chosen, example)
    train(model, chosen, example, 1)
    before = picture(model, chosen)
    for call in (lambda: structure.prune(0.5, "magnitude"), lambda: trimtab.gates(model, chosen, example)):
        with pytest.raises(UserError, match="the state 'preconditioner' of Strange"):
            call()
    assert differing(before, picture(model, chosen)) == []
    with pytest.raises(UserError, match="the state of LBFGS does not fall into units"):
        trimtab.gates(model, torch.optim.LBFGS(model.parameters()), example)


def test_what_is_no_model_or_optimizer_is_refused() -> None:
    model, example = make("perceptron")
    chosen = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(UserError, match="the optimizer is a list"):
        trimtab.gates(model, [], example)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the model is a function"):
        trimtab.gates(lambda x: x, chosen, example)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(model, example)
    with pytest.raises(UserError, match="torch.jit module"):
        trimtab.gates(scripted, chosen, example)
    with pytest.raises(UserError, match="no parameter of the model is in the optimizer"):
        trimtab.gates(make("perceptron")[0], chosen, example)
