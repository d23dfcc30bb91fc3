"""Signatures by which near duplicates are found: perceptual hashes of pictures, MinHash of texts, and the keys that group them.

Two pictures whose 64-bit hashes differ in at most d bits agree in at least two of d + 2 blocks of bits, so every pair of blocks
is a key (Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling", 2007): grouping by keys misses no pair. Texts
share a key when a whole band of their MinHash agrees (Broder 1997; locality-sensitive hashing as in "Mining of Massive
Datasets", chapter 3), and bands are cut so that a pair as similar as the threshold is found with probability 0.95 or more.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import datasketch
import imagehash
import numpy as np
import xxhash
from jaxtyping import UInt8
from PIL import Image

IMAGE_BITS = 64
SHINGLE_WORDS = 5
RECALL = 0.95
"""Chance that two texts exactly as similar as the threshold are compared; more similar ones have a higher one."""

_HAN_AND_KANA = (
    r"\u3005-\u3007\u3041-\u3096\u309d\u309e\u30a1-\u30fa\u30fc-\u30fe\u31f0-\u31ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)
_THAI, _THAI_MARKS = r"\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46\u0e50-\u0e59", r"\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
_WORD = re.compile(rf"[{_HAN_AND_KANA}]|[{_THAI}][{_THAI_MARKS}]*|[^\W{_HAN_AND_KANA}{_THAI}{_THAI_MARKS}]+")
"""Chinese, Japanese and Thai put no spaces between words: each of their characters is a word here (Thai marks go with theirs)."""


def image_hash(rgb: UInt8[np.ndarray, "h w 3"]) -> int:
    """The 64-bit perceptual hash of a picture (`imagehash.phash`: signs of the low frequencies of its cosine transform)."""
    bits = imagehash.phash(Image.fromarray(rgb)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hamming(left: int, right: int) -> int:
    """Bits in which two hashes differ."""
    return (left ^ right).bit_count()


def image_keys(value: int, distance: int) -> Iterator[tuple[int, int]]:
    """(which blocks, their bits): hashes that differ in `distance` bits or fewer have a key in common."""
    edges = [IMAGE_BITS * block // (distance + 2) for block in range(distance + 3)]
    masks = [(1 << end) - (1 << start) for start, end in itertools.pairwise(edges)]
    for number, (first, second) in enumerate(itertools.combinations(masks, 2)):
        yield number, value & (first | second)


def words(text: str) -> list[str]:
    """Words of a text for comparison: compatibility forms, case and punctuation put aside; Han, kana and Thai by character."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def word_hashes(tokens: Sequence[str], count: int) -> Iterator[int]:
    """64-bit hashes of the runs of `count` words; of the whole, where there are fewer."""
    for start in range(max(1, len(tokens) - count + 1)):
        yield xxhash.xxh3_64_intdigest("\0".join(tokens[start : start + count]).encode())


def text_signature(text: str, permutations: int) -> bytes:
    """MinHash of the word 5-grams of a text, `4 · permutations` bytes; the same on every machine."""
    sketch = datasketch.MinHash(
        permutations, hashfunc=_low_word, permutations=_permutations(permutations), scheme="affine32"
    )
    sketch.update_batch(list(set(word_hashes(words(text), SHINGLE_WORDS))))
    return sketch.hashvalues.astype("<u4").tobytes()


def _low_word(value: int) -> int:
    return value & 0xFFFFFFFF


@functools.cache
def _permutations(count: int) -> np.ndarray:
    """Drawn once a process: they cost more than hashing a short text."""
    return datasketch.MinHash(count).permutations


def similarity(left: bytes, right: bytes) -> float:
    """Estimated Jaccard similarity of the texts behind two signatures."""
    return float(np.mean(np.frombuffer(left, "<u4") == np.frombuffer(right, "<u4")))


def text_keys(signature: bytes, threshold: float) -> Iterator[tuple[int, bytes]]:
    """(which band, its bytes): texts as similar as `threshold` very likely have a key in common."""
    bands, rows = band_shape(threshold, len(signature) // 4)
    for band in range(bands):
        yield band, signature[4 * rows * band : 4 * rows * (band + 1)]


@functools.cache
def band_shape(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows of a band): the widest bands, hence the fewest false keys, that find a pair at `threshold` with `RECALL`."""
    found = lambda rows: 1 - (1 - threshold**rows) ** (permutations // rows)
    rows = max((rows for rows in range(1, permutations + 1) if found(rows) >= RECALL), default=1)
    return permutations // rows, rows


def text_fingerprint(text: str) -> int:
    """64 bits that are equal for texts of the same words."""
    return xxhash.xxh3_64_intdigest("\0".join(words(text)).encode())
