"""Criteria: named pure functions that score the units, or the weights, of a group; a high score is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import ConfigError, MismatchError, unknown
from trimtab.inner_training.structure import activity_scores as activity
from trimtab.inner_training.structure import brain_surgeon as surgeon
from trimtab.inner_training.structure import loss_scores as loss
from trimtab.inner_training.structure import weight_scores as weight
from trimtab.inner_training.structure.draws import Source
from trimtab.inner_training.structure.evidence import NEEDS, Evidence

Score = Callable[[Evidence, Source], Tensor]


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One way to say which units, or weights, matter.

    Attributes:
        name: lower-case words with hyphens.
        doc: the formula in one line.
        source: where it comes from.
        needs: fields of ``Evidence`` that the score of units reads; those of the bias only where there is a bias, and
            ``alive`` is read without being named.
        unit: the formula: evidence and a source of randomness give (..., U).
        weight_needs: fields that the score of weights reads.
        weight: the formula for weights of the rows, (..., U, I); None where there is none.
        within: whether scores of weights compare in a whole layer, or only among the inputs of one unit.
    """

    name: str
    doc: str
    source: str
    needs: frozenset[str]
    unit: Score
    weight_needs: frozenset[str] = frozenset()
    weight: Score | None = None
    within: Literal["layer", "row"] = "layer"

    @property
    def levels(self) -> tuple[str, ...]:
        """``unit``, and ``weight`` where it has a score for weights."""
        return ("unit",) if self.weight is None else ("unit", "weight")

    def score(self, evidence: Evidence, source: Source) -> Tensor:
        """Scores of units (..., U) float32, finite; high is kept.

        Units that are not alive are scored by what they would be (see ``Evidence``); who prunes leaves them out.

        Args:
            evidence: with the fields of ``needs``.
            source: generator, or a seed for each run; only ``random`` draws from it.

        Raises:
            MismatchError: a field that is needed was not gathered.
        """
        return _finite(self.unit(evidence, source))

    def weight_score(self, evidence: Evidence, source: Source) -> Tensor:
        """Scores of the weights of the rows (..., U, I) float32, finite; high is kept.

        Raises:
            MismatchError: a field that is needed was not gathered, or the criterion scores units only.
        """
        if self.weight is None:
            able = ", ".join(name for name, one in CRITERIA.items() if one.weight is not None)
            raise MismatchError(f"criterion {self.name!r} scores units only; these score weights: {able}")
        return _finite(self.weight(evidence, source))


def _finite(scores: Tensor) -> Tensor:
    """Where squares overflow a score is the largest float32; where they cancel to NaN it is 0."""
    return torch.nan_to_num(scores, nan=0.0)


def _row(
    name: str, unit: Score, doc: str, source: str, needs: str, weight: Score | None = None, weight_needs: str = ""
) -> Criterion:
    of_weights = frozenset((weight_needs or needs).split()) if weight is not None else frozenset()
    return Criterion(name=name, doc=doc, source=source, needs=frozenset(needs.split()), unit=unit,
                     weight_needs=of_weights, weight=weight, within="row" if name == "wanda" else "layer")  # fmt: skip


def _table() -> tuple[Criterion, ...]:
    rows, steep = "weights_in", "weights_in grad_in"
    return (
        _row("random", weight.random_units, "uniform in (0, 1): the control of every comparison", "", rows, weight.random_weights),
        _row("magnitude", weight.magnitude_units, "L2 norm of the row; |w| of a weight", "Han et al., arXiv 1506.02626", rows, weight.magnitude_weights),
        _row("magnitude-l1", weight.mean_magnitude_units, "mean |w| of the row; |w| of a weight", "Lillo & Cheney, arXiv 2605.15435, eq. 24", rows, weight.magnitude_weights),
        _row("lamp", weight.lamp_units, "squared norm over the sum of those that are not smaller, of rows or of weights, in the layer", "Lee et al., arXiv 2010.07611", rows, weight.lamp_weights),
        _row("taylor", activity.read("taylor"), "E|sum over places of h g| of a unit; (w g)^2 of a weight", "Molchanov et al., arXiv 1611.06440; weights: arXiv 1906.10771", "taylor", loss.taylor_weights, steep),
        _row("taylor-weights", loss.taylor_weight_units, "sum of (w g)^2 over row and bias", "Molchanov et al., arXiv 1906.10771", steep + " bias grad_bias", loss.taylor_weights, steep),
        _row("taylor-second", loss.second_order_units, "sum of (w^2 H / 2 - w g)^2 over the row, H the Hessian's diagonal", "Molchanov et al., arXiv 1906.10771", steep + " hess_in", loss.second_order_weights),
        _row("snip", loss.snip_units, "sum of |w g| over row and bias", "Lee et al., arXiv 1810.02340", steep + " bias grad_bias", loss.snip_weights, steep),
        _row("grasp", loss.grasp_units, "sum of w (H g) over row and bias: what leaves takes little of |g|^2 with it", "Wang et al., arXiv 2002.07376; the sign by its text", "weights_in hv_in bias hv_bias", loss.grasp_weights, "weights_in hv_in"),
        _row("synflow", weight.synflow_units, "sum of |w| dR/d|w| over the row", "Tanaka et al., arXiv 2006.05467", "weights_in flow_in", weight.synflow_weights),
        _row("obd", loss.obd_units, "sum of w^2 F / 2 over row and bias, F the mean squared gradient of single examples", "LeCun et al., NeurIPS 1989, with the empirical Fisher matrix", "weights_in square_in bias square_bias", loss.obd_weights, "weights_in square_in"),
        _row("obs", surgeon.obs_units, "|column|^2 / 2 over the unit's entry of the diagonal of (E h h')^-1; of weights, of (E x x')^-1", "Hassibi & Stork, NeurIPS 1992; layers: Frantar & Alistarh, arXiv 2208.11580", "weights_out output_cov", surgeon.obs_weights, "weights_in input_cov"),
        _row("wanda", weight.wanda_units, "|w| x root mean square of the input; a unit's is the sum of its row", "Sun et al., arXiv 2306.11695; units: ours", "weights_in input_norm", weight.wanda_weights),
        _row("ria", weight.ria_units, "(|w| / sum of the unit's + |w| / sum of the input's) x sqrt(root mean square of the input), summed over the row", "Zhang et al., ICLR 2024; units: ours", "weights_in input_norm", weight.ria_weights),
        _row("activation-frequency", activity.read("active"), "share of outputs above 0.05", "Lillo & Cheney, arXiv 2605.15435", "active"),
        _row("redo", activity.over_mean("mean_abs"), "E|h| over the layer's mean", "Sokar et al., arXiv 2302.12902", "mean_abs"),
        _row("grama", activity.over_mean("pre_grad"), "E|dL/dz| over the layer's mean", "Liu et al., arXiv 2505.24061", "pre_grad"),
        _row("cbp", activity.contribution, "E|h| x mean |column|", "Dohare et al., Nature 632, 2024: contribution utility", "mean_abs weights_out"),
        _row("cbp-adaptable", activity.adaptable_contribution, "standard deviation of h x mean |column| / mean |row|", "Dohare et al., arXiv 2108.06325: mean-corrected, with adaptability", "mean square weights_in weights_out"),
        _row("agf", activity.read("agf"), "E sum over places of |h g|: absolute before any reduction", "Qian et al., arXiv 2603.12354", "agf"),
        _row("agf-first", activity.read("agf_first"), "agf of the first ten calibration batches alone", "Qian et al., arXiv 2603.12354", "agf agf_first"),
        _row("kunin", activity.kunin, "-E sum over places of h g, over the squared length of row, bias and column: for candidates", "Kunin et al., arXiv 2506.06489", "signed weights_in bias weights_out"),
    )  # fmt: skip


CRITERIA: dict[str, Criterion] = {criterion.name: criterion for criterion in _table()}


def register_criterion(criterion: Criterion) -> None:
    """Adds a criterion to the table.

    Raises:
        ConfigError: its name is taken.
        UnknownNameError: it needs a field that ``Evidence`` does not have.
    """
    if criterion.name in CRITERIA:
        raise ConfigError(f"criterion {criterion.name!r} is registered already; choose another name")
    for need in sorted(criterion.needs | criterion.weight_needs):
        if need not in NEEDS:
            raise unknown("field of the evidence", need, sorted(NEEDS))
    CRITERIA[criterion.name] = criterion


def resolve_criterion(name: str) -> Criterion:
    """The criterion of a name.

    Raises:
        UnknownNameError: there is none; the message names the nearest.

    >>> resolve_criterion("agf").levels
    ('unit',)
    """
    if name not in CRITERIA:
        raise unknown("criterion", name, CRITERIA)
    return CRITERIA[name]
