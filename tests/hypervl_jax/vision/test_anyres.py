import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hypervl_jax.architecture import TilingConfig
from hypervl_jax.vision.anyres import (
    PADDING_BYTE,
    ImagePlan,
    alpha_to_milli,
    plan_image,
    prompt_tokens,
    resize,
    row_breaks,
    separator_count,
    tile_image,
    visual_slots,
    write_tiles,
)

DEFAULT = TilingConfig()
SMALL = TilingConfig(tile_size=16, patch_size=2, shuffle=2, max_tiles=6)
THUMBNAIL = TilingConfig(tile_size=16, patch_size=2, shuffle=2, max_tiles=6, thumbnail=True, separators=True)

side = st.one_of(
    st.integers(1, 2_000),
    st.integers(1, 20_000),
    st.sampled_from([1, 31, 32, 33, 511, 512, 513, 1023, 1024, 1025, 10_000]),
)
alpha_milli = st.integers(1, 1000)
tilings = st.builds(
    lambda cells, patch, shuffle, tiles, thumbnail, separators: TilingConfig(
        cells * patch * shuffle, patch, shuffle, tiles, thumbnail, separators
    ),
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 3),
    st.integers(1, 16),
    st.booleans(),
    st.booleans(),
)


def grid_tokens(plan: ImagePlan) -> int:
    return plan.cell_rows * plan.cell_columns


def noise(height: int, width: int) -> np.ndarray:
    """Pixels above the padding byte, so that content and padding cannot be confused, even after averaging."""
    return np.random.default_rng(height * 7919 + width).integers(
        PADDING_BYTE + 1, 256, (height, width, 3), dtype=np.uint8
    )


@settings(max_examples=1000, deadline=None)
@given(side, side, alpha_milli, tilings)
def test_plan_keeps_budget_and_counts(height: int, width: int, alpha: int, tiling: TilingConfig) -> None:
    plan = plan_image(height, width, alpha / 1000, tiling)
    assert 1 <= plan.height <= height
    assert 1 <= plan.width <= width
    assert plan.rows * plan.columns <= tiling.max_tiles
    assert plan.tiles <= tiling.tile_limit
    assert (plan.rows, plan.columns) == (
        math.ceil(plan.height / tiling.tile_size),
        math.ceil(plan.width / tiling.tile_size),
    )
    assert (plan.cell_rows, plan.cell_columns) == (
        math.ceil(plan.height / tiling.cell_size),
        math.ceil(plan.width / tiling.cell_size),
    )
    assert plan.tokens <= plan.tiles * tiling.tokens_per_tile
    assert (
        (plan.tiles > plan.rows * plan.columns)
        == bool(plan.thumbnail_height)
        == (tiling.thumbnail and plan.rows * plan.columns > 1)
    )
    assert plan.thumbnail_height <= min(plan.height, tiling.tile_size)
    assert plan.thumbnail_width <= min(plan.width, tiling.tile_size)


@settings(max_examples=1000, deadline=None)
@given(side, side, alpha_milli, alpha_milli, tilings)
def test_tokens_and_tiles_are_monotone_in_alpha(
    height: int, width: int, first: int, second: int, tiling: TilingConfig
) -> None:
    low, high = (plan_image(height, width, alpha / 1000, tiling) for alpha in sorted((first, second)))
    assert low.tokens <= high.tokens
    assert low.tiles <= high.tiles
    assert prompt_tokens(low, tiling) <= prompt_tokens(high, tiling)


def test_tokens_with_a_thumbnail_are_monotone_over_every_small_size() -> None:
    # Rounding makes this fail for many of these sizes if the thumbnail follows the scaled size.
    for height in range(17, 49):
        for width in range(1, 49):
            tokens = [plan_image(height, width, alpha / 1000, THUMBNAIL).tokens for alpha in range(300, 1001, 35)]
            assert tokens == sorted(tokens)


@settings(max_examples=1000, deadline=None)
@given(side, side, alpha_milli, tilings)
def test_kept_tokens_are_alpha_up_to_one_row_and_column(
    height: int, width: int, alpha: int, tiling: TilingConfig
) -> None:
    full, scaled = plan_image(height, width, 1, tiling), plan_image(height, width, alpha / 1000, tiling)
    assert grid_tokens(scaled) < Fraction(alpha, 1000) * grid_tokens(full) + scaled.cell_rows + scaled.cell_columns
    assert scaled.height * scaled.width * 1000 <= max(
        alpha * full.height * full.width, 1000 * max(scaled.height, scaled.width)
    )


def test_bound_over_every_tenth_of_alpha_and_thousands_of_sizes() -> None:
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(0, np.log(20_000), (3000, 2))).astype(int):
        plans = [plan_image(height, width, k / 10, DEFAULT) for k in range(1, 11)]
        assert all(a.tokens <= b.tokens and a.tiles <= b.tiles for a, b in itertools.pairwise(plans))
        for k, plan in enumerate(plans, 1):
            assert 10 * plan.tokens < k * plans[-1].tokens + 10 * (plan.cell_rows + plan.cell_columns)


@settings(max_examples=1000, deadline=None)
@given(side, side, tilings)
def test_scale_at_alpha_one_is_the_best_within_the_budget(height: int, width: int, tiling: TilingConfig) -> None:
    tile, budget = tiling.tile_size, tiling.max_tiles
    grids = [(r, c) for r in range(1, budget + 1) for c in range(1, budget + 1) if r * c <= budget]
    scale = max(min(Fraction(1), Fraction(r * tile, height), Fraction(c * tile, width)) for r, c in grids)
    plan = plan_image(height, width, 1, tiling)
    assert (plan.height, plan.width) == (max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))


@pytest.mark.parametrize(
    ("height", "width", "alpha", "size", "grid", "tokens"),
    [
        (1, 1, 1, (1, 1), (1, 1), 1),
        (512, 512, 1, (512, 512), (1, 1), 256),
        (513, 512, 1, (513, 512), (2, 1), 272),
        (511, 512, 1, (511, 512), (1, 1), 256),
        (480, 640, 1, (480, 640), (1, 2), 300),
        (480, 640, 0.7, (401, 535), (1, 2), 221),
        (1, 10_000, 1, (1, 6144), (1, 12), 192),
        (10_000, 1, 1, (6144, 1), (12, 1), 192),
        (1, 10_000, 0.1, (1, 1942), (1, 4), 61),
        (3000, 4000, 1, (1536, 2048), (3, 4), 3072),
        (3000, 4000, 0.25, (768, 1024), (2, 2), 768),
        (10_000, 10_000, 1, (1536, 1536), (3, 3), 2304),
    ],
)
def test_worked_examples(
    height: int, width: int, alpha: float, size: tuple[int, int], grid: tuple[int, int], tokens: int
) -> None:
    plan = plan_image(height, width, alpha, DEFAULT)
    assert ((plan.height, plan.width), (plan.rows, plan.columns), plan.tokens) == (size, grid, tokens)


@pytest.mark.parametrize("alpha", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        plan_image(10, 10, alpha, DEFAULT)


def test_alpha_is_rounded_to_thousandths_and_never_to_zero() -> None:
    assert [alpha_to_milli(value) for value in (1, 0.1, np.float32(0.3), 0.7004, 0.7006, 1e-9)] == [
        1000,
        100,
        300,
        700,
        701,
        1,
    ]


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan_image(*size, 1, DEFAULT)


@settings(max_examples=500, deadline=None)
@given(side, side, alpha_milli, tilings)
def test_slots_are_unique_in_range_and_as_many_as_tokens(
    height: int, width: int, alpha: int, tiling: TilingConfig
) -> None:
    plan = plan_image(height, width, alpha / 1000, tiling)
    slots = visual_slots(plan, tiling)
    assert slots.dtype == np.int32
    assert len(slots) == plan.tokens
    assert (np.diff(slots) > 0).all()
    assert slots[0] >= 0
    assert slots[-1] < plan.tiles * tiling.tokens_per_tile


def test_slots_of_the_example_in_the_module_docstring() -> None:
    plan = plan_image(12, 24, 1, SMALL)
    assert visual_slots(plan, SMALL).tolist() == [*range(12), 16, 17, 20, 21, 24, 25]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(100, 1000), st.sampled_from([SMALL, THUMBNAIL]))
def test_slots_are_exactly_the_cells_with_content(height: int, width: int, alpha: int, tiling: TilingConfig) -> None:
    plan = plan_image(height, width, alpha / 1000, tiling)
    tiles = tile_image(noise(height, width), plan, tiling)
    assert tiles.shape == (plan.tiles, tiling.tile_size, tiling.tile_size, 3)
    cells, cell = tiling.tile_size // tiling.cell_size, tiling.cell_size
    has_content = (tiles != PADDING_BYTE).reshape(plan.tiles, cells, cell, cells, cell * 3).any(axis=(2, 4))
    np.testing.assert_array_equal(np.flatnonzero(has_content), visual_slots(plan, tiling))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(100, 1000))
def test_tiles_put_together_are_the_scaled_image_in_padding(height: int, width: int, alpha: int) -> None:
    plan, image = plan_image(height, width, alpha / 1000, THUMBNAIL), noise(height, width)
    tiles = tile_image(image, plan, THUMBNAIL)
    grid = tiles[: plan.rows * plan.columns].reshape(plan.rows, plan.columns, 16, 16, 3)
    canvas = np.concatenate([np.concatenate(list(row), axis=1) for row in grid])
    np.testing.assert_array_equal(canvas[: plan.height, : plan.width], resize(image, plan.height, plan.width))
    canvas[: plan.height, : plan.width] = PADDING_BYTE
    assert (canvas == PADDING_BYTE).all()
    if plan.thumbnail_height:
        small = tiles[-1][: plan.thumbnail_height, : plan.thumbnail_width]
        np.testing.assert_array_equal(small, resize(image, plan.thumbnail_height, plan.thumbnail_width))


def test_an_image_that_fits_keeps_its_bytes() -> None:
    image = noise(12, 30)
    tiles = tile_image(image, plan_image(12, 30, 1, SMALL), SMALL)
    np.testing.assert_array_equal(np.concatenate(list(tiles), axis=1)[:12, :30], image)


def test_shrinking_averages_fine_stripes() -> None:
    # Stripes one pixel wide become grey; point sampling would keep them black or white. At the border the filter is cut off.
    stripes = np.repeat(np.tile(np.array([0, 255], np.uint8), 64)[None, :, None], 64, 0).repeat(3, 2)
    assert abs(resize(stripes, 16, 32)[:, 1:-1].astype(int) - 127).max() <= 1


@pytest.mark.parametrize("size", [(20, 31), (40, 9), (1, 1), (57, 90)])
def test_resize_is_the_antialiased_bilinear_filter_of_torch(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    image = noise(57, 91)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = (
        torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    )
    # Pillow rounds to bytes after each of its two passes.
    assert abs(resize(image, *size).astype(np.float32) - expected).max() <= 1.01


def test_image_of_another_size_than_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="plan"):
        tile_image(noise(10, 11), plan_image(11, 10, 1, SMALL), SMALL)


def test_only_pictures_of_bytes_are_taken() -> None:
    plan = plan_image(10, 11, 1, SMALL)
    for other in (noise(10, 11)[..., :2], noise(10, 11).astype(np.float32), Image.new("RGBA", (11, 10))):
        with pytest.raises(ValueError, match="a picture is uint8"):
            write_tiles(other, plan, np.empty((plan.tiles, 16, 16, 3), np.uint8))


@settings(max_examples=500, deadline=None)
@given(side, side, alpha_milli, tilings)
def test_separators_stand_between_rows_of_tiles_and_before_the_thumbnail(
    height: int, width: int, alpha: int, tiling: TilingConfig
) -> None:
    plan = plan_image(height, width, alpha / 1000, tiling)
    breaks = row_breaks(plan, tiling)
    assert prompt_tokens(plan, tiling) == plan.tokens + len(breaks)
    assert len(breaks) == separator_count(plan, tiling)
    if not tiling.separators:
        assert len(breaks) == 0
        return
    tile_rows = visual_slots(plan, tiling) // tiling.tokens_per_tile // plan.columns
    thumbnail = visual_slots(plan, tiling) // tiling.tokens_per_tile == plan.rows * plan.columns
    tile_rows[thumbnail] = plan.rows
    np.testing.assert_array_equal(breaks, np.flatnonzero(np.diff(tile_rows)) + 1)
