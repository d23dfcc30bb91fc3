"""Our checkpoints as a model of lmms-eval, so that its task list runs against them. Imported by lmms-eval only, which is no dependency.

    pip install lmms-eval
    python -m lmms_eval --model hypervl --model_args checkpoint=runs/stage3,encoder=base,alpha=1.0 --tasks ai2d,ocrbench --batch_size 32

`setup.py` registers it under lmms-eval's entry-point group `lmms_eval.models`. It runs on one process; lmms-eval keeps the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from hypervl_jax.inference.assistant import AUTO, Options, Request, load_assistant
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.training.checkpoint import checkpoint_home

MANIFEST = ModelManifest("hypervl", simple_class_path=f"{__name__}.HyperVLModel")

DEFAULT_NEW_TOKENS = 256


class HyperVLModel(lmms):
    """Greedy answers of one checkpoint through one encoder.

    Args:
        checkpoint: a run's workdir or its checkpoints directory.
        encoder: the branch that sees the pictures.
        alpha: share of each picture's area to keep, or "auto" with a compressor.
        compressor: directory of a VRC; none when empty.
        batch_size: questions answered together.
    """

    def __init__(
        self,
        checkpoint: str,
        encoder: str = "base",
        alpha: float | str = 1.0,
        compressor: str = "",
        batch_size: int | str = 32,
        **ignored: Any,
    ) -> None:
        super().__init__()
        self._assistant = load_assistant(checkpoint_home(checkpoint), compressor=compressor or None)
        self._rows = int(batch_size)
        self._encoder, self._alpha = encoder, AUTO if alpha == AUTO else float(alpha)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests; those with the same longest answer go in batches together."""
        prepared = [self._prepare(request) for request in requests]
        answers: list[str] = [""] * len(prepared)
        for limit in dict.fromkeys(limit for _, limit, _ in prepared):
            places = [place for place, (_, wanted, _) in enumerate(prepared) if wanted == limit]
            options = Options(encoder=self._encoder, alpha=self._alpha, max_new_tokens=limit)
            found = self._assistant.answer([prepared[place][0] for place in places], options, rows=self._rows)
            for place, answer in zip(places, found, strict=True):
                answers[place] = cut(answer.text, prepared[place][2])
        return answers

    def _prepare(self, request: Instance) -> tuple[Request, int, list[str]]:
        """The question, the longest answer in tokens, and the texts that end it."""
        context, settings, visuals, number, task, split = request.args
        shown = visuals(self.task_dict[task][split][number]) or []
        until = settings.get("until") or []
        return (
            to_request(context, [to_rgb(picture) for picture in shown]),
            int(settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
            [until] if isinstance(until, str) else list(until),
        )

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not there: tasks that rank given answers by their likelihood are refused."""
        raise NotImplementedError("hypervl answers by generation; choose tasks with output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not there: tasks that ask again after an answer are refused."""
        raise NotImplementedError(
            "hypervl answers one question at a time; choose tasks with output_type generate_until"
        )


def to_request(context: str, pictures: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Request:
    """A question with its pictures: in its own slots where it has one for each, else before it."""
    slotted = context.count(IMAGE_SLOT) == len(pictures)
    text = context if slotted else IMAGE_SLOT * len(pictures) + context.replace(IMAGE_SLOT, "")
    return Request((Turn("user", text),), tuple(pictures))


def to_rgb(picture: Any) -> UInt8[np.ndarray, "h w 3"]:
    """A Pillow image as an array. Raises `TypeError` for anything else, such as a video."""
    if not hasattr(picture, "convert"):
        raise TypeError(f"hypervl sees pictures, and this task shows {type(picture).__name__}; choose an image task")
    return np.asarray(picture.convert("RGB"))


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the endings."""
    ends = [place for ending in until if ending and (place := text.find(ending)) >= 0]
    return text[: min(ends, default=len(text))]
