"""Task families by name, and families of the user's own as ``module:function`` or ``format:path``.

Importing this module is light: a family's own module, and scikit-learn, are imported when the family is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.errors import ConfigError, UserError, unknown
from trimtab.inner_training.tasks.local_files import FORMATS, file_family

if TYPE_CHECKING:
    from trimtab.inner_training.task import TaskFamily


@dataclass(frozen=True)
class FamilyEntry:
    """A family that has not been made yet.

    Attributes:
        doc: one line for tables.
        factory: makes the family.
    """

    doc: str
    factory: Callable[[], TaskFamily]


FAMILIES: dict[str, FamilyEntry] = {}
_MADE: dict[str, TaskFamily] = {}


def _built_in(name: str, doc: str, where: str, **options: Any) -> None:
    module, _, attribute = where.partition(":")

    def factory() -> TaskFamily:
        made: TaskFamily = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)(name, doc, **options)
        return made

    FAMILIES[name] = FamilyEntry(doc, factory)


_built_in("digits-mlp", "handwritten digits, one hidden layer, relu", "digits:DigitsMLP")
_built_in("digits-mlp-deep", "handwritten digits, three hidden layers, relu", "digits:DigitsMLP", depth=3)
_built_in(
    "digits-mlp-tanh", "handwritten digits, two hidden layers, tanh", "digits:DigitsMLP", depth=2, activation="tanh"
)
_built_in("tabular-mlp", "iris, wine and breast cancer, one hidden layer, relu", "tabular:TabularMLP")
_built_in("teacher-mlp", "labels of random teacher networks, one hidden layer, relu", "teacher:TeacherMLP")
_built_in("language", "source code of Python's standard library, byte by byte", "language:StandardLibrary")
_built_in("sprites-vit", "drawn shapes with nuisances, a small vision transformer", "vit:SpritesViT")
_built_in("sprites-conv", "drawn shapes with nuisances, two convolutions", "images:Sprites")
_built_in("sprites-resnet", "drawn shapes with nuisances, residual with group norm", "images:Sprites", residual=True)
_built_in("sprites-head", "drawn shapes, two dense convolutions under a gated head", "images:SpritesHead")
_built_in("textures-conv", "tiles of photographs that scikit-image ships, two convolutions", "images:Textures")
_built_in("graph", "nodes of random and bundled graphs, two-layer graph convolution", "graphs:GraphNodes")
_built_in(
    "regression",
    "diabetes data, Friedman's functions and teacher networks, one hidden layer",
    "regression:RegressionMLP",
)
_built_in("quadratic", "least squares with a known spectrum and optimum, for tests of theory", "quadratic:Quadratic")
_built_in(
    "permuted-digits", "digits in a new, independent pixel order in each of ten phases", "continual:PermutedDigits"
)
_built_in(
    "random-label-digits",
    "digits with new random labels in each of five phases, memorised",
    "continual:RandomLabelDigits",
)
_built_in(
    "class-incremental-digits",
    "two more digits in each of five phases, a tiny replay",
    "continual:ClassIncrementalDigits",
)
_built_in("warm-start-digits", "half of the digits' training data, then all of it", "continual:WarmStartDigits")
_built_in("drifting-digits", "gradual or abrupt drift of inputs or labels in ten phases", "drift:DriftingDigits")
_built_in("shifted-digits", "domain adaptation: a source, then a shifted target with few labels", "drift:ShiftedDigits")
_built_in("alternating-classes", "five new classes, one new class, five times in turn", "class_pool:AlternatingClasses")
_built_in(
    "class-pairs", "a new pair of classes and a fresh output layer in each of ten phases", "class_pool:ClassPairs"
)
_built_in(
    "changing-regression",
    "bit-flipping regression: one of the slow bits flips between phases",
    "changing_regression:SlowlyChangingRegression",
)

BUILT_IN = tuple(FAMILIES)


def make_family(name: str) -> TaskFamily:
    """Makes a family of ``FAMILIES``, or returns the one made before.

    Args:
        name: a name of ``FAMILIES``.

    Returns:
        The family; the same object at each call, which nobody may change.

    Raises:
        UserError: when the name is unknown, or its factory does not give a family.

    >>> make_family("digits-mlp").draw(0, held_out=False).key
    'digits-mlp/train/0'
    """
    if name not in FAMILIES:
        raise unknown("task family", name, FAMILIES)
    if name not in _MADE:
        _MADE[name] = _made(FAMILIES[name].factory, f"the factory of task family {name!r}")
    return _MADE[name]


def register_task(name: str, factory: Callable[[], TaskFamily]) -> None:
    """Adds a family of the user's own, for this process.

    Args:
        name: how scenarios call it.
        factory: makes the family; the first line of its docstring describes it in tables.

    Raises:
        ConfigError: when the name is taken or holds a colon, or the factory cannot be called.
    """
    if name in FAMILIES:
        raise ConfigError(f"task family {name!r} exists already; give yours another name")
    if not isinstance(name, str) or not name or ":" in name:
        raise ConfigError(
            f"task family name {name!r} is empty, no text, or holds ':', as in module:function and npz:PATH; rename it"
        )
    if not callable(factory):
        raise ConfigError(
            f"the factory of task family {name!r} is {factory!r}; give a callable that returns a TaskFamily"
        )
    lines = (factory.__doc__ or "").strip().splitlines()
    FAMILIES[name] = FamilyEntry(lines[0] if lines else "registered in this process", factory)


def resolve_family(name: str) -> TaskFamily:
    """Makes a family from its name, from the place of a function that returns one, or from a file.

    Args:
        name: a name of ``FAMILIES``; or ``module:function`` with an importable module and a function without
            arguments in it; or ``format:path`` with a format of ``FORMATS``, which come before modules of their names.

    Returns:
        The family; ``module:function`` calls the function anew each time, and a file is read once.

    Raises:
        UserError: when the name is unknown, the module cannot be imported, the function is missing or cannot be
            called, it returns something else, or the file cannot be used.
    """
    if ":" not in name:
        return make_family(name)
    place, _, attribute = name.partition(":")
    if place in FORMATS:
        return file_family(name)
    try:
        module = importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way while it is imported
        raise UserError(
            f"task family {name!r}: cannot import module {place!r} ({type(error).__name__}: {error}); "
            "check its name and that its folder is on PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        raise UserError(f"task family {name!r}: module {place!r} has no {attribute!r}; name a function of it")
    if not callable(function):
        raise UserError(
            f"task family {name!r} is a {type(function).__name__}; name a function that returns a TaskFamily"
        )
    return _made(function, f"task family {name!r}")


def _made(factory: Callable[[], object], what: str) -> TaskFamily:
    from trimtab.inner_training.task import TaskFamily

    try:
        made = factory()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's own code; its traceback stays chained
        raise UserError(f"{what} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, TaskFamily):
        raise UserError(f"{what} returned a {type(made).__name__}; it must return a TaskFamily, such as an ArrayTask")
    return made
