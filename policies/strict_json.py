"""JSON as bundles hold it: one canonical form, no key twice, every number finite, bounded size and depth."""

from __future__ import annotations

import json
import reprlib
from typing import Any, NoReturn

from trimtab.errors import BundleError

MOST_ENTRIES, MOST_DEPTH = 1024, 8  # of any list or object, far above what a bundle needs; keeps refusals quick

_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = 80


def short(value: object) -> str:
    """A value in at most about 80 ASCII characters, for messages.

    >>> len(short("a" * 200)), short("\\ud800")
    (80, "'\\\\ud800'")
    """
    return _shortener.repr(value).encode("ascii", "backslashreplace").decode()


def canonical(content: Any) -> bytes:
    """The one way to write some JSON content: sorted keys, no spaces, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def has_half_characters(text: str) -> bool:
    """Whether a text holds lone surrogates, which no encoding can write.

    >>> has_half_characters("\\ud800"), has_half_characters("\\U0001f600")
    (True, False)
    """
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def fields_with_half_characters(content: Any, place: str = "") -> list[str]:
    """The fields of some JSON content, in dots, whose name or text holds lone surrogates.

    >>> fields_with_half_characters({"a": ["b", "\\udfff"], "\\ud800": 1})
    ['a.1', '\\\\ud800']
    """
    if isinstance(content, str):
        return [place] if has_half_characters(content) else []
    if not isinstance(content, (dict, list)):
        return []
    found = []
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        inside = f"{place}.{short(key)[1:-1]}" if isinstance(key, str) else f"{place}.{key}"
        half = isinstance(key, str) and has_half_characters(key)
        found += [inside.lstrip(".")] if half else fields_with_half_characters(value, inside.lstrip("."))
    return found


def read_object(raw: bytes, where: str) -> dict[str, Any]:
    """Reads one JSON object strictly.

    Args:
        raw: its bytes; the caller bounds their number.
        where: the path of the file, for messages.

    Raises:
        BundleError: for anything but one JSON object in ASCII, without repeated keys, numbers that are not finite,
            more than 1024 entries in a list or object, or more than 8 levels.
    """
    try:
        content = json.loads(raw.decode("ascii"), object_pairs_hook=_unique, parse_constant=_refuse)
        _check_size(content)
        canonical(content)  # finds 1e999, which reads as infinity
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not strict JSON: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{where}: it holds a {type(content).__name__}, not a JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_ENTRIES:
        raise ValueError(f"an object has {len(pairs)} keys; at most {MOST_ENTRIES} are allowed")
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {short(key)} is there twice")
        if has_half_characters(key):
            raise ValueError(f"the key {short(key)} is no text: it holds half a character")
        content[key] = value
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not allowed; numbers are finite")


def _check_size(content: Any) -> None:
    level = [content]
    for _ in range(MOST_DEPTH):
        inner: list[Any] = []
        for holder in level:
            if isinstance(holder, list) and len(holder) > MOST_ENTRIES:
                raise ValueError(f"a list has {len(holder)} entries; at most {MOST_ENTRIES} are allowed")
            values = holder.values() if isinstance(holder, dict) else holder
            if isinstance(holder, (dict, list)):
                inner += [value for value in values if isinstance(value, (dict, list))]
        if not inner:
            return
        level = inner
    raise ValueError(f"lists and objects inside one another; at most {MOST_DEPTH} levels are allowed")
