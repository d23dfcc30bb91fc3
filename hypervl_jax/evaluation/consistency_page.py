"""The page of `tools.compare_encoders`: how far the encoders lie apart on each task, and where they do most, as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypervl_jax.architecture import BRANCHES, TilingConfig
from hypervl_jax.evaluation import page, plots
from hypervl_jax.evaluation.analysis import percent
from hypervl_jax.evaluation.benchmarks import Item
from hypervl_jax.evaluation.consistency import ItemComparison, TaskComparison, worst
from hypervl_jax.evaluation.gallery import shrink, tile_mosaic
from hypervl_jax.evaluation.statistics import Estimate
from hypervl_jax.text.conversation import IMAGE_SLOT
from hypervl_jax.vision.anyres import plan_image
from hypervl_jax.vision.decoding import decode_image

_SHOWN_SIDE = 132.0
"""Longest side of a picture on the page, in CSS pixels."""

_NOTE = (
    "Means over items, [95 % interval] by bootstrap, Wilson's for shares of items. KL, cross-entropy, top token and hidden states: over the "
    "tokens of the right answer, which is given; KL in nats at T = 1. Distances are 1 − cosine. Same answer: both generate greedily and say "
    "the same, case and punctuation aside."
)


def build_page(
    rows: Sequence[TaskComparison],
    items: Mapping[str, Item],
    tiling: TilingConfig,
    warnings: Sequence[str],
    shown: int,
) -> str:
    """The whole document.

    Args:
        rows: by task.
        items: by identity.
        tiling: of the model, to draw the tiles.
        warnings: said first.
        shown: worst items of each task.
    """
    signs = [f'<p class="lead no">{page.escape(warning)}</p>' for warning in warnings]
    calm = [] if warnings else [page.paragraph("Switching encoders keeps the answers on every task.", "lead")]
    shares = {row.task: {"same likeliest token": row.agreement, "same answer": row.same_answer} for row in rows}
    parts = [
        page.paragraph(_NOTE, "note"),
        page.table(("task", "items", *_COLUMNS), map(_task_row, rows)),
        page.panel(plots.accuracy_intervals(shares)),
    ]
    pictures = [_task_cards(row, items, tiling, shown) for row in rows]
    note = "The items of each task with the largest KL(large ‖ base). Left the picture, right the tiles that both encoders get."
    return page.page(
        "The two encoders compared",
        [
            "<h1>The two encoders compared</h1>",
            *signs,
            *calm,
            page.section("tasks", "By task", *parts),
            page.section("worst", "Where they differ most", page.paragraph(note, "note"), *pictures),
        ],
    )


_COLUMNS = (
    "KL(large ‖ base)",
    "KL(base ‖ large)",
    "same top token",
    "same answer",
    "loss base",
    "loss large",
    "hidden",
    "visual",
)


def _task_row(row: TaskComparison) -> tuple[str, ...]:
    losses = (row.cross_entropy[branch] for branch in BRANCHES)
    visual = _number(row.visual_distance) if row.visual_distance else ""
    shares = (percent(value) for value in (row.agreement, row.same_answer))
    numbers = (_number(value) for value in (*losses, row.hidden_distance))
    left_out = f" <small>({row.left_out} left out)</small>" if row.left_out else ""
    kls = (_number(row.kl), _number(row.reverse_kl))
    return (page.escape(row.task), f"{len(row.items)}{left_out}", *kls, *shares, *numbers, visual)


def _number(value: Estimate) -> str:
    return f"{value.mean:.3f} <small>[{value.low:.3f}, {value.high:.3f}]</small>"


def _task_cards(row: TaskComparison, items: Mapping[str, Item], tiling: TilingConfig, shown: int) -> str:
    cards = [_card(found, items[found.identity], tiling) for found in worst(row, shown)]
    return f'<h3>{page.escape(row.task)}</h3><div class="samples">{"".join(cards)}</div>' if cards else ""


def _card(found: ItemComparison, item: Item, tiling: TilingConfig) -> str:
    """One item. Of several images the first is drawn."""
    question = item.turns[-1].text.replace(IMAGE_SLOT, "").strip()
    said = "".join(
        f"<dt>{branch}</dt><dd>{page.escape(found.answers[branch]) or '<i>nothing</i>'}</dd>" for branch in BRANCHES
    )
    mark = '<span class="yes">same answer</span>' if found.same_answer else '<span class="no">different answers</span>'
    numbers = f"KL {found.kl:.3f} · top token {100 * found.agreement:.0f} % · hidden {found.hidden_distance:.3f}"
    return (
        f'<article class="sample">{_views(item, tiling)}<p class="question">{page.escape(question)}</p>'
        f'<dl class="answers"><dt>right answer</dt><dd>{page.escape(item.answers[0])}</dd>{said}</dl>'
        f'<p class="note">{mark} · {numbers}</p></article>'
    )


def _views(item: Item, tiling: TilingConfig) -> str:
    if not item.images:
        return ""
    rgb = decode_image(item.images[0])
    plan = plan_image(*rgb.shape[:2], 1.0, tiling)
    picture, mosaic = shrink(rgb), tile_mosaic(rgb, plan, tiling)
    drawn = (
        page.png(pixels, min(_SHOWN_SIDE / max(pixels.shape[:2]), 2.0), name)
        for pixels, name in ((picture, "the picture"), (mosaic, "the tiles"))
    )
    caption = f"{rgb.shape[1]} × {rgb.shape[0]}", f"{plan.tiles} tiles, {plan.tokens} tokens"
    figures = (
        f"<figure>{view}<figcaption>{text}</figcaption></figure>" for view, text in zip(drawn, caption, strict=True)
    )
    return f'<div class="views">{"".join(figures)}</div>'
