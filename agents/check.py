"""`trimtab check`: is a bundle whole, is a scenario's file valid?"""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import ConfigError


def run_check(path: Path) -> str:
    """Verifies a bundle or a scenario's file.

    Args:
        path: a bundle's folder, its `policy.json`, or a `.yaml` / `.yml` file with a scenario.

    Returns:
        One line that says what was verified.

    Raises:
        ConfigError: when there is nothing at `path`, it is neither kind, or the scenario does not validate.
        UserError: when a task family of the scenario cannot be made, its runs cannot be stacked, or its instances do
            not fit.
        BundleError: when the bundle is damaged.
    """
    kinds = "give a bundle's folder, its policy.json, or a scenario's YAML file"
    if not path.exists():
        raise ConfigError(f"no file or folder {str(path)!r}; {kinds}")
    if path.is_dir() or path.name == "policy.json":
        from trimtab.policies.bundle import load_bundle

        load_bundle(path if path.is_dir() else path.parent)
        return f"{path}: the bundle is whole; its hashes and golden vectors agree"
    if path.suffix in (".yaml", ".yml"):
        from trimtab.envs.scenario import load_scenario
        from trimtab.inner_training.population import Population
        from trimtab.inner_training.tasks import resolve_family

        scenario = load_scenario(path)
        for share in scenario.families:
            family = resolve_family(share.name)
            run = Population(family, 1, mode="eager", disturbances=scenario.disturbance_settings)
            for held_out in (False, True):
                run.reset([0], [family.draw(0, held_out=held_out)])
        return f"{path}: the scenario is valid, and its runs can be made"
    raise ConfigError(f"{str(path)!r} is neither a bundle nor a scenario; {kinds}")
