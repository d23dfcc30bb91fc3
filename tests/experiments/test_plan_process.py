"""What is said of a process that the TPU compiler has ended."""

import os
import pathlib
import subprocess
import sys
import time

from experiments.plan_process import last_words

ABORTED = """\
W0000 00:00:1795380689.446613   13198 something.cc:12] a warning
F1122 18:47:43.590250   27983 fusion_util.cc:5409] Check failed: window.pad_low[old_dim] == 0 && window.pad_high[old_dim] == 0
*** Check failure stack trace: ***
    @     0x7fe82a5fd5e4  absl::log_internal::LogMessage::SendToLog()
F1122 18:47:43.590250   27983 fusion_util.cc:5409] said again
"""


def test_last_words_are_the_first_fatal_line() -> None:
    said = "fusion_util.cc:5409] Check failed: window.pad_low[old_dim] == 0 && window.pad_high[old_dim] == 0"
    assert last_words(ABORTED) == said
    assert last_words("ERROR: Unknown command line flag 'x'.\n") == "Unknown command line flag 'x'."


def test_a_process_that_was_killed_says_nothing() -> None:
    assert last_words("a warning\n").startswith("no reason given")


def wait(number: pathlib.Path) -> None:
    """Says which process it is, and takes long."""
    number.with_suffix(".new").write_text(str(os.getpid()))
    number.with_suffix(".new").rename(number)
    time.sleep(600)


def test_the_process_ends_with_the_one_that_was_killed(tmp_path: pathlib.Path) -> None:
    program = f"""
import pathlib
from experiments.plan_process import apart
from tests.experiments.test_plan_process import wait
apart(wait, pathlib.Path({str(tmp_path / "number")!r}))
"""
    parent = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    until(lambda: (tmp_path / "number").exists())
    child = pathlib.Path("/proc") / (tmp_path / "number").read_text()
    assert child.exists()
    parent.kill()
    parent.wait()
    until(lambda: not child.exists() or " Z " in (child / "stat").read_text())


def until(holds, seconds: float = 120.0) -> None:
    """Waits for it, at most so long."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)
