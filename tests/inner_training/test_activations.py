"""What activation functions put out, and sparse gradients, against slow references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from trimtab.inner_training.activations import EXAMPLES, FEATURE_EXAMPLES, Watch, effective_rank, packed
from trimtab.inner_training.live_measure import live_sparsity
from trimtab.inner_training.probe import sparsity

SEEN = ("saturation", "dormant", "features")


def watched(forward: Callable[[], Any], examples: int, weight: Tensor | None = None) -> dict[str, np.ndarray]:
    few = min(examples, EXAMPLES)
    with Watch(SEEN, examples, torch.full((few,), 1 / few) if weight is None else weight) as watch:
        forward()
    found = {name: value.double().numpy() for name, value in watch.results().items()}
    if "features" in found:
        found["features"] = effective_rank(found["features"][:, None])[0]
    return found


def slow(layers: list[tuple[np.ndarray, np.ndarray, str]], examples: int) -> dict[str, float]:
    """The same from (input, output, kind) of each activation, (B, places, units), one unit at a time."""
    saturated, limited, dormant, units = 0.0, 0, 0, 0
    for before, after, kind in layers:
        used = [unit for unit in range(after.shape[2]) if np.any(before[:, :, unit] != 0)]
        sizes = {unit: np.mean([np.abs(after[b, :, unit]).mean() for b in range(examples)]) for unit in used}
        mean = sum(sizes.values()) / len(used)
        dormant += sum(sizes[unit] <= 0.025 * mean for unit in used)
        units += len(used)
        if kind in ("tanh", "sigmoid"):
            low, high = (-1, 1) if kind == "tanh" else (0, 1)
            place = (after[:, :, used] - low) / (high - low)
            saturated += np.mean((place < 0.015) | (place > 0.985)) * len(used)
            limited += len(used)
    found = {"dormant": dormant / units}
    if limited:
        found["saturation"] = saturated / limited
    before, after, _ = layers[-1]
    features = after[:FEATURE_EXAMPLES].mean(1)
    singular = np.linalg.svd(features, compute_uv=False)
    share = singular[singular > 1e-3 * singular[0]] / singular[singular > 1e-3 * singular[0]].sum()
    limit = min(len(features), np.any(before != 0, axis=(0, 1)).sum())
    return {**found, "features": np.exp(-(share * np.log(share)).sum()) / limit}


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": torch.relu,
    "functional": functional.relu,
    "method": lambda x: x.relu(),
    "module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "method in place": lambda x: x.clone().relu_(),
}
TANHS: dict[str, Callable[[Tensor], Tensor]] = {"torch": torch.tanh, "method": lambda x: x.tanh(), "module": nn.Tanh()}
SIGMOIDS: dict[str, Callable[[Tensor], Tensor]] = {"torch": torch.sigmoid, "module": nn.Sigmoid()}
SPELLINGS = [
    (kind, name, function)
    for kind, spelled in (("relu", RELUS), ("tanh", TANHS), ("sigmoid", SIGMOIDS))
    for name, function in spelled.items()
]


@pytest.mark.parametrize(("kind", "function"), [pytest.param(k, f, id=f"{k}, {n}") for k, n, f in SPELLINGS])
def test_an_activation_is_measured_however_it_is_written(kind: str, function: Callable[[Tensor], Tensor]) -> None:
    rng = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.0, 0.01, 3.0, 8.0, 1.0, -5.0])  # a unit that is off, a small one, and wide ones
    inputs = torch.randn(20, 6, generator=rng) * scale - torch.tensor([0, 0, 0, 0, 9.0, 0])
    outputs: list[Tensor] = []
    found = watched(lambda: outputs.append(function(inputs.clone())), 20)
    expected = slow([(inputs[:, None].numpy(), outputs[0][:, None].numpy(), kind)], 20)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-5), name
    assert expected["dormant"] in ({"relu": 0.4, "tanh": 0.2, "sigmoid": 0.2}[kind],)


def test_a_deep_network_is_summed_over_its_layers() -> None:
    torch_rng = torch.Generator().manual_seed(1)
    first, second = (torch.randn(8, size, generator=torch_rng) * 2 for size in (5, 8))
    inputs = torch.randn(12, 5, generator=torch_rng)
    seen: list[tuple[np.ndarray, np.ndarray, str]] = []

    def layer(x: Tensor, weight: Tensor, kind: str) -> Tensor:
        before = functional.linear(x, weight)
        after = getattr(torch, kind)(before)
        seen.append((before[:, None].numpy(), after[:, None].numpy(), kind))
        return after

    found = watched(lambda: layer(layer(inputs, first, "tanh"), second, "sigmoid"), 12)
    for name, value in slow(seen, 12).items():
        assert found[name] == pytest.approx(value, abs=2e-5), name


@pytest.mark.parametrize("where", ["tokens", "merged tokens", "convolution", "signal", "behind a linear layer"])
def test_units_are_found_on_their_axis(where: str) -> None:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(6, 5, 4, generator=rng)  # examples, places, units
    x[..., 1] = -torch.rand(6, 5, generator=rng)  # never active
    layers = {
        "tokens": lambda: torch.relu(x),
        "merged tokens": lambda: torch.relu(x.reshape(30, 4)),
        "convolution": lambda: torch.relu(x.mT.reshape(6, 4, 5, 1)),
        "signal": lambda: torch.relu(functional.conv1d(x.mT, torch.eye(4)[..., None])),
        "behind a linear layer": lambda: torch.relu(functional.linear(x.reshape(6, 5, 1, 4), torch.eye(4))),
    }
    found = watched(layers[where], 6)
    expected = slow([(x.numpy(), x.relu().numpy(), "relu")], 6)
    assert expected["dormant"] == 0.25
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-5), name


def test_examples_beyond_the_batch_do_not_count() -> None:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(12, 7, generator=rng)
    weight = (torch.arange(12) < 5) / 5
    alone = watched(lambda: torch.tanh(3 * x[:5]), 5)
    among = watched(lambda: torch.tanh(3 * x), 12, weight)
    assert alone.keys() == among.keys() == set(SEEN)
    for name, value in alone.items():
        assert among[name] == pytest.approx(value, abs=1e-5), name


@settings(max_examples=40, deadline=None)
@given(examples=st.integers(1, 16), units=st.integers(1, 40), rank=st.integers(1, 16), seed=st.integers(0, 99))
def test_effective_rank_is_that_of_a_singular_value_decomposition(
    examples: int, units: int, rank: int, seed: int
) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    features = rng.normal(size=(examples, rank)) @ rng.normal(size=(rank, units))
    limit = min(examples, units)
    singular = np.linalg.svd(features, compute_uv=False)
    share = singular[singular > 1e-3 * singular[0]]
    share = share / share.sum()
    expected = np.exp(-(share * np.log(share)).sum()) / limit
    given_features = packed(torch.from_numpy(features), torch.tensor(limit))
    found = effective_rank(np.stack([given_features.numpy(), np.full(len(given_features), np.nan)], 1))
    assert found[0] == pytest.approx(expected, abs=1e-6)
    assert 0 < found[0] <= 1 + 1e-9
    assert np.isnan(found[1])


def test_effective_rank_of_orthogonal_and_of_equal_examples() -> None:
    known = {1.0: torch.eye(16), 1 / 16: torch.ones(16, 16)}
    for expected, features in known.items():
        found = effective_rank(packed(features, torch.tensor(16)).double().numpy()[:, None])
        assert found[0] == pytest.approx(expected, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), scale=st.floats(1e-3, 1e3))
def test_sparsity_counts_tiny_elements_and_no_padding(data: st.DataObject, scale: float) -> None:
    numbers = st.lists(st.sampled_from([0.0, 1e-3, 0.05, 0.5, -1.0, 3.0]), min_size=12, max_size=12)
    gradient, parameters = np.array(data.draw(numbers)), np.array(data.draw(numbers))
    present = [i for i in range(12) if gradient[i] != 0 or parameters[i] != 0]
    if not present:
        return
    size = np.sqrt(sum(gradient[i] ** 2 for i in present) / len(present))
    expected = sum(abs(gradient[i]) < 0.1 * size for i in present) / len(present)
    flat = torch.tensor(gradient * scale, dtype=torch.float32)
    weight = torch.tensor(parameters, dtype=torch.float32)
    assert float(sparsity(flat[None], weight[None])) == pytest.approx(expected, abs=1e-6)
    parts = [one.clone().requires_grad_() for one in weight.split(5)]
    for part, grad in zip(parts, flat.split(5), strict=True):
        part.grad = grad
    found = live_sparsity([*parts, torch.ones(3, requires_grad=True)])
    assert found is not None
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_sparsity_of_a_broken_or_absent_gradient_is_unknown() -> None:
    assert sparsity(torch.tensor([[torch.nan, 1.0]]), torch.ones(1, 2)).isnan().all()
    assert live_sparsity([torch.ones(2, requires_grad=True)]) is None
