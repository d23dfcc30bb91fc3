"""What can go wrong in an ingest: a sample that is left out and counted, or an error that ends the run."""

from __future__ import annotations

from data_pipelines.errors import RecordError
from hypervl_jax.text.tokenizer import TokenizerError


class IngestError(ValueError):
    """The ingest cannot go on; the message says why and what to do."""


EXPECTED = (IngestError, RecordError, TokenizerError)
"""Errors of an ingest whose message is for people: the command prints it and nothing else."""


class Skip(ValueError):
    """A sample that is left out. `reason` is a short slug that the manifest counts by; `detail` is for people.

    `failure` says that the source is damaged or is not what it was taken for, rather than that a filter did not want the
    sample: failures count against the source's failure limit.
    """

    def __init__(self, reason: str, detail: str = "", failure: bool = False) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.failure = failure


FILE_DAMAGED = "file_damaged"
"""Reason of the one skip that stands for all that a damaged file has lost: nobody knows how many samples that is."""


def unreadable(reason: str, detail: str = "") -> Skip:
    """A skip that counts against the source's failure limit."""
    return Skip(reason, detail, failure=True)
