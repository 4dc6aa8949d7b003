"""What plain values must look like: kinds, ranges and lengths as a tree, checked by the entry."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.errors import MismatchError, shown

REMEDY = "the state is damaged, so resume from another checkpoint"
LARGEST = 3.5e38  # just above every float32
VAST = 1e80  # above the square of every float32

Limits = Mapping[str, tuple[float, float]]


class Form(Protocol):
    """Of one value and what it holds."""

    def check(self, value: Any, path: str) -> None:
        """Raises ``MismatchError``, which names the entry at ``path``, unless a value is of this form."""
        ...


def wrong(path: str, value: object, wanted: str) -> MismatchError:
    """The error for an entry of a state."""
    return MismatchError(f"{path} of the state is {brief(value)}; it must be {wanted}: {REMEDY}")


def brief(value: object) -> str:
    """A value for a message, whatever it is.

    >>> brief(10**400), brief([0.5, "x"])
    ('a whole number of about 400 digits', "[0.5, 'x']")
    """
    if shown(value) is not value:
        return str(shown(value))
    try:
        return reprlib.repr(value)
    except Exception:  # noqa: BLE001 - whatever somebody's class raises; or a number within that is too long to write
        return f"a {type(value).__name__}"


def entry(holder: Any, key: str, path: str) -> Any:
    """What a mapping holds under a key; ``MismatchError`` where it is no mapping, or has no such key."""
    if not isinstance(holder, Mapping):
        raise wrong(path, holder, "a mapping")
    if key not in holder:
        raise MismatchError(f"the state has no {_below(path, key)}: {REMEDY}")
    return holder[key]


def _below(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


@dataclass(frozen=True)
class Anything:
    """Whatever it is."""

    def check(self, value: Any, path: str) -> None:
        """See ``Form``."""


@dataclass(frozen=True)
class Number:
    """A number between ``low`` and ``high``, ends included; NaN where it may be ``unknown``; or one of the infinite
    ones in ``endless``."""

    low: float = -VAST
    high: float = VAST
    unknown: bool = False
    endless: tuple[float, ...] = ()

    def check(self, value: Any, path: str) -> None:
        """See ``Form``."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(path, value, self._words)
        if isinstance(value, float) and not math.isfinite(value):
            fits = value in self.endless or (self.unknown and math.isnan(value))
        else:
            fits = self.low <= value <= self.high
        if not fits:
            raise wrong(path, value, self._words)

    @property
    def _words(self) -> str:
        size = (
            f"of at most {self.high:g} in size" if -self.low == self.high else f"between {self.low:g} and {self.high:g}"
        )
        finite = "finite " if -self.low == self.high >= LARGEST and not self.endless else ""
        return ", or ".join([f"a {finite}number {size}", *["NaN"] * self.unknown, *map(str, self.endless)])


@dataclass(frozen=True)
class Whole:
    """A whole number between ``low`` and ``high``, ends included."""

    high: int
    low: int = 0

    def check(self, value: Any, path: str) -> None:
        """See ``Form``."""
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise wrong(path, value, f"a whole number of at least {self.low}, and at most {self.high:,}")


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def check(self, value: Any, path: str) -> None:
        """See ``Form``."""
        if not isinstance(value, bool):
            raise wrong(path, value, "true or false")


@dataclass(frozen=True)
class Text:
    """A text, one of ``allowed`` where there are any."""

    allowed: Collection[str] = ()

    def check(self, value: Any, path: str) -> None:
        """See ``Form``."""
        if not isinstance(value, str) or (self.allowed and value not in self.allowed):
            raise wrong(path, value, " or ".join(map(repr, self.allowed)) or "a text")


@dataclass(frozen=True)
class Maybe:
    """Nothing (None), or something of a form."""

    form: Form

    def check(self, value: Any, path: str) -> None:
        """See ``Form``."""
        if value is not None:
            self.form.check(value, path)


@dataclass(frozen=True)
class Listed:
    """A list of ``least`` to ``most`` values of one form; tuples are as good."""

    form: Form
    least: int
    most: int | None

    def check(self, value: Any, path: str) -> None:
        """See ``Form``."""
        most = math.inf if self.most is None else self.most
        if not isinstance(value, list | tuple) or not self.least <= len(value) <= most:
            length = f"{self.least}" if most == self.least else f"{self.least} to {self.most}"
            raise wrong(path, value, "a list" if self.most is None else f"a list of {length}")
        for place, one in enumerate(value):
            self.form.check(one, f"{path}[{place}]")


@dataclass(frozen=True)
class Row:
    """A list with a form for each place."""

    forms: tuple[Form, ...]

    def check(self, value: Any, path: str) -> None:
        """See ``Form``."""
        Listed(Anything(), len(self.forms), len(self.forms)).check(value, path)
        for place, form in enumerate(self.forms):
            form.check(value[place], f"{path}[{place}]")


@dataclass(frozen=True)
class Nested:
    """Lists of lists, as deep as they go, of values of one form."""

    form: Form

    def check(self, value: Any, path: str) -> None:
        """See ``Form``."""
        if not isinstance(value, list | tuple):
            return self.form.check(value, path)
        for place, one in enumerate(value):
            self.check(one, f"{path}[{place}]")


@dataclass(frozen=True)
class Entries:
    """A mapping that has every one of these keys; where ``alone``, it has no others."""

    forms: Mapping[str, Form]
    alone: bool = False

    def check(self, value: Any, path: str) -> None:
        """See ``Form``."""
        for key, form in self.forms.items():
            form.check(entry(value, key, path), _below(path, key))
        if not isinstance(value, Mapping):
            raise wrong(path, value, "a mapping")
        if self.alone and (more := [key for key in value if key not in self.forms]):
            raise wrong(path, more[0], f"a mapping of {', '.join(self.forms) or 'nothing'}")


@dataclass(frozen=True)
class Named:
    """A mapping of any texts, or those of ``allowed`` (None: any), to values of one form."""

    form: Form
    allowed: Collection[str] | None = None

    def check(self, value: Any, path: str) -> None:
        """See ``Form``."""
        if not isinstance(value, Mapping):
            raise wrong(path, value, "a mapping")
        for key, one in value.items():
            if not isinstance(key, str) or (self.allowed is not None and key not in self.allowed):
                names = "texts" if self.allowed is None else ", ".join(self.allowed) or "nothing"
                raise wrong(path, key, f"a mapping of {names}")
            self.form.check(one, _below(path, key))


def form_of(fresh: Any, whole: Whole, most: float, limits: Limits, path: str = "") -> Form:
    """The form of a tree that another one has: the same keys, lengths and kinds.

    Args:
        fresh: the other tree. Lists hold values of one kind. Where a number is NaN or infinite it may be that; where it
            is finite it must be. Whole numbers are at least 0, unless it has lower ones.
        whole: the range of whole numbers, where no limit is given.
        most: the largest size of other numbers, where no limit is given.
        limits: ranges of the numbers at a path, which does not count the places in lists.
        path: of this tree.

    >>> form_of({"left": [1, 2]}, Whole(9), 1.0, {"left": (0, 5)}).check({"left": [0, 6]}, "")
    Traceback (most recent call last):
    trimtab.errors.MismatchError: left[1] of the state is 6; it must be a whole number of at least 0, and at most 5: the ...
    """
    if isinstance(fresh, Mapping):
        forms = {key: form_of(one, whole, most, limits, _below(path, key)) for key, one in fresh.items()}
        return Entries(forms, alone=True)
    if isinstance(fresh, list):
        one = form_of(fresh[0], whole, most, limits, path) if fresh else Flag()
        return Listed(one, len(fresh), len(fresh))
    if isinstance(fresh, bool):
        return Flag()
    if isinstance(fresh, int):
        low, high = limits.get(path, (min(whole.low, fresh), whole.high))
        return Whole(int(high), int(low))
    if isinstance(fresh, float):
        low, high = limits.get(path, (-most, most))
        return Number(low, high, unknown=math.isnan(fresh), endless=(fresh,) if math.isinf(fresh) else ())
    return Text((fresh,))
