"""Sample pictures of a report: the picture, the tiles the encoder got, the question, and what was answered."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from hypervl_jax.architecture import BRANCHES, TilingConfig
from hypervl_jax.evaluation.analysis import Groups, compressed, full_resolution, tasks_of
from hypervl_jax.evaluation.benchmarks import BLANK, IMAGE, Item, ItemResult
from hypervl_jax.evaluation.page import escape, png
from hypervl_jax.inference.assistant import AUTO
from hypervl_jax.text.conversation import IMAGE_SLOT
from hypervl_jax.vision.anyres import ImagePlan, plan_image, resize, tile_image, visual_slots
from hypervl_jax.vision.decoding import decode_image

RIGHT_SAMPLES, WRONG_SAMPLES = 3, 3
"""Samples of each task that both encoders answer rightly, and that at least one answers wrongly."""

_GAP = 3
"""Pixels between two drawn tiles."""

_FAINT = 50
"""Opacity of cells without a visual token, of 255."""

_PICTURE_LIMIT = 480
"""Longest side of an embedded picture, in pixels: reports of real data stay small."""

_SHOWN_SIDE = 132.0
"""Longest side of a picture on the page, in CSS pixels."""


def sample_cards(groups: Groups, items: Mapping[str, Item], tiling: TilingConfig) -> str:
    """Cards of every task's samples, right ones first."""
    return "".join(_task_cards(groups, task, items, tiling) for task in tasks_of(groups))


def _task_cards(groups: Groups, task: str, items: Mapping[str, Item], tiling: TilingConfig) -> str:
    cards = [
        _card(items[identity], answers, tiling)
        for identity, answers in choose_samples(groups, task)
        if identity in items and items[identity].images
    ]
    return f'<h3>{escape(task)}</h3><div class="samples">{"".join(cards)}</div>' if cards else ""


def choose_samples(groups: Groups, task: str) -> list[tuple[str, dict[str, ItemResult]]]:
    """Items of a task and their answers by the name they are shown with: the first right and the first wrong ones by content hash.

    Nobody picks them, and another run of the same data shows the same pictures where it can.
    """
    answers = _answers(groups, task)
    ranked = sorted(answers, key=lambda identity: hashlib.sha256(identity.encode()).digest())
    right = [identity for identity in ranked if _all_right(answers[identity])]
    wrong = [identity for identity in ranked if not _all_right(answers[identity])]
    return [(identity, answers[identity]) for identity in (*right[:RIGHT_SAMPLES], *wrong[:WRONG_SAMPLES])]


def _answers(groups: Groups, task: str) -> dict[str, dict[str, ItemResult]]:
    """Answers of each item: both encoders', with α from the VRC where it was measured, and one to a blank picture."""
    found = {
        branch: compressed(groups, task, branch) or full_resolution(groups, task, branch, IMAGE) for branch in BRANCHES
    }
    blind = (full_resolution(groups, task, branch, BLANK) for branch in reversed(BRANCHES))
    results = found | {"blank image": next(filter(None, blind), None)}
    answers: dict[str, dict[str, ItemResult]] = {}
    for name, result in results.items():
        for item in result.items if result is not None else ():
            answers.setdefault(item.identity, {})[name] = item
    return answers


def _all_right(answers: Mapping[str, ItemResult]) -> bool:
    return all(answers[branch].score >= 0.5 for branch in BRANCHES if branch in answers)


def _card(item: Item, answers: Mapping[str, ItemResult], tiling: TilingConfig) -> str:
    """One sample. Of several images the first is drawn."""
    seen = next(answers[branch] for branch in reversed(BRANCHES) if branch in answers)
    question = item.turns[-1].text.replace(IMAGE_SLOT, "").strip()
    rows = "".join(_answer_row(name, result) for name, result in answers.items())
    about = " · ".join(filter(None, (item.kind.replace("_", " "), f"level {item.level}" if item.level else "")))
    return (
        f'<article class="sample">{_views(item.images[0], seen, tiling)}'
        f'<p class="question">{escape(question)}</p><dl class="answers"><dt>right answer</dt><dd>{escape(item.answers[0])}</dd>{rows}</dl>'
        f'<p class="note">{escape(about)}</p></article>'
    )


def _answer_row(name: str, result: ItemResult) -> str:
    right = result.score >= 0.5
    mark = f'<span class="{"yes" if right else "no"}">{"✓" if right else "✗"}</span>'
    return f"<dt>{escape(name)}</dt><dd>{mark} {escape(result.prediction) or '<i>nothing</i>'}</dd>"


def _views(image: bytes, seen: ItemResult, tiling: TilingConfig) -> str:
    """The picture, and beside it, at the same scale, the tiles that the encoder got."""
    rgb = decode_image(image)
    height, width = rgb.shape[:2]
    alpha = seen.alphas[0] if seen.alphas else 1.0
    full, plan = plan_image(height, width, 1.0, tiling), plan_image(height, width, alpha, tiling)
    mosaic = tile_mosaic(rgb, plan, tiling)
    zoom = min(_SHOWN_SIDE / max(full.height, full.width, *mosaic.shape[:2]), 2.0)
    picture = shrink(rgb)
    chosen = "α = auto: " if seen.alpha == AUTO else "α = "
    views = (
        (png(picture, zoom * full.width / picture.shape[1], "the picture"), f"{width} × {height}<br>{_cost(full)}"),
        (png(mosaic, zoom, "the tiles"), f"{chosen}{alpha:.2f}<br>{_cost(plan)}"),
    )
    figures = (f"<figure>{view}<figcaption>{caption}</figcaption></figure>" for view, caption in views)
    return f'<div class="views">{"".join(figures)}</div>'


def _cost(plan: ImagePlan) -> str:
    return f"{_plural(plan.tiles, 'tile')}, {_plural(plan.tokens, 'token')}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shrink(rgb: UInt8[np.ndarray, "h w 3"], limit: int = _PICTURE_LIMIT) -> UInt8[np.ndarray, "H W 3"]:
    """The picture with its longest side at most `limit` pixels."""
    height, width = rgb.shape[:2]
    longest = max(height, width, limit)
    return resize(rgb, max(1, height * limit // longest), max(1, width * limit // longest))


def tile_mosaic(rgb: UInt8[np.ndarray, "h w 3"], plan: ImagePlan, tiling: TilingConfig) -> UInt8[np.ndarray, "h w 4"]:
    """What becomes of a picture, as `lay_out_tiles` shows it."""
    return lay_out_tiles(tile_image(rgb, plan, tiling), plan, tiling)


def lay_out_tiles(
    tiles: UInt8[np.ndarray, "t s s 3"], plan: ImagePlan, tiling: TilingConfig
) -> UInt8[np.ndarray, "h w 4"]:
    """The tiles in their places with transparent gaps, cells without a visual token faint; a thumbnail stands below."""
    side, gapped = tiling.tile_size, tiling.tile_size + _GAP
    rows = plan.rows + (1 if plan.tiles > plan.rows * plan.columns else 0)
    canvas = np.zeros((rows * gapped - _GAP, plan.columns * gapped - _GAP, 4), np.uint8)
    opacities = token_opacity(plan, tiling)
    for number, tile in enumerate(tiles):
        top, left = (place * gapped for place in divmod(number, plan.columns))
        canvas[top : top + side, left : left + side] = np.dstack([tile, opacities[number]])
    return canvas


def token_opacity(plan: ImagePlan, tiling: TilingConfig) -> UInt8[np.ndarray, "t s s"]:
    """255 over cells whose visual token enters the LLM's sequence, `_FAINT` over the others."""
    cells = np.full(plan.tiles * tiling.tokens_per_tile, _FAINT, np.uint8)
    cells[visual_slots(plan, tiling)] = 255
    across = tiling.tile_size // tiling.cell_size
    grid = cells.reshape(plan.tiles, across, across)
    return grid.repeat(tiling.cell_size, 1).repeat(tiling.cell_size, 2)
