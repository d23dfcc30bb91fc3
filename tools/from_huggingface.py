"""`python -m tools.from_huggingface`: SigLIP2 and Qwen3 directories in, an initial HyperVL checkpoint out.

    SigLIP2 Base ─► vision_base ─┐
    SigLIP2 Large ─► vision_large ┼─► <output>/checkpoints/0 and its description ─► launch, chat, to_torch
    Qwen3 ─► decoder, tokenizer ─┘    (projectors from the seed)

It reads with the code that `launch --config.initialize_from` uses; what this command adds is a checkpoint before any step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from experiments.config import InitializeConfig
from experiments.pretrained import listing, read_published
from hypervl_jax.architecture import (
    MOBILENET_V3_SMALL,
    CompressorConfig,
    ConfigError,
    HyperVLConfig,
    ProjectorConfig,
    TilingConfig,
    require,
)
from hypervl_jax.models.huggingface import LoadReport, decoder_config, vision_config
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.models.safetensors_files import CheckpointError
from hypervl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from hypervl_jax.training.checkpoint import CheckpointConfig, Checkpoints, Description, write_description
from hypervl_jax.training.state import TrainState, abstract_parameters, initial_counters, initialise_parts
from tools.artifacts import ArtifactError, check_output, writing

FAILURE, SUCCESS = 1, 0
RUNTIME = RuntimeConfig(dtype="float32")
FLOAT32_BYTES = 4

_DESCRIPTION = """\
Makes an initial checkpoint of published weights, at step 0. The architecture is that of the directories' config.json: SigLIP2 towers of
fixed resolution (Base, Large, so400m, any image size) and a dense Qwen3, whole or in shards. Position embeddings of another
size than --tile-size are resampled, projectors are made from the seed. Only safetensors are read; pickles are refused.
"""
_EPILOG = """\
examples:
  python -m tools.from_huggingface --vision-base DIR/siglip2-base-patch16-512 --vision-large DIR/siglip2-large-patch16-512 \\
      --llm DIR/Qwen3-1.7B --output runs/initial
  python -m experiments.launch --config stage1 --config.initialize_from.checkpoint=runs/initial …
  python -m tools.chat --checkpoint runs/initial --prompt "The capital of France is"

exit status:
  0  written    1  it cannot be made of these directories    2  wrong usage
"""


class Made(NamedTuple):
    """An initial checkpoint's architecture, and where each part's parameters came from."""

    architecture: HyperVLConfig
    reports: dict[str, LoadReport]


def convert(
    source: InitializeConfig,
    output: str | pathlib.Path,
    *,
    tile_size: int | None = None,
    max_tiles: int = TilingConfig.max_tiles,
    tokenizer: str | pathlib.Path | None = None,
    seed: int = 0,
) -> Made:
    """Writes the checkpoint; `output` appears only when it is complete.

    Args:
        source: directories of both towers and of the language model.
        output: a workdir to be.
        tile_size: pixels of a tile's side; the base tower's own image size when None.
        max_tiles: tile budget of an image.
        tokenizer: file or directory; the language model's `tokenizer.json` when None.
        seed: of the projectors.

    Raises:
        CheckpointError: a directory is missing, incomplete, of another kind, or holds only pickles.
        ConfigError: the directories do not go together.
        TokenizerError: no usable tokenizer.
        ArtifactError: the output is taken, or the disk is full.
    """
    check_output(output)
    words = load_tokenizer(pathlib.Path(tokenizer or source.llm))
    config = architecture_of(source, tile_size, max_tiles)
    check_vocabulary(words, config)
    with writing(output, FLOAT32_BYTES * sum(config.parameter_counts().values())) as home:
        params, reports = parameters(config, source, seed)
        save(home, config, params, words)
    return Made(config, reports)


def architecture_of(source: InitializeConfig, tile_size: int | None, max_tiles: int) -> HyperVLConfig:
    """The HyperVL that these directories make, with the projector and compressor of the paper's size."""
    base = vision_config(source.vision_base, tile_size)
    large = vision_config(source.vision_large, base.image_size)
    tiling = TilingConfig(tile_size=base.image_size, patch_size=base.patch_size, max_tiles=max_tiles)
    compressor = CompressorConfig(stages=MOBILENET_V3_SMALL)
    return HyperVLConfig(base, large, decoder_config(source.llm), ProjectorConfig(), tiling, compressor)


def check_vocabulary(words: Tokenizer, config: HyperVLConfig) -> None:
    """Raises `ConfigError` when the tokenizer has more ids than the decoder has embeddings."""
    rows = config.decoder.vocab_size
    require(
        words.vocab_size <= rows, f"the tokenizer has {words.vocab_size} ids and the decoder {rows}; give --tokenizer"
    )


def parameters(
    config: HyperVLConfig, source: InitializeConfig, seed: int
) -> tuple[dict[str, Any], dict[str, LoadReport]]:
    """All parts on the first device, read tensor by tensor, and where they came from."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract, _ = abstract_parameters(config, RUNTIME)
    targets = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
    params, reports = read_published(config, source, targets)
    missing = tuple(part for part in targets if part not in params)
    shardings = {part: jax.tree.map(lambda leaf: leaf.sharding, targets[part]) for part in missing}
    return params | initialise_parts(config, RUNTIME, missing, seed, shardings), reports


def save(home: pathlib.Path, config: HyperVLConfig, params: Mapping[str, Any], words: Tokenizer) -> None:
    """Writes checkpoint 0 and its description, as a run of no steps would."""
    checkpoints = Checkpoints(home / "checkpoints", CheckpointConfig(asynchronous=False))
    state = TrainState(jnp.int32(0), dict(params), {}, initial_counters(1))
    try:
        checkpoints.save(state, jnp.zeros((1, 1), jnp.int32), {})
    finally:
        checkpoints.close()
    words.save(home / "tokenizer")
    description = Description(config, {"tokenizer": words.fingerprint}, epath.Path(home / "tokenizer"))
    write_description(home / "checkpoints", description)


def as_json(made: Made, output: str) -> dict[str, Any]:
    """What was made, as plain values."""
    reports = {part: dataclasses.asdict(report) for part, report in made.reports.items()}
    return {"output": output, "parameters": made.architecture.parameter_counts(), "parts": reports}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options. Ends the program with status 2 on anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.from_huggingface",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--vision-base", metavar="DIR", required=True, help="a SigLIP2 checkpoint, whole or only its vision tower")
    add("--vision-large", metavar="DIR", required=True, help="the larger one, of the same patch size")
    add("--llm", metavar="DIR", required=True, help="a Qwen3 checkpoint")
    add("--output", metavar="DIR", required=True, help="workdir to make; must not exist, or be empty")
    add("--tile-size", type=int, metavar="N", help="pixels of a tile's side (default: the base tower's image size)")
    add("--max-tiles", type=int, metavar="N", default=TilingConfig.max_tiles, help="of an image (default: %(default)s)")
    add("--tokenizer", metavar="PATH", help="default: tokenizer.json of the language model")
    add("--seed", type=int, default=0, help="of the projectors (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    source = InitializeConfig(vision_base=options.vision_base, vision_large=options.vision_large, llm=options.llm)
    try:
        made = convert(
            source,
            options.output,
            tile_size=options.tile_size,
            max_tiles=options.max_tiles,
            tokenizer=options.tokenizer,
            seed=options.seed,
        )
    except (ArtifactError, CheckpointError, ConfigError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    if options.json:
        print(json.dumps(as_json(made, options.output)))
        return SUCCESS
    for part, report in made.reports.items():
        print(f"{part}: {listing(report)}")
    print(
        f"{options.output}: checkpoint of {sum(made.architecture.parameter_counts().values()):,} parameters at step 0"
    )
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
