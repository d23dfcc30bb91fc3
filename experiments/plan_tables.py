"""Plans as the Markdown tables of docs/scale.md, from what `plan_report.to_json` says of them, so that plans that were saved serve too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.plan_report import GB, TERA
from hypervl_jax.planning.chips import GIB

PlanObject = Mapping[str, Any]
"""One plan as `plan_report.to_json` gives it."""

OVERVIEW = (
    "stage",
    "topology",
    "chips",
    "mesh",
    "rows at a time",
    "remat",
    "GiB of",
    "useful/compiled",
    "limit",
    "MFU at most",
    "step s at MFU",
    "tokens/s a chip",
    "days",
    "chip-hours",
)
MEMORY_KINDS = ("parameters", "optimizer", "tiles", "batch", "activations", "code", "needed", "available")
ARMS = ("stage", "topology", "arm", "TFLOP", "HBM GB", "collectives GB", "arithmetic s", "HBM s", "ICI s", "DCN s")
FLOORS = ("arithmetic", "hbm", "ici", "dcn")
LEAST_SHOWN = 0.05 * GB
"""Bytes of collectives of one kind below which they are left out."""


def tables(plans: Sequence[PlanObject]) -> str:
    """`overview`, memory of a device by kind, and what a device does in a step of each arm."""
    memory = [(plan["config"], plan["topology"], *_sizes(plan["bytes"])) for plan in plans]
    arms = [_arm_cells(plan, name) for plan in plans for name, arm in plan["arms"].items() if arm["demand"]]
    kinds = (f"{kind} GiB" for kind in MEMORY_KINDS)
    return "\n\n".join(
        (overview(plans), _table(("stage", "topology", *kinds), memory), _table(ARMS, arms)),
    )


def overview(plans: Iterable[PlanObject]) -> str:
    """One line a plan."""
    return _table(OVERVIEW, map(_cells, plans))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _sizes(memory: Mapping[str, int | None]) -> list[str]:
    sizes = (memory[kind] for kind in MEMORY_KINDS)
    return ["" if size is None else f"{size / GIB:.2f}" for size in sizes]


def _arm_cells(plan: PlanObject, name: str) -> tuple[str, ...]:
    arm = plan["arms"][name]
    head = (plan["config"], plan["topology"], name, f"{arm['demand']['flops'] / TERA:.1f}")
    seconds = [f"{arm['floors'][floor]:.3f}" for floor in FLOORS]
    moves = (
        f"{total['kind']}{' between slices' if total['crosses_slices'] else ''} {total['received'] / GB:.1f}"
        for total in arm["collectives"]
        if total["received"] >= LEAST_SHOWN
    )
    return (*head, f"{arm['demand']['hbm_bytes'] / GB:.0f}", ", ".join(moves), *seconds)


def _cells(plan: PlanObject) -> tuple[str, ...]:
    memory, budget, runtime, bound = plan["bytes"], plan["budget"], plan["runtime"], plan["mfu_bound"]
    fits = f"{memory['needed'] / GIB:.1f} of {memory['available'] / GIB:.1f}"
    return (
        plan["config"],
        plan["topology"],
        f"{plan['chips']:,}",
        " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1),
        f"{plan['rows_per_shard']} of {plan['rows']}",
        f"{runtime['decoder_remat']}/{runtime['tower_remat']}",
        fits if plan["fits"] else f"**{fits}: does not fit**",
        " / ".join(f"{name} {arm['useful_share']:.0%}" for name, arm in plan["arms"].items()),
        _limit(plan),
        f"{bound:.0%}" if bound else "",
        f"{budget['step_seconds']:.2f} at {budget['mfu']:.0%}",
        f"{budget['tokens_per_chip_second']:,.0f}",
        f"{budget['days']:.1f}",
        f"{budget['chip_hours']:,.0f}",
    )


def _limit(plan: PlanObject) -> str:
    """The longest floor of any arm; empty when the step does not fit."""
    floors = [pair for arm in plan["arms"].values() for pair in (arm["floors"] or {}).items()]
    return max(floors, key=lambda pair: pair[1])[0] if floors else ""
