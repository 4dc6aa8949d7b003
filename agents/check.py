"""`trimtab check`: is a bundle whole, is a scenario's file valid? Says what was verified, or every defect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trimtab.errors import BundleError, ConfigError, UserError
from trimtab.printing import printable


def run_check(path: Path) -> str:
    """Verifies a bundle or a scenario's file.

    Args:
        path: a bundle's folder, its `policy.json`, or a `.yaml` / `.yml` file with a scenario.

    Returns:
        Lines that say what was verified.

    Raises:
        ConfigError: when there is nothing at `path`, it is neither kind, or the scenario does not validate.
        UserError: when a task family of the scenario cannot be made, its runs cannot be stacked, or its instances do
            not fit.
        BundleError, MismatchError: when the bundle is damaged, or does not fit this version. The message of each lists
            all defects; a part that cannot be read hides those that lie behind it.
    """
    kinds = "give a bundle's folder, its policy.json, or a scenario's YAML file"
    if not path.exists():
        raise ConfigError(f"no file or folder {str(path)!r}; {kinds}")
    if path.is_dir() or path.name == "policy.json":
        return _check_bundle(path if path.is_dir() else path.parent)
    if path.suffix in (".yaml", ".yml"):
        return _check_scenario(path)
    raise ConfigError(f"{str(path)!r} is neither a bundle nor a scenario; {kinds}")


def _check_bundle(folder: Path) -> str:
    from trimtab.policies.bundle_reading import TOLERANCE, read_bundle
    from trimtab.policies.manifest import GOLDEN, MANIFEST, ONNX

    found: list[UserError] = []
    try:
        policy, manifest = read_bundle(folder, found.append)
    except UserError as error:
        found.append(error)
    if found:
        raise _together(str(folder), found, BundleError)
    tensors = len(manifest.tensors())
    facts = {
        "folder": f"{', '.join(sorted([MANIFEST, *manifest.files]))}: regular files within their caps, nothing else",
        "manifest": f"format version {manifest.format_version}, canonical, every field valid, its own SHA-256 right",
        "signals, levers": f"{len(policy.signals)} and {len(policy.levers)}, as this version knows them",
        "weights": f"SHA-256 right; {tensors} tensors, {policy.parameters:,} finite numbers, every byte accounted for",
        "golden vectors": f"{GOLDEN} decisions replayed, off by at most {TOLERANCE}",
    }
    if ONNX in manifest.files:
        facts[ONNX] = "SHA-256 right; the graph was not run"
    return _told(f"{folder}: the bundle is whole", facts)


def _check_scenario(path: Path) -> str:
    from pydantic import ValidationError

    from trimtab.envs.config import sentences
    from trimtab.envs.scenario import Scenario, load_scenario
    from trimtab.inner_training.population import Population
    from trimtab.inner_training.tasks import resolve_family

    try:
        scenario = load_scenario(path)
    except ConfigError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        every = [ConfigError(f"{path}: {said}") for said in sentences(error.__cause__, Scenario)]
        raise _together(str(path), every, ConfigError) from error
    found: list[UserError] = []
    for share in scenario.families:
        try:
            family = resolve_family(share.name)
            run = Population(family, 1, mode="eager", disturbances=scenario.disturbance_settings)
            for held_out in (False, True):
                run.reset([0], [family.draw(0, held_out=held_out)])
        except UserError as error:
            found.append(error)
    if found:
        raise _together(str(path), found, ConfigError)
    facts = {
        "keys": f"all known and valid; {len(scenario.signals)} signals, {len(scenario.levers)} levers",
        "task families": f"{', '.join(share.name for share in scenario.families)}: a run of each was made, from an "
        "instance for training and a held-out one",
    }
    return _told(f"{path}: the scenario is valid, and its runs can be made", facts)


def _told(first: str, facts: Mapping[str, str]) -> str:
    return "\n".join(map(printable, [first, *(f"  {part:<15}  {what}" for part, what in facts.items())]))


def _together(where: str, found: Sequence[UserError], kind: type[UserError]) -> UserError:
    """One defect as it is; several in one sentence each, without the path that all share."""
    if len(found) == 1:
        return found[0]
    said = [str(error).removeprefix(where).lstrip(":/\\ ") for error in found]
    listed = " ".join(f"({number}) {what}" for number, what in enumerate(said, start=1))
    return kind(f"{where} has {len(found)} defects: {listed}")
