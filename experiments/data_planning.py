"""Plans the data of a run: how far it reaches, how full its rows get, and what it asks of the hosts that feed the step.

Only manifests are read, but for the few samples that are decoded to time them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

from data_pipelines import mixture_plan
from data_pipelines.errors import RecordError
from data_pipelines.lanes import LaneLoader, source_directories
from data_pipelines.manifest import read_manifest, source_statistics
from data_pipelines.mixture_plan import Fill, Reading, SourceFacts
from data_pipelines.mixtures import sampling_odds
from data_pipelines.packing import Budget
from data_pipelines.streams import Lane
from data_pipelines.transforms import fill_row
from experiments import preflight
from experiments.config import ExperimentConfig, HeldoutConfig
from experiments.planning import mean_over_arms, useful_flops
from hypervl_jax.planning import bounds
from hypervl_jax.planning.chips import HOST_BOUNDS, Topology
from hypervl_jax.text.tokenizer import load_tokenizer
from hypervl_jax.training.batch import Batch, BatchShape, empty_batch

ENOUGH_FILL = 0.97
"""What both budgets of a row are to be filled to, of what the mixture allows; the binding one of all."""

TIMED_SAMPLES = 64
"""Samples of a source that are decoded at most to time it; twenty times as many are packed."""

MEGABYTE = 1e6

Say = Callable[[str], None]


class MissingInput(Exception):
    """Data or a tokenizer that the plan needs and that is not there; the message says where it was looked for."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """CPU seconds of this machine: to read, decode, tile and tokenise a sample of each source; to draw and pack one sample."""

    decode: tuple[float, ...]
    packing: float


@dataclasses.dataclass(frozen=True)
class HostDemand:
    """What one host must do to keep up with the step.

    Attributes:
        rows: of each step that a host loads; hosts whose chips share a row all load it.
        samples_per_second: read, decoded and packed.
        megabytes_per_second: read from storage.
        cores: kept busy by that, of the kind that was timed; None without timing.
    """

    rows: int
    samples_per_second: float
    megabytes_per_second: float
    cores: float | None


@dataclasses.dataclass(frozen=True)
class DataPlan:
    """All that is known of a run's data before it starts.

    Attributes:
        config: of the run.
        facts: of each source.
        odds: samples of each source, as a share of all.
        fill: of rows as they are configured.
        fills: for each tile budget that rows of this length may have.
        costs: useful FLOPs of a step for each position that is used, by tile budget.
        token_budget: of the run.
        reading: what it reads of each source, and where it ends.
        step_seconds: time of a step.
        hosts: that feed it.
        timing: None when nothing was decoded.
    """

    config: ExperimentConfig
    facts: tuple[SourceFacts, ...]
    odds: tuple[float, ...]
    fill: Fill
    fills: tuple[Fill, ...]
    costs: tuple[float, ...]
    token_budget: float
    reading: Reading
    step_seconds: float
    hosts: int
    timing: Timing | None

    @property
    def reachable(self) -> bool:
        """Whether the data suffices for the token budget."""
        return self.reading.reached >= self.token_budget * (1 - 1e-6)

    @property
    def step_tokens(self) -> float:
        """LLM positions of a step that are not padding."""
        return step_tokens(self.config, self.fill)

    @property
    def steps(self) -> int:
        """Steps that the token budget takes at this fill."""
        return math.ceil(self.token_budget / self.step_tokens)

    @property
    def recommended(self) -> Fill:
        """The tile budget with the least work for a used position, among those that fill both budgets as far as can be."""
        pairs = list(zip(self.costs, self.fills, strict=True))
        full = [pair for pair in pairs if pair[1].reaches(ENOUGH_FILL)]
        return min(full or pairs)[1]

    @property
    def host(self) -> HostDemand:
        """What one host must do."""
        rows = -(-self.config.batch.rows // self.hosts)
        rate = rows * self.fill.samples / self.step_seconds
        stored = mixture_plan.mean_over_samples(self.odds, [source.mean_bytes for source in self.facts])
        cores = None
        if self.timing is not None:
            cores = rate * (self.decode_seconds + self.timing.packing)
        return HostDemand(rows, rate, rate * stored / MEGABYTE, cores)

    @property
    def decode_seconds(self) -> float:
        """Mean seconds of one core for a sample of the mixture. Only for a plan that was timed."""
        return mixture_plan.mean_over_samples(self.odds, self.timing.decode)

    @property
    def epochs(self) -> tuple[float, ...]:
        """Passes over each source."""
        return tuple(read / source.tokens for read, source in zip(self.reading.tokens, self.facts, strict=True))


def step_tokens(config: ExperimentConfig, fill: Fill) -> float:
    """LLM positions of a step that are not padding."""
    return config.batch.rows * config.batch.length * fill.token_fill


def read_facts(config: ExperimentConfig) -> tuple[SourceFacts, ...]:
    """Facts of each source, from its manifest.

    Raises:
        MissingInput: sources are not there.
        RecordError: one cannot be used.
    """
    problem = preflight.data_problem(dataclasses.replace(config, heldout=HeldoutConfig(batches=0)))
    if problem:
        raise MissingInput(problem)
    budget, tiling = Budget(config.batch.length, config.batch.tiles), config.architecture.tiling
    facts = []
    for name, path in source_directories(config.data).items():
        statistics = source_statistics(path, tiling)
        facts.append(mixture_plan.source_facts(name, read_manifest(path), statistics, budget, config.data.oversize))
        if not facts[-1].usable:
            raise RecordError(
                f"no record of source {name!r} fits a row of {budget.tokens} tokens and {budget.tiles} tiles; raise batch.length or batch.tiles"
            )
    return tuple(facts)


def time_samples(config: ExperimentConfig, say: Say = lambda text: None) -> Timing:
    """Decodes up to `TIMED_SAMPLES` samples of each source and packs some rows, on one core.

    Raises:
        MissingInput: there is no usable tokenizer.
        RecordError: a source cannot be used.
    """
    problem = preflight.tokenizer_problem(config)
    if problem:
        raise MissingInput(f"{problem}\n  Or plan without decoding: --no-timing.")
    tokenizer, unlimited = load_tokenizer(config.tokenizer_path), {"epoch_limit": 0.0, "epoch_limits": ()}
    data = dataclasses.replace(config.data, **unlimited)
    loader = LaneLoader(data, config.batch, config.architecture.tiling, tokenizer, lanes=(0,))
    seconds = []
    for number, source in enumerate(loader.mixture.sources):
        say(f"decoding samples of {source.name}")
        seconds.append(_decode_seconds(loader, number))
    say("packing rows")
    return Timing(tuple(seconds), _packing_seconds(loader))


def _decode_seconds(loader: LaneLoader, source: int) -> float:
    """Mean seconds of one sample of a source; those that fit no row are left out."""
    mixture = loader.mixture
    drawn = (mixture.sample(0, source, draw) for draw in range(TIMED_SAMPLES))
    samples = [sample for sample in drawn if mixture.budget.holds(sample)]
    batch = empty_batch(BatchShape(1, mixture.budget.tokens, mixture.budget.tiles), mixture.tiling.tile_size)
    row = Batch(*(field[0] for field in batch))
    started = time.process_time()
    for sample in samples:
        fill_row(row, [sample], mixture.sources, mixture.tokenizer, mixture.tiling)
    return (time.process_time() - started) / max(len(samples), 1)


def _packing_seconds(loader: LaneLoader) -> float:
    """Mean seconds to draw, price and pack one sample, once the indexes are open."""
    lane = Lane(loader.mixture, 0, loader.initial_states()[0])
    lane.plan()
    started, samples = time.process_time(), 0
    while samples < 20 * TIMED_SAMPLES:
        samples += len(lane.plan())
    return (time.process_time() - started) / samples


def flops_per_token(config: ExperimentConfig, fill: Fill) -> float:
    """Useful FLOPs of a step with rows of `fill.tiles` tile slots, for each position that is used."""
    batch = dataclasses.replace(config.batch, tiles=fill.tiles)
    return _step_flops(dataclasses.replace(config, batch=batch)) / step_tokens(config, fill)


def _step_flops(config: ExperimentConfig) -> float:
    arms = config.consistency.arms
    return mean_over_arms(config.consistency, [sum(useful_flops(config, arm).values()) for arm in arms])


def step_time(config: ExperimentConfig, topology: Topology, mfu: float) -> float:
    """Seconds of a step at a stated MFU, the mean over the alternation."""
    return bounds.budget(topology, _step_flops(config), 1.0, 1.0, mfu).step_seconds


def host_count(topology: Topology) -> int:
    """Hosts of a topology: one for four chips."""
    return max(1, topology.chips // math.prod(HOST_BOUNDS))


def plan(
    config: ExperimentConfig, step_seconds: float, hosts: int, timed: bool = True, say: Say = lambda text: None
) -> DataPlan:
    """Plans the data of a run.

    Args:
        config: of the run.
        step_seconds: the time of a step.
        hosts: that feed it.
        timed: whether to decode samples.
        say: is told what is being waited for.

    Raises:
        MissingInput: data is not there, or the tokenizer where samples are decoded.
        RecordError: a source cannot be used.
    """
    say("reading manifests")
    facts = read_facts(config)
    say("packing simulated rows")
    shares = [source.share for source in config.data.mixture]
    tiling = config.architecture.tiling
    choices = mixture_plan.tile_budgets(config.batch.length, tiling.tile_limit, tiling.tokens_per_tile)
    simulate = lambda tiles: mixture_plan.simulate_fill(
        facts, shares, Budget(config.batch.length, tiles), config.data.window
    )
    fills = {tiles: simulate(tiles) for tiles in sorted({*choices, config.batch.tiles})}
    fill = fills[config.batch.tiles]
    timing = time_samples(config, say) if timed else None
    a_step = step_tokens(config, fill)
    budget = config.loop.token_budget or config.loop.steps * a_step
    return DataPlan(
        config=config,
        facts=facts,
        odds=sampling_odds(shares, [source.mean_tokens for source in facts]),
        fill=fill,
        fills=tuple(fills.values()),
        costs=tuple(flops_per_token(config, candidate) for candidate in fills.values()),
        token_budget=budget,
        reading=mixture_plan.foretell(config.data, [source.tokens for source in facts], budget, a_step),
        step_seconds=step_seconds,
        hosts=hosts,
        timing=timing,
    )
