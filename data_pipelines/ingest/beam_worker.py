"""`python -m data_pipelines.ingest.beam_worker PARENT`: Beam's worker process, which ends when the process PARENT does.

The ingest command starts it with the environment that Beam's local runner makes for its workers; it is not for people.
"""

from __future__ import annotations

import contextlib
import os
import sys

from data_pipelines.child_processes import end_with


def main(arguments: list[str]) -> None:
    """Works until Beam says that there is no more to do."""
    end_with(int(arguments[1]))
    # Beam sends log and errors to the command, which knows what to say of them, and writes them to standard error as well.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        from apache_beam.runners.worker import sdk_worker_main

        sdk_worker_main.main(arguments)


if __name__ == "__main__":
    main(sys.argv)
