"""Evidence from a user's own module, against slow references and identities between its fields."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.inner_training.structure.test_edits import differing, picture
from tests.inner_training.structure.zoo import OPTIMIZERS, ZOO, make, mean_square, train
from trimtab.errors import UserError
from trimtab.inner_training.structure.collect import Request, gather
from trimtab.inner_training.structure.criteria import CRITERIA
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.growth import GROWTH
from trimtab.inner_training.structure.splitting import split_matrices
from trimtab.inner_training.structure.structure import Structure


def ready(name: str, prune: float = 0.4) -> tuple[nn.Module, torch.optim.Optimizer, Any, Structure]:
    model, example = make(name)
    chosen = OPTIMIZERS["momentum"](list(model.parameters()))
    train(model, chosen, example, 2)
    structure = trimtab.gates(model, chosen, example)
    if prune:
        structure.prune(prune, "random", "layer")
    return model, chosen, example, structure


def evidence_of(structure: Structure, needs: str, batches: list[Any], names: Any = None) -> dict[str, Evidence]:
    request = Request(
        needs=frozenset(needs.split()),
        names=tuple(names or structure.groups),
        example=batches[0],
        why="a test",
        draws=torch.Generator().manual_seed(0),
    )
    return gather(structure._gates, request, batches, mean_square)


@pytest.mark.parametrize("name", ZOO)
def test_utilities_agree_with_gradients_of_weights(name: str) -> None:
    """E sum h g is what the loss changes by when a unit's columns are scaled, of inactive units with what is parked."""
    _, _, example, structure = ready(name)
    for group, evidence in evidence_of(structure, "signed weights_out grad_out alive agf taylor", [example]).items():
        wanted = (evidence.read("weights_out") * evidence.read("grad_out")).sum(-1)
        assert torch.allclose(evidence.read("signed"), wanted, atol=1e-5 * float(wanted.abs().max()) + 1e-8), group
        assert not bool(evidence.live.all())
        assert (evidence.read("agf") >= evidence.read("taylor") - 1e-7).all()
        assert (evidence.read("taylor") >= evidence.read("signed").abs() - 1e-7).all()


def test_weights_leave_out_inactive_units_of_other_groups() -> None:
    model, _, example, structure = ready("perceptron", prune=0)
    before = model[2].weight.detach().clone()  # type: ignore[index]
    structure.prune(0.4, "random", "layer")
    evidence = evidence_of(structure, "weights_in", [example])["2"]
    idle = ~structure.active["0"]
    assert not evidence.read("weights_in")[:, idle].any()
    assert torch.equal(
        evidence.read("weights_in")[:, ~idle], before[:, ~idle]
    )  # also of the group's own inactive units
    assert not bool(structure.active["2"].all())


class Counting(nn.Module):
    """A module that counts its calls in a buffer, in any mode."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(torch.relu(self.a(x)))


def test_buffers_are_put_back() -> None:
    model, example = Counting(), torch.randn(3, 4)
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), example)
    structure.score("agf", [example], mean_square)
    structure.prune(0.5, "obd", batches=[example], loss_fn=mean_square)
    structure.compact()
    assert model.calls == 0


@pytest.mark.parametrize("name", ["perceptron", "residual", "encoder", "own-vision"])
def test_inactive_units_are_seen_as_if_opened_by_a_crack(name: str) -> None:
    """The utility of an inactive unit is the derivative of the loss by its gate, at zero."""
    model, _, example, structure = ready(name)
    model.double().eval()
    gates, examples = structure._gates, example.double()
    gates.parked = {key: value.double() for key, value in gates.parked.items()}
    for group, evidence in evidence_of(structure, "signed alive mean_abs", [examples]).items():
        unit = int((~gates.active[group]).nonzero()[0, 0])
        losses = []
        for gate in (1e-5, -1e-5):
            active, gates.active[group] = gates.active[group], gates.active[group].clone()
            saved = {one.parameter: gates.tensor(one.parameter).detach().clone() for one in gates.groups[group].members}
            with torch.no_grad():
                for member in gates.groups[group].members:
                    parked = member.of(gates.virtual(member.parameter, {group}))[[unit]]
                    scale = gate if member.role == "column" else 1.0
                    member.put(gates.tensor(member.parameter), torch.tensor([unit]), parked * scale)
                losses.append(mean_square(model, examples))
                for key, values in saved.items():
                    gates.tensor(key).copy_(values)
            gates.active[group] = active
        slope = float((losses[0] - losses[1]) / 2e-5)
        assert float(evidence.read("signed")[unit]) == pytest.approx(slope, rel=1e-3, abs=1e-7), group


def test_fields_of_activity_are_their_definitions() -> None:
    model, _, example, structure = ready("perceptron", prune=0)
    needs = "mean_abs mean square active agf agf_first taylor signed pre_grad output_cov input_norm input_cov"
    other = example + 0.5
    evidence = evidence_of(structure, needs, [example, other])["0"]
    fields: dict[str, list[Tensor]] = {}
    for batch in (example, other):
        z = model[0](batch).detach().requires_grad_()  # type: ignore[index]
        h = torch.relu(z)
        slopes = []
        for index in range(len(batch)):
            loss = (model[2:](h)[index] - torch.linspace(-1, 1, 3)).square().mean()  # type: ignore[index]
            slopes.append([one[index] for one in torch.autograd.grad(loss, [h, z], retain_graph=True)])
        g, dz = (torch.stack(one) for one in zip(*slopes, strict=True))
        h = h.detach()
        for key, value in {
            "mean_abs": h.abs().mean(0), "mean": h.mean(0), "square": h.square().mean(0),
            "active": (h > 0.05).float().mean(0), "agf": (h * g).abs().mean(0), "agf_first": (h * g).abs().mean(0),
            "taylor": (h * g).abs().mean(0), "signed": (h * g).mean(0), "pre_grad": dz.abs().mean(0),
            "output_cov": h.T @ h / len(h), "input_cov": batch.T @ batch / len(h), "input_norm": batch.square().mean(0),
        }.items():  # fmt: skip
            fields.setdefault(key, []).append(value)
    for key, values in fields.items():
        wanted = torch.stack(values).mean(0)
        wanted = wanted.sqrt() if key == "input_norm" else wanted
        assert torch.allclose(evidence.read(key), wanted, atol=1e-6), key


@pytest.mark.parametrize("name", ["residual", "encoder", "own-convnet"])
def test_examples_are_told_apart(name: str) -> None:
    """A batch's evidence is the mean of that of its examples, also where places are flattened into examples."""
    _, _, example, structure = ready(name)
    needs = "agf taylor signed mean_abs output_cov pre_grad square_in square_out square_bias"
    joint = evidence_of(structure, needs, [example])
    single = evidence_of(structure, needs, [example[index : index + 1] for index in range(len(example))])
    for group, evidence in joint.items():
        for key, value in evidence.given().items():
            wanted = single[group].read(key).float()
            assert torch.allclose(value.float(), wanted, rtol=1e-3, atol=1e-6 * float(wanted.abs().max()) + 1e-9), (
                group,
                key,
            )


def test_squares_of_single_examples_by_both_ways() -> None:
    _, _, example, structure = ready("residual")

    def without_func(model: nn.Module, batch: Any) -> Tensor:
        return mean_square(model, batch) * float(model(batch).isfinite().all())  # torch.func cannot follow a number

    request = Request(
        needs=frozenset(("square_in",)), names=("first",), example=example, why="", draws=torch.Generator()
    )
    one = gather(structure._gates, request, [example], mean_square)["first"].read("square_in")
    other = gather(structure._gates, request, [example], without_func)["first"].read("square_in")
    assert one.any() and torch.allclose(one, other, rtol=1e-3, atol=1e-12)


class Straight(nn.Module):
    """Layers without an activation function, for which a new unit is the product of its row and its column."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        make_layer = nn.Linear if kind == "linear" else lambda i, o: nn.Conv2d(i, o, 3, padding=1)
        self.a, self.b = make_layer(3, 6), make_layer(6, 4) if kind != "flat" else nn.Linear(6 * 16, 4)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return torch.tanh(self.b(h.flatten(1) if self.kind == "flat" else h)).flatten(1)


@pytest.mark.parametrize("kind", ["linear", "convolution", "flat"])
def test_the_bypass_tells_what_a_new_unit_would_do(kind: str) -> None:
    model = Straight(kind)
    example = torch.randn(5, 3) if kind == "linear" else torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        model.a.bias.zero_()
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), example)
    structure.prune(0.5, "random")
    evidence = evidence_of(structure, "bypass next_grad signed weights_in weights_out alive", [example])["a"]
    wanted = torch.einsum("uo,oi,ui->u", *(evidence.read(one) for one in ("weights_out", "bypass", "weights_in")))
    assert torch.allclose(evidence.read("signed"), wanted, atol=1e-6)
    mean_square(model, example).backward()
    bias = evidence.read("next_grad")
    bias = bias.view(16, 4)[0] if kind == "flat" else bias.view(4, -1)[:, 0]
    assert torch.allclose(bias, model.b.bias.grad, atol=1e-6)


def test_second_order_against_the_whole_hessian() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    example = torch.randn(6, 3, dtype=torch.float64)
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), example)
    names = [name for name, _ in model.named_parameters()]
    sizes = [one.numel() for one in model.parameters()]

    def loss(flat: Tensor) -> Tensor:
        pieces = [piece.view(one.shape) for piece, one in zip(flat.split(sizes), model.parameters(), strict=True)]
        outputs = torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), (example,))
        return (outputs - torch.linspace(-1, 1, 2)).square().mean()

    point = torch.cat([one.detach().flatten() for one in model.parameters()])
    hessian, slope = torch.autograd.functional.hessian(loss, point), torch.func.grad(loss)(point)
    product, diagonal = (hessian @ slope).split(sizes), hessian.diagonal().split(sizes)
    evidence = evidence_of(structure, "hv_in hv_bias hv_out hess_in hess_out", [example] * 150)["0"]
    assert torch.allclose(evidence.read("hv_in"), product[0].view(4, 3).float(), atol=1e-5)
    assert torch.allclose(evidence.read("hv_bias"), product[1].float(), atol=1e-5)
    assert torch.allclose(evidence.read("hv_out"), product[2].view(2, 4).T.float(), atol=1e-5)
    scale = float(hessian.abs().max())
    assert torch.allclose(evidence.read("hess_in"), diagonal[0].view(4, 3).float(), atol=0.1 * scale)
    assert torch.allclose(evidence.read("hess_out"), diagonal[2].view(2, 4).T.float(), atol=0.1 * scale)


def test_flow_is_conserved_at_each_unit() -> None:
    """Without biases what flows into a unit flows out of it (Tanaka et al., theorem 1)."""
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)
    )
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), torch.randn(3, 4))
    for evidence in evidence_of(structure, "weights_in weights_out flow_in flow_out", [torch.randn(3, 4)]).values():
        into = (evidence.read("weights_in").abs() * evidence.read("flow_in")).sum(-1)
        out = (evidence.read("weights_out").abs() * evidence.read("flow_out")).sum(-1)
        assert torch.allclose(into, out, rtol=1e-4) and bool((into > 0).all())


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
def test_splitting_matrices(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2))
    example = torch.randn(6, 3)
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), example)
    z = model[0](example).detach()
    h = activation(z).requires_grad_()
    loss = (model[2](h) - torch.linspace(-1, 1, 2)).square().mean()
    g = torch.autograd.grad(loss, h)[0] * 6
    relu = isinstance(activation, nn.ReLU)
    bend = 3 * (3 * z).sigmoid() * (1 - (3 * z).sigmoid()) if relu else -2 * z.tanh() * (1 - z.tanh().square())
    wanted = split_matrices(g[..., None], bend[..., None], example[..., None])
    assert torch.allclose(evidence_of(structure, "split", [example])["0"].read("split"), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ZOO)
def test_scores_and_diagnostics_leave_no_trace(name: str) -> None:
    model, chosen, example, structure = ready(name)
    mean_square(model, example).backward()
    model[0].eval() if isinstance(model, nn.Sequential) else None
    before, modes = picture(model, chosen), [part.training for part in model.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    def noisy(module: nn.Module, batch: Any) -> Tensor:
        return mean_square(module, batch) * (1 + 0.1 * torch.rand(()) * float(np.random.rand()) * random.random())

    structure.score("agf", [example], noisy)
    structure.score("obd", [example], noisy)
    structure.score("synflow", [example], noisy)
    structure.diagnostics(example, noisy)
    with pytest.raises(ZeroDivisionError):
        structure.score("agf", [example], lambda module, batch: module(batch).sum() / 0 if 1 // 0 else None)
    assert differing(before, picture(model, chosen)) == []
    assert modes == [part.training for part in model.modules()]
    assert torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert nn.functional.linear.__name__ == "linear" and not hasattr(nn.functional.linear, "__wrapped__")
    assert type(nn.functional.linear).__name__ == "builtin_function_or_method"


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["perceptron", "residual", "encoder", "own-mlp"])
def test_every_criterion_scores_or_says_why_not(name: str, criterion: str) -> None:
    _, _, example, structure = ready(name)
    try:
        scores = structure.score(criterion, [example], mean_square)
    except UserError as error:
        assert name == "encoder" and "1.self_attn.heads" in str(error)  # inputs of torch's attention are not seen
        scores = structure.score(criterion, [example], mean_square, groups=["1.linear1"])
    for group, values in scores.items():
        assert values.shape == (structure.groups[group],) and torch.isfinite(values).all()


@pytest.mark.parametrize("method", GROWTH)
@pytest.mark.parametrize("name", ["perceptron", "convolutional"])
def test_every_growth_method_makes_newborns(name: str, method: str) -> None:
    model, chosen, example, structure = ready(name, prune=0.5)
    group = next(iter(structure.groups))
    model.eval()
    before = model(example).detach()
    try:
        edit = structure.grow(0.4, method, [example], mean_square, groups=[group])
    except UserError as error:
        assert method in ("splitting", "gradmax", "nest") and name == "convolutional"
        assert "cannot be had of 0" in str(error)  # a norm lies in between
        return
    assert len(edit.units[group]) > 0
    if GROWTH[method].preserves and name == "perceptron":
        assert torch.allclose(model(example), before, atol=1e-5)
    train(model, chosen, example, 2)


def test_a_criterion_on_what_cannot_be_seen_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Bilinear(6, 6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            return self.b(h, h)

    model = Own()
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), torch.randn(2, 3))
    assert structure.groups == {} and "a" in structure.refused
    with pytest.raises(UserError, match="no group of units to edit"):
        structure.prune(0.5, "magnitude")
