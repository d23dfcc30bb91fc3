"""The error of data that cannot be used, and the two checks that raise it."""

from __future__ import annotations

import os


class RecordError(ValueError):
    """A record, index or manifest that cannot be used; the message says what is wrong and what to do."""


def require_record(condition: bool, message: str) -> None:
    """Raises `RecordError` with `message` unless `condition` holds."""
    if not condition:
        raise RecordError(message)


def require_intact(condition: bool, path: str | os.PathLike[str], fault: str) -> None:
    """Raises `RecordError` that names the file and its fault unless `condition` holds."""
    require_record(condition, f"{os.fspath(path)} {fault}; make the source again")
