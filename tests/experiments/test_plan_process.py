"""What is said of a process that the TPU compiler has ended."""

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
