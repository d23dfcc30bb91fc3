"""The progress line, and the rates it shows."""

from __future__ import annotations

import collections
import contextlib
import datetime
import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

import rich.console
import rich.live
import rich.text

from hypervl_jax.architecture import BRANCHES

PLAIN_LINE_SECONDS = 15.0
"""Seconds between progress lines where the output is a file or a pipe."""

LIVE_LINE_SECONDS = 0.2
"""Least seconds between two redraws of the live line."""

MARK_SECONDS = 0.5
"""Least seconds that rates are taken over."""

TOLERANCE = 0.02
"""Share of the schedules' steps by which a token budget may end elsewhere before the line warns."""

LEAST_STEPS = 10
"""Steps, or one in a hundred of all where that is more, before the tokens of a step are judged."""


class Throughput:
    """Rates of growing totals (steps, tokens, tiles) over the last `window` marks, pauses left out.

    Marks are `MARK_SECONDS` apart at least: metrics are read in groups, and the steps of a group arrive all at once.

    Args:
        window: marks the rates are taken over.
        clock: seconds that only grow.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._marks: collections.deque[tuple[float, dict[str, float]]] = collections.deque(maxlen=window + 1)
        self._clock = clock
        self._paused = 0.0

    def update(self, **totals: float) -> None:
        """Notes the totals reached by now."""
        now = self._clock() - self._paused
        if len(self._marks) >= 2 and now - self._marks[-2][0] < MARK_SECONDS:
            self._marks.pop()
        self._marks.append((now, totals))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside (an evaluation, a checkpoint) does not count."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def rates(self) -> dict[str, float]:
        """Growth of each total per second; empty while the marks span less than `MARK_SECONDS`."""
        if not self._marks:
            return {}
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        seconds = end - start
        return {name: (last[name] - first[name]) / seconds for name in last} if seconds >= MARK_SECONDS else {}


class ProgressLine:
    """One line that says where a run is: step, tokens, loss of each branch, tokens/s, MFU, time left. A context manager.

    On a terminal the line is redrawn in place; elsewhere a plain line is printed every 15 seconds, so that logs stay readable.

    Args:
        total_steps: at which the schedules end, and the run too when it has no token budget.
        start_step: at which this start resumed.
        token_budget: the run ends when this many tokens were seen; 0 when it ends by steps.
        enabled: False prints nothing: processes other than 0.
        console: where to print; standard error when None.
        clock: seconds that only grow.

    Attributes:
        mfu: shown from when it is set.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        token_budget: int = 0,
        enabled: bool = True,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps, self._token_budget, self._enabled = total_steps, token_budget, enabled
        self._console = console or rich.console.Console(stderr=True)
        self._live = rich.live.Live(console=self._console, auto_refresh=False, redirect_stdout=False)
        self._clock, self._throughput = clock, Throughput(clock=clock)
        self._losses: dict[str, float] = {}
        self._step, self._tokens, self._shown = start_step, 0, -math.inf
        self._told_apart = False
        self.mfu: float | None = None

    def __enter__(self) -> ProgressLine:
        if self._enabled and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled and self._tokens:
            self._show()
        self._live.stop()

    def update(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Notes that `step` updates are done and `tokens` seen in all, and what was measured (`cross_entropy/base`, …)."""
        if not self._enabled:
            return
        self._step, self._tokens = step, tokens
        losses = {branch: values.get(f"cross_entropy/{branch}", math.nan) for branch in BRANCHES}
        self._losses |= {branch: loss for branch, loss in losses.items() if not math.isnan(loss)}
        self._throughput.update(step=step, tokens=tokens)
        self._compare_ends()
        interval = LIVE_LINE_SECONDS if self._console.is_terminal else PLAIN_LINE_SECONDS
        if self._clock() - self._shown >= interval:
            self._show()

    def message(self, text: str) -> None:
        """Prints `text` above the line."""
        if self._enabled:
            self._console.print(rich.text.Text(text), soft_wrap=True)

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Time spent inside (an evaluation, a checkpoint) does not count for tokens/s and the time left."""
        return self._throughput.pause()

    def text(self) -> str:
        """The line itself."""
        tokens = _short(self._tokens) + (f"/{_short(self._token_budget)}" if self._token_budget else "")
        last_step = f"~{self._last_step()}" if self._token_budget and self._tokens else str(self._total_steps)
        parts = [f"step {self._step}/{last_step}", f"{tokens} tokens"]
        losses = [f"{branch} {self._losses[branch]:.3f}" for branch in BRANCHES if branch in self._losses]
        parts += [f"loss {' '.join(losses)}"] if losses else []
        rates = self._throughput.rates()
        parts += [f"{_short(rates['tokens'])} tokens/s"] if rates else []
        parts += [f"MFU {self.mfu:.1%}"] if self.mfu is not None else []
        parts += [f"{self._time_left(rates)} left"] if rates else []
        return " · ".join(parts)

    def _time_left(self, rates: Mapping[str, float]) -> str:
        """Until the token budget is used up, or until the last step when there is none."""
        amount, rate = self._total_steps - self._step, rates["step"]
        if self._token_budget:
            amount, rate = self._token_budget - self._tokens, rates["tokens"]
        seconds = max(amount, 0) / max(rate, 1e-9)
        return str(datetime.timedelta(seconds=round(min(seconds, 1e9))))

    def _last_step(self) -> int:
        """Where a token budget ends the run if steps go on to hold as many tokens as until now."""
        return max(self._step, math.ceil(self._token_budget * self._step / self._tokens))

    def _compare_ends(self) -> None:
        """Says once that the token budget ends the run at another step than the schedules are made for."""
        enough = self._step >= min(self._total_steps, max(LEAST_STEPS, self._total_steps // 100))
        if self._told_apart or not (self._token_budget and self._tokens and enough):
            return
        last, horizon = self._last_step(), self._total_steps
        if abs(last - horizon) <= TOLERANCE * horizon:
            return
        self._told_apart = True
        trouble = (
            f"its last {last - horizon:,} steps would keep the rate that the schedules end with"
            if last > horizon
            else "the rate would not reach its end"
        )
        self.message(
            f"warning: at {self._tokens / self._step:,.0f} tokens a step, as until now, loop.token_budget ends the run near step "
            f"{last:,}, but the schedules are made for loop.steps {horizon:,}: {trouble}. Set loop.steps to {last}; a resumed run "
            "takes it with --accept-changes"
        )

    def _show(self) -> None:
        self._shown = self._clock()
        if self._live.is_started:
            self._live.update(rich.text.Text(self.text(), no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self.message(self.text())


def _short(amount: float) -> str:
    """A count in at most four digits: 950, 12.3k, 1.05M, 82.8B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= size:
            return f"{amount / size:.3g}{unit}" if amount < 999.5 * size else f"{amount / size:.0f}{unit}"
    return f"{amount:.0f}"
