"""HTML of packed rows as training gets them: budgets as coloured bars, tiles from the batch's bytes, text with its loss weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from hypervl_jax.architecture import TilingConfig
from hypervl_jax.evaluation.gallery import lay_out_tiles
from hypervl_jax.evaluation.page import escape, panel, png
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.training.batch import Batch
from hypervl_jax.vision.anyres import ImagePlan

STYLE = """<style>
.bar { display: block; width: 100%; height: 1.5rem; border-radius: 4px; background: var(--line); }
.tilebar { display: flex; gap: 2px; margin: .35rem 0 0; }
.tilebar i { flex: 1; height: .7rem; border-radius: 2px; background: var(--line); }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .9rem; margin: .6rem 0; }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .35em; vertical-align: -.06em; }
.packed { margin: .3rem 0 1rem; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: .7rem;
  align-items: start; }
.packed .sample h4 { font-size: .92rem; margin: 0 0 .1rem; }
.mosaics { display: flex; flex-wrap: wrap; gap: .6rem; margin: .5rem 0; align-items: flex-start; }
.mosaics img { max-width: 100%; height: auto; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15rem; overflow-y: auto; font-size: .82rem; line-height: 1.5; }
.tokens .context { color: var(--soft); }
.tokens mark { background: color-mix(in srgb, var(--good) 26%, transparent); color: var(--ink); border-radius: 2px; }
.tokens .visual { border: 1px solid var(--line); border-radius: 4px; padding: 0 .35em; font-size: .92em; color: var(--accent); white-space: nowrap; }
.rowhead { display: flex; justify-content: space-between; gap: 1rem; font-size: .86rem; margin-bottom: .3rem; color: var(--soft); }
.rowhead b { color: var(--ink); font-size: 1rem; }
.histograms { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .7rem; }
.histograms .panel { margin: 0; padding: .6rem .7rem; } .histograms h4 { margin: 0; font-size: .86rem; }
.panel > svg.bar { min-width: 0; max-width: none; margin: 0; }
.histograms .panel > svg { min-width: 0; }
</style>"""

_GOLDEN_ANGLE = 137.508
"""Degrees of hue between one source and the next: any number of them stay apart."""

_OPACITY = {"visual": 0.3, "context": 0.58, "weighted": 1.0}
_MOSAIC_SIDE = 320
"""Longest side of drawn tiles, in pixels: a page of large rows stays a few megabytes."""


class Segment(NamedTuple):
    """A sample in its row.

    Attributes:
        source: number of its source.
        place: its positions.
        tiles: its tile slots.
        plans: of its images, in order.
        about: what else is known of it, as plain text.
        failure: why it was left out; empty if it was not.
    """

    source: int
    place: slice
    tiles: slice
    plans: tuple[ImagePlan, ...]
    about: str
    failure: str


def colour(source: int) -> str:
    """A colour for a source by its number, readable on light and dark pages."""
    return f"hsl({source * _GOLDEN_ANGLE % 360:.0f} 62% 52%)"


def key(names: Sequence[str]) -> str:
    """Which colour is which source."""
    entries = (f"<span>{dot(number)}{escape(name)}</span>" for number, name in enumerate(names))
    return f'<div class="key">{"".join(entries)}</div>'


def dot(source: int) -> str:
    """A spot in a source's colour."""
    return f'<i class="dot" style="background:{colour(source)}"></i>'


def row_panel(
    title: str,
    row: Batch,
    segments: Sequence[Segment],
    names: Sequence[str],
    tokenizer: Tokenizer,
    tiling: TilingConfig,
) -> str:
    """One packed row: its two budgets, then each sample with its tiles and text.

    Args:
        title: which row it is.
        row: of a batch, without the leading axis.
        segments: what was packed into it.
        names: of the sources.
        tokenizer: turns ids into text.
        tiling: of the batch.
    """
    tokens, tiles = int((row.segments > 0).sum()), int((row.tile_segments > 0).sum())
    head = (
        f'<div class="rowhead"><b>{escape(title)}</b><span>{tokens} of {len(row.tokens)} tokens, '
        f"{tiles} of {len(row.tile_segments)} tiles, {plural(len(segments), 'sample')}</span></div>"
    )
    cards = (_card(row, segment, names, tokenizer, tiling) for segment in segments)
    return panel(head + token_bar(row) + tile_bar(row)) + f'<div class="packed">{"".join(cards)}</div>'


def token_bar(row: Batch) -> str:
    """The row's positions from left to right: colour by source, faint for visual tokens, full where the loss counts."""
    rectangles = "".join(_rectangles(row))
    length = len(row.tokens)
    return f'<svg class="bar" viewBox="0 0 {length} 10" preserveAspectRatio="none" role="img" aria-label="tokens">{rectangles}</svg>'


def _rectangles(row: Batch) -> Iterator[str]:
    start = 0
    for (segment, kind), run in itertools.groupby(zip(row.segments.tolist(), kinds(row), strict=True)):
        width = len(list(run))
        if segment:
            fill = f'fill="{colour(int(row.sources[start]))}" fill-opacity="{_OPACITY[kind]}"'
            begins = start == 0 or row.segments[start - 1] != segment
            yield f'<rect x="{start}" width="{width}" height="10" {fill}><title>sample {segment}: {width} {kind} tokens</title></rect>'
            if begins and start:
                yield f'<rect x="{start}" width="{len(row.tokens) / 600:.2f}" height="10" fill="var(--card)"/>'
        start += width


def kinds(row: Batch) -> list[str]:
    """Of each position: `visual`, `weighted` (the loss counts its prediction) or `context`."""
    return [
        "visual" if visual >= 0 else "weighted" if weight > 0 else "context"
        for visual, weight in zip(row.visual_index.tolist(), token_weights(row).tolist(), strict=True)
    ]


def token_weights(row: Batch) -> np.ndarray:
    """Loss weight of each token at its own place; in the batch it stands one earlier, where the token is predicted."""
    return np.concatenate([np.zeros(1, np.float32), row.loss_weights[:-1]])


def tile_bar(row: Batch) -> str:
    """The row's tile slots in the colours of their samples' sources; every other sample is paler."""
    sources = {
        segment: int(source) for segment, source in zip(row.segments.tolist(), row.sources.tolist(), strict=True)
    }
    slots = (
        f'<i style="background:{colour(sources[segment])};opacity:{1 if segment % 2 else 0.6}" title="sample {segment}"></i>'
        if segment
        else "<i></i>"
        for segment in row.tile_segments.tolist()
    )
    return f'<div class="tilebar">{"".join(slots)}</div>'


def _card(row: Batch, segment: Segment, names: Sequence[str], tokenizer: Tokenizer, tiling: TilingConfig) -> str:
    title = f"<h4>{dot(segment.source)}{escape(names[segment.source])}</h4>"
    about = f'<p class="note">{escape(segment.about)}</p>'
    if segment.failure:
        return f'<article class="sample">{title}{about}<p class="no">left out: {escape(segment.failure)}</p></article>'
    images = "".join(mosaics(row.tiles[segment.tiles], segment.plans, tiling))
    text = f'<div class="tokens">{sample_text(row, segment.place, tokenizer)}</div>'
    return f'<article class="sample">{title}{about}<div class="mosaics">{images}</div>{text}</article>'


def mosaics(tiles: UInt8[np.ndarray, "t s s 3"], plans: Sequence[ImagePlan], tiling: TilingConfig) -> Iterator[str]:
    """Each image's tiles in their places; cells without a visual token are faint."""
    first = 0
    for plan in plans:
        drawn = lay_out_tiles(tiles[first : first + plan.tiles], plan, tiling)
        yield png(_shrunk(drawn), 0.5 if max(drawn.shape) > _MOSAIC_SIDE else 1.0, plural(plan.tiles, "tile"))
        first += plan.tiles


def _shrunk(drawn: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "H W 4"]:
    height, width = drawn.shape[:2]
    limit = 2 * _MOSAIC_SIDE
    longest = max(height, width, limit)
    size = max(1, width * limit // longest), max(1, height * limit // longest)
    return np.asarray(Image.fromarray(drawn).resize(size, Image.Resampling.BOX))


def sample_text(row: Batch, place: slice, tokenizer: Tokenizer) -> str:
    """A sample's ids as text: what the loss counts is marked, a stretch of visual tokens is one label."""
    runs = itertools.groupby(range(place.start, place.stop), key=kinds(row).__getitem__)
    return "".join(_run(kind, row.tokens[list(positions)].tolist(), tokenizer) for kind, positions in runs)


def _run(kind: str, ids: Sequence[int], tokenizer: Tokenizer) -> str:
    if kind == "visual":
        return f'<span class="visual">{len(ids)} visual tokens</span>'
    text = escape(tokenizer.decode(ids, skip_special=False))
    return f"<mark>{text}</mark>" if kind == "weighted" else f'<span class="context">{text}</span>'


def histograms(title: str, values: Mapping[int, Sequence[int]], names: Sequence[str], edges: Sequence[int]) -> str:
    """A histogram of each source: the share of its samples between two `edges`, the last edge included."""
    panels = (panel(_histogram(number, names[number], taken, edges)) for number, taken in values.items())
    return f'<h3>{escape(title)}</h3><div class="histograms">{"".join(panels)}</div>'


def _histogram(source: int, name: str, values: Sequence[int], edges: Sequence[int]) -> str:
    counts, _ = np.histogram(values, edges)
    shares = counts / max(counts.sum(), 1)
    bars = (
        f'<rect x="{place + 0.06}" y="{10 - 9.4 * share / max(shares.max(), 1e-9):.3f}" width="0.88" height="{9.4 * share / max(shares.max(), 1e-9):.3f}" '
        f'fill="{colour(source)}"><title>{low} to {high}: {share:.1%}</title></rect>'
        for place, (share, (low, high)) in enumerate(zip(shares, itertools.pairwise(edges), strict=True))
    )
    svg = f'<svg viewBox="0 0 {len(counts)} 10" preserveAspectRatio="none" style="height:4.2rem">{"".join(bars)}</svg>'
    ends = f'<div class="rowhead"><span>{edges[0]}</span><span>{edges[-1]}</span></div>'
    about = f'<p class="note">{plural(len(values), "sample")}, mean {np.mean(values):.1f}, most {max(values)}</p>'
    return f"<h4>{dot(source)}{escape(name)}</h4>{svg}{ends}{about}"


def plural(count: int, noun: str) -> str:
    """The count and its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def numbers(pairs: Iterable[tuple[str, str]]) -> str:
    """Large figures with what they are."""
    cards = (f'<div class="number"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in pairs)
    return f'<div class="numbers">{"".join(cards)}</div>'
