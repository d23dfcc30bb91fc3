"""`python -m tools.profile_device`: how long each part of a model takes on this machine.

Writes a profile that `tools.chat --latency-budget-ms` and `hypervl_jax.inference.latency.choose` predict with.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hypervl_jax import architecture
from hypervl_jax.architecture import (
    BRANCHES,
    DECODER,
    ConfigError,
    HyperVLConfig,
    TilingConfig,
    projector_part,
    vision_part,
)
from hypervl_jax.inference.assistant import (
    encode,
    inference_dtypes,
    inference_runtime,
    load_assistant,
)
from hypervl_jax.inference.compression import compress
from hypervl_jax.inference.generate import (
    LENGTH_BUCKET,
    NEW_TOKENS_BUCKET,
    Generator,
    Programs,
    bucket,
    pad_prompts,
)
from hypervl_jax.inference.latency import DeviceProfile, model_digest, save_profile
from hypervl_jax.models.compressor import Compressor
from hypervl_jax.models.compressor_io import abstract_compressor
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.models.projector import Projector
from hypervl_jax.models.qwen3 import Decoder
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.models.siglip2 import VisionTower
from hypervl_jax.text.conversation import TEXT_POSITION, EncodedConversation
from hypervl_jax.text.tokenizer import TokenizerError
from hypervl_jax.training.checkpoint import CheckpointError, checkpoint_home
from hypervl_jax.training.state import abstract_parameters
from hypervl_jax.vision.anyres import plan_image, tile_image
from hypervl_jax.vision.resolution import make_proxies

SIZES: dict[str, Callable[[], HyperVLConfig]] = {"tiny": architecture.hypervl_tiny, "2b": architecture.hypervl_2b}
IMAGE_SIDE, IMAGE_ALPHAS = 1024, (0.1, 0.9)
"""Side in pixels of the square image that resize and proxy are measured with, and the two α it is tiled at."""

TEXT_TOKENS = 64
"""Text of the prompts that prefill is measured with; tiles come on top."""

USAGE_ERROR, RUN_ERROR, SUCCESS = 2, 1, 0


class Model(NamedTuple):
    """What is measured: `params` holds all parts of HyperVL."""

    config: HyperVLConfig
    runtime: RuntimeConfig
    params: dict[str, Any]
    compressor_params: Any


class Measured(NamedTuple):
    """One measurement: the field of `DeviceProfile`, its key (branch, size, or both) where it has one, and milliseconds."""

    field: str
    key: Any
    milliseconds: float


def random_like(abstract: Any) -> Any:
    """Small random parameters in the given shapes and dtypes: speed does not depend on what was learned."""

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        return 0.02 * jax.random.normal(jax.random.key(seed), leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def random_model(config: HyperVLConfig) -> Model:
    """A model of this configuration that has learned nothing."""
    runtime = inference_runtime()
    params = random_like(inference_dtypes(abstract_parameters(config, runtime)[0], runtime.dtype))
    return Model(config, runtime, params, random_like(abstract_compressor(config.compressor)))


def saved_model(checkpoint: str, step: int | None) -> Model:
    """The model of a checkpoint, with a random compressor."""
    assistant = load_assistant(checkpoint_home(checkpoint), step)
    compressor = random_like(abstract_compressor(assistant.config.compressor))
    return Model(assistant.config, assistant.runtime, dict(assistant.params), compressor)


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of `run` after one call that warms up; waits for the arrays it returns."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def prompt_lengths(tiling: TilingConfig, max_tokens: int) -> list[int]:
    """Prompt lengths to measure: text alone, then with one tile, half the tile budget, and all of it, in static sizes."""
    tiles = (0, 1, tiling.max_tiles // 2, tiling.tile_limit)
    lengths = {bucket(TEXT_TOKENS + count * tiling.tokens_per_tile, LENGTH_BUCKET) for count in tiles}
    return sorted(length for length in lengths if length <= max_tokens) or [min(lengths)]


def features(params: Any, inputs: Array, *, module: VisionTower | Projector) -> Float[Array, "n p d"]:
    """A tower's or projector's output."""
    return module.apply({"params": params}, inputs)


def measurements(model: Model, lengths: Sequence[int], repeats: int) -> Iterator[Measured]:
    """Measures every part in turn."""
    programs = Programs()
    yield from _measure_compressor(model, programs, repeats)
    yield from _measure_resize(model.config.tiling, repeats)
    for branch in BRANCHES:
        yield from _measure_branch(model, branch, programs, repeats)
    for length in lengths:
        yield from _measure_decoder(model, length, programs, repeats)


def measurement_count(tiling: TilingConfig, lengths: Sequence[int]) -> int:
    """How many measurements there will be."""
    return 4 + len(BRANCHES) * (len(tile_counts(tiling)) + 2) + 3 * len(lengths)


def tile_counts(tiling: TilingConfig) -> list[int]:
    """Numbers of tiles to measure: one, and the tile budget in its static size."""
    return sorted({1, bucket(tiling.tile_limit)})


def _picture(side: int) -> UInt8[np.ndarray, "h w 3"]:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def _measure_compressor(model: Model, programs: Programs, repeats: int) -> Iterator[Measured]:
    side, compressor = model.config.compressor.proxy_size, Compressor(model.config.compressor, model.runtime.dtype)

    def predict(rgb: UInt8[np.ndarray, "h w 3"]) -> jax.Array:
        proxies, _ = make_proxies([rgb], side)
        return programs.run(compress, model.compressor_params, proxies, compressor=compressor)

    small, large = (median_ms(functools.partial(predict, _picture(each)), repeats) for each in (side, IMAGE_SIDE))
    yield Measured("compressor", None, small)
    yield Measured("proxy_per_megapixel", None, max(0.0, large - small) / ((IMAGE_SIDE**2 - side**2) / 1e6))


def _measure_resize(tiling: TilingConfig, repeats: int) -> Iterator[Measured]:
    """Two sizes of the result tell what a source pixel takes from what a tile takes."""
    rgb = _picture(IMAGE_SIDE)
    few, many = (plan_image(IMAGE_SIDE, IMAGE_SIDE, alpha, tiling) for alpha in IMAGE_ALPHAS)
    short, long = (median_ms(functools.partial(tile_image, rgb, plan, tiling), repeats) for plan in (few, many))
    per_tile = max(0.0, long - short) / max(1, many.tiles - few.tiles)
    yield Measured("resize_per_megapixel", None, max(0.0, short - few.tiles * per_tile) / (IMAGE_SIDE**2 / 1e6))
    yield Measured("tiling_per_tile", None, per_tile)


def _measure_branch(model: Model, branch: str, programs: Programs, repeats: int) -> Iterator[Measured]:
    config, runtime, side = model.config, model.runtime, model.config.tiling.tile_size
    vision, parts = config.vision(branch), (vision_part(branch), projector_part(branch))
    tower = VisionTower(vision, runtime)
    projector = Projector(config.projector, vision, config.decoder, config.tiling.shuffle, runtime)
    params, hypervl = {part: model.params[part] for part in parts}, HyperVL(config, runtime)
    run = lambda *arguments, **static: median_ms(lambda: programs.run(*arguments, **static), repeats)
    for count in tile_counts(config.tiling):
        tiles = np.zeros((count, side, side, 3), np.uint8)
        yield Measured("encoder", (branch, count), run(encode, params, tiles, model=hypervl, branch=branch))
    tile = jnp.zeros((1, side, side, 3), jnp.uint8)
    patches = jnp.zeros((1, vision.num_patches, vision.hidden_size), runtime.dtype)
    yield Measured("tower_per_tile", branch, run(features, params[parts[0]], tile, module=tower))
    yield Measured("projector_per_tile", branch, run(features, params[parts[1]], patches, module=projector))


def _measure_decoder(model: Model, length: int, programs: Programs, repeats: int) -> Iterator[Measured]:
    decoder = Decoder(model.config.decoder, model.runtime)
    # No token has the id -1, so that decoding runs to its limit.
    generator = Generator(decoder, model.params[DECODER], (-1,), programs)
    text = EncodedConversation(
        np.ones(length, np.int32), np.zeros(length, np.float32), np.full(length, TEXT_POSITION, np.int32)
    )
    prompts = pad_prompts([text], [0], 1, length)
    visual = jnp.zeros((length, model.config.decoder.hidden_size), model.runtime.dtype)
    prefill = lambda: generator.start(prompts, visual, None, NEW_TOKENS_BUCKET)
    yield Measured("prefill", length, median_ms(prefill, repeats))
    started, slots = prefill(), length + NEW_TOKENS_BUCKET
    first, whole = (
        median_ms(functools.partial(generator.finish, started, None, limit), repeats)
        for limit in (1, NEW_TOKENS_BUCKET)
    )
    yield Measured("decode_start", slots, first)
    yield Measured("decode", slots, max(0.0, whole - first) / (NEW_TOKENS_BUCKET - 1))


def to_profile(model: Model, measured: Sequence[Measured]) -> DeviceProfile:
    """The profile that these measurements make."""
    fields: dict[str, Any] = {}
    for field, key, milliseconds in measured:
        if key is None:
            fields[field] = milliseconds
        else:
            fields.setdefault(field, {})[key] = milliseconds
    for field in ("prefill", "decode_start", "decode"):
        fields[field] = tuple(sorted(fields[field].items()))
    encoder = sorted(fields["encoder"].items())
    fields["encoder"] = {name: tuple((n, ms) for (branch, n), ms in encoder if branch == name) for name in BRANCHES}
    device = jax.devices()[0]
    return DeviceProfile(
        device=f"{device.device_kind} ({device.platform}), host {platform.machine()} with {os.cpu_count()} cores",
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy", "pillow")},
        model=model_digest(model.config),
        dtype=model.runtime.dtype,
        **fields,
    )


def measure_device(model: Model, lengths: Sequence[int], repeats: int, console: Console) -> DeviceProfile:
    """Measures a model with a progress bar on `console`."""
    measured = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=measurement_count(model.config.tiling, lengths))
        for one in measurements(model, lengths, repeats):
            measured.append(one)
            name = one.field if one.key is None else f"{one.field} {one.key}"
            progress.update(task, advance=1, description=f"{name}: {one.milliseconds:.2f} ms")
    return to_profile(model, measured)


def to_table(profile: DeviceProfile) -> Table:
    """A profile for people."""
    table = Table("part", "ms", title=f"{profile.device}, {profile.dtype}")
    table.columns[1].justify = "right"
    rows = {
        "compressor, an image": profile.compressor,
        "its proxy, a megapixel": profile.proxy_per_megapixel,
        "resize, a megapixel": profile.resize_per_megapixel,
        "resize, a tile": profile.tiling_per_tile,
    }
    for branch in BRANCHES:
        rows |= {f"{branch} encoder, {tiles} tiles": milliseconds for tiles, milliseconds in profile.encoder[branch]}
        rows[f"{branch} tower alone, a tile"] = profile.tower_per_tile[branch]
        rows[f"{branch} projector alone, a tile"] = profile.projector_per_tile[branch]
    rows |= {f"prefill of {tokens} tokens": milliseconds for tokens, milliseconds in profile.prefill}
    rows |= {f"start of decoding, {slots} slots": milliseconds for slots, milliseconds in profile.decode_start}
    rows |= {f"decode of a token, {slots} slots": milliseconds for slots, milliseconds in profile.decode}
    for name, milliseconds in rows.items():
        table.add_row(name, f"{milliseconds:.3f}")
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options. Ends the program with status 2 on anything else."""
    parser = argparse.ArgumentParser(prog="python -m tools.profile_device", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="DIR", help="a run's workdir or its checkpoints directory")
    source.add_argument("--config-size", choices=sorted(SIZES), help="a named size with random parameters")
    parser.add_argument("--step", type=int, help="checkpoint to read (default: the newest)")
    parser.add_argument("--output", metavar="FILE", default="profile.json", help="default: profile.json")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed runs of each part; the median counts (default: 5)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=1 << 20, help="longest prompt to measure; longer ones are extrapolated"
    )
    parser.add_argument("--json", action="store_true", help="print the profile as one JSON object on the last line")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options, console = parse(arguments), Console(stderr=True)
    try:
        if options.checkpoint:
            model = saved_model(options.checkpoint, options.step)
        else:
            model = random_model(SIZES[options.config_size]())
        lengths = prompt_lengths(model.config.tiling, options.max_tokens)
        profile = measure_device(model, lengths, options.repeats, console)
        save_profile(profile, options.output)
    except (CheckpointError, ConfigError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        print(f"error: cannot write {options.output}: {error.strerror}", file=sys.stderr)
        return RUN_ERROR
    console.print(to_table(profile))
    console.print(f"written to {options.output}", highlight=False)
    if options.json:
        print(json.dumps(dataclasses.asdict(profile)))
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
