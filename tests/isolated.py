"""Tests that need a process of their own."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable

CHILD = "HYPERVL_TEST_CHILD"
LONGEST = 300.0
"""Seconds a child may take."""


def in_own_process(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test in a new process: JAX's profiler crashes one in which the TPU compiler was loaded by another test."""
    if os.environ.get(CHILD):
        return test

    @functools.wraps(test)
    def run() -> None:
        name = f"{inspect.getfile(test)}::{test.__name__}"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", name]
        child = subprocess.run(
            command, env={**os.environ, CHILD: "1"}, capture_output=True, text=True, timeout=LONGEST, check=False
        )
        assert child.returncode == 0, child.stdout + child.stderr

    del run.__wrapped__
    return run
