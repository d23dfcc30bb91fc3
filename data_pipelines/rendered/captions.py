"""Caption records for stage 1: pictures of all four tasks with one or two sentences that state what is easy to see."""

from __future__ import annotations

from data_pipelines.records import Record
from data_pipelines.rendered import digits
from data_pipelines.rendered.pictures import FRAMINGS, item_random
from data_pipelines.rendered.questions import TASKS
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn

LICENCE = f"Apache-2.0; handwritten digits {digits.LICENCE}"

_TURNS = ("digits", "scenes", "digits", "charts", "digits", "documents")
"""Half digits: what a cell of the picture shows is learned from them first."""

_PLAIN_SHARE = 0.9
"""Captions whose picture is one full tile with little on it; the others are as in the questions."""

_PROMPTS = ("Describe it.", "What do you see?", "Write a caption.")


def caption_record(split: str, index: int, sizes: str = "demo") -> Record:
    """The caption record with a number; the generators take turns as `_TURNS` says. `sizes` is a key of `pictures.FRAMINGS`."""
    rng = item_random(split, "captions", index)
    kind = _TURNS[index % len(_TURNS)]
    plain = rng.random() < _PLAIN_SHARE
    picture = TASKS[kind].draw(rng, split, plain, FRAMINGS[sizes][kind])
    turns = (Turn("user", f"{IMAGE_SLOT}{rng.choice(_PROMPTS)}"), Turn("assistant", picture.caption))
    metadata = {"kind": kind, "level": 1, "answer": picture.caption, "scale": picture.scale}
    return Record((picture.image,), turns, "captions", task="captions", metadata=metadata)
