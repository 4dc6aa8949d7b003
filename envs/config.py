"""Configuration files: strict YAML in, and validation errors as one sentence."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from trimtab.errors import ConfigError, unknown
from trimtab.regular_files import read_regular

MOST_BYTES = 1 << 20  # of a file
MOST_DEPTH = 32  # lists and mappings inside one another; a scenario has five
MOST_NODES = 10_000  # keys and values of a file, those that aliases repeat counted each time
TOO_MANY = f"more than {MOST_NODES:,} keys and values, with those that aliases repeat"
LONGEST = 1024  # bits of a whole number, as in the largest float
LONGEST_NUMBER = 1000  # characters of any number


class _Loader(yaml.SafeLoader):
    """Safe YAML without its two worst traps: a repeated key that hides the first, and `1e-4` read as text.

    A small file cannot become a large one either: nesting, and what aliases make of it, are bounded.
    """

    _depth = _nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Bounds the nesting, and what is read at all."""
        self._depth, self._nodes = self._depth + 1, self._nodes + 1
        if self._depth > MOST_DEPTH or self._nodes > MOST_NODES:
            here = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            deep = self._depth > MOST_DEPTH
            raise _error(f"lists and mappings are nested more than {MOST_DEPTH} deep" if deep else TOO_MANY, here)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """Bounds what aliases make of it."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _error(f"key {reprlib.repr(key.value)} is given twice; keep one", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        self._check_length(node)
        value: int = super().construct_yaml_int(node)
        if value.bit_length() > LONGEST:  # thousands of digits cannot even be shown in a message
            raise _error(
                f"a whole number of {value.bit_length()} bits is too long; give one of at most {LONGEST} bits",
                node.start_mark,
            )
        return value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        self._check_length(node)
        value: float = super().construct_yaml_float(node)
        return value

    def _check_length(self, node: yaml.ScalarNode) -> None:
        if len(node.value) > LONGEST_NUMBER:
            raise _error(
                f"a number of {len(node.value)} characters is too long; give one of at most {LONGEST_NUMBER}",
                node.start_mark,
            )


def _error(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=mark)


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Nodes in a tree, where one that aliases repeat counts each time; an error where there are too many, or no end."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise _error("an alias stands inside of what it repeats", node.start_mark)
        return count
    known[id(node)], count = None, 1
    for entry in node.value if isinstance(node, yaml.CollectionNode) else ():
        for inner in entry if isinstance(entry, tuple) else (entry,):
            count += _count(inner, known)
    if count > MOST_NODES:
        raise _error(TOO_MANY, node.start_mark)
    known[id(node)] = count
    return count


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a mapping from a YAML file.

    Raises:
        ConfigError: when there is no such file, it cannot be read, is no regular file or larger than 1 MiB, is no YAML,
            repeats a key, is nested more than 32 deep, holds more than 10,000 keys and values (what aliases repeat counted each
            time) or no mapping.
    """
    try:
        data = yaml.load(read_regular(path, MOST_BYTES).decode(), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_problem(error)}") from error
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise ConfigError(f"{path} {what}; it must hold a mapping of keys to values, such as 'interval: 10'")
    return data


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "; ".join(str(error).split("\n")) or type(error).__name__
    return f"line {mark.line + 1}: {problem}" if mark else problem


def explain(error: ValidationError, model: type[BaseModel], source: str) -> ConfigError:
    """Turns pydantic's report into one sentence with the key, the value, and what is allowed.

    Args:
        error: what pydantic raised for `model`.
        model: the model that was validated.
        source: where the values came from, such as a path.

    Returns:
        The error; the caller raises it.
    """
    first, *others = sentences(error, model)
    return ConfigError(f"{source}: {first}{f' (and {len(others)} more)' if others else ''}")


def sentences(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence for everything that pydantic found; at least one."""
    everything = error.errors(include_url=False)
    # A list whose entries are wrong is also reported as too short.
    inner = [one["loc"] for one in everything]
    found = [one for one in everything if not any(one["loc"] == place[: len(one["loc"])] != place for place in inner)]
    schema = model.model_json_schema()
    return [_sentence(dict(one), schema) for one in found]


def _sentence(found: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    place, value = list(found["loc"]), reprlib.repr(found["input"])
    if place[-1:] == ["[key]"] or found["type"] == "invalid_key":
        return f"key {value} is a {type(found['input']).__name__}; every key must be text"
    path, node = dotted(place), _node(schema, place)
    if found["type"] == "extra_forbidden":
        keys = [dotted([*place[:-1], key]) for key in _within(_node(schema, place[:-1]), schema).get("properties", {})]
        return f"{unknown('key', path, keys)} (its value is {value})"
    if found["type"] == "missing":
        return f"{path} is missing; give {_allowed(node, schema)}"
    if found["type"] == "value_error":
        reason = str(found["ctx"]["error"])
        return f"{path}: {reason}" if path else reason  # a rule about several keys names them itself
    return f"{path} is {value}; it must be {_allowed(node, schema)}"


def dotted(place: list[Any]) -> str:
    """`families[0].share` for `["families", 0, "share"]`.

    >>> dotted(["families", 0, "share"])
    'families[0].share'
    """
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = node.get("$ref", "")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else node


def _node(schema: Mapping[str, Any], place: list[Any]) -> Mapping[str, Any]:
    node = schema
    for part in place:
        node = _within(node, schema)
        if isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(part, node.get("additionalProperties", {}))
        node = _resolved(node, schema) if isinstance(node, Mapping) else {}
    return node


def _within(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mapping or list of a node that may be null as well; any other node itself."""
    options = [_resolved(one, schema) for one in node.get("anyOf", ())]
    return next((one for one in options if "properties" in one or "items" in one), node)


_LIMITS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "below"),
)
_KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}


def _allowed(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a node of a JSON schema accepts, in words."""
    if "enum" in node:
        return "one of " + ", ".join(node["enum"])
    if "anyOf" in node:
        return " or ".join(_allowed(_resolved(one, schema), schema) for one in node["anyOf"])
    kind = node.get("type", "")
    if kind == "null":
        return "null"
    if kind in _KINDS:
        limits = " and ".join(f"{words} {node[key]:g}" for key, words in _LIMITS if key in node)
        length = f"at most {node['maxLength']} characters" if "maxLength" in node else ""
        pattern = f"that matches {node['pattern']}" if "pattern" in node else ""
        return ", ".join(part for part in (_KINDS[kind], limits, pattern, length) if part)
    if kind == "array":
        item = _resolved(node.get("items", {}), schema)
        counts = " and ".join(
            f"{words} {node[key]}" for key, words in (("minItems", "at least"), ("maxItems", "at most")) if key in node
        )
        each = f", each {_allowed(item, schema)}" if "properties" in item else " of text"
        return f"a list of {counts} entries{each}"
    if keys := node.get("properties"):
        return "a mapping with the keys " + ", ".join(keys)
    return "a mapping of names to numbers" if kind == "object" else "a value of another kind"
