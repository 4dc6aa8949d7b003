"""Keepers: what they see of a training loop, what they reset, and what they leave alone."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.inner_training.structure.zoo import make, mean_square, train
from trimtab.errors import MismatchError, UnknownNameError, UserError
from trimtab.inner_training.structure.keeping import maintain
from trimtab.inner_training.structure.maintenance import MAINTENANCE
from trimtab.inner_training.structure.structure import Structure
from trimtab.inner_training.structure.unit_keeping import UnitKeeper

BRISK: dict[str, dict[str, float]] = {
    "redo": {"threshold": 0.7, "every": 4, "window": 2},
    "grama": {"threshold": 0.7, "every": 4, "window": 2},
    "continual-backprop": {"rate": 0.1, "maturity": 3},
    "random-reset": {"rate": 0.1, "maturity": 3},
    "self-normalised": {"first": 1, "longest": 10, "window": 5},
    "shrink-and-perturb": {"every": 5},
    "weight-clipping": {"kappa": 0.5},
}
Made = tuple[nn.Module, torch.optim.Optimizer, Any, Structure]


def ready(name: str = "perceptron", lr: float = 0.01, kind: Any = torch.optim.Adam) -> Made:
    model, example = make(name)
    optimizer = kind(model.parameters(), lr=lr)
    return model, optimizer, example, trimtab.gates(model, optimizer, example)


def run(keeper: Any, made: Made, steps: int, seen: bool = True, begin: int = 0) -> list[dict[str, list[int]]]:
    """Steps on batches that change with the step; each is seen in passing, or looked at afterwards."""
    model, optimizer, example, _ = made
    found = []
    for step in range(begin, begin + steps):
        batch = example + torch.randn(example.shape, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        if seen:
            with keeper.watch():
                mean_square(model, batch).backward()
        else:
            mean_square(model, batch).backward()
        optimizer.step()
        done = keeper.step() if seen else keeper.step(batch, mean_square)
        found.append({name: units.tolist() for name, units in done.items()})
    return found


@pytest.mark.parametrize("name", MAINTENANCE)
def test_every_method_keeps_a_model(name: str) -> None:
    made = ready()
    model, structure = made[0], made[3]
    keeper = maintain(structure, name, **BRISK.get(name, {}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    found = run(keeper, made, 20)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.isfinite(one).all() for one in model.parameters())
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if isinstance(keeper, UnitKeeper):
        counts = {group: sum(len(step.get(group, [])) for step in found) for group in structure.groups}
        assert counts == keeper.resets and sum(counts.values()) > 0
    else:
        assert not any(found)
    keeper.close()


@pytest.mark.parametrize("name", ["redo", "grama", "continual-backprop", "self-normalised"])
@pytest.mark.parametrize("model", ["perceptron", "own-crelu", "one-dimensional", "own-convnet", "encoder"])
def test_seen_in_passing_is_as_looked_at(model: str, name: str) -> None:
    """Without training (and dropout, and batch statistics) both see the same, and so reset the same."""
    histories = []
    for seen in (True, False):
        made = ready(model, lr=0.0)
        made[0].eval()
        options = {} if name != "continual-backprop" else {"newborn_state": "zero"}
        histories.append(run(maintain(made[3], name, **options, **BRISK[name]), made, 12, seen))
    assert histories[0] == histories[1]
    assert any(histories[0]) or (model, name) == ("own-crelu", "self-normalised")  # one half of CReLU always fires


@pytest.mark.parametrize("model", ["convolutional", "dense", "own-language", "encoder"])
def test_gradients_in_passing_are_those_of_the_evidence(model: str) -> None:
    """Before the activation function, also where that works in place."""
    from trimtab.inner_training.structure.collect import Request, gather
    from trimtab.inner_training.structure.sight import Sight

    network, example = make(model)
    structure = trimtab.gates(network, torch.optim.SGD(network.parameters(), lr=0.1), example)
    held = structure.editor.gates
    network.eval()
    sight = Sight(network, list(held.groups.values()), outputs=False, gradients=True)
    with sight.open():
        mean_square(network, example).backward()
    request = Request(
        needs=frozenset(("pre_grad",)), names=tuple(held.groups), example=None, why="", draws=torch.Generator()
    )
    for name, evidence in gather(held, request, [example], mean_square).items():
        found = sight.gradient(held.groups[name])
        assert found is not None
        expected = evidence.read("pre_grad")
        torch.testing.assert_close(found / found.mean(), expected / expected.mean(), rtol=1e-4, atol=1e-5)


def test_accumulated_passes_are_one_step() -> None:
    made = ready(lr=0.0)
    model, _, example, structure = made
    keeper = maintain(structure, "continual-backprop", rate=0.001)
    assert isinstance(keeper, UnitKeeper)
    halves = example[:1], example[1:]
    for half in halves:
        with keeper.watch():
            mean_square(model, half).backward()
    keeper.step()
    means = keeper._resetters["0"].means
    assert means is not None
    torch.testing.assert_close(means[:, 0], model[1](model[0](example)).mean(0).detach())  # type: ignore[index]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_what_a_reset_unit_is(kind: Any) -> None:
    made = ready(kind=kind)
    model, optimizer, _, structure = made
    keeper = maintain(structure, "random-reset", groups="0", rate=0.9, maturity=5)
    run(keeper, made, 5)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    (done,) = run(keeper, made, 1, begin=5)
    rows, bias, columns = model[0].weight, model[0].bias, model[2].weight  # type: ignore[index]
    reset = torch.zeros(8, dtype=torch.bool)
    reset[done["0"]] = True
    assert reset.sum() == 7  # 0.9 x 8, and the best one stays
    assert not columns[:, reset].any() and not bias[reset].any()
    assert (rows[reset].abs() <= 5**-0.5).all() and rows[reset].std() > 0.15
    assert not torch.isclose(rows[reset], before["0.weight"][reset], atol=0.011).all()
    for one, mask in ((rows, reset[:, None]), (bias, reset), (columns, reset[None])):
        for value in optimizer.state.get(one, {}).values():
            if value.shape == one.shape:
                assert not value.masked_select(mask).any() and value.masked_select(~mask).any()
    assert structure.ages["0"].tolist() == [0 if one else 6 for one in reset.tolist()]
    cohorts = structure.editor.state_dict()["cohorts"]
    assert bool(cohorts) == (kind is torch.optim.Adam)  # steps of their own where they matter
    run(keeper, made, 20, begin=6)
    cohorts = structure.editor.state_dict()["cohorts"]
    assert len({name for name, _, _ in cohorts}) == len(cohorts)  # however many resets there were
    assert all(len(where) == len(where.unique()) == len(begun) for _, where, begun in cohorts)


def test_units_of_all_ages_keep_their_own_steps_through_compaction() -> None:
    found = []
    for compact in (False, True):
        made = ready()
        keeper = maintain(made[3], "random-reset", rate=0.1, maturity=2)
        run(keeper, made, 15)
        made[3].prune(0.4, "magnitude", "layer")
        if compact:
            made[3].compact()
        before = made[0](made[2]).detach()
        train(made[0], made[1], made[2], 4)
        found.append(torch.cat([before, made[0](made[2]).detach()]))
        ages = {int(step) for _, _, begun in made[3].editor.state_dict()["cohorts"] for step in begun}
        assert len(ages) > 3
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("model", "group"), [("perceptron", "2"), ("own-crelu", "layers.1"), ("convolutional", "3")])
def test_compensation_leaves_the_mean_of_what_the_consumer_computes(model: str, group: str) -> None:
    """Also where a unit is read at several positions, each with a mean of its own."""
    changes = []
    for compensate in (None, False):
        made = ready(model, lr=0.0)
        network, _, example, structure = made
        network.eval()
        batch = torch.randn(64, *example.shape[1:], generator=torch.Generator().manual_seed(1))
        keeper = maintain(structure, "continual-backprop", groups=[group], rate=0.3, maturity=4, compensate=compensate)
        with torch.no_grad():
            before = network(batch).mean(0)
            for _ in range(5):
                done = keeper.step(batch, mean_square)
            assert len(done[group]) > 0
            changes.append(float((network(batch).mean(0) - before).abs().max()))
    assert changes[0] < 1e-5 and changes[1] > 1e-3


@pytest.mark.parametrize("name", MAINTENANCE)
def test_saved_and_gone_on(name: str) -> None:
    options = BRISK.get(name, {})
    whole = ready()
    straight = maintain(whole[3], name, **options, seed=3)
    run(straight, whole, 10)
    parts = [one.state_dict() for one in (whole[0], whole[1], whole[3], straight)]
    saved = copy.deepcopy(parts)
    run(straight, whole, 10, begin=10)
    other = ready()
    train(other[0], other[1], other[2], 1)  # so that the optimizer has state
    again = maintain(other[3], name, **options)
    for part, state in zip((other[0], other[1], other[3], again), saved, strict=True):
        part.load_state_dict(state)  # type: ignore[union-attr]
    run(again, other, 10, begin=10)
    for one, two in zip(whole[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(one, two)
    foreign = maintain(ready()[3], "redo" if name != "redo" else "grama")
    with pytest.raises(MismatchError, match=f"the state is of {name}"):
        foreign.load_state_dict(saved[3])


@pytest.mark.parametrize("model", ["own-crelu", "convolutional"])
def test_resets_by_hand_compensate_position_by_position(model: str) -> None:
    network, _, example, structure = ready(model, lr=0.0)
    network.eval()
    batch = torch.randn(64, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    group = list(structure.groups)[-1]
    with torch.no_grad():
        before = network(batch).mean(0)
        structure.reset({group: [1, 2]}, batches=[batch], loss_fn=mean_square, compensate=True)
        torch.testing.assert_close(network(batch).mean(0), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="compensation reads what units put out; give batches and loss_fn"):
        structure.reset({group: [1]}, compensate=True)


def test_keepers_respect_the_structure() -> None:
    made = ready()
    model, _, example, structure = made
    weight = model[0].weight  # type: ignore[index]
    edit = structure.prune(0.4, "magnitude", "layer")
    pruned = ~structure.active["0"]
    keeper = maintain(structure, "continual-backprop", rate=0.3, maturity=2)
    found = run(keeper, made, 12)
    assert not {unit for step in found for unit in step.get("0", [])} & set(pruned.nonzero()[:, 0].tolist())
    assert not weight[pruned].any() and sum(map(len, found)) > 0
    assert isinstance(keeper, UnitKeeper)
    edit.undo()  # over the resets, which count as training
    assert structure.active["0"].all() and weight[pruned].any()
    run(keeper, made, 1)
    assert (keeper._resetters["0"].memory["age"][pruned] == 1).all()  # units that have come back are new
    assert not structure.editor._history
    hand = structure.reset({"0": [4]})
    run(keeper, made, 1)
    assert keeper._resetters["0"].memory["age"][4] == 1
    hand.undo()
    structure.prune(0.4, "magnitude", "layer")
    structure.compact()
    with pytest.raises(UserError, match="is no longer what it was, since a compaction; make a new keeper"):
        keeper.step(example, mean_square)
    run(maintain(structure, "continual-backprop", rate=0.3, maturity=2), made, 5)


def test_a_look_leaves_no_trace() -> None:
    made = ready("residual")
    model, _, example, structure = made
    train(model, made[1], example, 2)
    for name in ("redo", "grama", "self-normalised"):
        keeper = maintain(
            structure, name, **{**BRISK[name], **({"threshold": 0} if "gra" in name or "re" in name else {})}
        )
        state = {key: value.clone() for key, value in model.state_dict().items()}
        grads = [None if one.grad is None else one.grad.clone() for one in model.parameters()]
        for _ in range(3):
            keeper.step(example, mean_square)
        if not isinstance(keeper, UnitKeeper) or not sum(keeper.resets.values()):
            assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        for one, old in zip(model.parameters(), grads, strict=True):
            assert (one.grad is None) == (old is None) and (old is None or torch.equal(one.grad, old))  # type: ignore[arg-type]
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def stepped(name: str, **settings: float) -> tuple[Tensor, Tensor, Tensor]:
    """Value before and after one step of SGD, and the gradient of the loss alone, of one weight."""
    made = ready(kind=torch.optim.SGD, lr=0.1)
    model, optimizer, example, structure = made
    weight = model[0].weight  # type: ignore[index]
    train(model, optimizer, example, 3)
    keeper = maintain(structure, name, **settings)
    train(model, optimizer, example, 3)
    before = weight.detach().clone()
    optimizer.zero_grad()
    mean_square(model, example).backward()
    slope = weight.grad.clone()
    optimizer.step()
    keeper.step()
    return before, weight.detach().clone(), slope


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", MAINTENANCE)
def test_on_a_device(name: str, device: str) -> None:
    model, example = make("convolutional")
    model, example = model.to(device), example.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def loss(network: nn.Module, batch: Tensor) -> Tensor:
        return network(batch).square().mean()

    keeper = maintain(trimtab.gates(model, optimizer, example), name, **BRISK.get(name, {}))
    for step in range(12):
        optimizer.zero_grad()
        with keeper.watch():
            loss(model, example).backward()
        optimizer.step()
        keeper.step(*(() if step % 2 else (example, loss)))
    assert not isinstance(keeper, UnitKeeper) or sum(keeper.resets.values()) > 0 or name == "self-normalised"


def test_gradient_terms_enter_before_the_step() -> None:
    before, after, slope = stepped("l2-noise", strength=0.5, noise=0.0)
    torch.testing.assert_close(after, before - 0.1 * (slope + 0.5 * before))
    before, after, slope = stepped("upgd", noise=0.0)
    moved = before - after
    assert not torch.allclose(moved, 0.1 * slope, rtol=1e-3, atol=0)
    assert (moved.abs() <= 0.2 * slope.abs() + 1e-7).all() and (moved * slope >= 0).all()


def test_l2_init_pulls_to_the_values_at_the_start() -> None:
    made = ready(kind=torch.optim.SGD, lr=0.1)
    model, optimizer, _, structure = made
    start = [one.detach().clone() for one in model.parameters()]
    keeper = maintain(structure, "l2-init", strength=1.0)
    with torch.no_grad():
        for one in model.parameters():
            one += 1.0
    for _ in range(200):
        for one in model.parameters():
            one.grad = torch.zeros_like(one)
        optimizer.step()
        keeper.step()
    for one, old in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(one.detach(), old)
    keeper.close()
    with torch.no_grad():
        model[0].weight += 1.0  # type: ignore[index]
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), start[0] + 1.0)  # type: ignore[index]


@pytest.mark.parametrize("name", [name for name, method in MAINTENANCE.items() if method.acts_on == "weights"])
def test_held_weights_stay_zero_and_norms_alone(name: str) -> None:
    made = ready("convolutional", kind=torch.optim.SGD)
    model, optimizer, _, structure = made
    structure.prune(0.5, "magnitude", "layer")
    keeper = maintain(structure, name, **{**BRISK.get(name, {}), **({"every": 1} if "perturb" in name else {})})
    norm = model[1].weight.detach().clone()  # type: ignore[index]
    held = structure.editor.gates
    for _ in range(3):
        for one in model.parameters():
            one.grad = torch.zeros_like(one)
        optimizer.step()
        keeper.step()
    assert torch.equal(model[1].weight, norm)  # type: ignore[index]
    for key, one in model.named_parameters():
        assert not one.detach()[held.held(key)].any()
    assert all(bool(held.held(key).any()) for key in ("0.weight", "3.weight"))
    structure.compact()
    with pytest.raises(UserError, match="has another shape than it had, since a compaction"):
        keeper.step() if keeper.method.rule.moves else optimizer.step()  # type: ignore[union-attr]
    keeper.close()


def test_events_come_every_so_many_steps() -> None:
    made = ready(lr=0.0)
    keeper = maintain(made[3], "shrink-and-perturb", every=3, keep=0.5, noise=0.2)
    weight, bound = made[0][0].weight, 5**-0.5  # type: ignore[index]
    values = [weight.detach().clone()]
    for _ in range(6):
        run(keeper, made, 1)
        values.append(weight.detach().clone())
    assert [torch.equal(one, two) for one, two in itertools.pairwise(values)] == [True, True, False] * 2
    fresh = (values[3] - 0.5 * values[2]) / 0.2
    assert fresh.abs().max() <= bound * 1.0001 and fresh.abs().max() > 0.8 * bound
    assert not torch.allclose(fresh, (values[6] - 0.5 * values[5]) / 0.2)


def test_weights_are_clipped_by_the_fan_in_of_their_layer() -> None:
    made = ready(lr=0.0)
    keeper = maintain(made[3], "weight-clipping", kappa=0.5)
    with torch.no_grad():
        for one in made[0].parameters():
            one.mul_(100)
    run(keeper, made, 1)
    assert made[0][0].weight.abs().max().item() == pytest.approx(0.5 * 5**-0.5)  # type: ignore[index]
    assert made[0][2].bias.abs().max().item() == pytest.approx(0.5 * 8**-0.5)  # type: ignore[index]


def test_scaled_gradients_of_a_fused_optimizer() -> None:
    """Their scale is still in them when the penalty comes."""
    found = []
    for scale in (None, torch.tensor(64.0)):
        made = ready(kind=torch.optim.SGD, lr=0.1)
        keeper = maintain(made[3], "l2-noise", strength=0.5, noise=0.0)
        made[1].grad_scale = scale  # type: ignore[attr-defined]
        mean_square(made[0], made[2]).backward()
        for one in made[0].parameters():
            assert one.grad is not None
            one.grad *= 1.0 if scale is None else scale
        keeper._steer(made[1])  # type: ignore[union-attr]
        found.append(made[0][0].weight.grad / (1.0 if scale is None else scale))  # type: ignore[index]
    torch.testing.assert_close(found[0], found[1])


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ready()
    model, _, example, structure = made
    with pytest.raises(
        UserError, match=r"maintain needs a Structure and was given a Sequential; make it by trimtab.gates"
    ):
        maintain(model, "redo")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="unknown maintenance 'redoo'; did you mean 'redo'"):
        maintain(structure, "redoo")
    with pytest.raises(UnknownNameError, match="unknown group '7'"):
        maintain(structure, "redo", groups=["7"])
    with pytest.raises(UnknownNameError, match="unknown setting of l2-init 'lambda_'; allowed: strength"):
        maintain(structure, "l2-init", lambda_=1)
    with pytest.raises(UserError, match="l2-init acts on weights; leave groups"):
        maintain(structure, "l2-init", groups=["0"])
    with pytest.raises(UserError, match="redo does not know what units give on average"):
        maintain(structure, "redo", compensate=True)
    with pytest.raises(UserError, match="seed is -1; it must be a whole number"):
        maintain(structure, "redo", seed=-1)
    with pytest.raises(UserError, match=r"strength of l2-init has the shape|strength has the shape"):
        maintain(structure, "l2-init", strength=torch.ones(2))
    keeper = maintain(structure, "continual-backprop")
    with pytest.raises(
        UserError, match="has seen nothing of 0 since the last step; run the passes inside `with keeper.watch"
    ):
        keeper.step()
    with pytest.raises(UserError, match="give loss_fn beside the batch"):
        keeper.step(example)
    bare = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2, bias=False))
    odd = trimtab.gates(bare, torch.optim.SGD(bare.parameters(), lr=0.1), torch.zeros(2, 4))
    with pytest.raises(UserError, match="has no bias that could compensate for units of 0; give compensate=False"):
        maintain(odd, "continual-backprop")
    maintain(odd, "continual-backprop", compensate=False)
    norms = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    only = trimtab.gates(norms, torch.optim.SGD(norms[1].parameters(), lr=0.1), torch.zeros(2, 4))
    with pytest.raises(UserError, match="the optimizer trains no weight of a linear layer"):
        maintain(only, "weight-clipping")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="would reset other units in each of several processes"):
        maintain(structure, "redo")
    maintain(structure, "random-reset")
