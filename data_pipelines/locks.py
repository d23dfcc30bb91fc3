"""Files that keep other processes out of a directory."""

from __future__ import annotations

import fcntl
import os
import pathlib
import platform
from typing import TextIO


class InUse(Exception):
    """Another process holds the lock; the message is who."""


def lock_file(path: pathlib.Path) -> TextIO:
    """Locks a file until it is closed, or the process ends, however it does; made where it is not there.

    Where the storage knows no locks, as mounted buckets do not, nothing is kept out.

    Raises:
        InUse: another process has it.
        OSError: the file cannot be opened.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with file:
            file.seek(0)
            raise InUse(file.read().strip() or "another process") from error
    except OSError:
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file
