"""What child processes have in common."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

_SECONDS = 0.5
"""Between two looks at a parent that `multiprocessing` does not know."""


def end_with_parent() -> None:
    """Lets this child of `multiprocessing` end when its parent does: one that SIGKILL ended has cleaned nothing up."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def end_with(process: int) -> None:
    """Lets this child of any kind end when its parent does, which is the process of that id."""
    threading.Thread(target=_watch_parent, args=(process,), daemon=True).start()


def _watch_parent(process: int) -> None:
    while os.getppid() == process:
        time.sleep(_SECONDS)
    os._exit(1)


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
