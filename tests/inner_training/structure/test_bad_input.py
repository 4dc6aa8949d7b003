"""What a user may give by mistake is refused in one sentence, with model and optimizer untouched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import trimtab
from tests.inner_training.structure.test_edits import picture
from tests.inner_training.structure.zoo import OPTIMIZERS, make, mean_square, train
from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.structure.criteria import CRITERIA
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.structure import Structure
from trimtab.policies.editing import Editing


def nan_loss(model: nn.Module, batch: Any) -> Tensor:
    return mean_square(model, batch) * math.nan


Call = Callable[[Structure, Tensor], Any]
REFUSED: list[tuple[str, Call]] = [
    (r"'agf' reads agf, which is NaN in 0,", lambda s, x: s.prune(0.3, "agf", "layer", [x], nan_loss)),
    (r"'gradmax' reads bypass, which is NaN in 0,", lambda s, x: s.grow(0.3, "gradmax", [x], nan_loss)),
    (r"'redo' reads mean_abs, which is NaN", lambda s, x: s.reset(batches=[x * math.nan], loss_fn=mean_square)),
    (r"batches is a Tensor, .* such as \[batch\]", lambda s, x: s.prune(0.3, "agf", "layer", x, mean_square)),
    (r"batches is a dict, .* such as \[batch\]", lambda s, x: s.score("agf", {"x": x}, mean_square)),
    (r"groups is a int; give a list of names", lambda s, x: s.prune(0.3, "magnitude", groups=5)),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("words", "call"), REFUSED, ids=[words for words, _ in REFUSED])
def test_refusals_change_nothing(words: str, call: Call) -> None:
    model, example = make("perceptron")
    chosen = OPTIMIZERS["adam"](model.parameters())
    structure = trimtab.gates(model, chosen, example)
    structure.prune(0.5, "magnitude", "layer")
    train(model, chosen, example, 2)
    before = picture(model, chosen)
    with pytest.raises(UserError, match=words) as caught:
        call(structure, example)
    assert "\n" not in str(caught.value)
    after = picture(model, chosen)
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key], key


def test_a_weight_that_is_not_a_number_is_not_ranked() -> None:
    model, example = make("perceptron")
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), example)
    with torch.no_grad():
        model[2].weight[3, 2] = math.nan  # type: ignore[index, union-attr, operator]
    with pytest.raises(UserError, match="'magnitude' reads weights_in, which is NaN in 2,"):
        structure.prune(0.2, "magnitude")
    assert structure.prune(0.2, "magnitude", groups=["0"]).units.keys() == {"0"}
    assert math.isnan(structure.diagnostics(example, mean_square)["2"].effective_rank)


def test_lamp_of_a_run_that_is_not_finite_leaves_the_others_alone() -> None:
    weights = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0))
    weights[1, 2, 1] = math.nan
    alive = torch.ones(2, 5, dtype=torch.bool)
    draws = torch.Generator()
    both = CRITERIA["lamp"].score(Evidence(weights_in=weights, alive=alive), draws)
    alone = CRITERIA["lamp"].score(Evidence(weights_in=weights[:1], alive=alive[:1]), draws)
    assert torch.equal(both[0], alone[0]) and both.isfinite().all()


def test_a_model_without_units_has_an_empty_diagnosis() -> None:
    model = nn.Linear(3, 3)
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), torch.zeros(1, 3))
    assert structure.diagnostics(torch.zeros(2, 3), mean_square) == {}


def test_a_model_without_values_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4, device="meta"), nn.ReLU(), nn.Linear(4, 2, device="meta"))
    with pytest.raises(UserError, match=r"0\.weight is on the device meta and has no values; .*to_empty"):
        trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), torch.zeros(1, 3))


class Bag(nn.Module):
    """Sums of embeddings, which torch differentiates once."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.a, self.b = nn.EmbeddingBag(9, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.relu(self.a(self.bag(x))))


@pytest.mark.parametrize("criterion", ["grasp", "taylor-second"])
def test_what_cannot_be_differentiated_twice_is_refused(criterion: str) -> None:
    model, example = Bag(), torch.arange(12).view(4, 3) % 9
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), example)
    assert structure.score("agf", [example], mean_square)["a"].any()
    with pytest.raises(UserError, match="Bag cannot be differentiated twice .* such as agf"):
        structure.score(criterion, [example], mean_square)


def test_one_batch_is_no_list_of_batches_under_a_controller() -> None:
    model, example = make("perceptron")
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), example)
    with pytest.raises(UserError, match=r"batches is a Tensor, .* such as \[batch\]"):
        Editing(structure, example, mean_square)


def test_a_model_in_two_optimizers_is_refused() -> None:
    """As with Muon for matrices and AdamW for the rest, whose momentum would move biases of units that are held at zero."""
    model, example = make("perceptron")
    matrices = torch.optim.Muon([one for one in model.parameters() if one.ndim == 2], lr=0.01)
    rest = torch.optim.AdamW([one for one in model.parameters() if one.ndim != 2], lr=0.01)
    with pytest.raises(MismatchError, match=r"0\.bias is in another optimizer \(AdamW\)"):
        trimtab.gates(model, matrices, example)
    with pytest.raises(MismatchError, match=r"0\.weight is in another optimizer \(Muon\)"):
        trimtab.gates(model, rest, example)
    for one in model.parameters():
        one.requires_grad_(one.ndim == 2)
    assert trimtab.gates(model, matrices, example).groups
    for one in model.parameters():
        one.requires_grad_(True)
    del rest
    assert trimtab.gates(model, matrices, example).groups


@pytest.mark.parametrize("edit", [
    lambda s, x: s.prune(0.3, "agf", "layer", [x], mean_square),
    lambda s, x: s.prune(0.3, "magnitude", "layer"),
    lambda s, x: s.grow(0.3, "pairing"),
    lambda s, x: s.reset({"0": [0, 1]}),
    lambda s, x: s.diagnostics(x, mean_square),
    lambda s, x: s.compact(),
    lambda s, x: s.load_state_dict(s.state_dict()),
    lambda s, x: s.editor._history[-1].edit.undo(),
])  # fmt: skip
def test_a_layer_that_was_replaced_is_told(edit: Call) -> None:
    model, example = make("perceptron")
    structure = trimtab.gates(model, OPTIMIZERS["adam"](model.parameters()), example)
    structure.prune(0.25, "magnitude", "layer", groups=["2"])
    model[2] = nn.Linear(8, 5)  # type: ignore[index, operator]
    model[4] = nn.Linear(5, 3)  # type: ignore[index, operator]
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(MismatchError, match=r"2\.weight of the model is not the parameter that the gates were put on"):
        edit(structure, example)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("edit", [
    lambda s: s.prune(0.3, "magnitude", "layer"), lambda s: s.grow(0.3, "pairing"), lambda s: s.reset({"0": [0, 1]}),
])  # fmt: skip
def test_weights_that_were_loaded_without_the_structure_are_told(edit: Callable[[Structure], Any]) -> None:
    model, example = make("perceptron")
    structure = trimtab.gates(model, OPTIMIZERS["adam"](model.parameters()), example)
    wide = {name: one.clone() for name, one in model.state_dict().items()}
    structure.prune(0.25, "magnitude", "layer", groups=["2"])
    model.load_state_dict(wide)
    with pytest.raises(MismatchError, match="structure.load_state_dict after the model's"):
        edit(structure)
    assert all(torch.equal(one, wide[name]) for name, one in model.state_dict().items())
