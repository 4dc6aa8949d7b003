"""A bundle's folder on disk: read with caps, written all or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from trimtab.errors import BundleError, OutputExistsError
from trimtab.policies.manifest import MANIFEST, ONNX, WEIGHTS

CAPS = {MANIFEST: 4 << 20, WEIGHTS: 64 << 20, ONNX: 64 << 20}  # bytes; nothing else belongs to a bundle


def read_file(folder: Path, name: str) -> bytes:
    """Content of a regular file of a bundle, or ``BundleError``."""
    path, cap = folder / name, CAPS[name]
    if not path.is_file():
        raise BundleError(f"no file {str(path)!r}; a bundle is a folder with {MANIFEST} and {WEIGHTS}")
    with path.open("rb") as file:
        content = file.read(cap + 1)
    if len(content) > cap:
        raise BundleError(f"{path}: larger than the {cap} bytes that are allowed")
    return content


def check_target(target: Path, overwrite: bool) -> None:
    """Refuses a path that holds anything but, with ``overwrite``, a bundle."""
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputExistsError(f"{str(target)!r} is a file; give a new folder")
    held = sorted(entry.name for entry in target.iterdir())
    foreign = [name for name in held if name not in CAPS]
    if foreign or (held and MANIFEST not in held):
        other = (foreign or held)[0]
        raise OutputExistsError(f"{str(target)!r} holds {other!r} and is not a bundle; give a new folder")
    if held and not overwrite:
        raise OutputExistsError(f"{str(target)!r} holds a bundle already; give a new folder")


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Writes all files of a bundle, or none: into a temporary folder beside the target, which is then renamed."""
    for name, content in files.items():
        if len(content) > CAPS[name]:
            raise BundleError(f"{name} would have {len(content)} bytes; at most {CAPS[name]} are allowed")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made.chmod(0o755)
        for name, content in files.items():
            _write(made / name, content)
        _sync_folder(made)
        _replace(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(made: Path, target: Path) -> None:
    """Renames the new folder to the target, and only then removes what was there."""
    old = made.with_name(made.name + ".old")
    existed = target.exists()
    if existed:
        target.rename(old)
    try:
        made.rename(target)
    except OSError:
        if existed:
            old.rename(target)
        raise
    _sync_folder(target.parent)
    if existed:
        shutil.rmtree(old)
