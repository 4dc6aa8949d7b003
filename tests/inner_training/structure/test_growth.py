"""What every growth method owes: shapes, the function where it promises it, batches, and units that can learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.inner_training.structure import tiny
from trimtab.errors import ConfigError, MismatchError, RangeError, UnknownNameError
from trimtab.inner_training.structure.evidence import SHAPES, Evidence, of_runs, run_of
from trimtab.inner_training.structure.growth import GROWTH, register_growth, resolve_growth
from trimtab.inner_training.structure.newborns import OPEN, Newborns, grown, scaled, woken

PRESERVING = [name for name, method in GROWTH.items() if method.preserves]
WAKING = [name for name, method in GROWTH.items() if method.wakes]
GATES = torch.tensor([1.0, 1, 0, 1, 0, 0], dtype=torch.float64)


def born(name: str, evidence: Evidence, count: int = 3, seed: int = 0) -> Newborns:
    return GROWTH[name].make(evidence, count, torch.Generator().manual_seed(seed))


def with_newborns(network: tiny.Network, evidence: Evidence, newborns: Newborns) -> tiny.Network:
    rows, bias, columns = (part.double() for part in grown(evidence, newborns))
    return replace(network, rows=rows, bias=None if network.bias is None else bias, columns=columns, alive=None)


def gated(seed: int = 0, activation: str = "relu") -> tiny.Network:
    return replace(tiny.make(seed, activation, units=6), alive=GATES)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", tiny.ACTIVATIONS)
@pytest.mark.parametrize("name", PRESERVING)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 9), count=st.sampled_from([1, 2, 3, 7, 20]), columns=st.sampled_from([0.1, 1.0, 2.0]))
def test_the_function_stays(name: str, activation: str, bias: bool, seed: int, count: int, columns: float) -> None:
    network, evidence = tiny.make(seed, activation, bias), tiny.evidence_of(seed, activation, bias)
    after = with_newborns(network, evidence, scaled(born(name, evidence, count, seed), columns=columns))
    assert len(after.rows) == 5 + count
    worst = (after.outputs() - network.outputs()).abs().max()
    assert worst <= 1e-5 * max(1.0, float(network.outputs().abs().max()))


@pytest.mark.parametrize("name", [name for name in GROWTH if name not in PRESERVING])
def test_the_others_say_so_rightly(name: str) -> None:
    network = gated(1, "gelu")  # neither odd nor straight
    evidence = tiny.gather(network)
    after = with_newborns(network, evidence, born(name, evidence))
    assert (after.outputs() - network.outputs()).abs().max() > 1e-4


def test_odd_pairs_keep_the_function_of_odd_activations() -> None:
    network, evidence = tiny.make(2, "tanh"), tiny.evidence_of(2, "tanh")
    after = with_newborns(network, evidence, born("pairing-odd", evidence, 4))
    torch.testing.assert_close(after.outputs(), network.outputs(), rtol=1e-5, atol=1e-6)
    newborns = born("pairing-odd", evidence, 4)
    assert torch.equal(newborns.rows[0], -newborns.rows[1]) and torch.equal(newborns.columns[2], newborns.columns[3])


LEARNING = ("random", "zero-out", "zero-in", "pairing", "net2wider", "gradmax", "splitting")


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("activation", tiny.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_newborns_learn(name: str, activation: str, bias: bool) -> None:
    """Under relu too, whose derivative at 0 is 0 in torch, at least one side has a gradient at birth."""
    network, evidence = tiny.make(3, activation, bias), tiny.evidence_of(3, activation, bias)
    newborns = born(name, evidence, 2)
    assert newborns.present.all()
    now = start = with_newborns(network, evidence, newborns)
    at_birth = tiny.unflat(start, tiny.gradient(start))
    of_rows, of_columns = at_birth.rows[5:].norm(dim=1), at_birth.columns[5:].norm(dim=1)
    assert (torch.maximum(of_rows, of_columns) > 1e-3).all()
    if name in ("random", "pairing", "net2wider", "splitting"):
        assert (torch.minimum(of_rows, of_columns) > 1e-3).all()
    for _ in range(2):
        now = tiny.unflat(now, tiny.flat(now) - 0.01 * tiny.gradient(now))
    assert ((now.rows - start.rows)[5:].norm(dim=1) > 1e-5).all()
    assert not torch.allclose(now.rows[5], now.rows[6])
    if (name, activation) != ("zero-in", "relu"):  # whose random columns may close it at the first step
        assert ((now.columns - start.columns)[5:].norm(dim=1) > 1e-6).all()


@pytest.mark.parametrize("name", GROWTH)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_newborns_are_whole(name: str, count: int) -> None:
    evidence = tiny.gather(gated(4))
    one, again = born(name, evidence, count), born(name, evidence, count)
    assert one.rows.shape == (count, 3) and one.columns.shape == (count, 4)
    assert one.bias.shape == one.present.shape == (count,)
    for value, same in ((one.rows, again.rows), (one.bias, again.bias), (one.columns, again.columns)):
        assert value.dtype == torch.float32 and value.isfinite().all() and torch.equal(value, same)
        assert (value[~one.present] == 0).all()
    assert one.present[0] and not (one.present.int().diff() > 0).any()  # the best come first
    if one.donors is not None:
        assert evidence.live[one.donors[one.present]].all() and (one.donors[~one.present] == -1).all()
    if name in WAKING:
        assert one.chosen is not None and one.present.sum() == min(count, 3)
        assert (~evidence.live[one.chosen[one.present]]).all() and len(set(one.chosen.tolist())) >= min(count, 3)
        assert woken(one, 6).sum() == one.present.sum()
    assert GROWTH[name].wakes == (one.chosen is not None)


@pytest.mark.parametrize("name", GROWTH)
def test_only_what_is_needed_is_read(name: str) -> None:
    evidence = tiny.gather(gated(5))
    alone = Evidence(alive=evidence.alive, **{field: evidence.read(field) for field in GROWTH[name].needs})
    assert torch.equal(born(name, alone).rows, born(name, evidence).rows)


@pytest.mark.parametrize("name", GROWTH)
def test_a_batch_of_runs_is_a_loop_over_them(name: str) -> None:
    """With seeds, and with another number of newborns in each run."""
    runs = [tiny.gather(gated(seed)) for seed in range(4)]
    runs[3] = replace(runs[3], **{field: torch.zeros_like(value) for field, value in runs[3].given().items()})
    seeds, counts = torch.tensor([5, 6, 7, 8]), torch.tensor([3, 0, 1, 2])
    together = GROWTH[name].make(of_runs(runs), 3, seeds, counts)
    rows, bias, columns = grown(of_runs(runs), together)
    for index, run in enumerate(runs):
        assert (together.present[index].sum() <= counts[index]).item()
        alone = GROWTH[name].make(run, 3, seeds[index], counts[index])
        for field in ("rows", "bias", "columns", "present", "donors", "donor_columns", "donor_rows", "chosen"):
            one, other = getattr(together, field), getattr(alone, field)
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one[index], other, rtol=1e-4, atol=1e-6, msg=field)
        of_one = grown(run, alone)
        torch.testing.assert_close(rows[index], of_one[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias[index], of_one[1])
        torch.testing.assert_close(columns[index], of_one[2], rtol=1e-4, atol=1e-6)
        if counts[index] == 0:  # nobody is born, nothing else changes
            torch.testing.assert_close(of_one[0][:6], run.read("weights_in") * run.live[:, None], rtol=0, atol=0)
            torch.testing.assert_close(of_one[2][:6], run.read("weights_out") * run.live[:, None], rtol=0, atol=0)
    torch.testing.assert_close(run_of(of_runs(runs), 2).read("split"), runs[2].read("split"))


@pytest.mark.parametrize("name", PRESERVING)
@pytest.mark.parametrize("counts", [(1, 2, 3, 0), (3, 3, 1, 2)])
def test_the_function_stays_when_runs_take_fewer(name: str, counts: tuple[int, ...]) -> None:
    networks = [tiny.make(seed) for seed in range(4)]
    evidence = of_runs([tiny.evidence_of(seed) for seed in range(4)])
    newborns = GROWTH[name].make(evidence, 3, torch.arange(4), torch.tensor(counts))
    rows, bias, columns = grown(evidence, newborns)
    for index, network in enumerate(networks):
        after = replace(network, rows=rows[index].double(), bias=bias[index].double(), columns=columns[index].double())
        torch.testing.assert_close(after.outputs(), network.outputs(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GROWTH)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), power=st.sampled_from([-25, -12, 0, 12, 30]), zeros=st.floats(0, 1))
def test_any_finite_evidence_gives_finite_newborns(name: str, seed: int, power: int, zeros: float) -> None:
    rng, sizes = torch.Generator().manual_seed(seed), {"U": 4, "I": 3, "O": 2}
    values = {}
    for field, axes in SHAPES.items():
        shape = [sizes[axis] for axis in axes]
        drawn = torch.randn(shape, generator=rng) * 10.0**power * (torch.rand(shape, generator=rng) >= zeros)
        drawn = drawn + drawn.mT if field == "split" else drawn
        values[field] = drawn > 0 if field == "alive" else drawn
    evidence = Evidence(**values)
    newborns = born(name, evidence, 3, seed)
    assert all(part.isfinite().all() for part in grown(evidence, newborns))


@pytest.mark.parametrize("name", ["random", "zero-out", "zero-in", "pairing"])
def test_random_weights_have_both_signs_and_the_incumbents_norms(name: str) -> None:
    evidence = tiny.evidence_of(6)
    one = born(name, evidence, 2000)
    sides: list[tuple[Tensor, str]] = [(one.rows, "weights_in"), (one.columns, "weights_out")]
    for made, field in sides:
        if (made.abs() > 1e-3).any():
            mean_norm = evidence.read(field).norm(dim=1).mean()
            torch.testing.assert_close(made.norm(dim=1), mean_norm.expand(2000), rtol=1e-3, atol=1e-4)
            assert 0.4 < (made[::2] > 0).float().mean() < 0.6 and made[::2].mean().abs() < 0.05 * mean_norm
    if name == "zero-in":
        assert (one.rows == 0).all() and (one.bias == torch.tensor(OPEN / 2000)).all()
    if name == "zero-out":
        assert (one.columns == 0).all()


def test_newborns_do_not_read_inactive_inputs() -> None:
    evidence = tiny.evidence_of(7)
    weights = evidence.read("weights_in").clone()
    weights[:, 1] = 0
    one = born("random", replace(evidence, weights_in=weights))
    assert (one.rows[:, 1] == 0).all() and (one.rows[:, 0] != 0).all()
    empty = replace(evidence, alive=torch.zeros(5, dtype=torch.bool))
    torch.testing.assert_close(born("random", empty).rows.norm(dim=1), torch.full((3,), 3**-0.5))
    assert not born("net2wider", empty).present.any() and not born("splitting", empty).present.any()


@pytest.mark.parametrize("share", [0.0, 0.5, 3.0])
def test_insertion_scale(share: float) -> None:
    one = born("net2wider", tiny.evidence_of(8))
    other = scaled(one, rows=2.0, columns=share)
    assert torch.equal(other.rows, 2 * one.rows) and torch.equal(other.columns, share * one.columns)
    assert one.donor_columns is not None and other.donor_columns is not None
    torch.testing.assert_close(1 - other.donor_columns, share * (1 - one.donor_columns))


def own(evidence: Evidence, wanted: Tensor, draws: object) -> Newborns:
    shape: Callable[..., Tensor] = torch.zeros
    del draws
    return Newborns(rows=shape(1, 3), bias=shape(1), columns=shape(1, 4), present=wanted)


def test_methods_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="unknown growth method 'pairng'; did you mean 'pairing'"):
        resolve_growth("pairng")
    with pytest.raises(RangeError, match="count of newborns is 0; it must be at least 1"):
        born("random", tiny.evidence_of(), 0)
    with pytest.raises(MismatchError, match="evidence 'bypass' was not gathered"):
        born("gradmax", Evidence(weights_in=torch.ones(2, 3), weights_out=torch.ones(2, 3)))
    with pytest.raises(MismatchError, match=r"counts have shape \(2,\); give one for each run, shape \(\)"):
        GROWTH["random"].make(tiny.evidence_of(), 1, torch.Generator(), torch.ones(2))
    monkeypatch.setattr("trimtab.inner_training.structure.growth.GROWTH", dict(GROWTH))
    mine = replace(GROWTH["random"], name="own", propose=own)
    register_growth(mine)
    assert resolve_growth("own").make(tiny.evidence_of(), 1, torch.Generator()).present.all()
    with pytest.raises(ConfigError, match="'own' is registered already"):
        register_growth(mine)
    with pytest.raises(UnknownNameError, match="unknown field of the evidence 'bypas'; did you mean 'bypass'"):
        register_growth(replace(mine, name="other", needs=frozenset({"bypas"})))
