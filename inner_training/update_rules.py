"""Update rules with per-run hyperparameters: each is a set of coefficients of one update on flat parameters.

With a gradient g, first and second moments m and v, and parameters p, every rule here is

    g' = g + coupled p
    v  = keep_square v + (1 - keep_square) g'^2
    d  = root sqrt(v) + floor
    u  = g' / d if early else g'
    m' = keep m + gain u
    s  = ahead u + along m' + behind m,   its sign if signed,   over d if not early
    p  = shrink p - size s

so that a population may mix rules at the cost of one: coefficients are per run and step, computed for a whole interval
at once, and the only full-size work (``updating.update``) is a single pass that a compiler fuses. What no rule present
needs is left out when the step is built (``Needs``). Muon replaces s for matrices. Each rule equals its reference at
one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_RULES = ("sgd", "adam", "adamw")
HYPERPARAMETERS = ("lr", "momentum", "weight_decay", "nesterov", "beta2", "eps", "decoupled", "grad_clip")
Columns = Mapping[str, Tensor]

MOMENTUM_DECAY = 4e-3  # of NAdam's momentum schedule, as torch.optim.NAdam


class Coefficients(NamedTuple):
    """Coefficients of the update in the module's docstring, each (K, N) for K steps of N runs.

    ``early`` and ``signed`` are 0 or 1; ``matrix`` is the learning rate of Muon's matrices, 0 for other rules.
    """

    coupled: Tensor
    keep: Tensor
    gain: Tensor
    keep_square: Tensor
    shrink: Tensor
    size: Tensor
    ahead: Tensor
    along: Tensor
    root: Tensor
    floor: Tensor
    early: Tensor
    behind: Tensor
    signed: Tensor
    matrix: Tensor


class Needs(NamedTuple):
    """What the rules of a population need, decided when its step is built.

    Attributes:
        squares: keep second moments.
        early: divide by them before averaging (RMSprop).
        signed: move by signs (Lion).
        matrices: orthogonalise matrices (Muon).
    """

    squares: bool = False
    early: bool = False
    signed: bool = False
    matrices: bool = False


@dataclass(frozen=True)
class UpdateRule:
    """One optimizer.

    Attributes:
        name: as in ``OptimizerSettings.rule``.
        doc: one line for tables.
        momentum: what the hyperparameter ``momentum`` is, for tables.
        decoupled: whether weight decay acts beside the gradient rather than through it.
        needs: what it needs of the step.
        coefficients: ``(columns, step) -> Coefficients``; ``columns`` holds each hyperparameter (K, N), and ``step``
            (K, N) float counts updates from 1.
        usual_momentum, usual_beta2: what recipes have unless they vary it.
        rate_factor: a usual learning rate over AdamW's (SGD's, for a rule that is not adaptive); a usual decoupled
            decay is as many times below AdamW's.
    """

    name: str
    doc: str
    momentum: str
    decoupled: bool
    needs: Needs
    coefficients: Callable[[Columns, Tensor], Coefficients]
    usual_momentum: float = 0.9
    usual_beta2: float = 0.999
    rate_factor: float = 1.0

    @property
    def adaptive(self) -> bool:
        """Whether the size of its steps does not follow the size of the gradient, so that rates like Adam's suit it."""
        return any(self.needs)


def sgd(columns: Columns, step: Tensor) -> Coefficients:
    """SGD with coupled weight decay, momentum and Nesterov momentum, as ``torch.optim.SGD`` (no dampening)."""
    del step
    momentum = columns["momentum"]
    zero, one = torch.zeros_like(momentum), torch.ones_like(momentum)
    moving, nesterov = momentum > 0, columns["nesterov"] > 0
    return Coefficients(
        coupled=columns["weight_decay"],
        keep=momentum,
        # torch keeps no buffer at momentum 0, so one that is switched on later starts from that step's gradient.
        gain=torch.where(moving, one, zero),
        keep_square=one,
        shrink=one,
        size=columns["lr"],
        ahead=torch.where(moving & ~nesterov, zero, one),
        along=torch.where(nesterov, momentum, torch.where(moving, one, zero)),
        root=zero,
        floor=one,
        early=zero,
        behind=zero,
        signed=zero,
        matrix=zero,
    )


def adam(columns: Columns, step: Tensor) -> Coefficients:
    """Adam (Kingma & Ba, arXiv 1412.6980) with coupled or decoupled weight decay (AdamW, arXiv 1711.05101).

    Equals ``torch.optim.Adam`` where the column ``decoupled`` is 0 and ``torch.optim.AdamW`` where it is 1.
    """
    decay, beta1, beta2 = columns["weight_decay"], columns["momentum"], columns["beta2"]
    zero, one = torch.zeros_like(beta1), torch.ones_like(beta1)
    return Coefficients(
        coupled=decay * (1 - columns["decoupled"]),
        keep=beta1,
        gain=1 - beta1,
        keep_square=beta2,
        shrink=1 - columns["lr"] * decay * columns["decoupled"],
        size=columns["lr"] / (1 - beta1**step),
        ahead=zero,
        along=one,
        root=torch.rsqrt(1 - beta2**step),
        floor=columns["eps"],
        early=zero,
        behind=zero,
        signed=zero,
        matrix=zero,
    )


def rmsprop(columns: Columns, step: Tensor) -> Coefficients:
    """RMSprop (Hinton's lecture 6e, 2012) with coupled decay and momentum, as ``torch.optim.RMSprop``, not centered.

    ``beta2`` is torch's ``alpha``. Momentum averages gradients that have been divided already.
    """
    plain = sgd({**columns, "nesterov": torch.zeros_like(columns["momentum"])}, step)
    one = torch.ones_like(plain.size)
    return plain._replace(keep_square=columns["beta2"], root=one, floor=columns["eps"], early=one)


@lru_cache(maxsize=1)
def _falling() -> Tensor:
    """Products of NAdam's momentum schedule up to each step, without beta1; they are below 1e-38 from step 128 on."""
    step = torch.arange(129, dtype=torch.float64)
    factor = 1 - 0.5 * 0.96 ** (step * MOMENTUM_DECAY)
    factor[0] = 1.0
    return factor.cumprod(0).float()


def nadam(columns: Columns, step: Tensor) -> Coefficients:
    """NAdam (Dozat, ICLR workshop 2016) with its momentum schedule, as ``torch.optim.NAdam``.

    Equals torch with ``decoupled_weight_decay`` where the column ``decoupled`` is 1. The product of past momentum
    factors is taken at the beta1 of now, as in the bias correction of torch's Adam; torch's NAdam multiplies the ones
    of then, which differs for some ten steps when a lever has moved momentum early in a run.
    """
    beta1 = columns["momentum"]
    now, following = (beta1 * (1 - 0.5 * 0.96 ** (when * MOMENTUM_DECAY)) for when in (step, step + 1))
    table = _falling().to(step.device)
    product = beta1**step * table[step.long().clamp(max=len(table) - 1)]
    return adam(columns, step)._replace(
        size=columns["lr"],
        ahead=(1 - now) / (1 - product),
        along=following / (1 - product * following),
    )


def lion(columns: Columns, step: Tensor) -> Coefficients:
    """Lion (Chen et al., arXiv 2302.06675, algorithm 2) with decoupled weight decay.

    The step is the sign of ``beta1 m + (1 - beta1) g``; then m becomes ``beta2 m + (1 - beta2) g``.
    """
    beta1, beta2 = columns["momentum"], columns["beta2"]
    zero, one = torch.zeros_like(beta1), torch.ones_like(beta1)
    return sgd(columns, step)._replace(
        coupled=zero,
        keep=beta2,
        gain=1 - beta2,
        shrink=1 - columns["lr"] * columns["weight_decay"],
        ahead=1 - beta1,
        along=zero,
        behind=beta1,
        signed=one,
    )


def muon(columns: Columns, step: Tensor) -> Coefficients:
    """Muon (Jordan et al., 2024) for matrices, with Nesterov momentum and decoupled decay, and AdamW for the rest.

    Matrices move as ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"`` (Liu et al., arXiv 2502.16982), so
    that one learning rate and one decay serve both parts.
    """
    rest = adam({**columns, "decoupled": torch.ones_like(columns["momentum"])}, step)
    return rest._replace(matrix=columns["lr"])


_RULES = (
    UpdateRule("sgd", "stochastic gradient descent, momentum and Nesterov", "momentum", False, Needs(), sgd,
               usual_momentum=0.0),
    UpdateRule("adam", "Adam, coupled weight decay", "beta1", False, Needs(squares=True), adam),
    UpdateRule("adamw", "Adam, decoupled weight decay", "beta1", True, Needs(squares=True), adam),
    UpdateRule("rmsprop", "RMSprop, not centered; beta2 is alpha", "momentum", False, Needs(squares=True, early=True),
               rmsprop, usual_momentum=0.0, usual_beta2=0.99),  # as torch.optim.RMSprop
    UpdateRule("nadam", "Adam with Nesterov momentum, coupled weight decay", "beta1", False, Needs(squares=True), nadam),
    UpdateRule("nadamw", "Adam with Nesterov momentum, decoupled weight decay", "beta1", True, Needs(squares=True),
               nadam),
    # Its paper advises a rate 3 to 10 times below AdamW's, and a decay as many times above.
    UpdateRule("lion", "sign of an average of gradients, decoupled weight decay", "beta1", True, Needs(signed=True),
               lion, usual_beta2=0.99, rate_factor=0.2),
    UpdateRule("muon", "orthogonalised momentum for matrices, AdamW for the rest", "momentum of matrices, beta1 of the rest",
               True, Needs(squares=True, matrices=True), muon, usual_momentum=0.95),  # as torch.optim.Muon
)  # fmt: skip

UPDATE_RULES: dict[str, UpdateRule] = {rule.name: rule for rule in _RULES}


def needs_of(rules: Iterable[UpdateRule]) -> Needs:
    """What a population of these rules needs."""
    return Needs(*(any(column) for column in zip(*(rule.needs for rule in rules), strict=True)))


def interval_coefficients(
    kinds: Sequence[Callable[[Columns, Tensor], Coefficients]], choice: Tensor, columns: Columns, step: Tensor
) -> Tensor:
    """Coefficients of an interval for a population whose runs may use different rules.

    Args:
        kinds: the distinct ``UpdateRule.coefficients`` present.
        choice: (N,) int64 index into ``kinds``.
        columns, step: as in ``UpdateRule.coefficients``.

    Returns:
        (K, N, 14), the last axis in the order of ``Coefficients``.
    """
    result = torch.stack(kinds[0](columns, step), -1)
    for index, kind in enumerate(kinds[1:], 1):
        result = torch.where((choice == index)[:, None], torch.stack(kind(columns, step), -1), result)
    return result
