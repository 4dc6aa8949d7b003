"""Files that are whole or absent, and the versions that results depend on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("trimtab", "torch", "gymnasium", "stable-baselines3", "numpy")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a whole file or none of it, through a temporary one beside it that then takes its place.

    Args:
        path: the file; missing folders above it are made.
        content: text is written as UTF-8, half characters of it (lone surrogates) as backslash escapes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def versions(*more: str) -> dict[str, str]:
    """Version of Python, and of each package that decides what a training or a benchmark gives; and of ``more``."""
    return {"python": platform.python_version(), **{package: version(package) for package in (*PACKAGES, *more)}}
