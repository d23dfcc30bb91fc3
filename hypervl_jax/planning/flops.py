"""Matrix FLOPs of a traced function, counted from its jaxpr: the compiler's own count takes a loop's body once and a kernel as 0.

Counted are matrix products and convolutions, 2 FLOPs a multiply-add; a scan's body times its length, a `shard_map`'s body times
the devices it runs on, what a `checkpoint` repeats as often as it is repeated. Kernels are counted by formula: a kernel of n products
of queries × keys × head width costs 2 · n · q · k · width a head, and **half of that in the decoder, whose attention is causal; the
towers' is full**. Plain XLA attention forms all pairs, and all are counted.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params
from jax.interpreters import partial_eval

from hypervl_jax.architecture import DECODER, PARTS, ConfigError, require
from hypervl_jax.planning.useful import HEAD

FORWARD, BACKWARD, REPEATED = "forward", "backward", "repeated"
"""Passes; `REPEATED` is what `jax.checkpoint` computes a second time."""

_PART = re.compile(rf"\b({'|'.join(PARTS)})\b")


class Work(NamedTuple):
    """What some FLOPs are for: the part, whether they mix positions ("attention") or not ("product"), and the pass."""

    part: str
    kind: str
    phase: str


Tally = collections.Counter[Work]


class _Place(NamedTuple):
    """Where the walk stands: name scopes so far, how often this place runs, which arm an outermost switch takes."""

    scopes: str
    times: int
    arm: int | None


def count_flops(jaxpr: ClosedJaxpr, arm: int = 0) -> Tally:
    """FLOPs of one call over all devices, by `Work`.

    Args:
        jaxpr: of a whole step, e.g. `jax.jit(f).trace(*arguments).jaxpr`.
        arm: the branch that a switch outside of any loop takes. Switches inside loops count their dearest branch.

    Raises:
        ConfigError: work inside a `while` loop, whose number of trips a jaxpr does not tell; a kernel without a formula.
    """
    tally: Tally = collections.Counter()
    # What `jax.checkpoint` keeps by name is still computed again in the jaxpr, for nobody; the compiler removes it too.
    needed, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    _walk(needed, _Place("", 1, arm), tally)
    return tally


def _walk(jaxpr: Jaxpr, place: _Place, tally: Tally) -> None:
    for equation in jaxpr.eqns:
        here = place._replace(scopes=f"{place.scopes}/{equation.source_info.name_stack}")
        _RULES.get(equation.primitive.name, _walk_inside)(equation, here, tally)


def _walk_inside(equation: JaxprEqn, place: _Place, tally: Tally) -> None:
    """jit, checkpoint, custom derivatives and anything else that runs its jaxprs once."""
    for inner in jaxprs_in_params(equation.params):
        _walk(inner, place, tally)


def _walk_scan(equation: JaxprEqn, place: _Place, tally: Tally) -> None:
    place = place._replace(times=place.times * equation.params["length"], arm=None)
    _walk(equation.params["jaxpr"].jaxpr, place, tally)


def _walk_while(equation: JaxprEqn, place: _Place, tally: Tally) -> None:
    inside: Tally = collections.Counter()
    _walk_inside(equation, place._replace(arm=None), inside)
    require(
        not inside, f"matrix products in a while loop at {place.scopes}: how often it runs is unknown; use lax.scan"
    )


def _walk_switch(equation: JaxprEqn, place: _Place, tally: Tally) -> None:
    branches = [collections.Counter() for _ in equation.params["branches"]]
    for branch, jaxpr in zip(branches, equation.params["branches"], strict=True):
        _walk(jaxpr.jaxpr, place._replace(arm=None), branch)
    if sum(map(bool, branches)) > 1 and place.arm is not None:
        require(place.arm < len(branches), f"the switch at {place.scopes} has no arm {place.arm}")
        tally.update(branches[place.arm])
    else:
        tally.update(max(branches, key=lambda branch: sum(branch.values())))


def _walk_shard_map(equation: JaxprEqn, place: _Place, tally: Tally) -> None:
    mesh = equation.params["mesh"]
    devices = math.prod(mesh.shape[axis] for axis in equation.params["newly_manual_axes"])
    _walk_inside(equation, place._replace(times=place.times * devices), tally)


def _book(place: _Place, kind: str, flops: int, tally: Tally) -> None:
    tally[Work(part_of(place.scopes), kind, phase_of(place.scopes))] += place.times * flops


def part_of(scopes: str) -> str:
    """The innermost part of the model that a chain of name scopes lies in, else `HEAD`."""
    found = _PART.findall(scopes)
    return found[-1] if found else HEAD


def phase_of(scopes: str) -> str:
    """The pass that a chain of name scopes belongs to, by the marks that `jax.checkpoint` and `jax.grad` leave."""
    if "rematted_computation" in scopes:
        return REPEATED
    return BACKWARD if "transpose(" in scopes else FORWARD


def _count_dot(equation: JaxprEqn, place: _Place, tally: Tally) -> None:
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    flops = 2 * math.prod(equation.outvars[0].aval.shape) * summed
    attention = bool(batch) and part_of(place.scopes) != HEAD
    _book(place, "attention" if attention else "product", flops, tally)


def _count_convolution(equation: JaxprEqn, place: _Place, tally: Tally) -> None:
    kernel = equation.invars[1].aval.shape
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    flops = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
    _book(place, "product", flops, tally)


def _count_kernel(equation: JaxprEqn, place: _Place, tally: Tally) -> None:
    name = equation.params["name"]
    for pattern, formula in KERNELS.items():
        if re.match(pattern, name):
            flops = formula(equation)
            return _book(place, "attention", flops // 2 if part_of(place.scopes) == DECODER else flops, tally)
    raise ConfigError(
        f"the FLOPs of kernel {name!r} at {place.scopes} are unknown; write its formula into planning.flops.KERNELS"
    )


def _query_and_key(equation: JaxprEqn) -> list[tuple[int, ...]]:
    """Shapes [… h q k] and [… h s k] (or [… s k]) of an attention kernel's first two real operands."""
    return [v.aval.shape for v in equation.invars if v.aval.ndim >= 3 and v.aval.dtype.kind not in "iub"][:2]


def _attention_flops(products: int, equation: JaxprEqn) -> int:
    """FLOPs of an attention kernel that forms this many products of all pairs."""
    query, key = _query_and_key(equation)
    return 2 * products * math.prod(query) * key[-2]


def _backward_flops(equation: JaxprEqn) -> int:
    """Scores, dV, dP and dK; and dQ where the same kernel writes it, one array for each block of keys."""
    query, _ = _query_and_key(equation)
    fused = any(out.aval.ndim > len(query) for out in equation.outvars)
    return _attention_flops(4 + fused, equation)


KERNELS: Mapping[str, Callable[[JaxprEqn], int]] = {
    r"splash_m[hq]a_fwd": functools.partial(_attention_flops, 2),
    r"splash_m[hq]a_dq": functools.partial(_attention_flops, 3),
    r"splash_m[hq]a_dkv": _backward_flops,
}
"""Kernel name (a pattern) -> FLOPs of one call with nothing masked; names of `jax.experimental.pallas.ops.tpu.splash_attention`."""

_RULES: Mapping[str, Callable[[JaxprEqn, _Place, Tally], Any]] = {
    "scan": _walk_scan,
    "while": _walk_while,
    "cond": _walk_switch,
    "shard_map": _walk_shard_map,
    "dot_general": _count_dot,
    "conv_general_dilated": _count_convolution,
    "pallas_call": _count_kernel,
}
