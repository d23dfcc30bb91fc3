"""Images and a question in, text out: chooses the branch and α, tiles, encodes, and decodes an answer.

    bytes ─► RGB ─► α (asked for, or VRC on a proxy) ─► plan ─► tiles ─► one branch's tower, tile by tile ─► prompt ─► tokens ─► text

Runs on one device. All programs have static shapes from `generate.bucket`, so few are compiled, whatever is asked.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Generator as GeneratorType
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8

from hypervl_jax.architecture import (
    BRANCHES,
    DECODER,
    HyperVLConfig,
    branch_parts,
    projector_part,
    require,
    vision_part,
)
from hypervl_jax.inference.compression import AlphaPredictor, Rgb, pad_rows
from hypervl_jax.inference.generate import (
    GREEDY,
    LENGTH_BUCKET,
    PROGRAMS,
    Draws,
    Generator,
    Sampling,
    Started,
    Stopwatch,
    bucket,
    pad_prompts,
)
from hypervl_jax.inference.latency import (
    ALPHAS,
    COMPRESSOR_STEP,
    DECODE,
    ENCODER,
    PREFILL,
    RESIZE,
    Choice,
    DeviceProfile,
    choose,
)
from hypervl_jax.models.compressor_io import load_compressor
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.models.qwen3 import Decoder
from hypervl_jax.models.runtime import RuntimeConfig, resolve_kernels
from hypervl_jax.text.conversation import IMAGE_SLOT, EncodedConversation, Turn, encode_prompt
from hypervl_jax.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from hypervl_jax.training.checkpoint import CheckpointError, load_params, read_description
from hypervl_jax.training.state import abstract_parameters
from hypervl_jax.vision.anyres import PADDING_BYTE, ImagePlan, plan_image, prompt_tokens, tile_image
from hypervl_jax.vision.decoding import UndecodableImage, decode_image
from hypervl_jax.vision.resolution import MAX_ALPHA, MIN_ALPHA

AUTO = "auto"
ENCODERS = (*BRANCHES, AUTO)

IMAGE_DECODING = "image_decoding"
"""A step that is measured besides `latency.STEPS`, outside every budget."""

_REHEARSED_TOKENS = 3
"""One of the prefill, one of a decoding step on it, and one of a decoding step on another."""

CAST_PARAMETERS = frozenset({"kernel", "embedding", "head", "position_embedding"})
"""Parameters that every layer casts to the compute dtype before use; the others are read in float32."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A conversation to answer and its images, encoded (`vision.decoding.FORMATS`) or as RGB, one for each image slot.

    `alphas` are those of its images where they differ from what the options ask for.
    """

    turns: tuple[Turn, ...]
    images: tuple[bytes | Rgb, ...] = ()
    alphas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(
            len(self.alphas) in (0, len(self.images)),
            f"{len(self.alphas)} α of a request for its {len(self.images)} images: give one each, or none",
        )


def ask(prompt: str, *images: bytes | Rgb) -> Request:
    """A request of one question; the images go before it unless it says with `IMAGE_SLOT` where they go."""
    slots = "" if IMAGE_SLOT in prompt else IMAGE_SLOT * len(images)
    return Request((Turn("user", slots + prompt),), images)


@dataclasses.dataclass(frozen=True)
class LatencyBudget:
    """At most `milliseconds` from decoded pixels to the last token, as `profile` predicts."""

    profile: DeviceProfile
    milliseconds: float

    def __post_init__(self) -> None:
        finite = 0 < self.milliseconds < math.inf
        require(finite, f"a latency budget of {self.milliseconds:g} ms is none; it must be positive and finite")


@dataclasses.dataclass(frozen=True)
class Options:
    """How to answer.

    Attributes:
        encoder: a branch, or "auto": the largest that fits the budget.
        alpha: share of each image's area to keep, in [0.1, 1], or "auto": the VRC's prediction for each image (1 without a
            VRC), limited by the budget.
        sampling: greedy by default.
        max_new_tokens: most tokens of an answer; what a budget counts with.
        blank: replaces the pixels, not the sizes, by mid-grey after α is chosen: what the model answers without seeing.
        budget: needed for the encoder "auto".
        unsure: α "auto" is 1 where the VRC judges a picture's views differently by more than this (`compression.VIEWS`), in the log of
            the area; never where None.
    """

    encoder: str = "base"
    alpha: float | str = 1.0
    sampling: Sampling = GREEDY
    max_new_tokens: int = 128
    blank: bool = False
    budget: LatencyBudget | None = None
    unsure: float | None = None

    def __post_init__(self) -> None:
        require(self.encoder in ENCODERS, f"encoder {self.encoder!r} is not one of {', '.join(ENCODERS)}")
        automatic = self.alpha == AUTO
        require(
            automatic or (isinstance(self.alpha, (int, float)) and MIN_ALPHA <= self.alpha <= MAX_ALPHA),
            f"alpha {self.alpha} must be 'auto' or a number from {MIN_ALPHA} to {MAX_ALPHA}",
        )
        require(self.max_new_tokens >= 1, f"max_new_tokens {self.max_new_tokens} must be at least 1")
        require(
            self.encoder != AUTO or self.budget is not None,
            "encoder 'auto' chooses by latency: give a latency budget and a device profile",
        )


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer and what it took.

    Attributes:
        text: of `tokens`.
        tokens: generated ids without the stop token.
        stopped: False where `max_new_tokens` cut the answer.
        alphas: of each image.
        tiles: encoded.
        visual_tokens: in the prompt.
        prompt_tokens: in all.
        milliseconds: wall time of each step: `latency.STEPS`, `IMAGE_DECODING`, and `generate.COMPILATION` of programs that were
            new, under a budget with their first run. In a batch, the batch's time divided by its requests.
        branch: that saw the images.
        reason: why this branch and these α.
    """

    text: str
    tokens: tuple[int, ...]
    stopped: bool
    alphas: tuple[float, ...]
    tiles: int
    visual_tokens: int
    prompt_tokens: int
    milliseconds: Mapping[str, float]
    branch: str
    reason: str


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A request ready for the model."""

    prompt: EncodedConversation
    tiles: UInt8[np.ndarray, "t s s 3"]
    visual_tokens: int
    choice: Choice


def encode(
    params: dict[str, Any], tiles: UInt8[Array, "t s s 3"], *, model: HyperVL, branch: str
) -> Float[Array, "v d"]:
    """Visual tokens of a list of tiles, `runtime.tile_chunk` at a time; `params` holds the branch's tower and projector."""
    return model.apply({"params": params}, tiles[None], branch, method="encode_tiles")[0]


class Assistant:
    """A model with its tokenizer, ready to answer.

    Args:
        config: what the model is.
        runtime: how it is computed.
        params: parts of HyperVL's tree: the decoder, and the tower and projector of each branch that may be asked for.
        tokenizer: with its chat template.
        compressor_params: the VRC's tree; without it α "auto" is 1.
    """

    def __init__(
        self,
        config: HyperVLConfig,
        runtime: RuntimeConfig,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        compressor_params: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.params = params
        self.tokenizer = tokenizer
        self.compressor_params = compressor_params
        self._model = HyperVL(config, runtime)
        self._predictor = AlphaPredictor(config.compressor, runtime.dtype, compressor_params or {})
        self._rehearsed: set[Hashable] = set()
        stop_ids = (tokenizer.end_of_turn, tokenizer.end_of_text)
        self._generator = Generator(Decoder(config.decoder, runtime), params[DECODER], stop_ids, PROGRAMS)

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches whose parameters are here."""
        return tuple(branch for branch in BRANCHES if set(branch_parts(branch)) <= set(self.params))

    def answer(self, requests: Sequence[Request], options: Options | None = None, *, rows: int = 32) -> list[Answer]:
        """Answers requests in batches of at most `rows` (one by one under a latency budget).

        Raises:
            ConfigError: options that cannot work with this model.
            ConversationError: turns that cannot become a prompt, or slots and images that differ in number.
            UndecodableImage: an image's bytes are damaged or too large.
        """
        options = options or Options()
        rows = 1 if options.budget else rows
        answers: list[Answer] = []
        for first in range(0, len(requests), rows):
            answers += self._answer_batch(requests[first : first + rows], first, options)
        return answers

    def stream(self, request: Request, options: Options | None = None) -> GeneratorType[str, None, Answer]:
        """Yields the answer's text piece by piece, as soon as it is known; returns the whole `Answer`, which is `answer`'s.

        Raises:
            As `answer`, at the first piece.
        """
        options = options or Options()
        watch = Stopwatch(PROGRAMS)
        prepared = self._prepare_warm([request], options, watch, True)
        draws = options.sampling.draws([0])
        started = self._start(prepared, draws, options, watch)
        text, tokens, decoder = "", [], StreamDecoder(self.tokenizer)
        ids = self._generator.stream(started, draws, options.max_new_tokens)
        while True:
            with watch.step(DECODE):
                token = next(ids, None)
            if token is None:
                break
            tokens.append(token)
            piece = decoder.push(token)
            text += piece
            if piece:
                yield piece
        if rest := decoder.finish():
            yield rest
        stopped = len(tokens) < options.max_new_tokens
        return _answer(prepared[0], text + rest, tokens, stopped, watch.milliseconds(1))

    def _answer_batch(self, requests: Sequence[Request], first: int, options: Options) -> list[Answer]:
        """Answers the requests that are numbered from `first` on."""
        watch = Stopwatch(PROGRAMS)
        prepared = self._prepare_warm(requests, options, watch, False)
        rows = bucket(len(requests))
        draws = options.sampling.draws(range(first, first + rows))
        started = self._start(prepared, draws, options, watch)
        with watch.step(DECODE):
            generated = self._generator.finish(started, draws, options.max_new_tokens)
        milliseconds = watch.milliseconds(len(requests))
        ids = [row[:length].tolist() for row, length in zip(generated.tokens, generated.lengths, strict=True)]
        return [
            _answer(item, self.tokenizer.decode(tokens), tokens, bool(stopped), milliseconds)
            for item, tokens, stopped in zip(prepared, ids, generated.stopped, strict=False)
        ]

    def _prepare_warm(
        self, requests: Sequence[Request], options: Options, watch: Stopwatch, streamed: bool
    ) -> list[_Prepared]:
        """Prepares the requests; under a budget, which has one at a time, with all programs run once before time is measured.

        The first run of a program costs many times what the device profile, which is of warm programs, predicts.
        """
        prepared = self._prepare(requests, options, watch)
        if options.budget is None:
            return prepared
        (item,) = prepared
        sizes = bucket(len(item.tiles)), bucket(len(item.prompt.tokens), LENGTH_BUCKET), options.max_new_tokens
        path = (streamed, item.choice.branch, sizes, options.alpha == AUTO, options.sampling.temperature > 0)
        if path in self._rehearsed:
            return prepared
        self._rehearse(prepared, options, streamed)
        self._rehearsed.add(path)
        watch.restart()
        return self._prepare(requests, options, watch)

    def _rehearse(self, prepared: Sequence[_Prepared], options: Options, streamed: bool) -> None:
        """Begins the answer once for nothing, as far as every program of it has run."""
        draws, most = options.sampling.draws([0]), options.max_new_tokens
        started = self._start(prepared, draws, options, Stopwatch(PROGRAMS))
        if streamed:
            list(itertools.islice(self._generator.stream(started, draws, most), _REHEARSED_TOKENS))
        else:
            self._generator.finish(started, draws, min(_REHEARSED_TOKENS, most))

    def _prepare(self, requests: Sequence[Request], options: Options, watch: Stopwatch) -> list[_Prepared]:
        with watch.step(IMAGE_DECODING):
            images = [_decode_images(request.images) for request in requests]
        wanted = self._wanted_alphas(images, options, watch)
        return [
            self._prepare_one(request, rgbs, request.alphas or alphas, options, watch)
            for request, rgbs, alphas in zip(requests, images, wanted, strict=True)
        ]

    def _wanted_alphas(
        self, images: Sequence[Sequence[Rgb]], options: Options, watch: Stopwatch
    ) -> list[tuple[float, ...]]:
        """α of each request's images before any budget."""
        if options.alpha != AUTO or self.compressor_params is None:
            alpha = MAX_ALPHA if options.alpha == AUTO else float(options.alpha)
            return [(alpha,) * len(rgbs) for rgbs in images]
        with watch.step(COMPRESSOR_STEP):
            predicted = iter(self._predictor.predict([rgb for rgbs in images for rgb in rgbs], options.unsure))
        return [tuple(next(predicted) for _ in rgbs) for rgbs in images]

    def _prepare_one(
        self, request: Request, images: list[Rgb], wanted: tuple[float, ...], options: Options, watch: Stopwatch
    ) -> _Prepared:
        tiling, sizes = self.config.tiling, [rgb.shape[:2] for rgb in images]
        plans = [plan_image(*size, alpha, tiling) for size, alpha in zip(sizes, wanted, strict=True)]
        prompt = encode_prompt(request.turns, self.tokenizer, plans, tiling)
        text_tokens = len(prompt.tokens) - sum(prompt_tokens(plan, tiling) for plan in plans)
        choice = self._choose(sizes, text_tokens, wanted, options)
        if choice.alphas != wanted:
            plans = [plan_image(*size, alpha, tiling) for size, alpha in zip(sizes, choice.alphas, strict=True)]
            prompt = encode_prompt(request.turns, self.tokenizer, plans, tiling)
        with watch.step(RESIZE):
            tiles = self._tiles(images, plans, options.blank)
        return _Prepared(prompt, tiles, sum(plan.tokens for plan in plans), choice)

    def _choose(
        self, sizes: Sequence[tuple[int, int]], text_tokens: int, wanted: tuple[float, ...], options: Options
    ) -> Choice:
        """The branch and α's, by the budget where there is one."""
        branches = self.branches if options.encoder == AUTO else (options.encoder,)
        require(
            bool(branches) and set(branches) <= set(self.branches),
            f"no parameters of branch {options.encoder} were loaded, only of {', '.join(self.branches) or 'none'}",
        )
        automatic = options.alpha == AUTO
        compressed = automatic and self.compressor_params is not None
        if options.budget is None:
            source = "predicted by the compressor" if compressed else "1, for there is no compressor"
            reason = f"branch {options.encoder} as asked, α {source if automatic else 'as asked'}"
            return Choice(options.encoder, wanted, {}, reason)
        return choose(
            options.budget.profile,
            sizes,
            text_tokens,
            options.max_new_tokens,
            options.budget.milliseconds,
            self.config.tiling,
            wanted=wanted,
            limits=ALPHAS if automatic else (MAX_ALPHA,),
            branches=branches,
            compressed=compressed,
        )

    def _tiles(self, images: list[Rgb], plans: list[ImagePlan], blank: bool) -> UInt8[np.ndarray, "t s s 3"]:
        side, seen = self.config.tiling.tile_size, images
        if blank:
            seen = [np.full_like(image, PADDING_BYTE) for image in images]
        tiles = [tile_image(image, plan, self.config.tiling) for image, plan in zip(seen, plans, strict=True)]
        return np.concatenate([np.zeros((0, side, side, 3), np.uint8), *tiles])

    def _start(self, prepared: Sequence[_Prepared], draws: Draws | None, options: Options, watch: Stopwatch) -> Started:
        """Encodes the tiles of a batch of one branch, and prefills its prompts."""
        with watch.step(ENCODER):
            tiles = np.concatenate([item.tiles for item in prepared])
            visual = jax.block_until_ready(self._encode(tiles, prepared))
        counts = [len(item.tiles) * self.config.tiling.tokens_per_tile for item in prepared]
        length = bucket(max(len(item.prompt.tokens) for item in prepared), LENGTH_BUCKET)
        first_visual = np.cumsum([0, *counts[:-1]])
        prompts = pad_prompts([item.prompt for item in prepared], first_visual, bucket(len(prepared)), length)
        with watch.step(PREFILL):
            return jax.block_until_ready(self._generator.start(prompts, visual, draws, options.max_new_tokens))

    def _encode(self, tiles: UInt8[np.ndarray, "t s s 3"], prepared: Sequence[_Prepared]) -> Float[Array, "v d"]:
        branch = prepared[0].choice.branch
        if len(tiles) == 0:
            return jnp.zeros((0, self.config.decoder.hidden_size), self.runtime.dtype)
        params = {part(branch): self.params[part(branch)] for part in (vision_part, projector_part)}
        return PROGRAMS.run(encode, params, pad_rows(tiles, bucket(len(tiles))), model=self._model, branch=branch)


def _answer(
    item: _Prepared, text: str, tokens: Sequence[int], stopped: bool, milliseconds: Mapping[str, float]
) -> Answer:
    choice, counts = item.choice, (len(item.tiles), item.visual_tokens, len(item.prompt.tokens))
    return Answer(text, tuple(tokens), stopped, choice.alphas, *counts, milliseconds, choice.branch, choice.reason)


def _decode_images(images: Sequence[bytes | Rgb]) -> list[Rgb]:
    decoded = []
    for number, image in enumerate(images, 1):
        try:
            decoded.append(decode_image(image) if isinstance(image, bytes) else image)
        except UndecodableImage as error:
            detail = f": {error.detail}" if error.detail else ""
            raise UndecodableImage(error.reason, f"image {number} of the request{detail}") from error
    return decoded


def inference_runtime(tile_chunk: int = 1) -> RuntimeConfig:
    """How inference computes on this machine: bfloat16 on accelerators, float32 on CPUs, nothing rematerialised."""
    platform = jax.default_backend()
    dtype = "float32" if platform == "cpu" else "bfloat16"
    runtime = RuntimeConfig(dtype=dtype, decoder_remat="none", tower_remat="none", tile_chunk=tile_chunk)
    return resolve_kernels(runtime, platform)


def inference_dtypes(abstract: Any, dtype: str) -> Any:
    """Abstract parameters as inference keeps them, on one device: what is cast before each use is stored cast.

    The results are bit-identical to those with float32 parameters, at half the memory in bfloat16.
    """
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, dtype if path[-1].key in CAST_PARAMETERS else leaf.dtype, sharding=sharding
        )

    return jax.tree_util.tree_map_with_path(one, abstract)


def load_assistant(
    checkpoint: epath.PathLike,
    step: int | None = None,
    *,
    compressor: epath.PathLike | None = None,
    branches: Sequence[str] = BRANCHES,
    runtime: RuntimeConfig | None = None,
) -> Assistant:
    """An assistant from a checkpoint directory that describes itself.

    Args:
        checkpoint: of the model.
        step: the newest when None.
        compressor: directory of a VRC (`models.compressor_io`).
        branches: whose parameters are read.
        runtime: `inference_runtime()` when None.

    Raises:
        CheckpointError: a directory is missing, is no checkpoint, or does not fit its own description.
        TokenizerError: the checkpoint's tokenizer cannot be read.
    """
    description = read_description(checkpoint)
    config, runtime = description.architecture, runtime or inference_runtime()
    if description.tokenizer_directory is None:
        raise CheckpointError(f"{checkpoint} holds no tokenizer; it cannot answer questions")
    tokenizer = load_tokenizer(Path(description.tokenizer_directory))
    parts = sorted({part for branch in branches for part in branch_parts(branch)})
    abstract, _ = abstract_parameters(config, runtime)
    targets = inference_dtypes({part: abstract[part] for part in parts}, runtime.dtype)
    params = load_params(checkpoint, targets, step, parts)
    if compressor is None:
        return Assistant(config, runtime, params, tokenizer)
    saved = load_compressor(compressor)
    config = dataclasses.replace(config, compressor=saved.config)
    return Assistant(config, runtime, params, tokenizer, saved.params)
