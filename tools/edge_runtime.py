"""Runs an artifact of `tools.export_tflite` by ai-edge-litert: images and a question in, text out, one tile after another.

    image ─► compressor ─► α ─► tiles ─► encoder, one by one ─┐
    question ─► ids ─► embedder ──────────────────────────────┴─► prefill in pieces ─► decode ─► text

The encoder's memory is that of one tile, however many an image has; only its pixels and visual tokens grow.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from hypervl_jax.architecture import CompressorConfig, HyperVLConfig, compressor_from_json, from_json, require
from hypervl_jax.text.conversation import TEXT_POSITION, EncodedConversation, Turn, encode_prompt
from hypervl_jax.text.tokenizer import Tokenizer, load_tokenizer
from hypervl_jax.vision.anyres import plan_image, tile_image
from hypervl_jax.vision.pixels import normalise_pixels
from hypervl_jax.vision.resolution import make_proxy
from tools import artifacts
from tools.artifacts import ArtifactError, Manifest
from tools.edge_graphs import HostCache

KIND = "tflite"
TOKENIZER = "tokenizer"
THREADS = 2

Rgb = UInt8[np.ndarray, "h w 3"]
Signature = Callable[..., Mapping[str, np.ndarray]]
"""A graph that is called with its inputs by name."""


@dataclasses.dataclass(frozen=True)
class EdgeSettings:
    """What a runtime must know beside the graphs.

    Attributes:
        config: what the model is.
        compressor: the VRC's own config, None without one.
        branches: whose encoders are there.
        prefill: lengths of the prefill graphs, rising.
        slots: of the cache.
    """

    config: HyperVLConfig
    compressor: CompressorConfig | None
    branches: tuple[str, ...]
    prefill: tuple[int, ...]
    slots: int

    def to_json(self) -> dict[str, Any]:
        """What stands in a manifest; the architecture is in its source."""
        values = {"branches": self.branches, "prefill": self.prefill, "slots": self.slots}
        return values | {"compressor": None if self.compressor is None else dataclasses.asdict(self.compressor)}


def read_settings(manifest: Manifest, kind: str = KIND) -> EdgeSettings:
    """The settings of an artifact. Raises `ArtifactError` when it is none of this kind."""
    if manifest.kind != kind:
        raise ArtifactError(f"this is an artifact for {manifest.kind!r}; only those of tools.export_{kind} run here")
    shapes = manifest.shapes
    try:
        vrc = None if shapes["compressor"] is None else compressor_from_json(shapes["compressor"])
        lists = (tuple(shapes[name]) for name in ("branches", "prefill"))
        return EdgeSettings(from_json(manifest.source["architecture"]), vrc, *lists, shapes["slots"])
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"the manifest's shapes are damaged ({error}); export the checkpoint again") from error


def checked(settings: EdgeSettings, signatures: Mapping[str, Signature]) -> Mapping[str, Signature]:
    """The signatures. Raises `ArtifactError` when one that the settings promise is not there."""
    decoder = {"decode", "embedder_1", f"embedder_{settings.prefill[-1]}"} if settings.prefill else set()
    wanted = decoder | {f"prefill_{length}" for length in settings.prefill}
    wanted |= {f"encoder_{branch}" for branch in settings.branches} | ({"compressor"} if settings.compressor else set())
    missing = sorted(wanted - signatures.keys())
    if missing:
        raise ArtifactError(f"no file of this artifact holds {', '.join(missing)}; export the checkpoint again")
    return signatures


def open_signatures(directory: pathlib.Path, threads: int = THREADS) -> dict[str, Signature]:
    """All signatures of the TFLite files of a directory, by name. Raises `ArtifactError` without ai-edge-litert."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ArtifactError(
            "ai-edge-litert is not installed; TFLite files run with the extra: pip install 'hypervl-jax[export]'"
        ) from error
    found: dict[str, Signature] = {}
    for path in sorted(directory.glob("*.tflite")):
        try:
            interpreter = Interpreter(str(path), num_threads=threads)
            names = list(interpreter.get_signature_list())
            found |= {name: interpreter.get_signature_runner(name) for name in names}
        except (ValueError, RuntimeError) as error:
            raise ArtifactError(f"{path} cannot be loaded ({str(error).splitlines()[0][:120]})") from error
    return found


class EdgeModel:
    """A model whose parts are graphs of static shapes, whatever runs them.

    Args:
        settings: sizes.
        tokenizer: with its chat template.
        signatures: graphs by name: `compressor`, `encoder_BRANCH`, `embedder_N`, `prefill_N`, `decode`.
    """

    def __init__(self, settings: EdgeSettings, tokenizer: Tokenizer, signatures: Mapping[str, Signature]) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.signatures = signatures

    def alpha(self, image: Rgb) -> float:
        """The compressor's α of an image; 1 without a compressor."""
        if self.settings.compressor is None:
            return 1.0
        proxy = make_proxy(image, self.settings.compressor.proxy_size)[None].astype(np.float32) / 255
        longest = np.float32([max(image.shape[:2])])
        return float(np.clip(self.signatures["compressor"](proxy=proxy, longest_side=longest)["alpha"][0], 0.1, 1))

    def encode(self, tiles: UInt8[np.ndarray, "t s s 3"], branch: str) -> Float32[np.ndarray, "v d"]:
        """Visual tokens of every tile, encoded one by one."""
        config = self.settings.config
        each = config.tiling.tokens_per_tile
        visual = np.empty((len(tiles) * each, config.decoder.hidden_size), np.float32)
        for number, tile in enumerate(tiles):
            features = self.signatures[f"encoder_{branch}"](tile=normalise_pixels(tile[None]))["features"]
            visual[number * each : (number + 1) * each] = features[0]
        return visual

    def embed(self, prompt: EncodedConversation, visual: Float32[np.ndarray, "v d"]) -> Float32[np.ndarray, "l d"]:
        """Embeddings of a prompt, visual tokens in their places."""
        length, tokens = self.settings.prefill[-1], prompt.tokens
        padded = np.zeros(-(-len(tokens) // length) * length, np.int32)
        padded[: len(tokens)] = tokens
        embedder = self.signatures[f"embedder_{length}"]
        pieces = [embedder(tokens=piece[None])["embeddings"][0] for piece in padded.reshape(-1, length)]
        embeddings, seen = np.concatenate(pieces)[: len(tokens)], prompt.visual_index != TEXT_POSITION
        embeddings[seen] = visual[prompt.visual_index[seen]]
        return embeddings

    def start(self, embeddings: Float32[np.ndarray, "l d"]) -> tuple[HostCache, Float32[np.ndarray, "n"]]:
        """Reads a prompt; the cache, and the logits of the token after it. The last position goes through `decode`."""
        cache, last = HostCache(self.settings.config.decoder, self.settings.slots), len(embeddings) - 1
        lengths = self.settings.prefill
        while cache.written < last:
            left = last - cache.written
            length = next((size for size in lengths if size >= left), lengths[-1])
            real = min(left, length)
            # Padding repeats the last position. Zeros would make 1 / sqrt(eps) of a norm, a range that leaves 16 bits nothing for the rest.
            piece = embeddings[None, cache.written + np.minimum(np.arange(length), real - 1)]
            cache.write(self.signatures[f"prefill_{length}"](**cache.inputs(piece, real)), real)
        return cache, self._append(cache, embeddings[None, last:])

    def step(self, cache: HostCache, token: int) -> Float32[np.ndarray, "n"]:
        """Appends a token; the logits of the one after it."""
        return self._append(cache, self.signatures["embedder_1"](tokens=np.int32([[token]]))["embeddings"])

    def _append(self, cache: HostCache, embeddings: Float32[np.ndarray, "1 1 d"]) -> Float32[np.ndarray, "n"]:
        outputs = self.signatures["decode"](**cache.inputs(embeddings, 1))
        cache.write(outputs, 1)
        return outputs["logits"][0, 0]

    def generate(
        self, embeddings: Float32[np.ndarray, "l d"], new_tokens: int, stop_ids: Sequence[int] = ()
    ) -> Iterator[int]:
        """Greedy ids after a prompt, one by one, without the stop token.

        Raises `ArtifactError` when prompt and answer do not fit the cache.
        """
        needed, slots = len(embeddings) + new_tokens - 1, self.settings.slots
        if needed > slots:
            raise ArtifactError(
                f"a prompt of {len(embeddings)} tokens and {new_tokens} new ones take {needed} slots, "
                f"the artifact has {slots}; ask for fewer tokens, a smaller alpha, or export with more --slots"
            )
        cache, scores = self.start(embeddings)
        for count in range(1, new_tokens + 1):
            token = int(scores.argmax())
            if token in stop_ids:
                return
            yield token
            if count < new_tokens:
                scores = self.step(cache, token)

    def prompt(
        self, turns: Sequence[Turn], images: Sequence[Rgb], alphas: Sequence[float]
    ) -> tuple[EncodedConversation, UInt8[np.ndarray, "t s s 3"]]:
        """Ids of a conversation, and the tiles of its images."""
        tiling = self.settings.config.tiling
        plans = [plan_image(*image.shape[:2], alpha, tiling) for image, alpha in zip(images, alphas, strict=True)]
        tiles = [tile_image(image, plan, tiling) for image, plan in zip(images, plans, strict=True)]
        none = np.zeros((0, tiling.tile_size, tiling.tile_size, 3), np.uint8)
        return encode_prompt(turns, self.tokenizer, plans, tiling), np.concatenate([none, *tiles])

    def answer(
        self,
        turns: Sequence[Turn],
        images: Sequence[Rgb],
        branch: str,
        alpha: float | None = None,
        new_tokens: int = 64,
    ) -> tuple[str, dict[str, Any]]:
        """Greedy text, and what it took; α is the compressor's when None.

        Raises:
            ArtifactError: it does not fit the cache.
            ConfigError: the artifact has no encoder of this branch.
            ConversationError: turns that cannot become a prompt.
        """
        branches = self.settings.branches
        require(branch in branches, f"this artifact has the encoder {' and '.join(branches)}, not {branch}")
        alphas = [self.alpha(image) if alpha is None else alpha for image in images]
        prompt, tiles = self.prompt(turns, images, alphas)
        stop_ids = (self.tokenizer.end_of_turn, self.tokenizer.end_of_text)
        embeddings = self.embed(prompt, self.encode(tiles, branch))
        tokens = list(self.generate(embeddings, new_tokens, stop_ids))
        counts = {"alphas": alphas, "tiles": len(tiles), "prompt_tokens": len(prompt.tokens), "new_tokens": len(tokens)}
        return self.tokenizer.decode(tokens), counts


def open_model(directory: pathlib.Path, threads: int = THREADS) -> EdgeModel:
    """The model of an artifact. Raises `ArtifactError` when it is none, or its parts cannot be run."""
    settings = read_settings(artifacts.read_manifest(directory))
    signatures = checked(settings, open_signatures(directory, threads))
    return EdgeModel(settings, load_tokenizer(directory / TOKENIZER), signatures)
