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
LONGEST = 1024  # bits of a whole number, as in the largest float


class _Loader(yaml.SafeLoader):
    """Safe YAML without its two worst traps: a repeated key that hides the first, and `1e-4` read as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"key {key.value!r} is given twice; keep one", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node)
        if value.bit_length() > LONGEST:  # thousands of digits cannot even be shown in a message
            raise yaml.constructor.ConstructorError(
                problem=f"a whole number of {value.bit_length()} bits is too long; give one of at most {LONGEST} bits",
                problem_mark=node.start_mark,
            )
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a mapping from a YAML file.

    Raises:
        ConfigError: when there is no such file, it cannot be read, is no regular file or larger than 1 MiB, is no YAML,
            or holds no mapping.
    """
    try:
        data = yaml.load(read_regular(path, MOST_BYTES).decode(), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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
        keys = [dotted([*place[:-1], key]) for key in _node(schema, place[:-1]).get("properties", {})]
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
        if isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(part, node.get("additionalProperties", {}))
        node = _resolved(node, schema) if isinstance(node, Mapping) else {}
    return node


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
