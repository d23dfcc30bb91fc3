"""Raw sources for the tests, written by the libraries that people write them with."""

from __future__ import annotations

import io
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from data_pipelines.ingest.scorers import Scorer

TEXTS = (
    "The committee meets on the first Monday of every month in the town hall.",
    "A small boat drifts past the old lighthouse while gulls circle above it.",
    "Please find attached the invoice for the repairs to the northern roof.",
    "Rainfall in the valley was far below the average of the last ten years.",
)


def picture(seed: int, side: int = 64, form: str = "PNG", blocks: int = 8, **options: object) -> bytes:
    """A picture of smooth random blotches: unlike any other seed's, also to a perceptual hash."""
    grid = np.random.default_rng(seed).integers(0, 256, (blocks, blocks, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC).save(buffer, form, **options)
    return buffer.getvalue()


def caption(seed: int) -> str:
    """A sentence that differs from seed to seed."""
    return f"{TEXTS[seed % len(TEXTS)][:-1]}, says note {seed}."


def webdataset_samples(count: int) -> Iterator[dict[str, object]]:
    """`count` captioned pictures, of which every twelfth is damaged, every tenth of the others repeats the one before it, and
    every sixteenth of the rest shows the one before it as a JPEG."""
    for number in range(count):
        damaged, repeated, near = number % 12 == 11, number % 10 == 9, number % 16 == 15
        seed = number - 1 if repeated or near else number
        kind = "jpg" if near and not repeated else "png"
        data = picture(seed, form="JPEG", quality=80) if kind == "jpg" else picture(seed)
        url = {"url": f"http://a.example/{number}"}
        yield {"__key__": f"{number:06d}", kind: b"no picture" if damaged else data, "txt": caption(seed), "json": url}


def write_webdataset(directory: pathlib.Path, count: int, per_shard: int) -> None:
    """Tar shards, by the `webdataset` library."""
    import webdataset

    directory.mkdir(parents=True)
    with webdataset.ShardWriter(str(directory / "%05d.tar"), maxcount=per_shard, verbose=0) as writer:
        for sample in webdataset_samples(count):
            writer.write(sample)


def write_jsonl(path: pathlib.Path, rows: Sequence[object]) -> None:
    """One object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def slow_scorer() -> Scorer:
    """Takes `TEST_SECONDS_A_RECORD` for each record, so that a run can be killed half-way, and likes all of them."""
    pause = float(os.environ.get("TEST_SECONDS_A_RECORD", "0"))

    def score(records: Sequence[object], pictures: Sequence[object]) -> list[float]:
        time.sleep(pause * len(records))
        return [1.0] * len(records)

    return score


def finishing_scorer() -> Scorer:
    """Puts the finished source `TEST_FINISHED` in the place `TEST_OUTPUT`, as a second ingest would that ends at this moment."""
    shutil.copytree(os.environ["TEST_FINISHED"], os.environ["TEST_OUTPUT"])
    return lambda records, pictures: [1.0] * len(records)


def brightness() -> Scorer:
    """The mean of each record's first picture, 0 to 255."""
    return lambda records, pictures: [float(of_record[0].mean()) if of_record else 0.0 for of_record in pictures]
