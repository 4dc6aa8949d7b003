"""The card's tables of families that the default policy has never met, from what `trimtab bench` has written.

    python experiments/beyond.py RESULTS.json [--out docs/results/beyond.json]

The command that makes RESULTS.json stands in docs/default_policy.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RULES = ("greedy", "plateau", "constant", "cosine")
SCORES = ("online_score", "phase_score", "last_score")


def minus(row: Mapping[str, Any]) -> str:
    """The default policy minus another."""
    estimate, low, high = row["difference"]
    return f"{-estimate:+.2f} [{-high:+.2f}, {-low:+.2f}]"


def stationary(name: str, rows: Mapping[str, Any]) -> str:
    """A line of the first table."""
    best = min(RULES, key=lambda one: rows[one]["final"][0])
    finals = " | ".join(f"{rows[one]['final'][0]:.2f}" for one in ("default", *RULES))
    return f"| `{name}` | {finals} | {minus(rows[best])} (`{best}`) |"


def changing(name: str, rows: Mapping[str, Any]) -> str:
    """A line of the second table."""
    scores = [" / ".join(f"{rows[one]['measures'][score]:.2f}" for score in SCORES) for one in ("default", *RULES)]
    forgotten = rows["default"]["measures"]["forgetting"]
    return f"| `{name}` | {' | '.join(scores)} | {forgotten:+.2f} | {minus(rows['constant'])} |"


def main() -> None:
    """Prints both tables, and keeps the figures that they are made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    content = json.loads(settings.results.read_text())
    rows = {
        name: {label: one["summary"] for label, one in result["policies"].items()}
        for name, result in content["scenarios"].items()
    }
    if settings.out:
        kept = {key: content[key] for key in ("command", "runs", "seed") if key in content}
        settings.out.write_text(json.dumps(kept | {"scenarios": rows}) + "\n")
    changes = [name for name in rows if "phase_score" in rows[name]["default"]["measures"]]
    print(*(stationary(name, rows[name]) for name in rows if name not in changes), sep="\n")
    print(*(changing(name, rows[name]) for name in changes), sep="\n")
    print("diverged:", sum(one["default"]["diverged"] for one in rows.values()), "of", len(rows), "families")


if __name__ == "__main__":
    main()
