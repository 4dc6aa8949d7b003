"""The functions that a population calls: two steps and its evaluations, plain or compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.stepping import (
    EvaluateFunction,
    StepFunction,
    StepOptions,
    compiled,
    make_evaluate,
    make_step,
)
from trimtab.inner_training.task import TaskFamily

EVALUATION_SLOTS = 128


class Programs(NamedTuple):
    """What a population calls.

    Attributes:
        steps: the step that does not sample, and the one that does.
        evaluations: sums of losses (False) and, for a family that has one, of scores (True).
    """

    steps: tuple[StepFunction, StepFunction]
    evaluations: Mapping[bool, EvaluateFunction]


def plain_programs(family: TaskFamily, layout: FlatLayout, options: StepOptions) -> Programs:
    """The functions as they are written."""
    plain, sampling = (make_step(family, layout, options._replace(sample=sample)) for sample in (False, True))
    kinds = (False, True) if family.score_name else (False,)
    return Programs((plain, sampling), {score: make_evaluate(family, EVALUATION_SLOTS, score) for score in kinds})


def compiled_programs(plain: Programs) -> Programs:
    """The same functions, compiled at their first call.

    Scores are evaluated rarely, so their evaluation is not worth a compilation.
    """
    steps = (compiled(plain.steps[0]), compiled(plain.steps[1]))
    return Programs(steps, {**plain.evaluations, False: compiled(plain.evaluations[False])})
