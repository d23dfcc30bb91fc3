"""Scorers of records: models or rules that anyone can plug in by `module:attribute`, and one rule that comes with us."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from data_pipelines.ingest.config import ScorerConfig
from data_pipelines.ingest.errors import IngestError
from data_pipelines.records import Record

BATCH = 32
"""Records that a scorer gets at a time, at most."""


class Scorer(Protocol):
    """Scores records: image-text similarity, safety, personal data. Made once in each worker by a factory without arguments."""

    def __call__(
        self, records: Sequence[Record], pictures: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]]
    ) -> Sequence[float]:
        """One finite number a record. `pictures` are those of each record, decoded to RGB.

        The same record must have the same score whatever else is in the batch, or restarts will not end in the same bytes.
        """


def load_scorer(config: ScorerConfig) -> Scorer:
    """The scorer that a configuration names.

    Raises:
        IngestError: it cannot be imported or made, or what is made cannot be called.
    """
    module, _, attribute = config.factory.partition(":")
    try:
        scorer = getattr(importlib.import_module(module), attribute)()
        if not callable(scorer):
            raise TypeError(f"it returns a {type(scorer).__name__}, not a function of records and pictures")
    except Exception as error:  # the factory is somebody else's
        raise IngestError(
            f"scorer {config.name!r} cannot be made from {config.factory!r} ({_one_line(error)}); "
            f"name a function without arguments as module:attribute"
        ) from error
    return scorer


def score(
    name: str, scorer: Scorer, records: Sequence[Record], pictures: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]]
) -> list[float]:
    """The scores of a batch, one finite number a record.

    Raises:
        IngestError: the scorer fails, or gives anything else.
    """
    try:
        scores = [float(value) for value in scorer(records, pictures)]
    except Exception as error:  # the scorer is somebody else's
        raise IngestError(f"scorer {name!r} fails on {_keys(records)} ({_one_line(error)})") from error
    if len(scores) != len(records) or not all(map(math.isfinite, scores)):
        raise IngestError(
            f"scorer {name!r} gives {scores[:3]}… ({len(scores)} numbers) for {len(records)} records, {_keys(records)}; "
            f"it must give one finite number a record"
        )
    return scores


def _one_line(error: Exception) -> str:
    """The error as one short line: it travels between workers as text."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _keys(records: Sequence[Record]) -> str:
    return f"the batch from {records[0].metadata.get('key', '?')}"


_PERSONAL = re.compile(
    r"""(?P<mail>[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+)
    |(?P<card>(?<!\d)(?:\d[ -]?){15}\d(?!\d))
    |(?P<phone>(?<![\w.])\+?\d{1,3}[ .-]?\(?\d{2,4}\)?(?:[ .-]\d{2,4}){2,4}(?![\w.]))""",
    re.VERBOSE,
)


def personal_data() -> Scorer:
    """Counts e-mail addresses, telephone numbers and payment card numbers (Luhn's check) in the turns of a record.

    A rule for a first pass: it knows no names and no postal addresses, and reads no pictures.
    """
    return lambda records, pictures: [float(sum(map(_count_personal, _texts(record)))) for record in records]


def _texts(record: Record) -> list[str]:
    return [turn.text for turn in record.turns]


def _count_personal(text: str) -> int:
    return sum(match.lastgroup != "card" or _luhn(match["card"]) for match in _PERSONAL.finditer(text))


def _luhn(number: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1)."""
    digits = [int(digit) for digit in number if digit.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) if place % 2 else digit for place, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0
