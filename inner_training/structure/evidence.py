"""Evidence: what criteria, growth methods and diagnostics read about the units of one group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import MismatchError, UserError, check_whole

FREQUENT = 0.05  # activations above it count for `active`: Lillo & Cheney, arXiv 2605.15435
FIRST_BATCHES = 10  # those that `agf_first` averages over

# Field -> its axes behind the batch axes: U units, I inputs of a unit, O weights that read a unit.
SHAPES: dict[str, str] = {
    "alive": "U",
    **dict.fromkeys(("weights_in", "grad_in", "square_in", "hess_in", "hv_in", "flow_in"), "UI"),
    **dict.fromkeys(("bias", "grad_bias", "square_bias", "hv_bias"), "U"),
    **dict.fromkeys(("weights_out", "grad_out", "square_out", "hess_out", "hv_out", "flow_out"), "UO"),
    **dict.fromkeys(("mean_abs", "mean", "square", "active"), "U"),
    **dict.fromkeys(("agf", "agf_first", "taylor", "signed", "pre_grad"), "U"),
    "input_norm": "I",
    "input_cov": "II",
    "output_cov": "UU",
    "bypass": "OI",
    "next_grad": "O",
    "split": "UII",
}
WEIGHTS = ("weights_in", "bias", "weights_out", "alive")  # not averages over batches


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about the units of one group; None is what was not gathered.

    Every tensor is float32 (``alive`` is bool) and may have any leading batch axes, the same ones in all: none for a plain
    module, N for a population. U is the number of units; I the weights that compute a unit (its row, flattened); O the
    weights that read it (its column, flattened). A loss is the mean over the examples of a batch, except where one example
    is named. h is what a unit puts out, at S places (1 for a linear layer, pixels or tokens else); g = dL_b/dh for the
    loss of example b alone; z is the unit's value before its activation function.

    For a unit that is not ``alive`` every field says what it would be if its gate were opened infinitesimally: its weights
    are the parked ones, h comes from the parked row, and g flows through the parked column.

    Attributes:
        alive: (..., U) which units are active; None for all.
        weights_in, bias, weights_out: (..., U, I), (..., U), (..., U, O); no bias is None.
        grad_in, grad_bias, grad_out: gradient of the loss, mean over batches.
        square_in, square_bias, square_out: mean over examples of the squared gradient of each example's loss, the diagonal
            of the empirical Fisher matrix. The square of a mean gradient is not it.
        hess_in, hess_out: diagonal of the Hessian of the loss.
        hv_in, hv_bias, hv_out: H g, the Hessian of the loss times its gradient.
        flow_in, flow_out: gradient of SynFlow's R, the sum of the outputs for an input of ones and all parameters replaced by
            their magnitudes, with respect to these magnitudes; >= 0.
        mean_abs, mean, square: (..., U) E|h|, E h, E h^2 over examples and places.
        active: (..., U) share of h above 0.05, in [0, 1].
        agf: (..., U) E_b sum_s |h g|; agf_first the same from the first 10 batches.
        taylor: (..., U) E_b |sum_s h g|.
        signed: (..., U) E_b sum_s h g.
        pre_grad: (..., U) E|dL_b/dz| over examples and places; of h where z is not to be had.
        input_norm: (..., I) root mean square of each input of the rows, over examples and places.
        input_cov: (..., I, I) second moment of the inputs of the rows, E x x'.
        output_cov: (..., U, U) second moment of h over examples and places, E h h'.
        bypass: (..., O, I) gradient of the loss with respect to a bypass of zeros from the inputs of the rows to what the
            columns feed: E_b sum_s dL/dz_next x'. Of a linear consumer (O, I) are its outputs and the producer's inputs.
        next_grad: (..., O) gradient of the loss with respect to a constant added to what the columns feed: E_b sum_s dL/dz_next,
            the gradient of the consumer's bias.
        split: (..., U, I, I) E_b sum_s g act''(z) x x', the splitting matrices (see ``splitting.split_matrices``).
        batches: how many batches the averages are over, >= 1: their weight in ``merged``.

    Raises:
        MismatchError: a tensor does not fit the others, or has another dtype.
    """

    alive: Tensor | None = None
    weights_in: Tensor | None = None
    bias: Tensor | None = None
    weights_out: Tensor | None = None
    grad_in: Tensor | None = None
    grad_bias: Tensor | None = None
    grad_out: Tensor | None = None
    square_in: Tensor | None = None
    square_bias: Tensor | None = None
    square_out: Tensor | None = None
    hess_in: Tensor | None = None
    hess_out: Tensor | None = None
    hv_in: Tensor | None = None
    hv_bias: Tensor | None = None
    hv_out: Tensor | None = None
    flow_in: Tensor | None = None
    flow_out: Tensor | None = None
    mean_abs: Tensor | None = None
    mean: Tensor | None = None
    square: Tensor | None = None
    active: Tensor | None = None
    agf: Tensor | None = None
    agf_first: Tensor | None = None
    taylor: Tensor | None = None
    signed: Tensor | None = None
    pre_grad: Tensor | None = None
    input_norm: Tensor | None = None
    input_cov: Tensor | None = None
    output_cov: Tensor | None = None
    bypass: Tensor | None = None
    next_grad: Tensor | None = None
    split: Tensor | None = None
    batches: int = 1

    def __post_init__(self) -> None:
        check_whole("batches of the evidence", self.batches, 1)
        sizes: dict[str, tuple[int, str]] = {}
        leading: tuple[tuple[int, ...], str] | None = None
        for name, tensor in self.given().items():
            axes, wanted = SHAPES[name], torch.bool if name == "alive" else torch.float32
            if tensor.dtype != wanted:
                raise MismatchError(f"evidence {name!r} is {tensor.dtype}; it must be {wanted}")
            if tensor.ndim < len(axes):
                raise MismatchError(
                    f"evidence {name!r} has shape {tuple(tensor.shape)}; it needs the axes {list(axes)}"
                )
            batch = tuple(tensor.shape[: tensor.ndim - len(axes)])
            leading = leading or (batch, name)
            if batch != leading[0]:
                raise MismatchError(
                    f"evidence {name!r} has the batch axes {batch}, but {leading[1]!r} has {leading[0]}; they must agree"
                )
            for axis, size in zip(axes, tensor.shape[len(batch) :], strict=True):
                first = sizes.setdefault(axis, (size, name))
                if size != first[0]:
                    raise MismatchError(
                        f"evidence {name!r} has {size} along {axis}, but {first[1]!r} has {first[0]}; they must agree"
                    )

    def given(self) -> dict[str, Tensor]:
        """The tensors that were gathered, by name."""
        return {name: value for name in SHAPES if (value := getattr(self, name)) is not None}

    def read(self, name: str) -> Tensor:
        """A field that is needed.

        Raises:
            MismatchError: it was not gathered.

        >>> Evidence(agf=torch.ones(3)).read("agf").shape
        torch.Size([3])
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise MismatchError(
                f"evidence {name!r} was not gathered; gather {', '.join(sorted({name, *self.given()}))}"
            )
        return value

    @property
    def shape(self) -> torch.Size:
        """(..., U).

        Raises:
            UserError: no field of the units was gathered.
        """
        for name, tensor in self.given().items():
            if SHAPES[name].startswith("U"):
                return tensor.shape[: tensor.ndim - len(SHAPES[name]) + 1]
        raise UserError("the evidence says nothing about units; gather weights_in at least")

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.given().values())).device

    @property
    def live(self) -> Tensor:
        """(..., U) bool: ``alive``, or all of them."""
        return torch.ones(self.shape, dtype=torch.bool, device=self.device) if self.alive is None else self.alive


def merged(first: Evidence, second: Evidence) -> Evidence:
    """Evidence of the batches of both: averages weigh as many batches as they have; weights are those of ``second``.

    ``input_norm`` is averaged as a mean square. ``hv`` is averaged as it is: the mean of H g over batches, not H g of the
    mean loss; take one large batch where the difference matters. ``agf_first`` stops after ten batches, exactly so
    when batches are merged one by one.

    Args:
        first: the batches so far.
        second: further ones, of the same group, with the same fields.

    Raises:
        MismatchError: one has fields that the other lacks.

    >>> total = merged(Evidence(agf=torch.tensor([1.0]), batches=3), Evidence(agf=torch.tensor([5.0])))
    >>> total.agf, total.batches
    (tensor([2.]), 4)
    """
    one, two = first.given(), second.given()
    if one.keys() != two.keys():
        odd = sorted(one.keys() ^ two.keys())
        raise MismatchError(
            f"only one of two batches of evidence has {', '.join(odd)}; gather the same fields from each"
        )
    share = second.batches / (first.batches + second.batches)
    values: dict[str, Tensor] = {}
    for name, later in two.items():
        earlier = one[name]
        if name in WEIGHTS:
            values[name] = later
        elif name == "agf_first" and first.batches >= FIRST_BATCHES:
            values[name] = earlier
        elif name == "input_norm":
            values[name] = torch.lerp(earlier.square(), later.square(), share).sqrt()
        else:
            values[name] = torch.lerp(earlier, later, share)
    return Evidence(**values, batches=first.batches + second.batches)


def averaged(parts: Iterable[Evidence]) -> Evidence:
    """Evidence of all batches of a calibration trajectory; holds no more than two of them at a time.

    Args:
        parts: evidence of one batch each, at least one.

    Raises:
        UserError: there is none.
        MismatchError: they have different fields or shapes.

    >>> averaged(Evidence(agf=torch.tensor([value])) for value in (1.0, 2.0, 6.0)).agf
    tensor([3.])
    """
    remaining = iter(parts)
    first = next(remaining, None)
    if first is None:
        raise UserError("there are no batches to gather evidence from; give at least one")
    return reduce(merged, remaining, first)


def of_runs(parts: Sequence[Evidence]) -> Evidence:
    """Stacks evidence of single runs along a new leading axis.

    Args:
        parts: N of them, with the same fields and shapes, and as many batches.

    Raises:
        MismatchError: they have different fields.

    >>> of_runs([Evidence(agf=torch.ones(3)), Evidence(agf=torch.zeros(3))]).shape
    torch.Size([2, 3])
    """
    given = [part.given() for part in parts]
    if any(one.keys() != given[0].keys() for one in given):
        raise MismatchError("runs have different fields of evidence; gather the same ones from each")
    return Evidence(**{name: torch.stack([one[name] for one in given]) for name in given[0]}, batches=parts[0].batches)


def run_of(evidence: Evidence, index: int) -> Evidence:
    """One run of stacked evidence: position ``index`` of the first axis of every tensor."""
    values: dict[str, Any] = {name: tensor[index] for name, tensor in evidence.given().items()}
    return replace(evidence, **values)


NEEDS = frozenset(field.name for field in fields(Evidence)) - {"batches"}
