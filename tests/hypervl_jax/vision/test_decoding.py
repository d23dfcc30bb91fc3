import io
import pickle
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hypervl_jax.vision.anyres import resize
from hypervl_jax.vision.decoding import UndecodableImage, decode_image, decode_picture, image_size, keep_memory


def gradient(height: int, width: int) -> np.ndarray:
    """A smooth picture without symmetry, so that lossy formats keep it and every flip shows."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 60 + 0 * x], -1).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, depth: int, colour: int, pixels: bytes) -> bytes:
    """A PNG from its unfiltered scan lines."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    return png(width, height, 8, 2, b"")


def deep_png(pixels: np.ndarray) -> bytes:
    """16 bits a channel: grey, grey and alpha, RGB or RGBA by the last axis."""
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], lines)


def textured(height: int, width: int) -> np.ndarray:
    """A picture with edges and noise in every channel, where a difference between decoders would show."""
    rng = np.random.default_rng(height * 10_007 + width)
    blocks = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3)).repeat(4, 0).repeat(4, 1)[:height, :width]
    return np.clip(blocks + rng.normal(0, 12, blocks.shape), 0, 255).astype(np.uint8)


def opencv(data: bytes) -> np.ndarray:
    """What OpenCV decodes, which has its own copies of libjpeg-turbo and libpng."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def reason_of(data: bytes, **options: int) -> str:
    with pytest.raises(UndecodableImage) as caught:
        decode_image(data, **options)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_formats_give_the_bytes_back(kind: str) -> None:
    image = gradient(37, 53)
    decoded = decode_image(encode(image, kind))
    np.testing.assert_array_equal(decoded, image)
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable
    assert decoded.flags.c_contiguous


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("WEBP", {"quality": 95}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_photographic_formats_are_close(kind: str, options: dict[str, object]) -> None:
    image = gradient(37, 53)
    assert np.abs(decode_image(encode(image, kind, **options)).astype(int) - image).mean() < 4


JPEG_KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "RGB inside": {"keep_rgb": True},
    "quality 5": {"quality": 5},
}


@pytest.mark.parametrize("options", JPEG_KINDS.values(), ids=JPEG_KINDS)
@pytest.mark.parametrize("size", [(61, 45), (16, 16), (1, 40), (40, 1), (1, 1)], ids=str)
def test_jpeg_pixels_are_those_of_pillow_and_opencv(size: tuple[int, int], options: dict[str, object]) -> None:
    data = encode(textured(*size), "JPEG", **options)
    decoded = decode_image(data)
    np.testing.assert_array_equal(decoded, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    np.testing.assert_array_equal(decoded, opencv(data))
    assert decoded.flags.writeable


def test_cmyk_jpeg() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(decode_image(encode(cmyk, "JPEG", quality=100)).astype(int) - [255, 0, 0]).max() < 6


def test_cmyk_jpeg_of_a_picture_is_that_of_opencv() -> None:
    data = encode(Image.fromarray(textured(61, 45)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode_image(data).astype(int) - opencv(data)).max() <= 1


def test_the_first_of_several_pictures_in_one_jpeg_file() -> None:
    first, second = textured(24, 32), gradient(24, 32)
    data = encode(first, "MPO", save_all=True, append_images=[Image.fromarray(second)], quality=90)
    np.testing.assert_array_equal(decode_image(data), decode_image(encode(first, "JPEG", quality=90)))


def test_grey_jpeg() -> None:
    assert decode_image(encode(Image.new("L", (4, 3), 77), "JPEG")).shape == (3, 4, 3)


def test_sixteen_bit_png_keeps_the_high_byte() -> None:
    values = np.array([[0, 255, 256, 32_768, 65_535]], np.uint16)
    np.testing.assert_array_equal(decode_image(encode(values, "PNG"))[0, :, 0], [0, 0, 1, 128, 255])


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_png_is_that_of_opencv(channels: int) -> None:
    data = deep_png(np.random.default_rng(0).integers(0, 2**16, (9, 7, channels)))
    np.testing.assert_array_equal(decode_image(data), opencv(data))


@pytest.mark.parametrize("channels", [2, 4])
def test_sixteen_bit_png_with_transparency_is_composited(channels: int) -> None:
    deep = np.random.default_rng(0).integers(0, 2**16, (9, 7, channels))
    colour, alpha = np.broadcast_to(deep[..., :-1], (9, 7, 3)) / 65_535, deep[..., -1:] / 65_535
    expected = 255 * (colour * alpha + 1 - alpha)
    assert np.abs(decode_image(deep_png(deep)) - expected).max() < 2.5


def test_palette_png() -> None:
    image = np.repeat(np.repeat(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8), 4, 0), 4, 1)
    palette = Image.fromarray(image).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    np.testing.assert_array_equal(decode_image(encode(palette, "PNG")), image)


def test_one_bit_png() -> None:
    np.testing.assert_array_equal(
        decode_image(encode(Image.fromarray(np.array([[True, False]])), "PNG"))[0, :, 1], [255, 0]
    )


def test_transparency_is_composited_on_white() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    np.testing.assert_array_equal(decode_image(encode(rgba, "PNG")), [[[200, 0, 0], [255, 255, 255], [127, 127, 127]]])


def test_transparent_palette_entry_and_grey_alpha_are_white() -> None:
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    assert (decode_image(encode(palette, "PNG", transparency=0)) == 255).all()
    assert (decode_image(encode(Image.new("LA", (2, 2), (9, 0)), "PNG")) == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(kind: str) -> None:
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    data = encode(
        red, kind, save_all=True, append_images=[blue], duration=50, **({"lossless": True} if kind == "WEBP" else {})
    )
    np.testing.assert_array_equal(decode_image(data), np.broadcast_to([255, 0, 0], (8, 8, 3)))


EXIF_VIEWS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,
}


@pytest.mark.parametrize("orientation", EXIF_VIEWS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    image, exif = gradient(6, 10), Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = EXIF_VIEWS[orientation](image)
    np.testing.assert_array_equal(decode_image(data), expected)
    assert image_size(data) == expected.shape[:2]


def test_exif_orientation_of_a_jpeg() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(gradient(16, 48), "JPEG", exif=exif)
    assert decode_image(data).shape == (48, 16, 3)
    assert image_size(data) == (48, 16)


def shown_turned(image: np.ndarray | Image.Image, kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif)


GREY = Image.fromarray(textured(61, 45)[..., 0])
PICTURES = {
    "JPEG": encode(textured(61, 45), "JPEG"),
    "JPEG without its end": encode(textured(61, 45), "JPEG")[:-2],
    "JPEG with stray bytes": encode(textured(61, 45), "JPEG")[:-2] + b"\x12\x34\xff\xd9",
    "grey JPEG": encode(GREY, "JPEG"),
    "CMYK JPEG": encode(Image.fromarray(textured(61, 45)).convert("CMYK"), "JPEG"),
    "turned JPEG": shown_turned(textured(61, 45), "JPEG", 6),
    "turned grey JPEG": shown_turned(GREY, "JPEG", 5),
    "one pixel of a grey JPEG": encode(GREY.resize((1, 1)), "JPEG"),
    "PNG": encode(textured(61, 45), "PNG"),
    "grey PNG": encode(GREY, "PNG"),
    "grey PNG with a transparent level": encode(GREY, "PNG", transparency=int(np.asarray(GREY)[0, 0])),
    "turned PNG": shown_turned(textured(61, 45), "PNG", 8),
    "turned grey PNG": shown_turned(GREY, "PNG", 3),
    "16-bit PNG": deep_png(np.random.default_rng(0).integers(0, 2**16, (61, 45, 1))),
    "transparent PNG": encode(Image.fromarray(np.dstack([textured(61, 45), textured(61, 45)[..., :1]])), "PNG"),
    "GIF": encode(textured(61, 45), "GIF"),
    "WebP": encode(textured(61, 45), "WEBP"),
}


@pytest.mark.parametrize("size", [(61, 45), (45, 61), (20, 31), (7, 90)], ids=str)
@pytest.mark.parametrize("data", PICTURES.values(), ids=PICTURES)
def test_pictures_scale_to_the_bytes_that_arrays_scale_to(data: bytes, size: tuple[int, int]) -> None:
    picture = decode_picture(data)
    assert picture.mode in ("RGB", "L")
    np.testing.assert_array_equal(resize(picture, *size), resize(decode_image(data), *size))


def test_grey_pictures_stay_one_channel() -> None:
    assert {decode_picture(PICTURES[kind]).mode for kind in ("grey JPEG", "turned grey JPEG", "grey PNG")} == {"L"}


def test_pictures_are_refused_for_the_reasons_of_arrays() -> None:
    data = encode(textured(96, 80), "JPEG")
    for broken in (b"", b"not an image", data[: len(data) // 2], data[:1500] + data[2000:-600] + b"\xff\xd9"):
        with pytest.raises(UndecodableImage) as caught:
            decode_picture(broken)
        assert caught.value.reason == reason_of(broken)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_ignored() -> None:
    data = encode(gradient(6, 10), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff\x00\x09")
    assert decode_image(data).shape == (6, 10, 3)


def test_size_needs_only_the_header() -> None:
    assert image_size(encode(gradient(300, 200), "PNG")[:100]) == (300, 200)
    assert image_size(encode(gradient(300, 200), "JPEG")[:700]) == (300, 200)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    for size in [(8_001, 8_000), (100_000, 1_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)]:
        assert reason_of(png_header(*size)) == "too_large"
        with pytest.raises(UndecodableImage, match="too_large"):
            image_size(png_header(*size))


def test_pixel_limit_is_inclusive() -> None:
    data = encode(gradient(10, 10), "PNG")
    assert decode_image(data, max_pixels=100).shape == (10, 10, 3)
    assert reason_of(data, max_pixels=99) == "too_large"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), kind)
    assert reason_of(data[: len(data) // 2]) == "truncated"


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.99])
def test_a_jpeg_that_ends_in_its_pixels_is_truncated(kept: float, progressive: bool) -> None:
    data = encode(textured(96, 80), "JPEG", progressive=progressive)
    assert reason_of(data[: int(len(data) * kept)]) == "truncated"


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_only_its_end_marker_is_whole(progressive: bool) -> None:
    data = encode(textured(96, 80), "JPEG", progressive=progressive)
    np.testing.assert_array_equal(decode_image(data[:-2]), decode_image(data))


@pytest.mark.parametrize("stray", [b"after the end", b"\x12\x34\x56"])
def test_stray_bytes_cost_no_pixel(stray: bytes) -> None:
    data = encode(textured(96, 80), "JPEG")
    np.testing.assert_array_equal(decode_image(data + stray), decode_image(data))
    np.testing.assert_array_equal(decode_image(data[:-2] + stray + data[-2:]), decode_image(data))


def test_a_jpeg_with_a_hole_is_corrupt() -> None:
    data = encode(textured(96, 80), "JPEG")
    assert reason_of(data[:1500] + data[2000:-600] + b"\xff\xd9") == "corrupt"


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)], ids=str)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_sides_of_one_pixel(kind: str, size: tuple[int, int]) -> None:
    decoded = decode_image(encode(np.full((*size, 3), 77, np.uint8), kind))
    assert decoded.shape == (*size, 3)
    assert np.abs(decoded.astype(int) - 77).max() <= 2


def test_pictures_reuse_memory_that_is_kept() -> None:
    data, before = encode(gradient(600, 800), "PNG"), Image.core.get_blocks_max()
    try:
        keep_memory()
        decode_image(data)
        Image.core.reset_stats()
        decode_image(data)
        assert Image.core.get_stats()["reused_blocks"] > 0
    finally:
        Image.core.set_blocks_max(before)
        Image.core.clear_cache()


@pytest.mark.parametrize(
    "data",
    [b"not an image", b"\x00" * 64, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0\n", b"%PDF-1.7\n"],
)
def test_other_formats_are_refused(data: bytes) -> None:
    assert reason_of(data) == "unknown_format"


def test_formats_that_pillow_knows_but_we_do_not_name_are_refused() -> None:
    for kind in ("TIFF", "ICO", "PPM"):
        assert reason_of(encode(gradient(16, 16), kind)) == "unknown_format"


def test_no_bytes_are_refused() -> None:
    assert reason_of(b"") == "empty"


def test_damaged_png_is_corrupt() -> None:
    data = bytearray(encode(gradient(64, 64), "PNG"))
    data[60:70] = bytes(10)
    assert reason_of(bytes(data)) == "corrupt"


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_too_large_also_where_warnings_are_errors() -> None:
    assert reason_of(png_header(10_000, 10_000)) == "too_large"


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]), st.integers(0, 2**32 - 1))
def test_damage_gives_an_image_or_a_reason_and_nothing_else(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = np.frombuffer(encode(gradient(24, 32), kind), np.uint8).copy()
    data[rng.integers(0, len(data), rng.integers(1, 12))] = rng.integers(0, 256)
    try:
        assert decode_image(bytes(data[: rng.integers(1, len(data) + 1)]), max_pixels=10_000).ndim == 3
    except UndecodableImage as error:
        assert error.reason in {"unknown_format", "too_large", "truncated", "corrupt"}  # noqa: PT017


def test_the_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(UndecodableImage("too_large", "9 x 9")))
    assert (error.reason, error.detail, str(error)) == ("too_large", "9 x 9", "undecodable image: too_large (9 x 9)")
