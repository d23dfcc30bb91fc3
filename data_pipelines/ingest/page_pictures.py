"""A program of its own that makes pictures of a document's pages: `page_pictures.py pdf|tif RESOLUTION PAGES < FILE`.

Documents come from the open web, and the libraries that read them are written in C: a document that crashes, loops or takes all
memory ends this process, within its limits, and not the worker that started it. It imports nothing of the project, so that it
starts in a fifth of a second from wherever the file lies.

It writes msgpack: the number of pages, then for each of the first PAGES `[picture as PNG, ""]` or `[b"", why there is none]`.
"""

from __future__ import annotations

import io
import resource
import sys
from collections.abc import Iterator

import msgpack
from PIL import Image

CPU_SECONDS, MEMORY_BYTES, OUTPUT_BYTES = 120, 4 * 2**30, 2**29
"""Limits of a document; pages beyond the last are `TOO_LARGE`, since the worker holds all pictures of a document."""

PAGE_PIXELS = 36_000_000
"""Of a page, checked before it is drawn: four times an A4 page at 300 dots an inch."""

_POINTS_PER_INCH = 72
_PLAIN_MODES = ("1", "L", "RGB")
TOO_LARGE, DAMAGED = "page_too_large", "page_damaged"


def pdf_pages(data: bytes, resolution: int, pages: int) -> Iterator[int | list[bytes | str]]:
    """The messages for a PDF file, drawn by PDFium."""
    import pypdfium2

    document = pypdfium2.PdfDocument(data)
    scale = resolution / _POINTS_PER_INCH
    yield len(document)
    for number in range(min(pages, len(document))):
        try:
            page = document[number]
            width, height = page.get_size()
            large = width * height * scale**2 > PAGE_PIXELS
            yield [b"", TOO_LARGE] if large else [_png(page.render(scale=scale).to_pil()), ""]
        except pypdfium2.PdfiumError:
            yield [b"", DAMAGED]


def tiff_pages(data: bytes, pages: int) -> Iterator[int | list[bytes | str]]:
    """The messages for a TIFF file, whose pages stay as they are: bilevel scans remain bilevel."""
    with Image.open(io.BytesIO(data), formats=("TIFF",)) as document:
        yield document.n_frames
        for number in range(min(pages, document.n_frames)):
            try:
                document.seek(number)
                large = document.width * document.height > PAGE_PIXELS
                yield [b"", TOO_LARGE] if large else [_png(document), ""]
            except (OSError, ValueError, SyntaxError):
                yield [b"", DAMAGED]


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.load()
    plain = picture if picture.mode in _PLAIN_MODES else picture.convert("RGB")
    plain.copy().save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    """Reads the document from standard input, and writes the messages."""
    # At the first limit the system sends SIGXCPU, which the worker knows; at the second SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before a page is decoded
    kind, resolution, pages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    data = sys.stdin.buffer.read()
    written = 0
    for message in pdf_pages(data, resolution, pages) if kind == "pdf" else tiff_pages(data, pages):
        packed = msgpack.packb(message)
        written += len(packed)
        sys.stdout.buffer.write(packed if written <= OUTPUT_BYTES else msgpack.packb([b"", TOO_LARGE]))


if __name__ == "__main__":
    main()
