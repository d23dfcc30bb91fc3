"""The named sweeps: each asks one question of a configuration and yields the settings that answer it.

A sweep is a function from the typed configuration to variants. Its docstring says the question, what varies and what is held
fixed. A variant's name comes from what it sets, never from its place, so that runs keep their directories when a sweep grows.
`python -m experiments.sweep --help` shows all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from experiments.config import ExperimentConfig

LAUNCH, TRAIN_COMPRESSOR = "experiments.launch", "tools.train_compressor"
"""Commands that a sweep may vary: overrides of a training run, or flags of the compressor's training."""


class Variant(NamedTuple):
    """One run of a sweep: `settings` are overrides by path for a launch, flags by name for another command."""

    name: str
    settings: Mapping[str, str]


Variants = Callable[["ExperimentConfig"], Iterable[Variant]]


def vary(path: str, values: Sequence[object]) -> list[Variant]:
    """A variant for each value of one setting, named by the last part of its path."""
    return [Variant(f"{path.rpartition('.')[2]}={value}", {path: str(value)}) for value in values]


def dcl_weight(config: ExperimentConfig) -> Iterable[Variant]:
    """How much does the small branch gain from the large one, and when does the KL term begin to hurt?

    Varies: λ, `consistency.kl_weight`; at 0 there is no teacher pass. Held fixed: T, alternation, data order, tokens.
    """
    return vary("consistency.kl_weight", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0))


def dcl_temperature(config: ExperimentConfig) -> Iterable[Variant]:
    """How soft should the distributions be that the small branch is pulled to?

    Varies: T, `consistency.temperature`. Held fixed: λ (the factor T² keeps gradients comparable), alternation, data order, tokens.
    """
    return vary("consistency.temperature", (1.0, 2.0, 4.0, 8.0))


def alternation(config: ExperimentConfig) -> Iterable[Variant]:
    """How should steps be dealt out between the branches? HyperVL does not publish the frequency of its alternation.

    Varies: runs of base and large steps, and random order with even odds. Held fixed: λ, T, data order, and the steps of both
    branches together, so a branch that trains more often sees more tokens.
    """
    ratios = ((1, 1), (1, 3), (3, 1), (8, 8), (64, 64))
    for base, large in ratios:
        settings = {"alternation": "ratio", "base_steps": str(base), "large_steps": str(large)}
        yield Variant(f"ratio={base}-{large}", {f"consistency.{key}": value for key, value in settings.items()})
    settings = {"alternation": "random", "base_steps": "1", "large_steps": "1"}
    yield Variant("random=1-1", {f"consistency.{key}": value for key, value in settings.items()})


def joint_or_alternating(config: ExperimentConfig) -> Iterable[Variant]:
    """Is training both branches in every step better than taking turns?

    Varies: `consistency.alternation`. Held fixed: data order and tokens. Not held fixed: a joint step trains both branches on
    its batch, at about twice the compute; read the table by tokens and by chip-hours.
    """
    return vary("consistency.alternation", ("ratio", "joint"))


DCL_SEEDS = (0, 1, 2)
"""Each main arm of the DCL study is run once with each."""


def dcl_arms(config: ExperimentConfig) -> Iterable[Variant]:
    """Does DCL lift the Base branch over training it alone, at equal Base steps and at equal compute?

    Varies: which branches are trained and whether the KL term is there: each branch alone, both by turns without and with KL, both in
    every step; Base alone once more for as many steps as the compute of DCL allows; the order of the data. Held fixed: the start, the
    rates, and half of `loop.steps` as the Base steps of every arm but the longer one. `tools.compare_arms` reads the runs.
    """
    kl, longer = config.consistency.kl_weight, _base_steps_for_compute(config)
    arms = (
        ("base", "base", 0.0, 0.5),
        ("base_longer", "base", 0.0, longer),
        ("large", "large", 0.0, 0.5),
        ("alternating", "ratio", 0.0, 1.0),
        ("dcl", "ratio", kl, 1.0),
        ("joint", "joint", kl, 0.5),
    )
    for seed in DCL_SEEDS:
        for name, alternation, weight, share in arms:
            settings = {"consistency.alternation": alternation, "consistency.kl_weight": str(weight)}
            settings |= _share_of_steps(config, share)
            settings |= {"seed": str(config.seed + seed), "data.seed": str(config.data.seed + 1000 * seed)}
            yield Variant(f"{name}.seed={seed}", settings)


def _share_of_steps(config: ExperimentConfig, share: float) -> dict[str, str]:
    """Settings that make a run shorter or longer by a factor."""
    lengths = {"loop.steps": config.loop.steps, "loop.token_budget": config.loop.token_budget}
    return {path: str(int(length * share)) for path, length in lengths.items() if length}


def _base_steps_for_compute(config: ExperimentConfig) -> float:
    """Steps of Base alone, as a share of `loop.steps`, that take the FLOPs of the alternation 1:1 with KL."""
    from hypervl_jax.planning.useful import step_flops

    flops = lambda arm, teacher: step_flops(
        config.architecture, config.batch, (arm,), config.optimizer.trainable_parts, teacher
    ).total()
    return (flops("base", True) + flops("large", False)) / 2 / flops("base", False)


def dcl_settings(config: ExperimentConfig) -> Iterable[Variant]:
    """Which λ, T, alternation and KL positions are worth a closer look? One run each, so differences are hints.

    Varies: one setting of the consistency term at a time. Held fixed: the others, the start, the order of the data and the steps of
    both branches together.
    """
    yield from vary("consistency.kl_weight", (0.25, 4.0))
    yield from vary("consistency.temperature", (1.0, 4.0))
    yield from vary("consistency.kl_positions", ("text", "all"))
    for kind, base, large in (("ratio", 1, 2), ("ratio", 2, 1), ("random", 1, 1)):
        settings = {"alternation": kind, "base_steps": str(base), "large_steps": str(large)}
        yield Variant(f"{kind}={base}-{large}", {f"consistency.{key}": value for key, value in settings.items()})


def vrc_epsilon(config: ExperimentConfig) -> Iterable[Variant]:
    """How much loss may compression cost: which ε of the VRC labels saves the most tokens for the least score?

    Varies: ε of α*, `--epsilon` of `tools.train_compressor`. Held fixed: labels, floor, compressor, its training. Needs --labels,
    --data and --checkpoint; the table shows tokens saved and the relative loss increase on pictures kept out of training.
    """
    return vary("epsilon", (0.01, 0.02, 0.05, 0.10, 0.20))


def vrc_loss(config: ExperimentConfig) -> Iterable[Variant]:
    """Which loss makes the best compressor of the same labels?

    Varies: `--loss` of `tools.train_compressor`. Held fixed: labels, ε, floor, the weight of over-compression, the calibration, which
    makes them lose alike so that the tokens saved tell them apart. Needs --labels, --data and --checkpoint.
    """
    return vary("loss", ("huber", "pinball", "mse", "ordinal"))


def tile_size(config: ExperimentConfig) -> Iterable[Variant]:
    """What do small tiles cost, for the memory and latency that they save? HyperVL names 8, 16 and 32 patches a side.

    Varies: the side of a tile, in quarters, halves and wholes of the configured one. Held fixed: the pixels that an image and
    a row may take (tiles grow in number as they shrink), patch, shuffle, data, tokens. A position embedding that was trained at
    another size is resampled; better give `initialize_from` a checkpoint of each size, which three single launches do.
    """
    tiling, batch = config.architecture.tiling, config.batch
    for parts in (4, 2, 1):
        side = tiling.tile_size // parts
        settings = {f"architecture.vision_{branch}.image_size": side for branch in ("base", "large")}
        settings |= {
            "architecture.tiling.tile_size": side,
            "architecture.tiling.max_tiles": tiling.max_tiles * parts**2,
        }
        settings |= {"batch.tiles": batch.tiles * parts**2}
        yield Variant(f"tile_size={side}", {key: str(value) for key, value in settings.items()})


def encoder_only(config: ExperimentConfig) -> Iterable[Variant]:
    """What does sharing one decoder cost each branch? Trained alone, a branch sees every step.

    Varies: `consistency.alternation`: both by turns, base alone, large alone. Held fixed: data order and tokens. The branch that is
    not trained is not evaluated fairly: look at the trained one.
    """
    return vary("consistency.alternation", ("ratio", "base", "large"))


def learning_rate(config: ExperimentConfig) -> Iterable[Variant]:
    """Is the learning rate right?

    Varies: `optimizer.learning_rate`, as factors of the configured one. Held fixed: its ratios between parts, schedule, data, tokens.
    """
    factors = (0.25, 0.5, 1.0, 2.0, 4.0)
    return vary(
        "optimizer.learning_rate", [float(f"{config.optimizer.learning_rate * factor:.6g}") for factor in factors]
    )


def data_shares(config: ExperimentConfig) -> Iterable[Variant]:
    """Which source is worth more of the tokens than it has?

    Varies: `data.mixture`: as configured, and with the share of one source doubled, for each source. Held fixed: tokens, seeds, the
    shares of the other sources among themselves.
    """
    shares = {source.name: source.share for source in config.data.mixture}
    yield _mixture("as_configured", shares)
    for name in shares:
        yield _mixture(f"more_{name}", shares | {name: 2 * shares[name]})


def _mixture(name: str, shares: Mapping[str, float]) -> Variant:
    text = ",".join(f"{source}:{share:g}" for source, share in shares.items())
    return Variant(name, {"data.mixture": text})


SWEEPS: Mapping[str, Variants] = {
    sweep.__name__: sweep
    for sweep in (
        dcl_weight,
        dcl_temperature,
        alternation,
        joint_or_alternating,
        dcl_arms,
        dcl_settings,
        vrc_epsilon,
        vrc_loss,
        tile_size,
        encoder_only,
        learning_rate,
        data_shares,
    )
}

COMMANDS: Mapping[str, str] = dict.fromkeys((vrc_epsilon.__name__, vrc_loss.__name__), TRAIN_COMPRESSOR)
"""Sweeps of another command than a launch."""


def command(name: str) -> str:
    """The module that a sweep's runs start."""
    return COMMANDS.get(name, LAUNCH)


def question(name: str) -> str:
    """The first line of a sweep's docstring."""
    return inspect.cleandoc(SWEEPS[name].__doc__ or "").splitlines()[0]
