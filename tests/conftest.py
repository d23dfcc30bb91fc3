"""Test settings: CPU only, eight virtual devices for sharding tests, and compiled programs shared between tests."""

import os
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Several tests build the same program; each is compiled once per session and shared with the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="hypervl-test-cache-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

LONGEST = ("test_multihost.py", "test_resume.py", "test_plan_topology.py", "test_processes.py", "test_sweep.py")
"""Files that take minutes, a few tests each. They go first: at the end one worker would wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; `--no-loadscope-reorder` keeps it so with several workers."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
