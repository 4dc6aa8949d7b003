"""What a live run measures of large models: a sample whose norms and inner products are close to those of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.inner_training import live_sample
from trimtab.inner_training.live_probe import LiveProbe, inner_product, total_norm
from trimtab.inner_training.live_sample import ELEMENTS, MANY, PACK, WHOLE, Sample, kind_of, packed, packs_of
from trimtab.inner_training.networks.transformer import LanguageModel


def perceptron() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Linear(256, 700), nn.ReLU(), nn.Linear(700, 400), nn.ReLU(), nn.Linear(400, 10))
    x, y = torch.randn(32, 256), torch.randint(10, (32,))
    return model, lambda: functional.cross_entropy(model(x), y)


def convolution() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(
        nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 320, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5120, 5)
    )
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
    return model, lambda: functional.cross_entropy(model(x), y)


def text() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = LanguageModel(context=32, width=128, depth=3, heads=4, tied=True)
    tokens = torch.randint(256, (4, 33))
    return model, lambda: functional.cross_entropy(model(tokens[:, :-1]).flatten(0, -2), tokens[:, 1:].flatten())


MODELS = {"perceptron": perceptron, "convolution, channels last": convolution, "transformer": text}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_sampled_interval_is_close_to_a_whole_one(make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]) -> None:
    torch.manual_seed(0)
    model, loss = make()
    parameters = list(model.parameters())
    assert sum(one.numel() for one in parameters) > WHOLE
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    sampled, whole = LiveProbe(4), LiveProbe(4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(live_sample, "WHOLE", 10**9)
        whole._sample = Sample([one.shape for one in parameters])
    assert whole._sample.stride == 1
    for position in range(4):
        optimizer.zero_grad()
        loss().backward()
        with torch.no_grad():
            norms = [probe.before(parameters, position, None) for probe in (sampled, whole)]
            assert norms[0] is None and (norms[1] is not None) == (position >= 2)
            optimizer.step()
            sampled.after(parameters)
            whole.after(parameters)
    for position in (2, 3):
        torch.testing.assert_close(sampled.grad_norms[position], whole.grad_norms[position], rtol=0.1, atol=0)
    for name in ("update_norm", "weight_norm"):
        torch.testing.assert_close(getattr(sampled, name), getattr(whole, name), rtol=0.05, atol=1e-6)
    first, second = whole.grad_norms[2], whole.grad_norms[3]
    assert sampled.grad_dot is not None and whole.grad_dot is not None
    assert abs(sampled.grad_dot - whole.grad_dot) < 0.1 * first * second


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 900), columns=st.integers(1, 900), seed=st.integers(0, 9))
def test_a_sample_never_reads_outside_and_estimates_without_bias(rows: int, columns: int, seed: int) -> None:
    big = torch.Size([600, 600])
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, columns, generator=generator), torch.randn(big, generator=generator)]
    sample = Sample([one.shape for one in tensors])
    read = sample.read([tensors[0].t().contiguous().t(), tensors[1]])  # one that lies column by column
    for part, one in zip(read, tensors, strict=True):
        assert total_norm([part]) == pytest.approx(float(total_norm([one])), rel=0.15)
    product = inner_product(sample.read(tensors), sample.read(tensors))
    assert product is not None and float(product) == pytest.approx(float(total_norm(read)) ** 2, rel=0.1)


@pytest.mark.parametrize("parameters", [10, WHOLE, WHOLE + 1, 10**6, 10**8])
def test_small_models_whole_and_of_large_ones_enough(parameters: int) -> None:
    sample = Sample([torch.Size([parameters])])
    assert (sample.stride == 1) == (parameters <= WHOLE)
    if sample.stride > 1:
        assert parameters / sample.stride >= ELEMENTS * 0.66


def test_the_slice_of_a_larger_tensor_is_read_where_it_lies() -> None:
    base = torch.arange(2_000_000, dtype=torch.float32)
    part = base[500_000:1_500_000].view(1000, 1000)
    sample = Sample([part.shape])
    (read,) = sample.read([part])
    scale = (1_000_000 / read.numel()) ** 0.5
    places = (read / scale - 500_000).round().long().reshape(-1)
    assert int(places.min()) >= 0 and int(places.max()) < 1_000_000
    assert len(set(places.tolist())) == read.numel()


def test_small_tensors_in_half_precision_and_missing_gradients() -> None:
    tensors: list[Tensor | None] = [torch.ones(5, dtype=torch.float16), None, torch.ones(400_000, dtype=torch.bfloat16)]
    sample = Sample([torch.Size([5]), torch.Size([9]), torch.Size([400_000])])
    first, missing, last = sample.read(tensors)
    assert first is not None and last is not None and missing is None
    assert first.dtype == last.dtype == torch.float32 and first.numel() == 5
    assert float(total_norm([last])) == pytest.approx(400_000**0.5, rel=1e-3)


# --- many small tensors -------------------------------------------------------------------------------------------


def crowd(seed: int = 0) -> list[nn.Parameter]:
    """500 small parameters with gradients of several kinds, and a few that stay alone."""
    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(1 + n % 9,) if n % 3 else (2 + n % 5, 3) for n in range(500)]
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to(torch.float16 if n % 7 == 0 else torch.float32))
        for n, shape in enumerate([*shapes, (80, 90)])
    ]
    parameters.append(nn.Parameter(torch.randn(6, generator=generator, dtype=torch.complex64)))
    for n, parameter in enumerate(parameters):
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad = None if n % 11 == seed else noise
    parameters[3].grad = torch.randn(parameters[3].shape, generator=generator).to_sparse()
    return parameters


def interval(probe: LiveProbe, parameters: list[nn.Parameter], later: list[nn.Parameter]) -> dict[str, Any]:
    """What the probe measures of an interval of two steps, the second with other gradients."""
    with torch.no_grad():
        probe.before(parameters, 0, torch.tensor(2.0))
        for one, other in zip(parameters, later, strict=True):
            one.grad = other.grad
        probe.before(parameters, 1, torch.tensor(2.0))
        for one, other in zip(parameters, later, strict=True):
            one.sub_(other, alpha=0.1)
        probe.after(parameters)
    assert probe.complete
    return probe.state_dict()


def test_many_small_tensors_give_what_each_by_itself_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    together = LiveProbe(2)
    told = interval(together, crowd(), crowd(seed=1))
    assert len(together._sample.thirds) == 2 + 3, "two alone, and one for each third of the depth"
    monkeypatch.setattr(live_sample, "MANY", 10**6)
    each = LiveProbe(2)
    expected = interval(each, crowd(), crowd(seed=1))
    assert len(each._sample.thirds) == 502
    for name in ("grad_dot", "update_norm", "weight_norm"):
        assert told[name] == pytest.approx(expected[name], rel=2e-5), name
    assert told["grad_norms"] == pytest.approx(expected["grad_norms"], rel=2e-5)


def test_layers_frozen_between_the_two_samples_leave_only_the_inner_product_unknown() -> None:
    probe, parameters = LiveProbe(2), crowd()
    with torch.no_grad():
        probe.before(parameters, 0, None)
        parameters = [one for n, one in enumerate(parameters) if n != 5]
        probe.before(parameters, 1, None)
        probe.after(parameters)
    assert probe.grad_dot is None and probe.complete and len(probe.grad_norms) == 2


class Counting(TorchDispatchMode):
    """Counts the operations that do more than look at a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.done += not any(word in str(func) for word in ("view", "reshape", "detach", "alias"))
        return func(*args, **(kwargs or {}))


def test_the_operations_of_a_sampled_step_do_not_grow_with_the_number_of_small_tensors() -> None:
    counts = []
    for number in (1000, 3000):
        parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(number)]
        for one in parameters:
            one.grad = torch.ones(2, 2)
        with Counting() as mode, torch.no_grad():
            probe = LiveProbe(2)
            for position in (0, 1):
                probe.before(parameters, position, None)
            probe.after(parameters)
            total_norm([one.grad for one in parameters if one.grad is not None])
        counts.append(mode.done)
    assert counts[0] == counts[1] < 100


@given(st.lists(st.integers(1, 5000), max_size=300), st.integers(1, 3))
def test_every_tensor_is_in_one_pack_or_alone(sizes: list[int], kinds: int) -> None:
    of = [None if size % 13 == 0 else size % kinds for size in sizes]
    packs = packs_of(sizes, of)
    places = [place for pack in packs for place in pack]
    assert len(places) == len(set(places))
    for pack in packs:
        assert len({of[place] for place in pack}) == 1 and None not in {of[place] for place in pack}
        assert sum(sizes[place] for place in pack) <= PACK
    for kind in range(kinds):
        small = [place for place, size in enumerate(sizes) if of[place] == kind and size <= live_sample.SMALL]
        assert (set(small) <= set(places)) if len(small) >= MANY else not set(small) & set(places)


def test_packed_tensors_hold_the_same_elements() -> None:
    tensors = [one.grad for one in crowd() if one.grad is not None]
    fewer = packed(tensors)
    assert len(fewer) == 3 and kind_of(fewer[1]) is None
    assert sum(one.numel() for one in fewer) == sum(one.numel() for one in tensors)
    assert packed(tensors[: MANY - 1]) == tensors[: MANY - 1]
