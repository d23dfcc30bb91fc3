"""A vision-language model of `transformers`, given by path, as the reference model of the VRC's labels. Needs torch and transformers."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import UInt8

from data_pipelines.records import RecordError, content_hash, read_manifest
from data_pipelines.sources import DamagedShard, Source
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.training.compression import RATIOS, ResolutionLabel
from hypervl_jax.vision.anyres import PADDING_BYTE, resize
from hypervl_jax.vision.decoding import UndecodableImage, decode_image
from tools.label_files import LabelError
from tools.label_models import paraphrases

Rgb = UInt8[np.ndarray, "h w 3"]

_HASHED_BYTES = 1 << 24
"""Of each weights file, from its start: enough to tell models apart without reading gigabytes."""


class TransformersReference:
    """Asks a model of `transformers` for the loss of each record's last answer; everything before it is the prompt.

    The image is scaled by α (each side by √α, rounded down) before the model's own processor sees it; `tokens` are the image
    placeholders that the processor writes. One image at a time, on the device that torch prefers.

    Args:
        directory: holds config, safetensors weights and processor with its chat template; no code in it is run.

    Raises:
        LabelError: it cannot be loaded.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._processor = transformers.AutoProcessor.from_pretrained(directory, **options)
            model = transformers.AutoModelForImageTextToText.from_pretrained(directory, use_safetensors=True, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise LabelError(
                f"{directory} holds no vision-language model that transformers can load ({error})"
            ) from error
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().to(self._device)
        self._image_token = getattr(model.config, "image_token_id", None)
        self.identity = {"reference": model.config.model_type, "weights": _digest(pathlib.Path(directory))}

    def open(self, directory: pathlib.Path) -> Source:
        """A source, whatever tokenizer it was counted with."""
        return Source(directory, read_manifest(directory).fingerprint)

    def label(self, source: Source, records: Sequence[int]) -> list[ResolutionLabel]:
        """Labels of the records that can be read, in their order."""
        return [found for record in records if (found := self._label(source, record)) is not None]

    def _label(self, source: Source, record: int) -> ResolutionLabel | None:
        try:
            content = source.record(record)
            rgb = decode_image(content.images[0])
        except DamagedShard:
            raise
        except (RecordError, UndecodableImage):
            return None
        *asked, answer = content.turns
        curve = [self._loss(_scaled(rgb, alpha), asked, answer.text) for alpha in RATIOS]
        return ResolutionLabel(
            content_hash=content_hash(content),
            source=source.name,
            task=content.task,
            height=rgb.shape[0],
            width=rgb.shape[1],
            losses=tuple(loss for loss, _ in curve),
            blind_loss=self._loss(np.full_like(rgb, PADDING_BYTE), asked, answer.text)[0],
            tokens=tuple(tokens for _, tokens in curve),
            paraphrase_losses=tuple(self._loss(rgb, asked, text)[0] for text in paraphrases(content)),
        )

    @torch.no_grad()
    def _loss(self, rgb: Rgb, asked: Sequence[Turn], answer: str) -> tuple[float, int]:
        """Mean cross-entropy of the answer's tokens, nats, and the image's placeholders in the prompt."""
        prompt = self._processor.apply_chat_template(list(map(_message, asked)), add_generation_prompt=True)
        inputs = self._encode(rgb, prompt + answer)
        ids, before = inputs["input_ids"][0], self._encode(rgb, prompt)["input_ids"][0]
        # A tokenizer may merge the prompt's last characters with the answer's first: the answer begins where the two part.
        shared = int((ids[: len(before)] == before[: len(ids)]).long().cumprod(0).sum())
        scores = self._model(**inputs).logits[0, shared - 1 : -1].float().log_softmax(-1)
        loss = -scores.gather(1, ids[shared:, None]).mean()
        return max(0.0, float(loss)), int((ids == self._image_token).sum()) if self._image_token is not None else 0

    def _encode(self, rgb: Rgb, text: str) -> Mapping[str, Any]:
        return self._processor(images=[rgb], text=[text], return_tensors="pt").to(self._device)


def _scaled(rgb: Rgb, alpha: float) -> Rgb:
    return resize(rgb, *(max(1, int(side * alpha**0.5)) for side in rgb.shape[:2]))


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as chat templates of vision-language models take it."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(turn.text.split(IMAGE_SLOT)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return {"role": turn.role, "content": parts}


def _digest(directory: pathlib.Path) -> str:
    """Names the weights by the sizes and beginnings of their files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(_HASHED_BYTES))
    return digest.hexdigest()
