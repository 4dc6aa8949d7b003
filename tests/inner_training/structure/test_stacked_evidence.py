"""Evidence of all runs at once, beside that of one module after the other."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.inner_training.problems import SmallDigits
from tests.inner_training.structure.populations import BATCH, NETWORKS, picture, stacked
from trimtab.errors import UserError
from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.collect import Request, gather
from trimtab.inner_training.structure.criteria import CRITERIA
from trimtab.inner_training.structure.draft import Draft
from trimtab.inner_training.structure.evidence import Evidence, of_runs
from trimtab.inner_training.structure.gating import Gates
from trimtab.inner_training.structure.growth import GROWTH
from trimtab.inner_training.structure.known import known_groups
from trimtab.inner_training.structure.stacked import Stacked

each_network = pytest.mark.parametrize("name", NETWORKS)
WEIGHTS = frozenset(("weights_in", "bias", "weights_out"))
ACTIVITY = frozenset(
    ("mean_abs", "mean", "square", "active", "agf", "agf_first", "taylor", "signed", "pre_grad", "output_cov")
)
GRADIENTS = frozenset(f"{kind}_{side}" for kind in ("grad", "square", "hv") for side in ("in", "bias", "out"))
FLOWS = frozenset(("flow_in", "flow_out"))


def one_by_one(structure: Stacked, needs: frozenset[str], names: tuple[str, ...], batches: int) -> dict[str, Evidence]:
    """The slow way: each run as a module of its own, gated like a user's."""
    runs, found = structure.population, []
    values = runs.layout.views(Draft(structure._flat, runs._learner, structure._units).values)
    for run in range(runs.num_runs):
        model = copy.deepcopy(runs.family.module)
        model.load_state_dict({**model.state_dict(), **{name: value[run] for name, value in values.items()}})
        gates = Gates(model, torch.optim.SGD(model.parameters(), lr=0.1), known_groups(model))
        for name, active in structure.active.items():
            gates.active[name] = active[run].clone()
            gates.refresh(gates.entries(gates.groups[name], (~active[run]).nonzero()[:, 0]))
        step = int(runs.steps_done[run])
        data = [runs.batch(run, step + place) for place in range(batches)]
        request = Request(needs=needs, names=names, example=data[0][0], why="a test", draws=torch.Generator())

        def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return runs.family.loss(module(batch[0]), batch[1]).mean()

        one = gather(gates, request, data, loss)
        found.append({name: per_example(runs.family.name, evidence, len(data[0][0])) for name, evidence in one.items()})
    return {name: of_runs([one[name] for one in found]) for name in names}


def per_example(family: str, evidence: Evidence, size: int) -> Evidence:
    """A module's flow is the sum over its examples, and so are slopes where examples share what columns read."""
    summed = ("flow_in", "flow_out", "pre_grad") if family == "tiny-graph" else ("flow_in", "flow_out")
    given = evidence.given()
    return replace(evidence, **{name: given[name] / size for name in summed if name in given})


def assert_alike(structure: Stacked, needs: frozenset[str], names: tuple[str, ...] = (), batches: int = 1) -> None:
    names = names or tuple(structure.groups)
    slow = one_by_one(structure, needs, names, batches)
    fast = structure.evidence(needs, batches=batches, groups=names)
    for name in names:
        expected, given = slow[name].given(), fast[name].given()
        assert expected.keys() == given.keys() and needs - OPTIONAL <= given.keys()
        assert torch.equal(expected.pop("alive"), given["alive"])
        for field, value in expected.items():
            scale = max(float(value.abs().max()), 1e-6)
            torch.testing.assert_close(
                given[field], value, rtol=2e-3, atol=2e-5 * scale, msg=lambda m, f=field, n=name: f"{n} {f}: {m}"
            )


OPTIONAL = frozenset(("grad_bias", "square_bias", "hv_bias", "bias", "next_grad"))


@each_network
def test_activity_is_that_of_single_runs(name: str) -> None:
    structure = stacked(name)
    structure.prune(0.4, structure.score("random"))
    structure.population.advance(1)
    assert_alike(structure, WEIGHTS | ACTIVITY, batches=2)


@each_network
def test_gradients_are_those_of_single_runs(name: str) -> None:
    structure = stacked(name, runs=2)
    structure.prune(0.4, structure.score("random"))
    assert_alike(structure, WEIGHTS | GRADIENTS | FLOWS)


@pytest.mark.parametrize("name", ["mlp", "conv", "vit", "residual"])
def test_inputs_are_those_of_single_runs(name: str) -> None:
    structure = stacked(name)
    structure.prune(0.4, structure.score("random"))
    cov = frozenset(("input_norm",) if name in ("vit", "residual") else ("input_norm", "input_cov"))
    assert_alike(structure, WEIGHTS | cov)


@pytest.mark.parametrize(("name", "group"), [("conv", "layers.0"), ("vit", "blocks.0.up"), ("mlp", "layers.0")])
def test_bypass_is_that_of_single_runs(name: str, group: str) -> None:
    assert_alike(stacked(name), WEIGHTS | {"bypass", "next_grad"}, (group,))


def test_hutchinsons_estimate_has_the_sign_of_curvature() -> None:
    structure = stacked("mlp-tanh", runs=2)
    found = structure.evidence({"hess_in", "hess_out", "weights_in"}, batches=8)["layers.0"]
    assert found.hess_in is not None and found.hess_out is not None
    assert found.hess_out.mean() > 0 and found.hess_in.shape == found.read("weights_in").shape


@each_network
def test_gathering_leaves_no_trace(name: str) -> None:
    structure = stacked(name)
    module, before = structure.population.family.module, picture(structure)
    parameters = {key: value.clone() for key, value in module.state_dict().items()}
    structure.evidence(WEIGHTS | ACTIVITY | GRADIENTS | FLOWS)
    structure.diagnostics()
    after = picture(structure)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(parameters[key], value) for key, value in module.state_dict().items())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


def test_what_a_run_gets_depends_on_itself_alone() -> None:
    both, alone = stacked("mlp", runs=3), stacked("mlp", runs=2)
    needs = WEIGHTS | {"agf", "hess_in"}
    for name, evidence in alone.evidence(needs).items():
        for field, value in evidence.given().items():
            torch.testing.assert_close(both.evidence(needs)[name].read(field)[:2], value, rtol=1e-4, atol=1e-6)


def test_splits_and_fewer_examples() -> None:
    structure = stacked("mlp")
    runs = structure.population
    whole = structure.evidence({"agf"}, split="validation")["layers.0"].read("agf")
    assert whole.shape == (3, 8) and not torch.equal(whole, structure.evidence({"agf"})["layers.0"].read("agf"))
    few = structure.evidence({"mean_abs"}, examples=2)["layers.0"].read("mean_abs")
    x, _ = runs.batch(0, int(runs.steps_done[0]))
    first = runs.family.module.layers[0]
    weight, bias = (runs.parameters_of(0)[f"layers.0.{key}"] for key in ("weight", "bias"))
    del first
    torch.testing.assert_close(few[0], torch.relu(x[:2] @ weight.mT + bias).mean(0))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_all_runs(criterion: str) -> None:
    structure = stacked("conv", runs=2)
    try:
        scores = structure.score(criterion, groups=["layers.0"])
    except UserError as error:
        pytest.fail(str(error))
    assert scores["layers.0"].shape == (2, 4) and scores["layers.0"].isfinite().all()


@pytest.mark.parametrize("method", GROWTH)
def test_every_growth_method_is_had_or_refused_by_name(method: str) -> None:
    structure = stacked("conv", runs=2)
    structure.prune(0.5, structure.score("random"), scope="layer")
    if method == "splitting":
        with pytest.raises(UserError, match="growth method 'splitting' reads 'split', which populations do not gather"):
            structure.grow(0.5, method, groups=["layers.0"])
        return
    edit = structure.grow(0.5, method, groups=["layers.0"])
    assert edit.counts.tolist() == [2, 2]
    structure.population.advance(3)
    assert structure.population._learner.parameters.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"needs": ["agf"], "groups": ["layers.9"]}, "layers.9"),
        ({"needs": ["agf"], "batches": 0}, "batches"),
        ({"needs": ["agf"], "examples": BATCH + 1}, "examples"),
        ({"needs": ["agf"], "split": "exam"}, "exam"),
        ({"needs": ["split"]}, "populations do not gather"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stacked("mlp").evidence(**arguments)  # type: ignore[arg-type]


def test_layers_that_are_called_by_numbers_are_not_taken_for_reads() -> None:
    class Numbered(SmallDigits):
        def __init__(self) -> None:
            super().__init__()
            layers = (nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10))
            self.module = nn.Sequential(*layers)  # type: ignore[assignment]

    family = Numbered()
    drawn = family.instance(0)
    object.__setattr__(drawn, "buffers", {})
    population = Population(family, 1, rules=("sgd",), mode="eager")
    population.reset([0], [drawn])
    structure = Stacked(population)
    alone = structure.evidence({"agf", "mean_abs"})
    beside = structure.evidence({"agf", "mean_abs", "pre_grad"})
    for name, one in alone.items():
        assert torch.equal(one.read("agf"), beside[name].read("agf"))
        silent = one.read("mean_abs") == 0
        assert silent.any() and not beside[name].read("pre_grad")[silent].any()
