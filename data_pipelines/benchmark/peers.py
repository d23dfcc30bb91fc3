"""The same pictures through other software: JPEG decoders, and Hugging Face `datasets` with a `transformers` processor.

Needs `pip install hypervl-jax[benchmark]`; what is not installed is left out of the tables and named.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.benchmark.steps import Clock, Work
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.qwen import QWEN3_SPECIAL
from hypervl_jax.text.tokenizer import HUGGING_FACE_FILE

DecodeScaled = Callable[[bytes, int], UInt8[np.ndarray, "h w 3"]]
"""A JPEG file to RGB at 1, 1/2, 1/4 or 1/8 of each side."""

SCALES = (1, 2, 4)
_DECODERS = ("pillow", "simplejpeg", "opencv-python-headless", "PyTurboJPEG")
TRANSFORMERS = "datasets + transformers"

_IMAGE_TOKEN = "<|image_pad|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
)


def jpeg_decoders() -> dict[str, DecodeScaled]:
    """Decoders that are installed, by name and version. PyTurboJPEG also needs the system's libturbojpeg."""
    found: dict[str, DecodeScaled] = {_versioned("pillow"): _pillow, _versioned("simplejpeg"): _simplejpeg}
    if importlib.util.find_spec("cv2"):
        found[_versioned("opencv-python-headless")] = _opencv()
    if importlib.util.find_spec("turbojpeg"):
        with contextlib.suppress(RuntimeError):  # the library itself is not installed
            found[_versioned("PyTurboJPEG")] = _turbojpeg()
    return found


def missing_decoders(found: Iterable[str]) -> list[str]:
    """Decoders that this module knows and `jpeg_decoders` did not find."""
    present = {name.split()[0] for name in found}
    return [name for name in _DECODERS if name not in present]


def _versioned(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _pillow(data: bytes, scale: int) -> UInt8[np.ndarray, "h w 3"]:
    image = Image.open(io.BytesIO(data))
    if scale > 1:
        image.draft("RGB", (image.width // scale, image.height // scale))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _simplejpeg(data: bytes, scale: int) -> UInt8[np.ndarray, "h w 3"]:
    if scale == 1:
        return simplejpeg.decode_jpeg(data)
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    smallest = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
    return simplejpeg.decode_jpeg(data, min_factor=scale, **smallest)


def _opencv() -> DecodeScaled:
    import cv2

    cv2.setNumThreads(1)
    reduced = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }
    in_place = lambda bgr: cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, bgr)
    return lambda data, scale: in_place(cv2.imdecode(np.frombuffer(data, np.uint8), reduced[scale]))


def _turbojpeg() -> DecodeScaled:
    import turbojpeg

    decoder = turbojpeg.TurboJPEG()
    return lambda data, scale: decoder.decode(data, turbojpeg.TJPF_RGB, scaling_factor=(1, scale))


def jpeg_files(work: Work) -> list[bytes]:
    """The JPEG files among the pictures, each once."""
    images = dict.fromkeys(image for image, _ in work.pictures())
    return [image for image in images if image[:2] == b"\xff\xd8"]


def decoder_seconds(decoders: dict[str, DecodeScaled], files: Sequence[bytes]) -> dict[tuple[str, int], float]:
    """Processor seconds of each decoder at each of `SCALES` for all files."""
    clock = Clock()
    for data, (name, decode), scale in itertools.product(files, decoders.items(), SCALES):
        with clock(f"{name}/{scale}"):
            decode(data, scale)
    return {(name, scale): clock.seconds[f"{name}/{scale}"] for name, scale in itertools.product(decoders, SCALES)}


def missing_for_transformers(root: pathlib.Path) -> str:
    """Why the comparison cannot run; empty when it can."""
    packages = [name for name in ("datasets", "transformers") if importlib.util.find_spec(name) is None]
    if packages:
        return f"{' and '.join(packages)} not installed"
    return "" if (root / HUGGING_FACE_FILE).is_file() else f"{root} has no {HUGGING_FACE_FILE}"


def image_backend() -> str:
    """What LLaVA-NeXT's image processor computes with here."""
    packages = ["transformers", "torchvision" if importlib.util.find_spec("torchvision") else "pillow"]
    return " and ".join(map(_versioned, packages))


class TransformersPath:
    """Hugging Face's way from a data set on disk to model input, for the samples of `work`.

    `datasets` reads an Arrow file and decodes with Pillow; LLaVA-NeXT's processor, the AnyRes of `transformers`, scales the picture
    to the best grid of tiles, adds a thumbnail, cuts, converts to normalised float32 and tokenises. It gets the same tile size,
    tile budget, filter and tokenizer as ours, steps that would change nothing are turned off, and nothing is packed or padded to
    other samples.

    Args:
        work: with a tokenizer of `tokenizers` and, for equal work, a thumbnail in its tiling.
        directory: an empty one for the Arrow file.
        tokenizer_directory: where the `tokenizer.json` of `work` lies.
    """

    def __init__(self, work: Work, directory: pathlib.Path, tokenizer_directory: pathlib.Path) -> None:
        import datasets

        features = datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "turns": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            }
        )
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(list(_rows(work)), features=features).save_to_disk(directory)
        self._dataset = datasets.load_from_disk(directory)
        self._processor = _processor(work.tiling, tokenizer_directory / HUGGING_FACE_FILE)

    def tiles(self) -> int:
        """Tiles that the processor makes of all samples."""
        return sum(inputs["pixel_values"].shape[1] for inputs in self._inputs() if "pixel_values" in inputs)

    def seconds(self) -> Counter[str]:
        """Processor seconds for all samples."""
        clock = Clock()
        with clock(TRANSFORMERS):
            for _ in self._inputs():
                pass
        return clock.seconds

    def _inputs(self) -> Iterator[dict[str, Any]]:
        for row in self._dataset:
            text = self._processor.apply_chat_template(row["turns"], tokenize=False)
            yield self._processor(images=row["images"] or None, text=text, return_tensors="np")


def _rows(work: Work) -> Iterator[dict[str, Any]]:
    for record in work.records:
        images = [{"bytes": image, "path": None} for image in record.images]
        turns = [{"role": turn.role, "content": turn.text.replace("<image>", _IMAGE_TOKEN)} for turn in record.turns]
        yield {"images": images, "turns": turns}


def _processor(tiling: TilingConfig, tokenizer: pathlib.Path) -> Any:
    """LLaVA-NeXT's processor with our tiles and tokenizer; the backend is torchvision's where that is installed."""
    import transformers

    transformers.logging.set_verbosity_error()
    side = tiling.tile_size
    grids = [[r * side, c * side] for r in range(1, tiling.max_tiles + 1) for c in range(1, tiling.max_tiles // r + 1)]
    images = transformers.LlavaNextImageProcessor(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=grids,
        resample=Image.Resampling.BILINEAR,
        do_resize=False,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    text = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), pad_token=QWEN3_SPECIAL[0], extra_special_tokens={"image_token": _IMAGE_TOKEN}
    )
    return transformers.LlavaNextProcessor(
        images,
        text,
        patch_size=tiling.cell_size,
        vision_feature_select_strategy="full",
        chat_template=_CHAT_TEMPLATE,
        image_token=_IMAGE_TOKEN,
    )
