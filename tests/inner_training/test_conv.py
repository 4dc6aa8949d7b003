"""The stackable convolution against ``torch.nn.Conv2d``, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from trimtab.errors import UserError
from trimtab.inner_training.networks import build_module
from trimtab.inner_training.networks.conv import Conv2d, convolve

CASES = [
    # channels in and out, kernel, stride, padding, height, width
    (1, 8, 3, 1, 1, 16, 16),
    (3, 5, 3, 2, 1, 16, 16),
    (3, 5, 3, 2, 1, 15, 9),
    (4, 2, 1, 1, 0, 5, 7),
    (4, 2, 1, 2, 0, 6, 6),
    (2, 6, 4, 4, 0, 8, 8),
    (2, 3, 5, 3, 2, 11, 8),
]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES)
def test_equals_a_grouped_convolution_under_vmap(case: tuple[int, ...]) -> None:
    before, after, size, stride, padding, high, wide = case
    weight, bias = normal(0, 4, after, before, size, size), normal(1, 4, after)
    inputs = normal(2, 4, 6, before, high, wide)

    def outcome(form: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        def loss(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            outputs = form(x, weight, bias, stride, padding)
            return outputs.sin().sum(), outputs

        gradients, outputs = vmap(grad(loss, argnums=(0, 1, 2), has_aux=True))(inputs, weight, bias)
        return outputs, *gradients

    for ours, reference in zip(outcome(convolve), outcome(functional.conv2d), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_that_of_torch(bias: bool) -> None:
    ours = build_module(lambda: Conv2d(3, 4, 3, stride=2, padding=1, bias=bias), 5)
    theirs = build_module(lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=bias), 5)
    drawn, expected = ours.state_dict(), theirs.state_dict()
    assert list(drawn) == list(expected)
    for name, value in expected.items():
        assert drawn[name].equal(value)
    inputs = normal(0, 2, 3, 8, 8)
    assert torch.allclose(ours(inputs), theirs(inputs), atol=1e-6)
    assert torch.allclose(convolve(inputs, ours.weight, ours.bias, 2, 1), theirs(inputs), atol=1e-6)


def test_a_compiled_layer_is_a_matrix_product() -> None:
    layer = build_module(lambda: Conv2d(2, 3, 3, padding=1), 0)
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    inputs = normal(1, 4, 2, 6, 6)
    outputs = torch.compile(lambda x: functional_call(layer, {}, (x,)), backend=backend, fullgraph=True)(inputs)
    assert torch.allclose(outputs, layer(inputs), atol=1e-6)
    assert any("matmul" in name for name in names)
    assert not any("conv" in name for name in names)


@pytest.mark.parametrize(
    ("sizes", "wrong"), [((0, 1, 3), "in_channels"), ((1, 1, 0), "kernel_size"), ((1, 1, 3, 0), "stride")]
)
def test_sizes_are_checked(sizes: tuple[int, ...], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        Conv2d(*sizes)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 8, 8), (2, 3, 2, 8)])
def test_an_input_that_does_not_fit_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="does not fit"):
        Conv2d(3, 4, 3)(torch.zeros(shape))
