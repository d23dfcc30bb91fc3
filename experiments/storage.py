"""What goes wrong with storage, as a sentence: a full disk, a directory that is none or may not be written."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import tempfile
from collections.abc import Iterator

ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space or write elsewhere"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "get the right to use it or give another path"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG), "give another path"),
    errno.EIO: "look after the disk",
}
"""What to do about an error of the operating system that the user can mend; others are bugs and keep their stack."""


class StorageError(Exception):
    """A file or directory cannot be read or written; the message says which, why, and what to do."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raises an `OSError` of `ADVICE` within the block as `StorageError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        place = f"{os.fspath(error.filename)!r}: " if error.filename is not None else ""
        raise StorageError(f"{place}{error.strerror}; {ADVICE[error.errno]}") from error


def make_writable(directory: pathlib.Path) -> None:
    """Makes a directory if need be. Raises `OSError` unless files can be written into it."""
    directory.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=directory).close()
