"""The data path of this project, timed step by step on the samples of some batches, and a bare decode-and-resize loop.

Times are processor seconds of this process, all its threads: what a core must give, however busy the machine is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from data_pipelines.lanes import LaneLoader
from data_pipelines.packing import Sample
from data_pipelines.records import Record
from data_pipelines.streams import Lane, Mixture
from data_pipelines.transforms import decode_for
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.conversation import encode_conversation
from hypervl_jax.vision.anyres import ImagePlan, resize, write_tiles

STEPS = ("pack", "read", "tokenise", "decode", "resize", "tile")
WHOLE, BARE, BARE_PILLOW = "whole pipeline", "bare decode + resize", "bare decode + resize, Pillow alone"


class Clock:
    """Processor seconds by name, added up over any number of uses."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the processor time of the `with` block to `name`."""
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start


@dataclasses.dataclass(frozen=True)
class Work:
    """The samples of some batches.

    Attributes:
        loader: makes the batches, in this process.
        batches: how many.
        rows: the samples of each row.
        records: of the samples, in order.
        plans: of each sample's images.
    """

    loader: LaneLoader
    batches: int
    rows: tuple[tuple[Sample, ...], ...]
    records: tuple[Record, ...]
    plans: tuple[tuple[ImagePlan, ...], ...]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Of all rows, in order."""
        return tuple(itertools.chain.from_iterable(self.rows))

    @property
    def tiling(self) -> TilingConfig:
        """Of the loader."""
        return self.loader.mixture.tiling

    @property
    def encoded_bytes(self) -> int:
        """Bytes of all images as they are stored."""
        return sum(len(image) for record in self.records for image in record.images)

    @property
    def megapixels(self) -> float:
        """Of all images as they are stored."""
        return sum(plan.source_height * plan.source_width for plan in self._images()) / 1e6

    @property
    def tiles(self) -> int:
        """Of all images."""
        return sum(plan.tiles for plan in self._images())

    def pictures(self) -> Iterator[tuple[bytes, ImagePlan]]:
        """Every image with its plan."""
        for record, plans in zip(self.records, self.plans, strict=True):
            yield from zip(record.images, plans, strict=True)

    def _images(self) -> Iterable[ImagePlan]:
        return itertools.chain.from_iterable(self.plans)


def plan_work(loader: LaneLoader, batches: int) -> Work:
    """The work behind the first batches of a loader without workers."""
    rows = tuple(map(tuple, _planned(loader, batches)))
    sources, tiling = loader.mixture.sources, loader.mixture.tiling
    samples = tuple(itertools.chain.from_iterable(rows))
    records = tuple(sources[sample.source].record(sample.record) for sample in samples)
    plans = tuple(tuple(sources[s.source].plans(s.record, s.alpha, tiling)) for s in samples)
    return Work(loader, batches, rows, records, plans)


def _planned(loader: LaneLoader, batches: int) -> Iterator[list[Sample]]:
    states = loader.initial_states()
    lanes = [Lane(loader.mixture, lane, state) for lane, state in zip(loader.lanes, states, strict=True)]
    for _ in range(batches):
        for lane in lanes:
            yield lane.plan()


def step_seconds(work: Work) -> Counter[str]:
    """Seconds of each of `STEPS` for all samples, one step at a time."""
    clock, mixture = Clock(), work.loader.mixture
    with clock("pack"):
        list(_planned(work.loader, work.batches))
    plans = iter(work.plans)
    for row in work.rows:
        _time_row(row, list(itertools.islice(plans, len(row))), mixture, clock)
    return clock.seconds


def _time_row(row: Sequence[Sample], plans: Sequence[Sequence[ImagePlan]], mixture: Mixture, clock: Clock) -> None:
    """Takes the samples of a row through the steps in the order of `fill_row`: all texts, then all images."""
    records = []
    for sample, own in zip(row, plans, strict=True):
        with clock("read"):
            record = mixture.sources[sample.source].record(sample.record)
        with clock("tokenise"):
            encode_conversation(record.turns, mixture.tokenizer, own, mixture.tiling)
        records.append(record)
    for record, own in zip(records, plans, strict=True):
        for image, plan in zip(record.images, own, strict=True):
            _time_image(image, plan, mixture.tiling, clock)


def _time_image(image: bytes, plan: ImagePlan, tiling: TilingConfig, clock: Clock) -> None:
    """Decodes, resizes and tiles one image; a thumbnail counts as resizing."""
    with clock("decode"):
        picture = decode_for(image, plan)
    with clock("resize"):
        content = resize(picture, plan.height, plan.width)
        if plan.thumbnail_height:
            resize(picture, plan.thumbnail_height, plan.thumbnail_width)
    scaled = dataclasses.replace(
        plan, source_height=plan.height, source_width=plan.width, thumbnail_height=0, thumbnail_width=0
    )
    tiles = np.empty((plan.tiles, tiling.tile_size, tiling.tile_size, 3), np.uint8)
    with clock("tile"):
        write_tiles(content, scaled, tiles)


def whole_seconds(work: Work) -> Counter[str]:
    """Seconds to make the batches."""
    clock = Clock()
    batches = work.loader.iterate(work.loader.initial_states())
    with contextlib.closing(batches), clock(WHOLE):
        for _ in itertools.islice(batches, work.batches):
            pass
    return clock.seconds


def bare_seconds(work: Work) -> Counter[str]:
    """Seconds of the loops that only decode and resize the same images: with our functions, and with Pillow alone."""
    clock = Clock()
    for image, plan in work.pictures():
        with clock(BARE):
            picture = decode_for(image, plan)
            resize(picture, plan.height, plan.width)
            if plan.thumbnail_height:
                resize(picture, plan.thumbnail_height, plan.thumbnail_width)
        with clock(BARE_PILLOW):
            _pillow(image, plan)
    return clock.seconds


def _pillow(image: bytes, plan: ImagePlan) -> None:
    """What one writes without thinking of speed."""
    opened = Image.open(io.BytesIO(image)).convert("RGB")
    np.asarray(opened.resize((plan.width, plan.height), Image.Resampling.BILINEAR))
    if plan.thumbnail_height:
        np.asarray(opened.resize((plan.thumbnail_width, plan.thumbnail_height), Image.Resampling.BILINEAR))
