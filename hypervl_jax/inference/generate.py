"""Prefill and decoding with a key-value cache: pure functions of static shapes, and the programs compiled from them.

Prompts of different lengths share a batch, padded to one of a few lengths (`bucket`), so that the number of compilations
stays small whatever arrives. Whole batches decode inside one `lax.while_loop`; streaming calls the same step token by token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Key

from hypervl_jax.architecture import require
from hypervl_jax.models.hypervl import merge
from hypervl_jax.models.qwen3 import Decoder, KVCache, empty_cache, head_weights, logits
from hypervl_jax.text.conversation import TEXT_POSITION, EncodedConversation

LENGTH_BUCKET = 32
NEW_TOKENS_BUCKET = 16
"""The smallest static sizes of a prompt and of an answer, in tokens."""

COMPILATION = "compilation"
"""The step of a `Stopwatch` that holds compile time."""


def bucket(size: int, smallest: int = 1) -> int:
    """The next static size: `smallest` times 1, 1.5, 2, 3, 4, 6, 8, …, so that at most a third is padding.

    With `smallest` 1 the sizes are 1, 2, 3, 4, 6, 8, 12, …
    """
    power = smallest
    while power < size:
        between = power * 3 // 2
        if power % 2 == 0 and between >= size:
            return between
        power *= 2
    return power


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from its logits.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding, which ignores the rest.
        top_k: only the k likeliest tokens; 0 keeps all.
        top_p: only the smallest set of likeliest tokens whose probabilities sum to `top_p` or more (arXiv 1904.09751), after
            temperature and `top_k`; the likeliest token always stays.
        seed: answers are a function of the seed, the request's number and the prompt, whatever shares the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"sampling temperature {self.temperature} must be 0 (greedy) or positive")
        require(self.top_k >= 0, f"sampling top_k {self.top_k} must be 0 (all tokens) or positive")
        require(0 < self.top_p <= 1, f"sampling top_p {self.top_p} must be in (0, 1]")

    def draws(self, requests: Sequence[int]) -> Draws | None:
        """What sampling needs on the device for the requests of these numbers; None for greedy decoding."""
        if self.temperature == 0:
            return None
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.seed), np.asarray(requests, np.uint32))
        return Draws(keys, np.float32(self.temperature), np.int32(self.top_k), np.float32(self.top_p))


GREEDY = Sampling()


class Draws(NamedTuple):
    """`Sampling` as arrays, so that other settings need no other program; one random key a row."""

    keys: Key[Array, "b"]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


class Prompts(NamedTuple):
    """Prompts padded to one length, on either side. Padding has segment 0; `positions` count the real tokens of a row.

    `visual_index` numbers the visual tokens of the whole batch (all rows' tiles in order), -1 for text.
    """

    tokens: Int32[Array, "b l"]
    segments: Int32[Array, "b l"]
    positions: Int32[Array, "b l"]
    visual_index: Int32[Array, "b l"]


class DecodeState(NamedTuple):
    """The cache, the next slot to write (of all rows), and the position of each row's next token."""

    cache: KVCache
    slot: Int[Array, ""]
    positions: Int[Array, "b"]


class Generated(NamedTuple):
    """Answers without their stop tokens: `lengths` of the m places hold ids. `stopped` is False where the limit cut."""

    tokens: Int[Array, "b m"]
    lengths: Int[Array, "b"]
    stopped: Bool[Array, "b"]


def pad_prompts(prompts: Sequence[EncodedConversation], first_visual: Sequence[int], rows: int, length: int) -> Prompts:
    """Prompts in host memory, padded on the right to `length` and below to `rows`.

    Args:
        prompts: at most `rows`, none longer than `length`.
        first_visual: for each prompt, the place of its first tile's first visual token among those of the batch.
        rows: of the batch.
        length: of the batch, in tokens.
    """
    padded = Prompts(*(np.zeros((rows, length), np.int32) for _ in Prompts._fields))
    padded.visual_index.fill(TEXT_POSITION)
    for row, (prompt, first) in enumerate(zip(prompts, first_visual, strict=True)):
        size = len(prompt.tokens)
        padded.tokens[row, :size] = prompt.tokens
        padded.segments[row, :size] = 1
        padded.positions[row, :size] = np.arange(size)
        visual = prompt.visual_index != TEXT_POSITION
        padded.visual_index[row, :size] = prompt.visual_index + np.where(visual, first, 0)
    return padded


def embed_prompts(
    params: dict[str, Any], prompts: Prompts, visual: Float[Array, "v d"], *, decoder: Decoder
) -> Float[Array, "b l d"]:
    """Token embeddings with the batch's visual tokens in their places; `params` are the decoder's."""
    embeddings = decoder.apply({"params": params}, prompts.tokens, method="embed")
    # One row of all positions, because the visual tokens of all rows lie in one list without padding.
    flat = embeddings.reshape(1, -1, embeddings.shape[-1])
    return merge(flat, visual[None], prompts.visual_index.reshape(1, -1)).reshape(embeddings.shape)


def prefill(
    params: dict[str, Any], embeddings: Float[Array, "b l d"], prompts: Prompts, *, decoder: Decoder, slots: int
) -> tuple[Float[Array, "b n"], DecodeState]:
    """Reads the prompts into a fresh cache of `slots` slots a row (at least l and the tokens to come).

    Returns:
        Logits of each row's next token, and the state to decode from. Rows of padding only give logits without meaning.
    """
    rows, length = prompts.segments.shape
    cache = empty_cache(decoder.config, rows, slots, decoder.runtime.dtype)
    segments, positions = prompts.segments, prompts.positions
    hidden, cache = decoder.apply({"params": params}, embeddings, segments, positions, cache, 0)
    last = jnp.max(jnp.where(segments > 0, jnp.arange(length), 0), axis=1)
    row = jnp.arange(rows)
    state = DecodeState(cache, jnp.int32(length), positions[row, last] + 1)
    return logits(hidden[row, last], head_weights(params)), state


def decode_step(
    params: dict[str, Any], tokens: Int[Array, "b"], state: DecodeState, *, decoder: Decoder
) -> tuple[Float[Array, "b n"], DecodeState]:
    """Appends one token to each row; returns the logits of the one after it."""
    embeddings = decoder.apply({"params": params}, tokens[:, None], method="embed")
    segments = jnp.ones_like(tokens)[:, None]
    positions = state.positions[:, None]
    hidden, cache = decoder.apply({"params": params}, embeddings, segments, positions, state.cache, state.slot)
    return logits(hidden[:, 0], head_weights(params)), DecodeState(cache, state.slot + 1, state.positions + 1)


def filter_logits(scores: Float[Array, "b n"], draws: Draws) -> tuple[Int[Array, "b n"], Float[Array, "b n"]]:
    """Ids from the likeliest down, and their logits over the temperature; -inf where top-k or top-p leaves a token out."""
    order = jnp.argsort(-scores, axis=-1)
    scaled = jnp.take_along_axis(scores, order, axis=-1) / draws.temperature
    rank = jnp.arange(scores.shape[-1])
    kept = jnp.where((draws.top_k == 0) | (rank < draws.top_k), scaled, -jnp.inf)
    probabilities = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    nucleus = (before < draws.top_p) | (rank == 0) | (draws.top_p >= 1)
    return order, jnp.where(nucleus, kept, -jnp.inf)


def choose_tokens(scores: Float[Array, "b n"], draws: Draws | None, positions: Int[Array, "b"]) -> Int[Array, "b"]:
    """Each row's next token: the likeliest, or one drawn with the row's key and the position the token will take."""
    if draws is None:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    order, filtered = filter_logits(scores, draws)
    keys = jax.vmap(jax.random.fold_in)(draws.keys, positions)
    rank = jax.vmap(jax.random.categorical)(keys, filtered)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def start(
    params: dict[str, Any],
    embeddings: Float[Array, "b l d"],
    prompts: Prompts,
    draws: Draws | None,
    *,
    decoder: Decoder,
    slots: int,
) -> tuple[Int[Array, "b"], DecodeState]:
    """Prefill and each row's first token."""
    scores, state = prefill(params, embeddings, prompts, decoder=decoder, slots=slots)
    return choose_tokens(scores, draws, state.positions), state


def advance(
    params: dict[str, Any], tokens: Int[Array, "b"], state: DecodeState, draws: Draws | None, *, decoder: Decoder
) -> tuple[Int[Array, "b"], DecodeState]:
    """One step of decoding: each row's token appended, its next one chosen."""
    scores, state = decode_step(params, tokens, state, decoder=decoder)
    return choose_tokens(scores, draws, state.positions), state


class _Loop(NamedTuple):
    step: Int[Array, ""]
    current: Int[Array, "b"]
    state: DecodeState
    generated: Generated


def decode_all(
    params: dict[str, Any],
    first: Int[Array, "b"],
    state: DecodeState,
    draws: Draws | None,
    real: Bool[Array, "b"],
    stop_ids: Int[Array, "k"],
    limit: Int[Array, ""],
    *,
    decoder: Decoder,
    width: int,
) -> Generated:
    """Decodes a batch to its end in one loop on the device, which ends with the last row.

    Args:
        params: the decoder's.
        first: each row's first token, from `start`.
        state: from `start`.
        draws: None for greedy decoding.
        real: False for rows of padding, which do not keep the loop running.
        stop_ids: tokens that end a row; they are not part of the answer.
        limit: most tokens of an answer, at most `width`; may be traced.
        decoder: the module.
        width: places for tokens; the cache must have as many free slots.
    """
    is_stop = lambda tokens: (tokens[:, None] == stop_ids).any(1)
    stopped = ~real | is_stop(first)
    tokens = jnp.zeros((first.shape[0], width), jnp.int32).at[:, 0].set(jnp.where(stopped, 0, first))
    generated = Generated(tokens, (~stopped).astype(jnp.int32), stopped)

    def running(loop: _Loop) -> Bool[Array, ""]:
        return (loop.step < limit) & ~loop.generated.stopped.all()

    def body(loop: _Loop) -> _Loop:
        current, state = advance(params, loop.current, loop.state, draws, decoder=decoder)
        tokens, lengths, stopped = loop.generated
        stopped = stopped | is_stop(current)
        tokens = tokens.at[:, loop.step].set(jnp.where(stopped, 0, current))
        return _Loop(loop.step + 1, current, state, Generated(tokens, lengths + ~stopped, stopped))

    return jax.lax.while_loop(running, body, _Loop(jnp.int32(1), first, state, generated)).generated


class Programs:
    """Compiled programs by function, static arguments, and shapes and devices of arguments; compile time is kept apart.

    Attributes:
        compile_ms: milliseconds spent compiling so far.
    """

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self.compile_ms = 0.0

    def __len__(self) -> int:
        return len(self._compiled)

    def run(
        self, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = (), **static: Hashable
    ) -> Any:
        """`function(*arguments, **static)`, compiled on first use; the arguments numbered in `donate` are used up.

        The arguments are trees of numpy or jax arrays.
        """
        leaves, structure = jax.tree.flatten(arguments)
        inputs = tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)
        key = (function, tuple(sorted(static.items())), structure, inputs)
        if key not in self._compiled:
            began = time.perf_counter()
            program = jax.jit(functools.partial(function, **static), donate_argnums=donate)
            self._compiled[key] = program.lower(*arguments).compile()
            self.compile_ms += 1000 * (time.perf_counter() - began)
        return self._compiled[key](*arguments)


PROGRAMS = Programs()
"""The programs of this process: assistants of the same configuration share them."""


class Stopwatch:
    """Milliseconds of each step, compilation taken out of them and kept as a step of its own."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._began, self._start_up = time.perf_counter(), 0.0
        self._compiled_before = programs.compile_ms
        self._steps: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Adds the time of the block to step `name`."""
        began, compiled = time.perf_counter(), self._programs.compile_ms
        yield
        elapsed = 1000 * (time.perf_counter() - began) - (self._programs.compile_ms - compiled)
        self._steps[name] = self._steps.get(name, 0.0) + elapsed

    def restart(self) -> None:
        """Begins anew; all time until now counts as compilation, since it went into making programs ready."""
        self._start_up = 1000 * (time.perf_counter() - self._began)
        self._compiled_before = self._programs.compile_ms
        self._steps = {}

    def milliseconds(self, requests: int) -> dict[str, float]:
        """What each of `requests` took."""
        compilation = self._start_up + self._programs.compile_ms - self._compiled_before
        steps = self._steps | ({COMPILATION: compilation} if compilation else {})
        return {name: milliseconds / requests for name, milliseconds in steps.items()}


class Started(NamedTuple):
    """A prefilled batch: first tokens, state, which rows are real, and the places for new tokens in the cache."""

    tokens: Int[Array, "b"]
    state: DecodeState
    real: Bool[np.ndarray, "b"]
    width: int


class Generator:
    """Answers batches of prompts with one decoder. A `Started` batch is used up by `finish` or `stream`."""

    def __init__(self, decoder: Decoder, params: dict[str, Any], stop_ids: Sequence[int], programs: Programs) -> None:
        self._decoder = decoder
        self._params = params
        self._stop_ids = np.asarray(stop_ids, np.int32)
        self._programs = programs

    def start(self, prompts: Prompts, visual: Float[Array, "v d"], draws: Draws | None, new_tokens: int) -> Started:
        """Prefills prompts of static shape and chooses their first tokens; `new_tokens` (at least 1) is the most there may be."""
        width = bucket(new_tokens, NEW_TOKENS_BUCKET)
        run, decoder = self._programs.run, self._decoder
        embeddings = run(embed_prompts, self._params, prompts, visual, decoder=decoder)
        slots = prompts.tokens.shape[1] + width
        tokens, state = run(start, self._params, embeddings, prompts, draws, decoder=decoder, slots=slots)
        return Started(tokens, state, np.asarray(prompts.segments).any(1), width)

    def finish(self, started: Started, draws: Draws | None, new_tokens: int) -> Generated:
        """All rows' answers, in host memory."""
        tokens, state, real, width = started
        arguments = (self._params, tokens, state, draws, real, self._stop_ids, np.int32(new_tokens))
        return jax.device_get(self._programs.run(decode_all, *arguments, decoder=self._decoder, width=width))

    def stream(self, started: Started, draws: Draws | None, new_tokens: int) -> Iterator[int]:
        """The first row's tokens one by one, each as soon as it is known; the same ids as `finish`."""
        tokens, state = started.tokens, started.state
        for count in range(1, new_tokens + 1):
            token = int(tokens[0])
            if token in self._stop_ids:
                return
            yield token
            if count < new_tokens:
                arguments = (self._params, tokens, state, draws)
                tokens, state = self._programs.run(advance, *arguments, donate=(2,), decoder=self._decoder)
