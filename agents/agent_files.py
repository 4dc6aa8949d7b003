"""The files of an agent of one's own training: the ``.zip`` of Stable-Baselines3, and the companion that is written beside it.

Both may come from anywhere, so they are read up to a size, only where they are regular files, and without running code.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from stable_baselines3.common.save_util import load_from_zip_file
from torch import Tensor

from trimtab.agents.normalize import check_statistics
from trimtab.envs.scenario import Scenario
from trimtab.errors import BundleError, ConfigError, UserError
from trimtab.policies.network import Activation
from trimtab.policies.strict_json import read_object, short
from trimtab.regular_files import read_regular

FORMAT = "trimtab-statistics-1"  # of the companion
ACTIVATIONS: tuple[Activation, ...] = ("tanh", "relu")
MOST_COMPANION, MOST_ZIP = 1 << 20, 256 << 20  # bytes; of the archive also unpacked
MOST_FILES = 256  # in the archive
AGAIN = "write it with trimtab.agents.export.save_for_export again"


@dataclass(frozen=True, kw_only=True)
class Companion:
    """What the JSON beside an agent's ``.zip`` says; see ``export.learned_policy``."""

    scenario: Scenario
    activation: Activation
    statistics: Mapping[str, Any]
    provenance: Mapping[str, Any]


def read_companion(path: Path) -> Companion:
    """Reads the companion of an agent.

    Raises:
        ConfigError: it cannot be read, is no regular file, larger than 1 MiB or no strict JSON, or a field does not fit.
    """
    try:
        content = read_object(read_regular(path, MOST_COMPANION), str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; {AGAIN}") from error
    except BundleError as error:
        raise ConfigError(f"{error}; {AGAIN}") from error
    if content.get("format") != FORMAT:
        raise ConfigError(f"{path} is of format {short(content.get('format'))}; this version reads {FORMAT!r}")
    for name in ("scenario", "statistics", "provenance"):
        if not isinstance(content.get(name), dict):
            raise ConfigError(f"{path}: {name} is {'no mapping' if name in content else 'missing'}; {AGAIN}")
    if content.get("activation") not in ACTIVATIONS:
        given = short(content.get("activation"))
        raise ConfigError(f"{path}: activation is {given}; it must be one of {', '.join(ACTIVATIONS)}; {AGAIN}")
    scenario = Scenario.of(content["scenario"], f"{path}: scenario")
    try:
        check_statistics(content["statistics"], len(scenario.signals))
    except (TypeError, ValueError, OverflowError) as error:
        said = str(error) if isinstance(error, UserError) else "a normalisation statistic is not made of numbers"
        raise ConfigError(f"{path}: {said}; {AGAIN}") from error
    return Companion(
        scenario=scenario,
        activation=cast(Activation, content["activation"]),
        statistics=content["statistics"],
        provenance=content["provenance"],
    )


def read_parameters(path: Path) -> dict[str, Tensor]:
    """The policy's tensors in the ``.zip`` of an agent; the rest of it is pickled, and not read.

    Raises:
        UserError: it cannot be read, is no regular file, larger than 256 MiB (also unpacked), or not of an agent.
    """
    shown = repr(str(path))
    try:
        content = read_regular(path, MOST_ZIP)
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror}; give the .zip of an agent") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            held = archive.infolist()
        if len(held) > MOST_FILES or sum(one.file_size for one in held) > MOST_ZIP:
            raise ValueError(f"it unpacks to more than {MOST_FILES} files, or {MOST_ZIP:,} bytes")
        parameters: Mapping[str, Any] = load_from_zip_file(io.BytesIO(content), load_data=False, device="cpu")[1]
    except Exception as error:  # a damaged archive raises errors of many types
        raise UserError(f"{shown} is not the .zip of an agent, or is damaged: {error}") from error
    if "policy" not in parameters:
        raise UserError(f"{shown} holds no policy; give the .zip of an agent of Stable-Baselines3")
    policy = parameters["policy"]
    if not isinstance(policy, Mapping) or not all(
        isinstance(name, str) and isinstance(one, Tensor) and one.layout == torch.strided and one.is_floating_point()
        for name, one in policy.items()
    ):
        raise UserError(f"the policy in {shown} is not made of named tensors of floats; give the .zip of an agent")
    return {name: one.float() for name, one in policy.items()}
