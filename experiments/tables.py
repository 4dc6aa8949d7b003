"""Prints the tables of `trimtab bench` as Markdown: python experiments/tables.py RESULTS.json ..."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HEAD = "| policy | final loss (IQM) | minus reference | better | p | best | average | diverged | steps to target |"


def interval(values: list[float], sign: str = "") -> str:
    """An estimate with its interval."""
    middle, low, high = values
    return f"{middle:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def row(entry: dict[str, Any], reference: str) -> str:
    """One line of a table."""
    label = entry["label"]
    against = "reference | | |"
    if label != reference:
        p = "<0.001" if entry["p_value"] < 0.001 else f"{entry['p_value']:.3f}"
        against = f"{interval(entry['difference'], '+')} | {entry['better'][0]:.2f} | {p} |"
    steps = entry["steps_to_target"]
    target = "never" if steps is None or steps == float("inf") else f"{steps:.0f}"
    lost = f"{entry['diverged']} (+{entry['lost_early']})"
    name = f"**{label}**" if entry["learned"] else label
    return (
        f"| {name} | {interval(entry['final'])} | {against} {entry['best']:.2f} | {entry['trajectory']:.2f} | {lost} | "
        f"{target} ({entry['reached']:.0%}) |"
    )


def main() -> None:
    """One table per file."""
    parser = argparse.ArgumentParser(description="Prints the tables of `trimtab bench` as Markdown.")
    parser.add_argument("results", nargs="+", metavar="RESULTS.json", help="what `trimtab bench` has written")
    for name in parser.parse_args().results:
        content = json.loads(Path(name).read_text())
        for scenario, result in content["scenarios"].items():
            rows = sorted((entry["summary"] for entry in result["policies"].values()), key=lambda one: one["final"][0])
            print(f"### {scenario}, {content['runs']} held-out instances, seed {content['seed']}\n")
            print(HEAD, "|---|---|---|---|---|---|---|---|---|", sep="\n")
            print(*(row(entry, result["reference"]) for entry in rows), "", sep="\n")


if __name__ == "__main__":
    main()
