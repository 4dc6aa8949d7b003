"""Policies by name: built-in and registered rules, bundles, and objects of a user's own."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from trimtab.errors import (
    BundleError,
    ConfigError,
    MismatchError,
    RangeError,
    UnknownNameError,
    UserError,
    check_whole,
    unknown,
)
from trimtab.inner_training.edits import EDITS, check_targets
from trimtab.inner_training.events import EVENTS
from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.signals import all_signals
from trimtab.policies import names
from trimtab.policies.policy import MOST_EVERY, Kind, Policy
from trimtab.policies.rules import RULES, Factory, RuleEntry
from trimtab.policies.strict_json import has_half_characters

DEFAULT = "default"
DEFAULT_BUNDLE = Path(__file__).parent / "bundled" / DEFAULT

LONGEST = 200  # characters of a policy's name

_OBJECT = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")
_IN_FILE = re.compile(r"(.*)\.py:([A-Za-z_][\w.]*)")  # which somebody may take for an object


def register_rule(name: str, factory: Factory) -> None:
    """Adds a rule of your own, for ``load_policy`` and the command line.

    Args:
        name: lower-case letters, digits and single hyphens, not taken yet.
        factory: called with the options as keyword arguments, returns a ``Policy``. The first line of its docstring
            describes the rule in tables.

    Raises:
        ConfigError: when the name is malformed or taken, or the factory cannot be called.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ConfigError(f"rule name {name!r} must be lower-case words with hyphens, such as 'my-rule'")
    if name in RULES or name == DEFAULT:
        raise ConfigError(f"rule {name!r} is registered already; choose another name")
    if not callable(factory):
        raise ConfigError(f"the factory of rule {name!r} is {factory!r}; it must be a callable that returns a policy")
    lines = (inspect.getdoc(factory) or "registered by the user").splitlines()
    RULES[name] = RuleEntry(name=name, doc=lines[0], factory=factory)
    names.REGISTERED.append(name)


def load_policy(name_or_path: str | os.PathLike[str], **options: Any) -> Policy:
    """Makes a policy.

    Args:
        name_or_path: a rule's name; ``"default"``, the learned policy that comes with trimtab; the path of a bundle's
            folder; or ``"module:object"``, a policy or a callable that returns one. A rule's name wins over a folder
            of the same name; write ``./name`` for the folder.
        options: of the rule, or of the callable.

    Raises:
        UserError: when there is no such policy (``UnknownNameError``), an option does not fit, the bundle is missing
            or damaged (``BundleError``), or the policy does not fit this version (``MismatchError``).

    >>> load_policy("cosine", floor=0.1).act(np.array([[1.0, 1.0]], dtype=np.float32), {})[0].round(3).tolist()
    [[0.1]]
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise UserError(f"a policy is given by name or path, not as {type(name_or_path).__name__}")
    given = os.fspath(name_or_path)
    is_name = isinstance(name_or_path, str)
    if is_name and given in RULES:
        label = f"rule {given!r}"
        return check_policy(_make(label, RULES[given].factory, options), label)
    is_default = is_name and given == DEFAULT
    if is_name and (os.sep in given or "/" in given) and not os.path.exists(given):
        _check_no_file(given)
    if is_default or not is_name or os.path.exists(given) or os.sep in given or "/" in given:
        if options:
            raise UserError(f"{given!r} is a learned policy and takes no options, but got: {', '.join(options)}")
        return _load_default() if is_default else _load_bundle(Path(given))
    if found := _OBJECT.fullmatch(given):
        return check_policy(_load_object(given, found[1], found[2], options), repr(given))
    _check_no_file(given)
    raise unknown("policy", given, [*names.rules(), DEFAULT])


def check_policy(policy: object, label: str) -> Policy:
    """Verifies that an object is a policy that this version can run.

    Args:
        policy: any object.
        label: what to call it in an error.

    Returns:
        The same object.

    Raises:
        MismatchError: names the attribute, signal or lever that does not fit, or a trial decision that failed.
    """
    policy = check_protocol(policy, label)
    _check_names(label, policy)
    every = policy.decide_every
    if every is not None:
        try:
            check_whole(f"{label}: decide_every", every, 1, "optimizer steps, or None", MOST_EVERY)
        except RangeError as error:
            raise MismatchError(str(error)) from error
    _check_trial(label, policy)
    return policy


def check_protocol(policy: object, label: str) -> Policy:
    """Verifies no more than that an object has what a policy has; ``MismatchError`` names what it lacks."""
    wanted = ("name", "signals", "levers", "decide_every", "init", "act")
    try:
        missing = [name for name in wanted if not hasattr(policy, name)]
        fits = not missing and isinstance(policy, Policy) and not isinstance(policy, type)
    except Exception as error:  # of a user's properties
        raise MismatchError(f"{label} is not a policy: asked for its attributes, it raised {error!r}") from error
    if not fits:
        lack = f"it has no {', '.join(missing)}" if missing else "it is a class; give an instance"
        raise MismatchError(f"{label} is not a policy: {lack}")
    return cast(Policy, policy)


def _check_names(label: str, policy: Policy) -> None:
    signals, levers = policy.signals, policy.levers
    if not isinstance(policy.name, str) or not 0 < len(policy.name) <= LONGEST or has_half_characters(policy.name):
        raise MismatchError(
            f"{label}: name is {reprlib.repr(policy.name)}; it must be a text of 1 to {LONGEST} whole characters"
        )
    if not isinstance(signals, tuple) or len(set(signals)) < len(signals):
        raise MismatchError(f"{label}: signals is {signals!r}; it must be a tuple of different signal names")
    if not isinstance(levers, Mapping) or not levers:
        raise MismatchError(
            f"{label}: levers is {levers!r}; it must map lever names to {' or '.join(map(repr, get_args(Kind)))}"
        )
    for name, kind in levers.items():
        if kind not in get_args(Kind):
            raise MismatchError(f"{label}: lever {name!r} is of kind {kind!r}; allowed: {', '.join(get_args(Kind))}")
    moved = [name for name, kind in levers.items() if kind != "events"]
    fired = [name for name, kind in levers.items() if kind == "events"]
    movable = {**LEVERS, **EDITS}
    for what, used, known in (("signal", signals, all_signals()), ("lever", moved, movable), ("event", fired, EVENTS)):
        for name in used:
            if name not in known:
                raise MismatchError(f"{label}: {unknown(what, name, known)}")
    for name, kind in levers.items():
        check_targets(label, name, kind)


def _check_trial(label: str, policy: Policy) -> None:
    wanted = (2, len(policy.levers))
    try:
        answer = policy.act(np.zeros((2, len(policy.signals)), dtype=np.float32), policy.init(2))
        pair = isinstance(answer, tuple) and len(answer) == 2
        shape = np.shape(answer[0]) if pair else ()
    except Exception as error:  # whatever a user's code raises: it must not first be met inside a training run
        raise MismatchError(f"{label}: a trial decision raised {type(error).__name__}: {error}") from error
    if not pair:
        raise MismatchError(
            f"{label}: act gave a {type(answer).__name__}; it must be a tuple of two: actions and state"
        )
    if shape != wanted:
        raise MismatchError(
            f"{label}: a trial decision gave actions of shape {shape}; it must be {wanted}: 2 runs, and an action for each "
            f"of its levers ({', '.join(policy.levers)})"
        )
    if not isinstance(answer[1], dict):
        raise MismatchError(
            f"{label}: a trial decision gave a state of type {type(answer[1]).__name__}; it must be a dict"
        )


def _make(label: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> object:
    """Calls a factory whose options were checked by name first."""
    try:
        parameters = tuple(inspect.signature(factory).parameters.values())
    except ValueError:  # a builtin that does not tell what it takes
        parameters = ()
    kinds = {parameter.kind for parameter in parameters}
    skipped = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [parameter for parameter in parameters if parameter.kind not in skipped]
    allowed = [parameter.name for parameter in named]
    for name in options:
        if name not in allowed and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise UserError(f"{label}: {unknown('option', name, allowed)}")
    lacking = [p.name for p in named if p.default is p.empty and p.name not in options]
    if lacking:
        raise UserError(f"{label} needs the options: {', '.join(lacking)}")
    try:
        return factory(**options)
    except UserError:
        raise
    except Exception as error:  # a user's own code; one line instead of its traceback, which stays chained
        raise UserError(f"{label} could not be made: {type(error).__name__}: {error}") from error


def _load_default() -> Policy:
    if not DEFAULT_BUNDLE.is_dir():
        raise BundleError(
            "this installation ships no default policy; give the name of a rule "
            f"({', '.join(names.rules())}) or the path of a bundle"
        )
    return _load_bundle(DEFAULT_BUNDLE)


def _load_bundle(path: Path) -> Policy:
    from trimtab.policies.bundle import load_bundle

    return load_bundle(path)


def _check_no_file(given: str, error: BaseException | None = None) -> None:
    """Raises where ``FILE.py:object`` was given for ``module:object``."""
    if found := _IN_FILE.fullmatch(given):
        folder, _, module = found[1].replace(os.sep, "/").rpartition("/")
        where = f"the folder {folder!r}" if folder else "its folder"
        right = f"{module}:{found[2]}" if module.isidentifier() else "module:object"
        raise UserError(
            f"policy {given!r} names a file, but objects are taken from modules; give {right!r}, with {where} as the working "
            "folder or in PYTHONPATH"
        ) from error


def _load_object(given: str, module: str, attribute: str, options: Mapping[str, Any]) -> object:
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            _check_no_file(given, error)
        raise UserError(f"cannot import {module!r} for policy {given!r}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in getattr(found, "__dict__", {}) if name[0] != "_"]
            raise UnknownNameError(f"policy {given!r}: {unknown('name', part, public)}")
        found = getattr(found, part)
    if isinstance(found, Policy) and not isinstance(found, type):
        if options:
            raise UserError(f"policy {given!r} is an object and takes no options, but got: {', '.join(options)}")
        return found
    if not callable(found):
        raise MismatchError(f"{given!r} is a {type(found).__name__}; it must be a policy or a callable returning one")
    return _make(repr(given), found, options)
