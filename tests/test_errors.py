"""Messages name the value, what is allowed, the nearest match and the remedy."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest

from trimtab import errors
from trimtab.errors import MissingExtraError, RangeError, UnknownNameError, UserError, out_of_range, unknown

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.TrimtabError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_one_documented_sentence(kind: type[Exception]) -> None:
    assert kind.__doc__ is not None
    assert kind.__doc__.startswith("Raised ")
    assert kind.__doc__.endswith(".")
    assert "\n" not in kind.__doc__
    assert kind is errors.TrimtabError or issubclass(kind, UserError)


def test_user_errors_are_value_errors() -> None:
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("digits-mpl", "digits-mlp"), ("DIGITS-MLP", "digits-mlp"), ("tabular", "tabular-mlp"), ("zzz", None), ("", None)],
)
def test_unknown_suggests_the_nearest(name: str, nearest: str | None) -> None:
    error = unknown("scenario", name, ("digits-mlp", "tabular-mlp"))
    assert isinstance(error, UnknownNameError)
    message = str(error)
    assert message.startswith(f"unknown scenario {name!r}; ")
    assert message.endswith("allowed: digits-mlp, tabular-mlp")
    assert (f"did you mean {nearest!r}?" in message) if nearest else ("did you mean" not in message)


def test_unknown_with_an_empty_table() -> None:
    assert str(unknown("rule", "x", [])) == "unknown rule 'x'; allowed: none"


@pytest.mark.parametrize(
    ("low", "high", "limits"),
    [(0, 1, "between 0 and 1"), (0, None, "at least 0"), (None, 1, "at most 1"), (None, None, "a finite number")],
)
def test_out_of_range_names_the_limits(low: float | None, high: float | None, limits: str) -> None:
    error = out_of_range("momentum", 7, low, high)
    assert isinstance(error, RangeError)
    assert str(error) == f"momentum is 7; it must be {limits}"
    assert str(out_of_range("momentum", 7, low, high, remedy="try 0.9")).endswith(f"{limits} (try 0.9)")


@pytest.mark.parametrize("value", [1.5, 2.0, True, None, "3", float("nan")], ids=repr)
def test_what_is_no_whole_number_is_refused(value: object) -> None:
    with pytest.raises(RangeError) as caught:
        errors.check_whole("runs", value, 1, remedy="64 is usual")
    assert str(caught.value) == f"runs is {value!r}; it must be a whole number of at least 1 (64 is usual)"


def test_whole_numbers_of_numpy_are_as_good() -> None:
    assert type(errors.check_whole("runs", np.int64(3), 1)) is int
    with pytest.raises(RangeError, match="runs is 0; it must be at least 1"):
        errors.check_whole("runs", np.int64(0), 1)


def test_require_extra_imports() -> None:
    assert errors.require_extra("json.decoder", "onnx") is sys.modules["json.decoder"]


@pytest.mark.parametrize("module", ["trimtab_absent", "trimtab_absent.sub"])
def test_require_extra_names_the_extra(module: str) -> None:
    with pytest.raises(MissingExtraError, match=r"trimtab_absent is not installed; run: pip install 'trimtab\[onnx\]'"):
        errors.require_extra(module, "onnx")


def test_require_extra_lets_a_broken_package_speak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trimtab_broken.py").write_text("import trimtab_its_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="trimtab_its_dependency") as caught:
        errors.require_extra("trimtab_broken", "onnx")
    assert not isinstance(caught.value, MissingExtraError)
