"""Growth methods: named pure functions that make newborn units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import ConfigError, MismatchError, check_whole, unknown
from trimtab.inner_training.structure import copying_growth as copying
from trimtab.inner_training.structure import fresh_growth as fresh
from trimtab.inner_training.structure import gradient_growth as gradient
from trimtab.inner_training.structure import parked_growth as waking
from trimtab.inner_training.structure.draws import Draws, Source
from trimtab.inner_training.structure.evidence import NEEDS, Evidence
from trimtab.inner_training.structure.newborns import Newborns, where_present


@dataclass(frozen=True, kw_only=True)
class GrowthMethod:
    """One way to make newborns.

    Attributes:
        name: lower-case words with hyphens.
        doc: what it does, in one line.
        source: where it comes from.
        needs: fields of ``Evidence`` that it reads; ``bias`` and ``next_grad`` only where there is one, and ``alive``
            is read unnamed.
        preserves: whether the function of the network stays, within 1e-5, for any activation with act(0) = 0.
        wakes: whether it chooses among inactive units, rather than making new weights.
        propose: the formula: evidence, which newborns are wanted (..., k) bool, and a source of draws give newborns.
    """

    name: str
    doc: str
    source: str
    needs: frozenset[str]
    propose: Callable[[Evidence, Tensor, Draws], Newborns]
    preserves: bool = False
    wakes: bool = False

    def make(self, evidence: Evidence, count: int, source: Source, counts: Tensor | None = None) -> Newborns:
        """Newborns for every run.

        Args:
            evidence: with the fields of ``needs``.
            count: newborns k, >= 1.
            source: generator, or a seed for each run.
            counts: (...) int64, how many of the k each run takes; None for all. The others are absent: zeros.

        Returns:
            k newborns, finite float32. Fewer are ``present`` where there are no more inactive units to wake, none alive
            to copy, no unit that gains by a split, or no gradient at all.

        Raises:
            RangeError: ``count`` is not at least 1.
            MismatchError: a field that is needed was not gathered, or ``counts`` has not one number for each run.
        """
        check_whole("count of newborns", count, 1)
        batch = tuple(evidence.shape[:-1])
        if counts is not None and tuple(counts.shape) != batch:
            raise MismatchError(f"counts have shape {tuple(counts.shape)}; give one for each run, shape {batch}")
        most = torch.full(batch, count, device=evidence.device) if counts is None else counts
        wanted = torch.arange(count, device=evidence.device) < most[..., None]
        return where_present(self.propose(evidence, wanted, Draws(source, batch, evidence.device)))


def _row(
    name: str,
    propose: Callable[[Evidence, Tensor, Draws], Newborns],
    doc: str,
    source: str,
    needs: str = "",
    preserves: bool = False,
    wakes: bool = False,
) -> GrowthMethod:
    both = frozenset(("weights_in", "bias", "weights_out"))
    return GrowthMethod(name=name, doc=doc, source=source, needs=both | frozenset(needs.split()), propose=propose,
                        preserves=preserves, wakes=wakes)  # fmt: skip


def _table() -> tuple[GrowthMethod, ...]:
    yuan = "Yuan et al., NeurIPS 2023"
    return (
        _row("random", fresh.random, "random rows and columns of the incumbents' mean norms: the control", ""),
        _row("zero-out", fresh.zero_out, "random rows, columns of 0", "", preserves=True),
        _row("zero-in", fresh.zero_in, "rows of 0 with the unit just open, random columns", "", preserves=True),
        _row("pairing", fresh.pairing, "pairs of random units with rows (v, v) and columns (z, -z)", yuan, preserves=True),
        _row("pairing-odd", fresh.pairing_odd, "pairs with rows (v, -v) and columns (z, z); keeps the function of odd activations (tanh)", "ours, after " + yuan),
        _row("net2wider", copying.net2wider, "copies of random incumbents, which share their columns with them almost evenly", "Chen et al., arXiv 1511.05641", preserves=True),
        _row("splitting", copying.splitting, "incumbents part in two along the lowest eigenvector of their splitting matrix, where its eigenvalue is below 0", "Wu et al., arXiv 1910.02366", "split"),
        _row("gradmax", gradient.gradmax, "rows of 0 with the unit just open, columns that give the rows the largest gradient", "Evci et al., arXiv 2201.05125; signs: ours", "bypass next_grad", preserves=True),
        _row("nest", gradient.nest, "one input and one output each, where the gradient of a missing connection is largest", "Dai et al., arXiv 1711.02017", "bypass"),
        _row("random-parked", waking.choosing(waking.by_chance), "wakes inactive units at random: the control of the next three", "", wakes=True),
        _row("activation-frequency", waking.choosing(waking.by_frequency), "wakes the inactive units that would be active most often", "Lillo & Cheney, arXiv 2605.15435", "active", wakes=True),
        _row("gradient", waking.choosing(waking.by_gradient), "wakes the inactive units whose weights have the largest gradient", "Lillo & Cheney, arXiv 2605.15435: GradMax-style selection", "grad_in grad_bias grad_out", wakes=True),
        _row("agf", waking.choosing(waking.by_utility), "wakes the inactive units of the highest signed utility at length 1 (criterion kunin)", "Kunin et al., arXiv 2506.06489", "signed", wakes=True),
    )  # fmt: skip


GROWTH: dict[str, GrowthMethod] = {method.name: method for method in _table()}


def register_growth(method: GrowthMethod) -> None:
    """Adds a growth method to the table.

    Raises:
        ConfigError: its name is taken.
        UnknownNameError: it needs a field that ``Evidence`` does not have.
    """
    if method.name in GROWTH:
        raise ConfigError(f"growth method {method.name!r} is registered already; choose another name")
    for need in sorted(method.needs):
        if need not in NEEDS:
            raise unknown("field of the evidence", need, sorted(NEEDS))
    GROWTH[method.name] = method


def resolve_growth(name: str) -> GrowthMethod:
    """The growth method of a name.

    Raises:
        UnknownNameError: there is none; the message names the nearest.

    >>> resolve_growth("pairing").preserves
    True
    """
    if name not in GROWTH:
        raise unknown("growth method", name, GROWTH)
    return GROWTH[name]
