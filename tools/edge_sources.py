"""What every exporter of edge artifacts reads and writes around its own files.

checkpoint, compressor ─► parameters ─► graphs of each part        data/train ─► prompts to take ranges from
golden prompts, data/heldout ─► JAX's answers, to compare with     report ─► golden arrays, report.json, manifest.json
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines.errors import RecordError
from hypervl_jax.architecture import BRANCHES, DECODER, HyperVLConfig, projector_part, require, vision_part
from hypervl_jax.models.compressor_io import SavedCompressor, predict_log_areas
from hypervl_jax.text.tokenizer import Tokenizer
from hypervl_jax.vision.decoding import decode_image
from hypervl_jax.vision.resolution import make_proxies
from tools import artifacts, edge_graphs, evaluate, golden
from tools.artifacts import Manifest
from tools.edge_graphs import Graph
from tools.edge_runtime import EdgeModel, EdgeSettings
from tools.golden import Case, Golden
from tools.quantisation import Precision, quantise, quantise_weights
from tools.to_torch import BOTH, Source, leaf_paths, load_parts, open_source

COMPRESSOR = "compressor"
HELDOUT, TRAIN = "heldout", "train"
ENCODER = "encoder"
PARTS = (ENCODER, DECODER)
"""What can be exported by itself; the compressor goes along where one is given."""

EMBEDDING = "embedding"
"""The decoder's leaf that its embedder is made of."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to read.

    Attributes:
        checkpoint: a run's workdir or its `checkpoints` directory.
        step: the newest when None.
        parts: of `PARTS`; only their parameters are read.
        encoder: "base", "large" or "both".
        vrc: the compressor that goes along.
        prefill: lengths of the prefill graphs.
        slots: of the cache, for prompt and answer.
        data: root of sources with answers; `data/heldout/TASK` is compared on besides the golden prompts.
        items: of each held-out source.
        calibration_items: of each training source.
        calibrated: names of the precisions that take ranges from `data/train/TASK`.
    """

    checkpoint: str
    step: int | None
    parts: Sequence[str]
    encoder: str
    vrc: SavedCompressor | None
    prefill: Sequence[int]
    slots: int
    data: str | None
    items: int
    calibration_items: int
    calibrated: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Exported:
    """Everything that is the same for all precisions.

    The model's parameters are not among it: they are read for each file that is made of them. Two billion of them in float32 beside
    such a file, or beside a runtime that has it open, would not fit into 12 GiB.
    """

    source: Source
    settings: EdgeSettings
    vrc: SavedCompressor | None
    cases: tuple[Case, ...]
    references: Mapping[str, Mapping[str, Golden]]
    calibration: tuple[Case, ...]

    def parameters(self) -> int:
        """How many parameters the artifact holds, the compressor's aside."""
        counts = self.source.config.parameter_counts()
        return sum(counts[part] for part in _parts(self.settings))

    def read_decoder(self) -> Mapping[str, Any]:
        """The decoder's parameters, float32. Raises `CheckpointError` when the checkpoint is gone by now."""
        return load_parts(self.source, (DECODER,))

    def read_decoder_weights(self, precision: Precision) -> edge_graphs.Weights:
        """The decoder's weights as graphs take them, each rounded when it has been read: they are never all there in float32.

        Raises `CheckpointError` when the checkpoint is gone by now.
        """
        weights: dict[str, Any] = {}
        for path in leaf_paths(self.source, DECODER):
            if path != EMBEDDING or self.source.config.decoder.tie_embeddings:
                read = edge_graphs.decoder_weights(load_parts(self.source, (DECODER,), path))
                weights |= quantise_weights(read, precision)
                del read  # before the next one is read
        return weights

    def read_embedding(self) -> Mapping[str, Any]:
        """The decoder's embedding alone. Raises `CheckpointError` when the checkpoint is gone by now."""
        return load_parts(self.source, (DECODER,), EMBEDDING)

    def read_encoder(self, branch: str) -> Mapping[str, Any]:
        """Tower and projector of a branch, float32. Raises `CheckpointError` when the checkpoint is gone by now."""
        return load_parts(self.source, (vision_part(branch), projector_part(branch)))


def read(request: Request) -> Exported:
    """Reads the checkpoint and the prompts, and lets JAX compute what the artifacts are compared with.

    Raises:
        CheckpointError, ConfigError, TokenizerError, RecordError: an input is missing or of another kind.
    """
    prefill, slots, names = request.prefill, request.slots, request.calibrated
    require(bool(prefill) and min(prefill) > 1, f"prefill lengths {list(prefill)} must be 2 or more")
    require(slots > max(prefill), f"a cache of {slots} slots does not hold a prefill of {max(prefill)}")
    source = open_source(request.checkpoint, request.step)
    branches = (BRANCHES if request.encoder == BOTH else (request.encoder,)) if ENCODER in request.parts else ()
    lengths = tuple(sorted(set(prefill))) if DECODER in request.parts else ()
    settings = EdgeSettings(source.config, request.vrc.config if request.vrc else None, branches, lengths, slots)
    require(not names or request.data is not None, f"{' and '.join(names)} take ranges from real records: give --data")
    require(
        not names or branches, f"{' and '.join(names)} take ranges from prompts with pictures: export the encoder too"
    )
    calibration = records(source, request.data, TRAIN, request.calibration_items) if names else ()
    held_out = () if request.data is None else records(source, request.data, HELDOUT, request.items)
    cases = (*golden.cases(source.config.tiling), *held_out)
    check_slots(cases, EdgeModel(settings, source.tokenizer, {}))
    return Exported(source, settings, request.vrc, cases, _references(source, settings, cases), calibration)


def _references(source: Source, settings: EdgeSettings, cases: Sequence[Case]) -> dict[str, dict[str, Golden]]:
    """What JAX makes of the prompts through each branch; through a decoder alone, of the prompts without pictures."""
    params = load_parts(source, _parts(settings))
    if not settings.branches:
        text = [case for case in cases if not case.images]
        # Without pictures nothing is read of a branch.
        found = {case.name: golden.compute(case, source.config, params, source.tokenizer, BRANCHES[0]) for case in text}
        return {DECODER: found}
    compute = golden.compute if settings.prefill else _encode_only
    return {
        branch: {case.name: compute(case, source.config, params, source.tokenizer, branch) for case in cases}
        for branch in settings.branches
    }


def check_slots(cases: Sequence[Case], model: EdgeModel) -> None:
    """Raises `ConfigError` when a prompt with its answer does not fit the cache."""
    for case in cases if model.settings.prefill else ():
        prompt, _ = model.prompt(case.request.turns, case.images, [1.0] * len(case.images))
        needed = len(prompt.tokens) + golden.NEW_TOKENS - 1
        require(
            needed <= model.settings.slots,
            f"{case.name}: a prompt of {len(prompt.tokens)} tokens and {golden.NEW_TOKENS} new ones take {needed} slots of the cache; "
            f"give --slots {needed} or more, or fewer --items",
        )


def _parts(settings: EdgeSettings) -> tuple[str, ...]:
    """Parts of the model that an artifact is made of."""
    parts = [part(branch) for branch in settings.branches for part in (vision_part, projector_part)]
    return (*parts, DECODER) if settings.prefill else tuple(parts)


def _encode_only(
    case: Case, config: HyperVLConfig, params: Mapping[str, Any], tokenizer: Tokenizer, branch: str
) -> Golden:
    """What JAX makes of a prompt's tiles, without a decoder."""
    tiles, none = golden.tile_all(case.images, config.tiling), np.zeros(0, np.int32)
    with jax.default_matmul_precision("highest"):
        visual = np.asarray(golden.encode_tiles(tiles, config, params, branch))
    return Golden(tiles, visual, none, np.zeros((0, 0), np.float32), none)


def records(source: Source, data: str, split: str, items: int) -> tuple[Case, ...]:
    """The first records of each held-out source, or of the source of that name in another split, with their first question.

    Those of several questions about several images are left out: which image the first one is about stands in the others.

    Raises:
        RecordError: there is no held-out source.
    """
    root = pathlib.Path(data) / HELDOUT
    tasks = sorted(path.name for path in root.glob("*") if path.is_dir())
    if not tasks:
        raise RecordError(f"{root} holds no sources; give the root of a data directory with a {HELDOUT} split")
    fingerprint = source.tokenizer.fingerprint
    return tuple(
        Case(f"{task}_{number}", item.turns[0].text, tuple(map(decode_image, item.images)))
        for task in tasks
        for number, item in enumerate(evaluate.read_items(data, split, task, fingerprint, items))
        if len(item.turns) == 1 or len(item.images) == 1
    )


# Graphs.


def part_graphs(made: Exported, precision: Precision) -> dict[str, Callable[[], list[Graph]]]:
    """The graphs of each part for a converter, made when they are called for."""
    settings, config = made.settings, made.settings.config
    files: dict[str, Callable[[], list[Graph]]] = {
        f"encoder_{branch}": lambda branch=branch: [
            edge_graphs.encoder_graph(config, branch, made.read_encoder(branch)).rounded(precision)
        ]
        for branch in settings.branches
    }
    if made.vrc is not None:
        vrc = made.vrc
        files[COMPRESSOR] = lambda: [edge_graphs.compressor_graph(vrc.config, vrc.params).rounded(precision)]
    if settings.prefill:
        files["embedder"] = lambda: _embedders(made.read_embedding(), settings, precision)
        files["decoder"] = lambda: _decoders(made.read_decoder_weights(precision), settings)
    return files


def _embedders(params: Mapping[str, Any], settings: EdgeSettings, precision: Precision) -> list[Graph]:
    bits = precision.others
    table = None if bits is None else quantise(np.asarray(params[DECODER]["embedding"]), bits)
    return [edge_graphs.embedder_graph(params, length, table) for length in (1, *settings.prefill)]


def _decoders(weights: edge_graphs.Weights, settings: EdgeSettings) -> list[Graph]:
    config, slots = settings.config.decoder, settings.slots
    prefill = [edge_graphs.decoder_graph(config, weights, length, slots, head=False) for length in settings.prefill]
    return [*prefill, edge_graphs.decoder_graph(config, weights, 1, slots, head=True)]


# What stands beside the files of an artifact.


def finish(
    made: Exported,
    kind: str,
    dtype: str,
    home: pathlib.Path,
    report: Mapping[str, Any],
    versions: Mapping[str, str],
    target: Mapping[str, Any] | None = None,
    more_golden: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Golden arrays, report and manifest; `target` is what stands in the shapes besides the settings, `more_golden` what else is golden."""
    source, tiling = made.source, made.settings.config.tiling
    shown = [case for case in golden.cases(tiling) if case.name in next(iter(made.references.values()))]
    arrays = {
        f"{branch}/{key}": value
        for branch, found in made.references.items()
        for key, value in golden.arrays(found, shown).items()
    }
    artifacts.write_golden(home, {**arrays, **_golden_parts(made, shown), **(more_golden or {})})
    artifacts.write_json(home / artifacts.REPORT, report)
    preprocessing = {
        "tiling": dataclasses.asdict(tiling),
        "pixels": "row, column, channel; byte / 127.5 - 1 for the encoder, byte / 255 for the compressor",
        "padding": "byte 128 in tiles, 0 in proxies; visual tokens wholly in padding are not in the prompt",
        "mask": f"0 where a position is seen, {edge_graphs.MASKED_SCORE} where not; cached slots first, then the new positions",
        "rotary": "cosine and sine of position · theta^(-2i/k), the half-width table written twice",
        "prompts": [{"name": case.name, "question": case.question, "images": len(case.images)} for case in shown],
    }
    origin = artifacts.source_of(source.home, source.step, source.description)
    shapes, parity = {**made.settings.to_json(), **(target or {})}, report["parts"]
    artifacts.write_manifest(home, Manifest(kind, origin, shapes, dtype, preprocessing, versions, parity))


def _golden_parts(made: Exported, shown: Sequence[Case]) -> dict[str, np.ndarray]:
    """What JAX makes of single parts: visual tokens of the first picture, and the compressor's outputs for all pictures."""
    images = [image for case in golden.cases(made.settings.config.tiling) for image in case.images]
    first = next((case.name for case in shown if case.images), None)
    branches = () if first is None else made.settings.branches
    found = {f"{branch}/{first}/visual": made.references[branch][first].visual for branch in branches}
    if made.vrc is None:
        return found
    proxies, sides = make_proxies(images, made.vrc.config.proxy_size)
    areas = predict_log_areas(made.vrc.config, made.vrc.params, proxies)
    return found | {
        f"{COMPRESSOR}/proxy": proxies,
        f"{COMPRESSOR}/longest_side": sides,
        f"{COMPRESSOR}/log_area": areas,
    }


# Options that all exporters have.


def add_options(add: Callable[..., Any], precisions: Sequence[str]) -> None:
    """Adds them by `add`, the `add_argument` of a parser; the first precision is the default."""
    add("--checkpoint", metavar="DIR", required=True, help="a run's workdir or its checkpoints directory")
    add("--step", type=int, help="checkpoint to read (default: the newest)")
    add("--output", metavar="DIR", required=True, help="directory to make; must not exist, or be empty")
    add("--parts", type=_list_of(PARTS), default=PARTS, metavar="LIST", help="encoder, decoder (default: both)")
    add("--encoder", choices=(*BRANCHES, BOTH), default=BRANCHES[0], help="default: %(default)s")
    add("--compressor", metavar="DIR", help="what tools.train_compressor wrote, to go with the model")
    listed, default = _list_of(precisions), (precisions[0],)
    add("--precision", type=listed, default=default, metavar="LIST", help=f"of {', '.join(precisions)}")
    add("--prefill", type=_lengths, default=(128,), metavar="LIST", help="lengths of prefill graphs (default: 128)")
    add("--slots", type=int, default=1024, metavar="N", help="positions the cache holds (default: %(default)s)")
    add("--data", metavar="ROOT", help="compare on ROOT/heldout/TASK too, calibrate on ROOT/train/TASK")
    add("--items", type=int, default=4, metavar="N", help="records of each TASK to compare on (default: %(default)s)")
    add(
        "--calibration-items",
        type=int,
        default=16,
        metavar="N",
        help="records of each TASK to calibrate on (default: %(default)s)",
    )
    add("--json", action="store_true", help="print the reports as one JSON object")


def _list_of(names: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        if set(found) - set(names) or not found:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of {', '.join(names)}")
        return found

    return parse


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from None
