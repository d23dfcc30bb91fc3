"""AnyRes: the one integer function from (height, width, α) to scaled size, tile grid and visual tokens.

Data, model, inference and export all call `plan_image`. An image is first fitted into the tile budget (aspect ratio kept,
never enlarged); α then multiplies the *area* of that size (the share of pixels, hence of visual tokens, that is kept).
Tiles do not overlap and are encoded one by one (LLaVA-NeXT's AnyRes; HyperVL, arXiv 2512.14052). α is held in
thousandths and all sizes are exact integers, so every platform gets the same answer.

A *cell* is the square of pixels behind one visual token. Cells that lie wholly in padding have no visual token, so the
number of tokens follows α even where the number of tiles does not. With 4 × 4 cells a tile, an image 6 cells wide and
3 high takes two tiles and 18 tokens, numbered here in sequence order (dots are padding without a token):

    tile 0         tile 1
    0  1  2  3     12 13  .  .
    4  5  6  7     14 15  .  .
    8  9 10 11     16 17  .  .
    .  .  .  .      .  .  .  .
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TypeAlias

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from hypervl_jax.architecture import TilingConfig

ALPHA_UNIT = 1000
"""α is held as an integer number of thousandths."""

Picture: TypeAlias = UInt8[np.ndarray, "h w 3"] | Image.Image
"""Pixels as an array, or as Pillow holds them (mode RGB, or L for grey): scaling begins and ends there."""

PADDING_BYTE = 128
"""Byte of padded pixels. SigLIP2 normalises x / 127.5 - 1, so 128 is +0.004, the paper's "zero" after normalisation; byte 0
would be -1, black. 127.5 cannot be written as a byte."""


@dataclasses.dataclass(frozen=True)
class ImagePlan:
    """What becomes of one image: sizes in pixels, the tile grid, and how many visual tokens it costs.

    Attributes:
        source_height, source_width: size of the decoded image.
        height, width: size of the scaled content, which lies in the top left of the tile grid.
        rows, columns: the tile grid.
        cell_rows, cell_columns: the grid of visual tokens: all cells that hold at least one pixel of content.
        tiles: tiles to encode, the thumbnail included.
        tokens: visual tokens, the thumbnail's included.
        thumbnail_height, thumbnail_width: size of the thumbnail's content; 0 when there is no thumbnail.
    """

    source_height: int
    source_width: int
    height: int
    width: int
    rows: int
    columns: int
    cell_rows: int
    cell_columns: int
    tiles: int
    tokens: int
    thumbnail_height: int
    thumbnail_width: int

    @property
    def scales(self) -> bool:
        """Whether the content has another size than the image."""
        return (self.height, self.width) != (self.source_height, self.source_width)


def alpha_to_milli(alpha: float) -> int:
    """α in thousandths, rounded to the nearest, at least 1. Raises `ValueError` unless 0 < α <= 1."""
    if not 0.0 < alpha <= 1.0:
        raise ValueError(
            f"alpha {alpha} is not in (0, 1]: it is the share of the image's area to keep; clip the prediction before planning"
        )
    return max(1, round(float(alpha) * ALPHA_UNIT))


def plan_image(height: int, width: int, alpha: float, tiling: TilingConfig) -> ImagePlan:
    """Plans one image; cached, because a loader asks again and again for the same sizes.

    Its size at α = 1 is the largest, at most the image's own, that a grid of at most `tiling.max_tiles` tiles holds. α then
    scales each side by √α, rounded down, to at least one pixel. The grid is the smallest that holds the scaled size.
    `tokens` and `tiles` never fall as α rises. With R × C the cell grid at α and T tokens at α = 1, both without the
    thumbnail, R · C < α · T + R + C: the kept share is α up to one row and one column of cells.

    Args:
        height: of the decoded image, pixels.
        width: of the decoded image, pixels.
        alpha: share of the area to keep, in (0, 1].
        tiling: tile size, tile budget, thumbnail.

    Raises:
        ValueError: a side is below one pixel, or α is out of range.
    """
    if height < 1 or width < 1:
        raise ValueError(
            f"image of {height} x {width} pixels: both sides must be at least 1; drop the image before planning"
        )
    return _plan(int(height), int(width), alpha_to_milli(alpha), tiling)


@functools.lru_cache(maxsize=1 << 16)
def _plan(height: int, width: int, alpha_milli: int, tiling: TilingConfig) -> ImagePlan:
    full_height, full_width = _fit_budget(height, width, tiling)
    scaled_height, scaled_width = _scale_area(full_height, alpha_milli), _scale_area(full_width, alpha_milli)
    rows, columns = _ceil_div(scaled_height, tiling.tile_size), _ceil_div(scaled_width, tiling.tile_size)
    cell_rows, cell_columns = _cell_grid(scaled_height, scaled_width, tiling)
    # From the size at α = 1, so that the thumbnail is the same for every α that has one and tokens stay monotone in α.
    thumbnail = _fit_tile(full_height, full_width, tiling) if tiling.thumbnail and rows * columns > 1 else (0, 0)
    return ImagePlan(
        source_height=height,
        source_width=width,
        height=scaled_height,
        width=scaled_width,
        rows=rows,
        columns=columns,
        cell_rows=cell_rows,
        cell_columns=cell_columns,
        tiles=rows * columns + (1 if any(thumbnail) else 0),
        tokens=cell_rows * cell_columns + math.prod(_cell_grid(*thumbnail, tiling)),
        thumbnail_height=thumbnail[0],
        thumbnail_width=thumbnail[1],
    )


def _fit_budget(height: int, width: int, tiling: TilingConfig) -> tuple[int, int]:
    """Size at α = 1. Scales are compared as integers: scale · height · width."""
    whole, tile = height * width, tiling.tile_size
    grids = ((r, tiling.max_tiles // r) for r in range(1, tiling.max_tiles + 1))
    scale = max(min(whole, r * tile * width, c * tile * height) for r, c in grids)
    return max(1, scale // width), max(1, scale // height)


def _fit_tile(height: int, width: int, tiling: TilingConfig) -> tuple[int, int]:
    """The largest size of this aspect ratio, not enlarged, that one tile holds."""
    side = max(height, width)
    limit = min(side, tiling.tile_size)
    return max(1, height * limit // side), max(1, width * limit // side)


def _scale_area(side: int, alpha_milli: int) -> int:
    """⌊side · √α⌋, at least 1, exactly."""
    return max(1, math.isqrt(side * side * alpha_milli // ALPHA_UNIT))


def _cell_grid(height: int, width: int, tiling: TilingConfig) -> tuple[int, int]:
    return _ceil_div(height, tiling.cell_size), _ceil_div(width, tiling.cell_size)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def visual_slots(plan: ImagePlan, tiling: TilingConfig) -> Int32[np.ndarray, "v"]:
    """Where each visual token stands among the image's flattened tile tokens: tile · tokens_per_tile + cell.

    In sequence order: tiles row-major, cells row-major within a tile, cells wholly in padding left out, thumbnail last.
    """
    grid = _grid_slots(plan.cell_rows, plan.cell_columns, plan.columns, tiling)
    thumbnail = _grid_slots(*_cell_grid(plan.thumbnail_height, plan.thumbnail_width, tiling), 1, tiling)
    return np.concatenate([grid, thumbnail + plan.rows * plan.columns * tiling.tokens_per_tile])


def _grid_slots(cell_rows: int, cell_columns: int, columns: int, tiling: TilingConfig) -> Int32[np.ndarray, "v"]:
    side = tiling.tile_size // tiling.cell_size
    rows = _ceil_div(cell_rows, side)
    in_rows = (np.arange(rows * side) < cell_rows).reshape(rows, 1, side, 1)
    in_columns = (np.arange(columns * side) < cell_columns).reshape(columns, 1, side)
    return np.flatnonzero(in_rows & in_columns).astype(np.int32)


def row_breaks(plan: ImagePlan, tiling: TilingConfig) -> Int32[np.ndarray, "r"]:
    """Numbers of visual tokens before which a separator is written; empty unless `tiling.separators`.

    One after each row of tiles but the last, and one before the thumbnail.
    """
    side = tiling.tile_size // tiling.cell_size
    ends = np.arange(1, separator_count(plan, tiling) + 1, dtype=np.int32)
    return np.minimum(ends * side, plan.cell_rows).astype(np.int32) * np.int32(plan.cell_columns)


def separator_count(plan: ImagePlan, tiling: TilingConfig) -> int:
    """Separator tokens that the image's prompt holds."""
    if not tiling.separators:
        return 0
    return plan.rows - 1 + (1 if plan.thumbnail_height else 0)


def prompt_tokens(plan: ImagePlan, tiling: TilingConfig) -> int:
    """Positions the image takes in the sequence: visual tokens and separators."""
    return plan.tokens + separator_count(plan, tiling)


def tile_image(rgb: UInt8[np.ndarray, "h w 3"], plan: ImagePlan, tiling: TilingConfig) -> UInt8[np.ndarray, "t s s 3"]:
    """Scales an image and cuts it into tiles, row-major, the thumbnail last; padding is `PADDING_BYTE`.

    The filter is Pillow's bilinear one, which averages over the whole footprint when it shrinks (antialiased): SigLIP2's
    published preprocessing, and its weights are never negative, so it draws no halos around glyphs.

    Raises:
        ValueError: `rgb` is not the image that was planned.
    """
    tiles = np.empty((plan.tiles, tiling.tile_size, tiling.tile_size, 3), np.uint8)
    write_tiles(rgb, plan, tiles)
    return tiles


def write_tiles(picture: Picture, plan: ImagePlan, tiles: UInt8[np.ndarray, "t s s 3"]) -> None:
    """`tile_image` into the first `plan.tiles` of `tiles`, whatever they hold: a pixel that needs no scaling is copied once.

    Raises:
        ValueError: `picture` is not the image that was planned.
    """
    if picture_size(picture) != (plan.source_height, plan.source_width):
        raise ValueError(
            f"image is {picture_size(picture)}, its plan is for {(plan.source_height, plan.source_width)}; plan the decoded size"
        )
    grid = plan.rows * plan.columns
    _cut(resize(picture, plan.height, plan.width), plan.columns, tiles[:grid])
    if plan.thumbnail_height:
        _cut(resize(picture, plan.thumbnail_height, plan.thumbnail_width), 1, tiles[grid : grid + 1])


def picture_size(picture: Picture) -> tuple[int, int]:
    """(height, width) in pixels.

    Raises:
        ValueError: an array of another kind than uint8 with three channels, or an image of another mode than RGB or L.
    """
    if isinstance(picture, Image.Image):
        width, height = picture.size
        known, kind = picture.mode in ("RGB", "L"), picture.mode
    else:
        height, width = picture.shape[:2]
        known, kind = picture.dtype == np.uint8 and picture.shape[2:] == (3,), f"{picture.dtype} {picture.shape}"
    if not known:
        raise ValueError(f"a picture is uint8 [height, width, 3], or an image of mode RGB or L; this is {kind}")
    return height, width


def resize(picture: Picture, height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """Antialiased bilinear resize, of each channel by itself; the same pixels when the size already fits."""
    image = picture if isinstance(picture, Image.Image) else None
    if picture_size(picture) != (height, width):
        image = (image or Image.fromarray(picture)).resize((width, height), Image.Resampling.BILINEAR)
    if image is None:
        return picture
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _cut(content: UInt8[np.ndarray, "h w 3"], columns: int, tiles: UInt8[np.ndarray, "t s s 3"]) -> None:
    """Lays the content over a grid of tiles with `columns` columns."""
    side = tiles.shape[1]
    for number, tile in enumerate(tiles):
        top, left = (side * place for place in divmod(number, columns))
        part = content[top : top + side, left : left + side]
        height, width = part.shape[:2]
        tile[:height, :width] = part
        tile[height:] = PADDING_BYTE
        tile[:height, width:] = PADDING_BYTE
