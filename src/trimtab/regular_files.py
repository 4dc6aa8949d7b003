"""Reading a file that somebody else may have put there: only a regular one, and only up to a size."""

from __future__ import annotations

import errno
import os
import stat


def read_regular(path: str | os.PathLike[str], cap: int) -> bytes:
    """Content of a regular file, or of the one that a link leads to.

    Args:
        path: of the file.
        cap: bytes that it may have.

    Raises:
        OSError: it cannot be read, is no regular file (a pipe would never end, nor would some devices), or is larger
            than the cap; ``strerror`` says which.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        _check(os.stat(path), cap)
        handle = os.open(path, flags)
    except ValueError as error:  # such as a path with a null character
        raise OSError(errno.EINVAL, str(error)) from error
    try:
        _check(os.fstat(handle), cap)  # it may have become another in this very moment
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = file.read(cap + 1)
    finally:
        os.close(handle)
    if len(content) > cap:
        raise _too_large(cap)
    return content


def _check(found: os.stat_result, cap: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    if found.st_size > cap:
        raise _too_large(cap)


def _too_large(cap: int) -> OSError:
    return OSError(errno.EFBIG, f"it is larger than the {cap:,} bytes that are allowed")
