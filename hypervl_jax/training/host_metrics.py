"""The metrics of steps on their way from the devices to the host, and what the host remembers of those it has read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypervl_jax.training.optimizer import part_norms
from hypervl_jax.training.state import TrainState, token_totals
from hypervl_jax.training.step import PackedMetrics
from hypervl_jax.training.telemetry.step_times import StepTime

SOURCE_TOKENS = "source_tokens"


@dataclasses.dataclass
class Progress:
    """What the host remembers of the steps whose metrics it has read; saved with every checkpoint.

    Attributes:
        tokens: LLM positions seen, padding left out.
        boundary_tokens: those known at the last log boundary. The end of a token budget is decided on them: at the same boundary, a
            run that has just resumed knows one step more.
        rewinds: times the run went back after a loss spike.
        history: (step, loss) of the last steps of each arm, by its number.
    """

    tokens: int = 0
    boundary_tokens: int = 0
    rewinds: int = 0
    history: dict[int, list[tuple[int, float]]] = dataclasses.field(default_factory=dict)

    def update(self, step: int, values: Mapping[str, float], keep: int) -> None:
        """Takes the metrics of one step; the last `keep` losses of each arm stay."""
        self.tokens += int(values["tokens"])
        if math.isfinite(values["loss"]):
            arm = int(values["arm"])
            self.history[arm] = [*self.history.get(arm, []), (step, values["loss"])][-keep:]

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        """The inverse of `to_json`."""
        histories = values["history"].items()
        history = {int(arm): [(int(step), float(loss)) for step, loss in lines] for arm, lines in histories}
        return cls(values["tokens"], values["boundary_tokens"], values["rewinds"], history)


def boundary_metrics(state: TrainState) -> dict[str, Any]:
    """What is computed at log boundaries only: the norm of each part's parameters, and the tokens seen of each source."""
    norms = {f"parameter_norm/{part}": norm for part, norm in part_norms(state.params).items()}
    # A copy: the state's own array is donated to the next step.
    return norms | {SOURCE_TOKENS: jnp.copy(state.counters.tokens)}


class HostMetrics(NamedTuple):
    """What a step measured, as plain numbers, and how long it took."""

    step: int
    values: dict[str, float]
    time: StepTime


class _Pending(NamedTuple):
    step: int
    values: PackedMetrics
    time: Future[StepTime]
    after: dict[str, jax.Array]


class PendingMetrics:
    """Metrics that still lie on the devices, oldest first.

    Args:
        sources: names of the sources by number.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = tuple(sources)
        self._pending: list[_Pending] = []

    def add(self, step: int, values: PackedMetrics, time: Future[StepTime]) -> None:
        """Takes the metrics of a step that the devices have just got."""
        self._pending.append(_Pending(step, values, time, {}))

    def add_to_newest(self, values: Mapping[str, jax.Array]) -> None:
        """Adds what was computed from the state after the newest step."""
        self._pending[-1].after.update(values)

    def read(self, keep: int = 0) -> list[HostMetrics]:
        """Waits for all steps but the newest `keep`, and fetches their metrics in one transfer."""
        cut = max(len(self._pending) - keep, 0)
        taken, self._pending = self._pending[:cut], self._pending[cut:]
        fetched = jax.device_get([(entry.values, entry.after) for entry in taken]) if taken else []
        return [
            HostMetrics(entry.step, values.numbers() | self._numbers(after), entry.time.result())
            for entry, (values, after) in zip(taken, fetched, strict=True)
        ]

    def forget(self) -> None:
        """Drops all of them."""
        self._pending = []

    def _numbers(self, values: dict[str, np.ndarray]) -> dict[str, float]:
        tokens = values.pop(SOURCE_TOKENS, None)
        numbers = {name: float(value) for name, value in values.items()}
        if tokens is None:
            return numbers
        totals = zip(self._sources, token_totals(tokens), strict=True)
        return numbers | {f"tokens/{source}": float(total) for source, total in totals}
