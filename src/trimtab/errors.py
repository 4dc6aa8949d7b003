"""Errors by name. Bad input raises a `UserError`; the command line turns it into one line and exit code 2."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Iterable
from numbers import Integral
from types import ModuleType

LONGEST = 128  # bits of a whole number that a message shows


class TrimtabError(Exception):
    """Raised for any failure that trimtab reports by itself."""


class UserError(TrimtabError, ValueError):
    """Raised when what the user gave cannot be used; the message says what is allowed and what to do."""


class UnknownNameError(UserError):
    """Raised when a name is in none of the entries of its table."""


class RangeError(UserError):
    """Raised when a number lies outside its allowed range."""


class BundleError(UserError):
    """Raised when a policy bundle is missing, damaged or of an unknown format."""


class ConfigError(UserError):
    """Raised when a configuration cannot be read or does not validate."""


class OutputExistsError(UserError):
    """Raised when an output folder already holds something that would be overwritten."""


class MismatchError(UserError):
    """Raised when two parts do not fit, such as a policy and the levers that it is given."""


class MissingExtraError(UserError):
    """Raised when an optional package is not installed."""


def unknown(kind: str, name: object, allowed: Iterable[str]) -> UnknownNameError:
    """Makes the error for a name that is not in a table, with the nearest match.

    Args:
        kind: what the name stands for, in the singular, such as `scenario`.
        name: the name that was given.
        allowed: every name of the table, in the order in which to list them.

    Returns:
        The error; the caller raises it.

    Example:
        >>> print(unknown("scenario", "digits-mpl", ["digits-mlp", "tabular-mlp"]))
        unknown scenario 'digits-mpl'; did you mean 'digits-mlp'? allowed: digits-mlp, tabular-mlp
    """
    names = [str(entry) for entry in allowed]
    folded = {entry.lower(): entry for entry in names}
    near = difflib.get_close_matches(str(name).lower(), list(folded), n=1, cutoff=0.5)
    hint = f"did you mean {folded[near[0]]!r}? " if near else ""
    return UnknownNameError(f"unknown {kind} {str(name)!r}; {hint}allowed: {', '.join(names) or 'none'}")


def out_of_range(
    name: str, value: object, low: float | None = None, high: float | None = None, remedy: str = ""
) -> RangeError:
    """Makes the error for a number outside its range.

    Args:
        name: the name of the quantity, as the user writes it.
        value: the value that was given.
        low: the smallest allowed value, inclusive; None is no lower limit.
        high: the largest allowed value, inclusive; None is no upper limit.
        remedy: what to do, in a few words; empty for none.

    Returns:
        The error; the caller raises it.

    Example:
        >>> print(out_of_range("runs", 0, low=1))
        runs is 0; it must be at least 1
        >>> print(out_of_range("momentum", 1.5, 0, 0.999, remedy="0.9 is usual"))
        momentum is 1.5; it must be between 0 and 0.999 (0.9 is usual)
    """
    if low is not None and high is not None:
        limits = f"between {low} and {high}"
    elif low is not None:
        limits = f"at least {low}"
    elif high is not None:
        limits = f"at most {high}"
    else:
        limits = "a finite number"
    tail = f" ({remedy})" if remedy else ""
    return RangeError(f"{name} is {shown(value)}; it must be {limits}{tail}")


def shown(value: object) -> object:
    """A value for a message; of a whole number that would fill the screen, or that Python refuses to write, its length.

    >>> shown(0.5), shown(10**400)
    (0.5, 'a whole number of about 400 digits')
    """
    if isinstance(value, int) and value.bit_length() > LONGEST:
        return f"a whole number of about {round(value.bit_length() * math.log10(2))} digits"
    return value


def check_whole(name: str, value: object, low: int, remedy: str = "", most: int | None = None) -> int:
    """A whole number that is large enough, as Python's ``int``; numpy's integers are as good, True and 2.0 are not.

    Args:
        name: the name of the quantity, as the user writes it.
        value: the value that was given.
        low: the smallest allowed value, inclusive.
        remedy: what to do, in a few words; empty for none.
        most: the largest allowed value, inclusive; None is no upper limit.

    Raises:
        RangeError: when it is no whole number, too small, or too large.

    Example:
        >>> check_whole("runs", 64, 1)
        64
        >>> check_whole("runs", 1.5, 1)
        Traceback (most recent call last):
        trimtab.errors.RangeError: runs is 1.5; it must be a whole number of at least 1
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        tail = f" ({remedy})" if remedy else ""
        raise RangeError(f"{name} is {value!r}; it must be a whole number of at least {low}{tail}")
    if int(value) < low:
        raise out_of_range(name, value, low=low, remedy=remedy)
    if most is not None and int(value) > most:
        raise out_of_range(name, value, high=most, remedy=remedy)
    return int(value)


def require_extra(module: str, extra: str) -> ModuleType:
    """Imports an optional module, or says which extra provides it.

    Args:
        module: the module to import, such as `onnxruntime`.
        extra: the extra of trimtab that installs it, such as `onnx`.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: when the module's package is not installed.

    Example:
        >>> require_extra("json", "onnx").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, but broken: its own message is the useful one
        raise MissingExtraError(f"{package} is not installed; run: pip install 'trimtab[{extra}]'") from error
