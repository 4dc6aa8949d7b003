"""A bundle's folder on disk: read with caps and without following links, written all or nothing."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from trimtab.errors import BundleError, OutputExistsError
from trimtab.policies.defects import Refuse, at_once
from trimtab.policies.manifest import MANIFEST, MOST_PARAMETERS, ONNX, WEIGHTS
from trimtab.policies.strict_json import short
from trimtab.policies.tensors import MOST_HEADER

# Bytes; nothing else belongs to a bundle. So small that a file which is refused only by its last byte is so quickly.
CAPS = {MANIFEST: 256 << 10, WEIGHTS: 4 * MOST_PARAMETERS + MOST_HEADER, ONNX: 4 * MOST_PARAMETERS + (1 << 20)}
MOST_NAMED = 8  # foreign files in an error


def check_entries(folder: Path, refuse: Refuse = at_once) -> None:
    """Refuses a folder with anything in it that is no file of a bundle."""
    foreign: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name not in CAPS:
                    foreign.append(entry.name)
                if len(foreign) == MOST_NAMED:
                    break
    except (OSError, ValueError):
        return  # there is no such folder, or not to be read: the manifest is missing, and said to be
    for name in sorted(foreign):
        refuse(BundleError(f"{folder}: it holds {short(name)}, which is no file of a bundle; remove it"))


def read_file(folder: Path, name: str) -> bytes:
    """Content of a regular file of a bundle.

    Raises:
        BundleError: when there is no such file, it is a link or no regular file (a pipe would block, and a link may
            point anywhere), is larger than its cap, or cannot be read.
    """
    path, cap = folder / name, CAPS[name]
    try:
        kind = stat.S_IFMT(path.lstat().st_mode)
        content = _read(path, cap + 1) if kind == stat.S_IFREG else b""
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise BundleError(f"no file {str(path)!r}; a bundle is a folder with {MANIFEST} and {WEIGHTS}") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
    if kind == stat.S_IFLNK:
        raise BundleError(f"{path}: a symbolic link; the files of a bundle are regular files, copy it instead")
    if kind != stat.S_IFREG:
        raise BundleError(f"no file {str(path)!r}: what is there is not a regular file")
    if len(content) > cap:
        raise BundleError(f"{path}: larger than the {cap} bytes that are allowed")
    return content


def _read(path: Path, size: int) -> bytes:
    """At most so many bytes; should it have become a link or a pipe in this very moment, it is not followed, nor waited
    for (Windows knows neither flag)."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        return file.read(size)


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
