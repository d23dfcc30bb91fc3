"""Places in a picture as text: `<what it is> [x1, y1, x2, y2]`, the one form that all sources with boxes are brought into.

The four numbers are left, top, right and bottom in thousandths of the picture's width and height, whole numbers from 0 to 999. That
is our choice, as no publication on HyperVL names a form. Relative numbers hold for every α and for tiles, which scale and cut a
picture but move nothing in it; a thousandth is less than a patch of 16 pixels up to a side of 16,000; and three digits are short.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from data_pipelines.ingest.errors import unreadable

STEPS = 1000
"""A picture's side has so many places."""

_TOLERANCE = 0.02
"""Detectors and recognisers let boxes stand out of the picture by this much; more is another unit than fractions."""

_MARKED = re.compile(r"<(ocr|object)>(.*?)</\1>\s*<bbox>(.*?)</bbox>", re.DOTALL)
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE]-?[0-9]+)?")
_LEFT_OVER = re.compile(r"</?(?:ocr|object|bbox)>")


def box_text(box: Any) -> str:
    """`[x1, y1, x2, y2]` of a box of four fractions: left, top, right, bottom.

    Raises:
        Skip: a failure: not four numbers, or not fractions of the picture's sides, or corners in another order.
    """
    if not isinstance(box, Sequence) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise unreadable("box_malformed", f"{str(box)[:80]} where four numbers are expected")
    if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in box):
        raise unreadable("box_not_fractions", f"{list(box)} are not fractions of the picture's sides")
    left, top, right, bottom = box
    if left > right or top > bottom:
        raise unreadable("box_malformed", f"{list(box)} is not left, top, right, bottom")
    return f"[{', '.join(str(place(value)) for value in box)}]"


def place(fraction: float) -> int:
    """The thousandth in which a fraction of a side lies, 0 to 999."""
    return min(STEPS - 1, max(0, math.floor(fraction * STEPS)))


def plain_caption(text: str) -> str:
    """A BLIP-3 caption with its marks, `<ocr>WORDS</ocr><bbox>[x1, y1][x2, y2]</bbox>` or `<object>`, in our form.

    Raises:
        Skip: a failure: a mark that is cut, or a box that `box_text` refuses.
    """
    plain = _MARKED.sub(lambda mark: f"{mark[2].strip()} {box_text(_numbers(mark[3]))}", text)
    if _LEFT_OVER.search(plain):
        raise unreadable("box_malformed", f"a mark without its end in {text[:80]!r}")
    return plain


def marked_caption(value: Any) -> str:
    """The caption with places among the versions that BLIP-3's sets keep of it, in our form.

    Args:
        value: the versions as JSON text or parsed: objects with `text` and, where the alt text of the web page is part of it,
            `include_datacomp_raw_cap`; or lists that begin with the text. One without alt text goes first.

    Raises:
        Skip: a failure: another form, or no version with places.
    """
    versions = _versions(value)
    with_places = [(alt, text) for alt, text in versions if "<bbox>" in text]
    if not with_places:
        raise unreadable("no_places", f"{len(versions)} versions of a caption, none with <bbox>")
    return plain_caption(min(with_places, key=lambda version: version[0])[1])


def _versions(value: Any) -> list[tuple[bool, str]]:
    """(whether it has the alt text, text) of each version."""
    try:
        items = json.loads(value) if isinstance(value, (str, bytes)) else value
    except (ValueError, RecursionError) as error:
        raise unreadable("no_places", f"versions of a caption that are not JSON: {error}") from error
    if not isinstance(items, list):
        raise unreadable("no_places", f"a {type(items).__name__} where versions of a caption are expected")
    return [version for item in items if (version := _version(item))]


def _version(item: Any) -> tuple[bool, str] | None:
    if isinstance(item, dict) and isinstance(item.get("text"), str):
        return bool(item.get("include_datacomp_raw_cap")), item["text"]
    if isinstance(item, list) and item and isinstance(item[0], str):
        return False, item[0]
    return None


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(text)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
