"""From untrusted image bytes to RGB: named formats only, size checked in the header before any pixel is decoded.

One decoder for each format, so that every machine gets the same bytes: simplejpeg (libjpeg-turbo, straight into the array)
for JPEG in grey or colour, Pillow for the others, for JPEG in CMYK, and for JPEG with faults that cost no pixel. Both call
libjpeg-turbo with its accurate transform and smooth upsampling, and agree bit for bit.
"""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np
import pyarrow as pa
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that Pillow may try; the file's content decides, never its name."""

MAX_PIXELS = 64_000_000
"""Default limit of an image's area; three bytes a pixel are held while it is decoded."""

_JPEG_KINDS = frozenset({"JPEG", "MPO"})
_JPEG_MODES = frozenset({"L", "RGB"})
_KEPT_BLOCKS = 8
"""Blocks of 16 MB at most that Pillow keeps: the decoded, the scaled and the converted copy of one large picture."""

_END_OF_IMAGE = b"\xff\xd9"
_NO_END = "Premature end of JPEG file"
_LOST_PIXELS = re.compile(r"Corrupt JPEG data(?!.*extraneous bytes)")
"""libjpeg's warnings of a damaged scan. Its other warnings, such as stray bytes between two segments, cost no pixel."""

_ORIENTATION_TAG = 0x0112
_FLIPS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
"""By orientation: whether rows and columns change places, then the steps through rows and columns."""
_SWAPS_SIDES = frozenset({5, 6, 7, 8})


class UndecodableImage(ValueError):
    """Bytes that give no image. `reason` is one of a few short slugs, so that skips can be counted.

    Reasons: `empty` (no bytes), `unknown_format` (none of `FORMATS`), `too_large` (over the pixel limit), `truncated`
    (the data ends early), `corrupt` (any other damage).
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"undecodable image: {reason}" + (f" ({detail})" if detail else ""))
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[UndecodableImage], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


def keep_memory() -> None:
    """Makes Pillow keep the memory of freed images, up to 128 MB, for the next ones. For processes that decode for hours.

    Memory fresh from the system must be cleared page by page first, which costs as much as decoding.
    """
    Image.core.set_blocks_max(_KEPT_BLOCKS)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes the first frame to RGB, EXIF orientation applied, transparency composited on white, 16 bits cut to 8.

    Args:
        data: a whole file in one of `FORMATS`.
        max_pixels: refuses larger images by their header, before decoding.

    Raises:
        UndecodableImage: the bytes are no image, or too large; its `reason` says which.
    """
    image = _open(data, max_pixels)
    orientation = _orientation(image)
    rgb = _jpeg_pixels(data, "RGB") if _is_plain_jpeg(image) else None
    if rgb is None:
        rgb = np.array(_rgb(_loaded(image)), dtype=np.uint8)
    return _upright(rgb, orientation)


def decode_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The pixels of `decode_image` in Pillow's own memory, of mode RGB, or L where all are grey: for pictures that are to be scaled.

    Pillow keeps four bytes a pixel. What its decoders give stays where it is, a JPEG file is decoded into four bytes, and grey
    pictures are scaled as one channel.

    Raises:
        UndecodableImage: as `decode_image`.
    """
    image = _open(data, max_pixels)
    orientation = _orientation(image)
    pixels = _jpeg_pixels(data, "GRAY" if image.mode == "L" else "RGBX") if _is_plain_jpeg(image) else None
    if pixels is None:
        image = _loaded(image)
        if orientation not in _FLIPS:
            return image
        pixels = np.atleast_3d(np.asarray(image))
    return _picture(_upright(pixels, orientation))


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format in _JPEG_KINDS and image.mode in _JPEG_MODES


def _jpeg_pixels(data: bytes, colours: str) -> UInt8[np.ndarray, "h w c"] | None:
    """Pixels of a JPEG file in grey or colour; None where libjpeg warns of what cost no pixel: Pillow then decides.

    Raises:
        UndecodableImage: the file ends early, or a scan is damaged, so that part of the picture would be grey or noise.
    """
    try:
        return simplejpeg.decode_jpeg(data, colours)
    except ValueError as error:
        warning = str(error)
    if warning == _NO_END:
        return _jpeg_without_end(data, colours)
    if _LOST_PIXELS.match(warning):
        raise UndecodableImage("corrupt", warning)
    return None


def _jpeg_without_end(data: bytes, colours: str) -> UInt8[np.ndarray, "h w c"]:
    """Pixels of a JPEG file that lacks nothing but its end marker: with the marker the decoder misses no data."""
    try:
        return simplejpeg.decode_jpeg(data + _END_OF_IMAGE, colours)
    except ValueError as error:
        raise UndecodableImage("truncated", str(error)) from error


def _loaded(image: Image.Image) -> Image.Image:
    """An opened image, decoded by Pillow, of mode RGB or L."""
    try:
        image.load()
        return image if image.mode == "L" and not image.has_transparency_data else _to_rgb(image)
    except Exception as error:  # decoders raise many types on damaged data
        raise _failure(error) from error


def _upright(pixels: UInt8[np.ndarray, "h w c"], orientation: int) -> UInt8[np.ndarray, "H W c"]:
    """The pixels as EXIF `orientation` (1 to 8) wants them shown; anything else changes nothing."""
    if orientation not in _FLIPS:
        return pixels
    transposed, rows, columns = _FLIPS[orientation]
    turned = pixels.transpose(1, 0, 2) if transposed else pixels
    return np.ascontiguousarray(turned[::rows, ::columns])


def _picture(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """An image of one channel, of three, or of three with a fourth byte that means nothing, which is not copied."""
    height, width, channels = pixels.shape
    if channels < 4:
        return Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), channels)
    return Image.fromarrow(flat, "RGB", (width, height))


def image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) that `decode_image` would return, from the header only.

    Raises:
        UndecodableImage: the header is no image's, or the image is too large.
    """
    image = _open(data, max_pixels)
    width, height = image.size
    return (width, height) if _orientation(image) in _SWAPS_SIDES else (height, width)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise UndecodableImage("empty")
    if _webp_length(data) > len(data):
        raise UndecodableImage("truncated", f"{len(data)} of {_webp_length(data)} bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise _failure(error) from error
    width, height = image.size
    if min(width, height) < 1:
        raise UndecodableImage("corrupt", f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise UndecodableImage("too_large", f"{width} x {height} pixels, limit {max_pixels}")
    return image


def _webp_length(data: bytes) -> int:
    """Bytes that a WebP's header promises, 0 for other formats. The WebP decoder fails on a short file without saying why."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return 0
    return 8 + int.from_bytes(data[4:8], "little")


def _failure(error: Exception) -> UndecodableImage:
    """The reason behind an exception of Pillow or of a decoder under it."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return UndecodableImage("too_large", str(error))
    if isinstance(error, UnidentifiedImageError):
        return UndecodableImage("unknown_format")
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return UndecodableImage("truncated", str(error))
    return UndecodableImage("corrupt", f"{type(error).__name__}: {error}")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where the block is missing or damaged. Reads the header only."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        return int(exif.get(_ORIENTATION_TAG, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error, zlib.error):
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to 255; the high byte is what it takes from 16-bit colour.
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")
