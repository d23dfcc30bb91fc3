import dataclasses
import functools
import itertools
import pathlib
import shutil

import numpy as np
import pytest
from corpora import SHAPE, TILING, sample, sign_indexes, tokenizer, write

from data_pipelines.packing import Sample
from data_pipelines.sources import DamagedShard, Source
from data_pipelines.transforms import Failure, FailureReason, fill_row
from hypervl_jax.text.conversation import encode_conversation
from hypervl_jax.training.batch import Batch, empty_batch, unfilled_batch
from hypervl_jax.vision.anyres import tile_image
from hypervl_jax.vision.decoding import decode_image

# one picture within a tile; two pictures, of which one takes two tiles; text only
RECORDS = [sample(0, [(40, 60)], 4), sample(1, [(50, 100), (30, 20)], 9), sample(2, [], 6)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = tmp_path_factory.mktemp("transforms")
    write(root, "s", RECORDS, per_shard=2)
    return Source(root / "train" / "s", tokenizer().fingerprint)


def drawn(source: Source, record: int, number: int = 0, alpha: int = 1000) -> Sample:
    return Sample(number, 0, record, alpha, *source.cost(record, alpha, TILING))


def filled(sources: list[Source], samples: list[Sample]) -> tuple[Batch, list[Failure]]:
    row = Batch(*(field[0] for field in empty_batch(SHAPE, TILING.tile_size)))
    return row, fill_row(row, samples, sources, tokenizer(), TILING)


def places(samples: list[Sample]) -> list[slice]:
    ends = np.cumsum([0, *(s.tokens for s in samples)]).tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def test_tokens_targets_and_weights(source: Source) -> None:
    samples = [drawn(source, record) for record in (1, 0, 2)]
    row, failures = filled([source], samples)
    assert not failures
    for s, place in zip(samples, places(samples), strict=True):
        encoded = encode_conversation(
            RECORDS[s.record].turns, tokenizer(), source.plans(s.record, 1000, TILING), TILING
        )
        np.testing.assert_array_equal(row.tokens[place], encoded.tokens)
        np.testing.assert_array_equal(row.targets[place], [*encoded.tokens[1:], 0])
        np.testing.assert_array_equal(row.loss_weights[place], [*encoded.loss_weights[1:], 0])
        assert row.loss_weights[place].sum() == encoded.loss_weights.sum() > 0


def test_tags(source: Source) -> None:
    samples = [drawn(source, 1, number=4), drawn(source, 0, number=2), drawn(source, 2, number=5)]
    row, _ = filled([source] * 6, samples)
    for segment, (s, place) in enumerate(zip(samples, places(samples), strict=True), start=1):
        assert set(row.segments[place]) == {segment}
        assert set(row.sources[place]) == {s.source}
        np.testing.assert_array_equal(row.positions[place], np.arange(s.tokens))
    assert row.tile_segments.tolist() == [1, 1, 1, 2, 0, 0, 0, 0]


def test_padding_is_that_of_an_empty_batch(source: Source) -> None:
    samples = [drawn(source, 1), drawn(source, 2)]
    row, _ = filled([source], samples)
    empty = empty_batch(SHAPE, TILING.tile_size)
    end = sum(s.tokens for s in samples)
    for name in ("tokens", "targets", "loss_weights", "segments", "positions", "visual_index", "sources"):
        np.testing.assert_array_equal(getattr(row, name)[end:], getattr(empty, name)[0, end:], err_msg=name)
    assert not row.tiles[3:].any()


def image_under(row: Batch, place: slice, first: int, height: int, width: int) -> np.ndarray:
    """Puts the cells at the visual positions of one image together, one row of cells after another."""
    cell, side = TILING.cell_size, TILING.tile_size // TILING.cell_size
    rows, columns = -(-height // cell), -(-width // cell)
    canvas = np.zeros((rows * cell, columns * cell, 3), np.uint8)
    visual = row.visual_index[place]
    visual = visual[visual >= 0][first : first + rows * columns]
    order = sorted((r // side, c // side, r, c) for r in range(rows) for c in range(columns))
    for index, (_, _, r, c) in zip(visual, order, strict=True):
        tile, inside = divmod(int(index), TILING.tokens_per_tile)
        y, x = (cell * part for part in divmod(inside, side))
        canvas[r * cell : (r + 1) * cell, c * cell : (c + 1) * cell] = row.tiles[tile, y : y + cell, x : x + cell]
    return canvas[:height, :width]


def test_pixels_at_the_visual_positions_are_the_image(source: Source) -> None:
    samples = [drawn(source, record) for record in (2, 0, 1)]
    row, _ = filled([source], samples)
    _, second, third = places(samples)
    wide, small = (decode_image(image) for image in RECORDS[1].images)
    np.testing.assert_array_equal(image_under(row, second, 0, 40, 60), decode_image(RECORDS[0].images[0]))
    np.testing.assert_array_equal(image_under(row, third, 0, 50, 100), wide)
    np.testing.assert_array_equal(image_under(row, third, 4 * 7, 30, 20), small)
    assert (row.visual_index >= 0).sum() == 3 * 4 + 4 * 7 + 2 * 2


def test_alpha_scales_the_pixels(source: Source) -> None:
    s = drawn(source, 1, alpha=400)
    row, failures = filled([source], [s])
    plans = source.plans(1, 400, TILING)
    expected = [tile_image(decode_image(i), p, TILING) for i, p in zip(RECORDS[1].images, plans, strict=True)]
    assert not failures
    assert s.tokens < source.cost(1, 1000, TILING)[0]
    np.testing.assert_array_equal(row.tiles[: s.tiles], np.concatenate(expected))


def test_a_decoder_that_remembers_changes_no_bit(source: Source) -> None:
    remembering = functools.lru_cache(decode_image)
    samples = [drawn(source, record, alpha=alpha) for alpha in (300, 1000) for record in (0, 1)]
    plain, _ = filled([source], samples)
    row = Batch(*(field[0] for field in empty_batch(SHAPE, TILING.tile_size)))
    assert not fill_row(row, samples, [source], tokenizer(), TILING, remembering)
    for name, expected in plain._asdict().items():
        np.testing.assert_array_equal(getattr(row, name), expected, err_msg=name)
    assert remembering.cache_info().misses == 3


def test_a_broken_image_leaves_padding_and_the_rest_of_the_row(source: Source, tmp_path: pathlib.Path) -> None:
    broken = RECORDS[0].images[0][:-60]
    turns = RECORDS[0].turns
    write(tmp_path, "b", [RECORDS[1], type(RECORDS[0])(images=(broken,), turns=turns, source="b"), RECORDS[2]])
    damaged = Source(tmp_path / "train" / "b", tokenizer().fingerprint)
    good, _ = filled([source], [drawn(source, record) for record in (1, 0, 2)])
    row, failures = filled([damaged], [drawn(damaged, record) for record in (0, 1, 2)])
    assert [(f.source, f.reason) for f in failures] == [(0, FailureReason.IMAGE)]
    assert "record 1" in failures[0].message
    gap = good.segments == 2
    assert gap.any()
    for name in ("tokens", "targets", "loss_weights", "segments", "positions", "visual_index"):
        padding = -1 if name == "visual_index" else 0
        np.testing.assert_array_equal(getattr(row, name), np.where(gap, padding, getattr(good, name)), err_msg=name)
    tile_gap = good.tile_segments == 2
    np.testing.assert_array_equal(row.tile_segments, np.where(tile_gap, 0, good.tile_segments))
    np.testing.assert_array_equal(row.tiles, np.where(tile_gap[:, None, None, None], 0, good.tiles))


def test_nothing_is_left_of_a_sample_whose_second_image_is_broken(tmp_path: pathlib.Path) -> None:
    whole = RECORDS[1]
    broken = dataclasses.replace(whole, images=(whole.images[0], whole.images[1][:-60]))
    write(tmp_path, "b", [RECORDS[0], broken])
    damaged = Source(tmp_path / "train" / "b", tokenizer().fingerprint)
    row = Batch(*(field[0] for field in unfilled_batch(SHAPE, TILING.tile_size)))
    row.tiles.fill(77)
    samples = [drawn(damaged, record) for record in (1, 0)]
    failures = fill_row(row, samples, [damaged], tokenizer(), TILING)
    assert [(f.reason, "truncated" in f.message) for f in failures] == [(FailureReason.IMAGE, True)]
    assert row.tile_segments.tolist() == [0, 0, 0, 2, 0, 0, 0, 0]
    assert not row.tiles[[0, 1, 2, 4, 5, 6, 7]].any()
    np.testing.assert_array_equal(row.tiles[3, :40, :60], decode_image(RECORDS[0].images[0]))


def test_a_record_that_is_not_as_its_index_says_is_left_out(source: Source, tmp_path: pathlib.Path) -> None:
    others = [sample(0, [(60, 40)], 4), sample(1, [(50, 100)], 9), sample(2, [], 7)]
    write(tmp_path, "o", others, per_shard=2)
    directory = tmp_path / "train" / "o"
    for index in source.directory.glob("*.index.arrow"):
        shutil.copy(index, directory / index.name)
    sign_indexes(directory)
    liar = Source(directory, tokenizer().fingerprint)
    row, failures = filled([liar], [drawn(liar, record) for record in range(3)])
    assert [f.reason for f in failures] == [FailureReason.RECORD] * 3
    assert "(60, 40) pixels, its index says (40, 60)" in failures[0].message
    assert "1 images, its index says 2" in failures[1].message
    assert "tokens, its index says" in failures[2].message
    assert not row.segments.any()


def test_a_flipped_bit_is_a_skip_that_names_the_shard(tmp_path: pathlib.Path) -> None:
    write(tmp_path, "s", RECORDS)
    flipped = Source(tmp_path / "train" / "s", tokenizer().fingerprint)
    shard = next(flipped.directory.glob("*.array_record"))
    data = bytearray(shard.read_bytes())
    data[data.index(b"PNG") + 40] ^= 1
    shard.write_bytes(data)
    row, failures = filled([flipped], [drawn(flipped, record) for record in range(3)])
    assert [f.reason for f in failures] == [FailureReason.RECORD]
    assert shard.name in failures[0].message
    assert set(row.segments.tolist()) == {0, 2, 3}


def test_a_damaged_shard_is_no_skip(tmp_path: pathlib.Path) -> None:
    write(tmp_path, "s", RECORDS)
    damaged = Source(tmp_path / "train" / "s", tokenizer().fingerprint)
    shard = next(damaged.directory.glob("*.array_record"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DamagedShard, match=shard.name):
        filled([damaged], [drawn(damaged, 0)])
