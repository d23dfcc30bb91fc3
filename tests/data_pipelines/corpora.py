"""Small sources on disk for the tests of this directory."""

from __future__ import annotations

import functools
import io
import json
import pathlib
import random
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from data_pipelines.config import DataConfig, SourceShare
from data_pipelines.records import MANIFEST, Manifest, Record, file_checksum, write_source
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.text.tokenizer import SentencePieceTokenizer, train_sentencepiece
from hypervl_jax.training.batch import Batch, BatchShape

TILING = TilingConfig(tile_size=64, patch_size=8, shuffle=2, max_tiles=4)
SHAPE = BatchShape(rows=4, length=256, tiles=8)
WORDS = ("red", "blue", "seven", "chart", "bar", "left", "page", "digit", "above", "circle")


@functools.cache
def tokenizer() -> SentencePieceTokenizer:
    """A tokenizer of 400 pieces, trained on ten words."""
    words = random.Random(0)
    texts = [" ".join(words.choices(WORDS, k=12)) for _ in range(200)] + ["user\nassistant\nsystem\n0123456789?."]
    with tempfile.TemporaryDirectory() as directory:
        return train_sentencepiece(texts, pathlib.Path(directory) / "tokenizer.model", 330)


def sign_indexes(directory: pathlib.Path) -> None:
    """Puts the checksums of the indexes that lie in a source into its manifest, for tests that write others."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for shard in manifest["shards"]:
        index = shard["file"].removesuffix(".array_record") + ".index.arrow"
        shard["index_checksum"] = file_checksum(directory / index)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def png(height: int, width: int, seed: int) -> bytes:
    """A picture of random blocks of 8 pixels."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    pixels = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def sample(number: int, sizes: Sequence[tuple[int, int]], words: int, source: str = "s") -> Record:
    """Record `number`: pictures of the given (height, width), a question that names the number, and a long or short answer."""
    images = tuple(png(height, width, 1000 * number + i) for i, (height, width) in enumerate(sizes))
    answer = " ".join(random.Random(number).choices(WORDS, k=words))
    turns = (Turn("user", f"{IMAGE_SLOT * len(images)}{number}?"), Turn("assistant", f"{answer}."))
    return Record(images=images, turns=turns, source=source, task="test")


def mixed_records(count: int, source: str, seed: int = 0, images: int = 1) -> list[Record]:
    """Records of varied sizes: 0 to `images` pictures of a fraction of a tile to four tiles, 1 to 30 words."""
    rng = random.Random(seed)

    def sizes() -> list[tuple[int, int]]:
        return [(rng.randint(8, 150), rng.randint(8, 150)) for _ in range(rng.randint(0, images))]

    return [sample(seed + number, sizes(), rng.randint(1, 30), source) for number in range(count)]


def write(
    root: pathlib.Path, name: str, records: Iterable[Record], split: str = "train", per_shard: int = 16
) -> Manifest:
    """Writes a source where a `DataConfig` looks for it."""
    return write_source(
        root / split / name,
        records,
        name=name,
        licence="CC0-1.0",
        description="test",
        tokenizer=tokenizer(),
        records_per_shard=per_shard,
    )


def config(root: pathlib.Path, shares: dict[str, float], **changes: object) -> DataConfig:
    """A configuration that reads the named sources."""
    mixture = tuple(SourceShare(name, share) for name, share in shares.items())
    return DataConfig(**{"root": str(root), "mixture": mixture, "seed": 7, "window": 8, **changes})


def assert_batches_equal(actual: Batch, expected: Batch) -> None:
    """Bit for bit, with types and shapes."""
    for name, left, right in zip(Batch._fields, actual, expected, strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape), name
        np.testing.assert_array_equal(left, right, err_msg=name)
