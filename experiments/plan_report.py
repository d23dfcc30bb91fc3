"""A plan as one JSON object and as tables for a terminal."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from experiments.planning import ArmPlan, Memory, Plan, flops_by_part
from hypervl_jax.planning.chips import GIB

GB, TERA = 1e9, 1e12

CONVENTIONS = (
    "Useful FLOPs: forward, backward and the teacher's forward pass of every position and tile slot, matrix products only, causal attention "
    "as half. Floors: published peaks, everything overlapped. Tokens: LLM positions without padding, at the packer's planned fill."
)


def name_of(arm: ArmPlan) -> str:
    """The branches that an arm trains, `base` or `base+large`."""
    return "+".join(arm.branches)


def collective_totals(arm: ArmPlan) -> list[dict[str, Any]]:
    """Collectives of one arm by kind and by whether they leave the slice: calls, array bytes and bytes received by a device."""
    totals: dict[tuple[str, bool], dict[str, float]] = collections.defaultdict(collections.Counter)
    for move in arm.collectives or ():
        entry = totals[move.kind, move.crosses]
        entry["calls"] += move.times
        entry["bytes"] += move.size * move.times
        entry["received"] += move.received
    return [{"kind": kind, "crosses_slices": crosses, **entry} for (kind, crosses), entry in sorted(totals.items())]


def to_json(plan: Plan) -> dict[str, Any]:
    """All of a plan in plain values: bytes and seconds, of one device where not said otherwise."""
    runtime, objective = plan.config.runtime, plan.config.objective
    return {
        "config": plan.config.name,
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "devices": plan.topology.num_devices,
        "mesh": dict(plan.mesh),
        "rows": plan.config.batch.rows,
        "rows_per_shard": plan.rows_per_shard,
        "accumulation": objective.accumulation,
        "loss_chunk_tokens": objective.loss_chunk_tokens,
        "runtime": dataclasses.asdict(runtime),
        "fits": plan.memory.fits,
        "planned": planned(plan),
        "bytes": dataclasses.asdict(plan.memory),
        "arms": {name_of(arm): _arm_to_json(arm) for arm in plan.arms},
        "step_seconds_floor": plan.step_floor,
        "mfu_bound": plan.mfu_bound,
        "budget": plan.budget._asdict(),
    }


def _arm_to_json(arm: ArmPlan) -> dict[str, Any]:
    return {
        "flops": flops_by_part(arm),
        "compiled_flops": sum(arm.compiled.values()),
        "useful_flops": sum(arm.useful.values()),
        "useful_share": arm.useful_share,
        "collectives": None if arm.collectives is None else collective_totals(arm),
        "demand": arm.demand and arm.demand._asdict(),
        "floors": arm.floors and arm.floors._asdict(),
    }


def verdict(memory: Memory) -> str:
    """Whether it fits and by how much, in one line."""
    spare = (memory.available - memory.needed) / GIB
    fits = f"fits with {spare:.2f} GiB to spare" if memory.fits else f"does not fit: {-spare:.2f} GiB too much"
    return f"{fits} ({memory.needed / GIB:.2f} of {memory.available / GIB:.2f} GiB a device)"


def tables(plan: Plan) -> RenderableType:
    """A plan for a terminal."""
    return Group(_head_table(plan), _memory_table(plan.memory), *map(_flops_table, plan.arms), _limits_table(plan))


def _plain(title: str, rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _head_table(plan: Plan) -> Table:
    runtime, objective, budget = plan.config.runtime, plan.config.objective, plan.budget
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    rows = [
        ("memory", verdict(plan.memory)),
        ("mesh", f"{mesh}; {plan.topology.chips} chips, {plan.topology.num_devices} devices"),
        (
            "batch",
            f"{plan.config.batch.rows} rows = {objective.accumulation} micro-batches, {plan.rows_per_shard} rows a shard at a time",
        ),
        (
            "layout",
            f"remat {runtime.decoder_remat}/{runtime.tower_remat}, attention {runtime.attention}, loss chunk {objective.loss_chunk_tokens} tokens",
        ),
        (
            "bound",
            "unknown"
            if plan.mfu_bound is None
            else f"step at least {plan.step_floor:.3f} s, MFU at most {plan.mfu_bound:.1%}",
        ),
        (
            "at MFU",
            f"{budget.mfu:.0%}: step {budget.step_seconds:.2f} s, {budget.tokens_per_chip_second:,.0f} tokens/s a chip",
        ),
        ("stage", f"{budget.days:.1f} days, {budget.chip_hours:,.0f} chip-hours" + _price(budget.price)),
    ]
    return _plain(f"{plan.config.name} on {plan.topology.name}", rows)


def _price(price: float | None) -> str:
    return "" if price is None else f", cost {price:,.0f}"


def _memory_table(memory: Memory) -> Table:
    kinds = ("parameters", "optimizer", "tiles", "batch", "activations", "code")
    known = ((kind, getattr(memory, kind)) for kind in kinds)
    return _plain("GiB a device", [(kind, "unknown" if size is None else f"{size / GIB:.3f}") for kind, size in known])


def _flops_table(arm: ArmPlan) -> Table:
    table = Table(
        "part", "compiled", "useful", "share", title=f"TFLOP a step, {name_of(arm)} (all devices)", title_justify="left"
    )
    for part, counts in flops_by_part(arm).items():
        table.add_row(part, *_shared(counts["compiled"], counts["useful"]))
    table.add_section()
    table.add_row("all", *_shared(sum(arm.compiled.values()), sum(arm.useful.values())))
    return table


def _shared(compiled: float, useful: float) -> tuple[str, str, str]:
    return f"{compiled / TERA:,.3f}", f"{useful / TERA:,.3f}", f"{useful / compiled:.1%}" if compiled else ""


def _limits_table(plan: Plan) -> Table:
    table = Table("arm", "limit", "amount a device", "seconds at least", title="Floors", title_justify="left")
    for arm in plan.arms:
        if arm.demand is None or arm.floors is None:
            continue
        amounts = (f"{arm.demand.flops / TERA:,.2f} TFLOP", *(f"{size / GB:,.3f} GB" for size in arm.demand[1:]))
        for limit, amount, seconds in zip(arm.floors._fields, amounts, arm.floors, strict=True):
            table.add_row(name_of(arm), limit, amount, f"{seconds:.4f}")
        for total in collective_totals(arm):
            where = "between slices" if total["crosses_slices"] else "in the slice"
            calls, received = int(total["calls"]), total["received"] / GB
            table.add_row("", f"  {total['kind']} {where}", f"{received:,.3f} GB", f"{calls:,} calls")
        table.add_section()
    return table


def planned(plan: Plan) -> str:
    """What `experiments.hardware.Hardware.planned` says of a layout."""
    if plan.step_floor is None:
        return verdict(plan.memory)
    memory = f"{plan.memory.needed / GIB:.1f} of {plan.memory.available / GIB:.1f} GiB a device"
    return f"{memory}, step at least {plan.step_floor:.2f} s"
