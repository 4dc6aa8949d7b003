"""What every criterion owes: shapes, finite scores, equivariance, batches, and how it reacts to scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.inner_training.structure import tiny
from trimtab.errors import ConfigError, MismatchError, UnknownNameError
from trimtab.inner_training.structure.criteria import CRITERIA, Criterion, register_criterion, resolve_criterion
from trimtab.inner_training.structure.evidence import SHAPES, Evidence, of_runs, run_of

SEEDS = torch.tensor([11, 12, 13])
LEVELS = [(name, level) for name, one in CRITERIA.items() for level in one.levels]
SEEDED = ("random",)


def score(name: str, level: str, evidence: Evidence, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    one = CRITERIA[name]
    return one.score(evidence, source) if level == "unit" else one.weight_score(evidence, source)


def permuted(evidence: Evidence, order: Tensor) -> Evidence:
    values = {}
    for name, tensor in evidence.given().items():
        for axis, letter in enumerate(SHAPES[name]):
            tensor = tensor.index_select(axis, order) if letter == "U" else tensor
        values[name] = tensor
    return Evidence(**values)


@pytest.mark.parametrize(("name", "level"), LEVELS)
@pytest.mark.parametrize("gated", [False, True])
def test_scores_have_the_shape_of_their_level(name: str, level: str, gated: bool) -> None:
    network = tiny.make(1)
    if gated:
        network = replace(network, alive=torch.tensor([1.0, 1, 0, 1, 0], dtype=torch.float64))
    evidence = tiny.gather(network)
    found = score(name, level, evidence)
    assert found.shape == ((5,) if level == "unit" else (5, 3))
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert found.unique().numel() > 1


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_only_what_is_needed_is_read(name: str, level: str) -> None:
    evidence, one = tiny.evidence_of(1), CRITERIA[name]
    needs = one.needs if level == "unit" else one.weight_needs
    alone = Evidence(**{field: evidence.read(field) for field in needs})
    torch.testing.assert_close(score(name, level, alone), score(name, level, evidence), rtol=0, atol=0)
    for field in needs - {"bias", "agf"} if name != "agf" else needs:
        if name not in SEEDED and field not in ("grad_bias", "hv_bias", "square_bias"):
            with pytest.raises(MismatchError, match=f"evidence '{field}' was not gathered"):
                score(name, level, Evidence(**{other: evidence.read(other) for other in needs - {field}}))


@pytest.mark.parametrize(("name", "level"), [pair for pair in LEVELS if pair[0] not in SEEDED])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 9), order=st.permutations(range(5)))
def test_units_in_another_order_have_their_scores_in_that_order(
    name: str, level: str, seed: int, order: list[int]
) -> None:
    evidence, index = tiny.evidence_of(seed), torch.tensor(order)
    found = score(name, level, permuted(evidence, index))
    torch.testing.assert_close(found, score(name, level, evidence)[index], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_a_batch_of_runs_is_a_loop_over_them(name: str, level: str) -> None:
    runs = [tiny.evidence_of(seed) for seed in range(3)]
    runs[1] = replace(
        runs[1], **{field: torch.zeros_like(value) for field, value in runs[1].given().items()}
    )  # a dead one
    stacked, one = of_runs(runs), CRITERIA[name]
    together = one.score(stacked, SEEDS) if level == "unit" else one.weight_score(stacked, SEEDS)
    for index, run in enumerate(runs):
        alone = one.score(run, SEEDS[index]) if level == "unit" else one.weight_score(run, SEEDS[index])
        torch.testing.assert_close(together[index], alone, rtol=1e-5, atol=1e-7)
        twice = of_runs([run_of(stacked, index)] * 2)
        nested = of_runs([twice, twice])  # two leading axes
        seeds = SEEDS[index].expand(2, 2).contiguous()
        deep = one.score(nested, seeds) if level == "unit" else one.weight_score(nested, seeds)
        torch.testing.assert_close(deep[1, 0], alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "level"), LEVELS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), power=st.sampled_from([-25, -12, 0, 6, 15, 30]), zeros=st.floats(0, 1))
def test_any_finite_evidence_gives_finite_scores(name: str, level: str, seed: int, power: int, zeros: float) -> None:
    rng, sizes = torch.Generator().manual_seed(seed), {"U": 4, "I": 3, "O": 2}
    values = {}
    for field, axes in SHAPES.items():
        shape = [sizes[axis] for axis in axes]
        drawn = torch.randn(shape, generator=rng) * 10.0**power * (torch.rand(shape, generator=rng) >= zeros)
        if field in ("mean_abs", "square", "active", "agf", "taylor", "pre_grad", "input_norm", "flow_in", "flow_out"):
            drawn = drawn.abs()
        if field in ("input_cov", "output_cov"):
            drawn = torch.nan_to_num(drawn @ drawn.mT)
        values[field] = drawn > 0 if field == "alive" else drawn
    assert score(name, level, Evidence(**values)).isfinite().all()


NEVER_NEGATIVE = [pair for pair in LEVELS if pair[0] not in ("grasp", "kunin")]


@pytest.mark.parametrize(("name", "level"), NEVER_NEGATIVE)
def test_scores_are_not_negative(name: str, level: str) -> None:
    assert all((score(name, level, tiny.evidence_of(seed)) >= 0).all() for seed in range(5))


BY_ACTIVITY = ("taylor", "snip", "grasp", "obd", "taylor-weights", "activation-frequency", "redo", "grama", "cbp",
               "cbp-adaptable", "agf", "agf-first", "obs")  # fmt: skip


@pytest.mark.parametrize("name", BY_ACTIVITY)
def test_a_dead_relu_has_the_lowest_score(name: str) -> None:
    network = tiny.make(2)
    assert network.bias is not None
    dead = replace(network, bias=network.bias.index_fill(0, torch.tensor(3), -1e3))
    scores = score(name, "unit", tiny.gather(dead))
    assert scores[3] == scores.min()
    assert (scores[3] == 0) or name == "grasp"
    assert (scores > scores[3]).sum() >= 3


# How a criterion grows with the loss, and with a in (a W_in, a b, W_out / a), which leaves a relu network as it was.
POWERS = {
    "magnitude": (0, 1), "magnitude-l1": (0, 1), "lamp": (0, 0), "taylor": (1, 0), "taylor-weights": (2, 0), "snip": (1, 0),
    "taylor-second": (2, 0), "obd": (2, 0), "obs": (0, 0), "wanda": (0, 1), "ria": (0, 0), "redo": (0, 0), "grama": (0, 0),
    "synflow": (0, 0), "cbp": (0, 0), "cbp-adaptable": (0, -1), "agf": (1, 0), "agf-first": (1, 0), "grasp": (2, None),
    "kunin": (1, None), "activation-frequency": (0, None), "random": (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CRITERIA)
def test_scale(name: str) -> None:
    by_loss, by_weights = POWERS[name]
    network = tiny.make(4)
    before = score(name, "unit", tiny.gather(network))
    torch.testing.assert_close(score(name, "unit", tiny.gather(replace(network, factor=3.0))), before * 3.0**by_loss)
    assert network.bias is not None
    scaled = replace(network, rows=4 * network.rows, bias=4 * network.bias, columns=network.columns / 4)
    torch.testing.assert_close(scaled.loss(), network.loss())
    if by_weights is not None:
        after = score(name, "unit", tiny.gather(scaled))
        torch.testing.assert_close(after, before * 4.0**by_weights, rtol=1e-4, atol=1e-5 * float(before.max()))


@pytest.mark.parametrize("activation", tiny.ACTIVATIONS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 99))
def test_agf_is_above_taylor_is_above_its_net(activation: str, seed: int) -> None:
    evidence = tiny.evidence_of(seed, activation)
    agf, taylor = score("agf", "unit", evidence), score("taylor", "unit", evidence)
    assert (agf >= taylor - 1e-6).all() and (taylor >= evidence.read("signed").abs() - 1e-6).all()
    assert (agf > taylor + 1e-4).any()


def test_agf_of_each_unit_is_invariant_under_its_own_scale() -> None:
    network = tiny.make(5)
    assert network.bias is not None
    a = torch.tensor([0.1, 0.5, 1.0, 3.0, 20.0], dtype=torch.float64)
    scaled = replace(
        network, rows=a[:, None] * network.rows, bias=a * network.bias, columns=network.columns / a[:, None]
    )
    torch.testing.assert_close(score("agf", "unit", tiny.gather(scaled)), score("agf", "unit", tiny.gather(network)))


@pytest.mark.parametrize("activation", ["relu"])
def test_synflow_flows_through(activation: str) -> None:
    evidence = tiny.evidence_of(6, activation, bias=False)
    leaving = (evidence.read("weights_out").abs() * evidence.read("flow_out")).sum(-1)
    torch.testing.assert_close(score("synflow", "unit", evidence), leaving)


def test_parked_weights_do_not_count_for_the_others() -> None:
    network = replace(tiny.make(7), alive=torch.tensor([1.0, 1, 0, 1, 1], dtype=torch.float64))
    evidence = tiny.gather(network)
    other = replace(evidence, **{name: tensor.clone() for name, tensor in evidence.given().items()})
    for tensor in (other.read("weights_in"), other.read("mean_abs"), other.read("pre_grad")):
        tensor[2] *= 100
    live = evidence.live
    for name in ("lamp", "ria", "redo", "grama"):
        torch.testing.assert_close(score(name, "unit", other)[live], score(name, "unit", evidence)[live])
    torch.testing.assert_close(score("lamp", "weight", other)[live], score("lamp", "weight", evidence)[live])


def test_random_depends_on_its_seed_alone() -> None:
    evidence = of_runs([tiny.evidence_of(seed) for seed in range(3)])
    found = CRITERIA["random"].score(evidence, SEEDS)
    other = CRITERIA["random"].score(run_of(evidence, 2), SEEDS[2])
    assert torch.equal(found[2], other) and not torch.equal(found[0], found[1])
    assert torch.equal(score("random", "unit", evidence, 4), score("random", "unit", evidence, 4))
    assert not torch.equal(score("random", "unit", evidence, 4), score("random", "unit", evidence, 5))
    large = Evidence(weights_in=torch.zeros(20000, 1))
    for source in (torch.tensor(3), torch.Generator().manual_seed(3)):
        drawn = CRITERIA["random"].score(large, source)
        assert 0 < drawn.min() < 0.001 and 0.999 < drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.01


def test_criteria_are_asked_for_by_name() -> None:
    assert resolve_criterion("agf") is CRITERIA["agf"]
    with pytest.raises(UnknownNameError, match="unknown criterion 'magnitud'; did you mean 'magnitude'"):
        resolve_criterion("magnitud")
    with pytest.raises(
        MismatchError, match="criterion 'agf' scores units only; these score weights: random, magnitude"
    ):
        CRITERIA["agf"].weight_score(tiny.evidence_of(), torch.Generator())
    with pytest.raises(MismatchError, match=r"give one int64 for each run, shape \(\)"):
        CRITERIA["random"].score(tiny.evidence_of(), SEEDS)


def test_a_criterion_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.inner_training.structure.criteria.CRITERIA", dict(CRITERIA))
    own = Criterion(name="own", doc="", source="", needs=frozenset({"mean"}), unit=lambda e, s: e.read("mean"))
    register_criterion(own)
    assert resolve_criterion("own") is own
    with pytest.raises(ConfigError, match="'own' is registered already"):
        register_criterion(own)
    with pytest.raises(UnknownNameError, match="unknown field of the evidence 'meen'; did you mean 'mean'"):
        register_criterion(replace(own, name="other", needs=frozenset({"meen"})))
