"""What data a run reads: a mixture by name, and how its lanes are shuffled, packed and read."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

from hypervl_jax.architecture import require

MAX_SOURCES = 128
"""Sources of a mixture: what a lane's saved state has room for."""

STOP, REWEIGHT = "stop", "reweight"
DROP, SPLIT = "drop", "split"


@dataclasses.dataclass(frozen=True)
class SourceShare:
    """One source of a mixture. `share` is its part of the mixture's TOKENS, in any unit: shares are divided by their sum.

    A source with share 0 enters later, by a `ShareChange`.
    """

    name: str
    share: float

    def __post_init__(self) -> None:
        plain = self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")
        require(plain, f"source name {self.name!r} must be a plain directory name")
        require(0 <= self.share < math.inf, f"share {self.share} of source {self.name!r} must be finite, 0 or more")


@dataclasses.dataclass(frozen=True)
class ShareChange:
    """From step `step` on (counted from 0), the source `name` has another share; 0 when it leaves."""

    step: int
    name: str
    share: float

    def __post_init__(self) -> None:
        require(self.step >= 1, f"data.changes at step {self.step}: what holds from step 0 on stands in data.mixture")
        require(0 <= self.share < math.inf, f"data.changes: share {self.share} of {self.name!r} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class EpochLimit:
    """The source `name` is read at most `epochs` times, fractions included."""

    name: str
    epochs: float

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"data.epoch_limits: {self.epochs} epochs of {self.name!r} must be more than 0")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of one run. The source `name` lies in `root/split/name`.

    Attributes:
        root: directory of the data.
        mixture: the sources and their shares of the tokens, from the first step on.
        seed: decides the order of records and the random α.
        split: `train`, or the name of a held-out split.
        changes: shares that change at a step. No source's place in its own order moves.
        epoch_limit: times that any source is read at most; 0 is no limit.
        epoch_limits: other limits for single sources.
        over_limit: `stop` ends the run with a message when all lanes of a host have used up a source; `reweight` goes on with the others.
        window: samples that wait at most, in each lane, for a row they fit into.
        oversize: `split` cuts a record that no row can hold at turn (plain text: paragraph) boundaries; `drop` leaves it out.
        workers: processes that read and decode; 0 reads in this process. Rows do not depend on it.
        prefetch: batches that each worker prepares ahead. Rows and saved states do not depend on it.
        alpha_jitter: share of samples that are scaled by a random α in 0.1–1, so that the model has seen scaled images.
        alphas: Arrow IPC file with the columns `content_hash` and `alpha`: predicted α by record; α is 1 where it has none.
        failure_limit: a source stops the run when more than this share of its samples cannot be read.
    """

    root: str
    mixture: tuple[SourceShare, ...]
    seed: int
    split: str = "train"
    changes: tuple[ShareChange, ...] = ()
    epoch_limit: float = 0.0
    epoch_limits: tuple[EpochLimit, ...] = ()
    over_limit: str = STOP
    window: int = 64
    oversize: str = SPLIT
    workers: int = 0
    prefetch: int = 2
    alpha_jitter: float = 0.0
    alphas: str = ""
    failure_limit: float = 0.05

    def __post_init__(self) -> None:
        _check_mixture(self)
        _check_limits(self)
        require(0 <= self.seed < 2**63, f"data.seed {self.seed} must lie in 0..2**63-1")
        require(self.window >= 1, f"data.window {self.window} must be at least 1")
        require(self.oversize in (DROP, SPLIT), f"data.oversize {self.oversize!r} must be {DROP!r} or {SPLIT!r}")
        require(self.workers >= 0, f"data.workers {self.workers} must not be negative; 0 reads in the main process")
        require(self.prefetch >= 1, f"data.prefetch {self.prefetch} must be at least 1 batch")
        require(
            0 <= self.alpha_jitter <= 1,
            f"data.alpha_jitter {self.alpha_jitter} is a share of samples; it must lie in 0..1",
        )
        require(
            0 <= self.failure_limit < 1,
            f"data.failure_limit {self.failure_limit} is a share of samples; it must lie in 0..1, 1 excluded",
        )

    def shares_by_step(self) -> Mapping[int, tuple[float, ...]]:
        """First step -> shares from there on, by source; in the order of the steps."""
        shares = {source.name: source.share for source in self.mixture}
        periods = {0: tuple(shares.values())}
        ordered = sorted(self.changes, key=lambda change: change.step)
        for step, changes in itertools.groupby(ordered, key=lambda change: change.step):
            shares |= {change.name: change.share for change in changes}
            periods[step] = tuple(shares.values())
        return periods

    def epochs_allowed(self) -> tuple[float, ...]:
        """Times that each source may be read; infinite without a limit."""
        limits = {limit.name: limit.epochs for limit in self.epoch_limits}
        return tuple(limits.get(source.name, self.epoch_limit or math.inf) for source in self.mixture)

    def heldout(self, name: str, split: str) -> DataConfig:
        """The split `split` of the source `name` alone, read in the same way but without limits."""
        alone = (SourceShare(name, 1.0),)
        return dataclasses.replace(self, split=split, mixture=alone, changes=(), epoch_limit=0.0, epoch_limits=())


def _check_mixture(config: DataConfig) -> None:
    names = [source.name for source in config.mixture]
    require(bool(names), "data.mixture is empty; name at least one source and its share")
    require(len(set(names)) == len(names), f"data.mixture names a source twice: {', '.join(names)}")
    require(len(names) <= MAX_SOURCES, f"data.mixture has {len(names)} sources, the limit is {MAX_SOURCES}")
    _check_known(config, "data.changes", [change.name for change in config.changes])
    keys = [(change.step, change.name) for change in config.changes]
    require(len(set(keys)) == len(keys), "data.changes gives a source two shares at one step")
    periods = config.shares_by_step()
    for step, shares in periods.items():
        require(any(shares), f"from step {step} on every source of data.mixture has share 0; give one a share")
    for name, shares in zip(names, zip(*periods.values(), strict=True), strict=True):
        require(
            any(shares),
            f"source {name!r} has share 0 from beginning to end; leave it out, or let it enter by data.changes",
        )


def _check_limits(config: DataConfig) -> None:
    require(0 <= config.epoch_limit < math.inf, f"data.epoch_limit {config.epoch_limit} must be 0 (no limit) or more")
    _check_known(config, "data.epoch_limits", [limit.name for limit in config.epoch_limits])
    allowed = (STOP, REWEIGHT)
    require(config.over_limit in allowed, f"data.over_limit {config.over_limit!r} must be {STOP!r} or {REWEIGHT!r}")


def _check_known(config: DataConfig, field: str, names: list[str]) -> None:
    known = [source.name for source in config.mixture]
    unknown = [name for name in names if name not in known]
    require(not unknown, f"{field} names {', '.join(unknown)}, not in data.mixture ({', '.join(known)})")
