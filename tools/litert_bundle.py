"""A `.litertlm` bundle: what the LiteRT-LM engine (`litert-lm run FILE`) needs of a model, in one file.

    decoder, embedder, tower and projector as TFLite (tools.litert_graphs) + tokenizer.json + metadata ─► BRANCH.litertlm

One vision encoder fits a bundle, so two branches are two. Pictures that follow one another in a message are tiles of one picture, row by row.
"""

from __future__ import annotations

import itertools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from hypervl_jax.architecture import DECODER, TilingConfig, require
from hypervl_jax.text.conversation import THINK_BLOCK
from hypervl_jax.text.tokenizer import (
    END_OF_TEXT,
    END_OF_TURN,
    IMAGE,
    START_OF_TURN,
    VISION_END,
    VISION_START,
    ChatTemplate,
)
from hypervl_jax.text.tokenizer_json import write_tokenizer_json
from tools import golden, litert_graphs
from tools.artifacts import ArtifactError
from tools.edge_graphs import Graph
from tools.edge_sources import Exported
from tools.golden import Case
from tools.quantisation import Precision, quantise

SUFFIX = ".litertlm"
PACKAGES = ("litert-lm-builder", "litert-lm")
ANSWER_TOKENS = 24
"""Of each prompt that a bundle is compared on."""

TILES = "bundle"
"""Golden arrays of those prompts are under this name."""

_TEMPLATE = """\
{% if @SYSTEM@ and messages[0].role != 'system' %}@START@system
{{ @SYSTEM@ }}@END@
{% endif %}{% for message in messages %}@START@{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}\
{% if loop.first or message.content[loop.index0 - 1].type != 'image' %}@OPEN@{% endif %}@IMAGE@\
{% if loop.last or message.content[loop.index0 + 1].type != 'image' %}@CLOSE@{% endif %}\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}@END@
{% endfor %}{% if add_generation_prompt %}@START@assistant
@THINK@{% endif %}"""


def packages() -> tuple[ModuleType, ModuleType]:
    """The builder of bundles and the engine that runs them. Raises `ArtifactError` where one is not installed."""
    try:
        import litert_lm
        import litert_lm_builder
    except ImportError as error:
        raise ArtifactError(
            f"bundles are written by litert-lm-builder and checked by litert-lm ({error}): pip install 'hypervl-jax[export]'"
        ) from error
    return litert_lm_builder, litert_lm


def chat_template(template: ChatTemplate) -> str:
    """`text.conversation` as the engine's Jinja template."""
    values = {
        "SYSTEM": repr(template.default_system or ""),
        "START": START_OF_TURN,
        "END": END_OF_TURN,
        "OPEN": VISION_START,
        "CLOSE": VISION_END,
        "IMAGE": IMAGE,
        "THINK": THINK_BLOCK if template.think_block else "",
    }
    text = _TEMPLATE
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def write(made: Exported, branch: str, precision: Precision, path: pathlib.Path) -> None:
    """Writes the bundle of one branch.

    Raises:
        ArtifactError: litert-lm-builder is missing, or litert-converter cannot convert a graph.
        ConfigError: the model writes separators or a thumbnail between tiles, which the engine cannot.
    """
    from tools.tflite_convert import convert

    (module, _), settings = packages(), made.settings
    tiling = settings.config.tiling
    require(not (tiling.separators or tiling.thumbnail), "a bundle holds no separators and no thumbnail between tiles")
    kinds = module.TfLiteModelType
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        home, bundle = pathlib.Path(name), module.LitertLmFileBuilder()
        (home / "metadata.pb").write_bytes(_metadata(made))
        bundle.add_system_metadata(module.Metadata(key="Authors", value="hypervl-jax", dtype=module.DType.STRING))
        bundle.add_llm_metadata(str(home / "metadata.pb"))
        bundle.add_hf_tokenizer(str(write_tokenizer_json(made.source.tokenizer, home)))
        both = litert_graphs.vision_graphs(settings.config, branch, made.read_encoder(branch))
        tower, adapter = (graph.rounded(precision) for graph in both)
        graphs: dict[Any, Callable[[], Sequence[Graph]]] = {
            kinds.PREFILL_DECODE: lambda: _decoders(made, precision),
            kinds.EMBEDDER: lambda: [_embedder(made, precision)],
            kinds.VISION_ENCODER: lambda: [tower],
            kinds.VISION_ADAPTER: lambda: [adapter],
        }
        for kind, signatures in graphs.items():
            file = home / f"{kind.name.lower()}.tflite"
            convert(signatures, file)
            bundle.add_tflite_model(str(file), kind)
        with path.open("wb") as stream:
            bundle.build(stream)


def _decoders(made: Exported, precision: Precision) -> list[Graph]:
    settings, weights = made.settings, made.read_decoder_weights(precision)
    config, most = settings.config.decoder, settings.prefill[-1]
    # A prefill writes all of its positions, padding too; behind the last slot there must be room for it.
    slots = settings.slots + most
    prefill = [litert_graphs.decoder_graph(config, weights, n, slots, head=False) for n in settings.prefill]
    return [*prefill, litert_graphs.decoder_graph(config, weights, 1, slots, head=True)]


def _embedder(made: Exported, precision: Precision) -> Graph:
    bits, params = precision.others, made.read_embedding()
    table = None if bits is None else quantise(np.asarray(params[DECODER]["embedding"]), bits)
    return litert_graphs.embedder_graph(params, table)


def _metadata(made: Exported) -> bytes:
    """What the engine must know beside the graphs. It has no greedy sampler: the best one of one is it."""
    from litert_lm_builder.runtime.proto import llm_metadata_pb2, sampler_params_pb2

    found = llm_metadata_pb2.LlmMetadata(max_num_tokens=made.settings.slots)
    found.jinja_prompt_template = chat_template(made.source.tokenizer.template)
    for token in (END_OF_TURN, END_OF_TEXT):
        found.stop_tokens.add().token_str = token
    sampler = found.sampler_params
    sampler.type = sampler_params_pb2.SamplerParameters.TOP_P
    sampler.k, sampler.p, sampler.temperature = 1, 1.0, 1.0
    model, pad = found.llm_model_type.generic_model, IMAGE.replace("|", r"\|")
    model.image_enabled, model.delimiter_regex, model.image_token_regex = True, f"({pad})", pad
    model.image_tensor_height = model.image_tensor_width = made.settings.config.tiling.tile_size
    return found.SerializeToString()


# The engine's answers, beside JAX's.


def cases(tiling: TilingConfig) -> list[Case]:
    """Prompts that mean the same to the engine: text, and pictures that are one and two whole tiles."""
    side, question = tiling.tile_size, "What is in the picture?"
    pictures = {"one_tile": golden.picture(side, side, 1), "two_tiles": golden.picture(side, 2 * side, 2)}
    text = (case for case in golden.cases(tiling) if not case.images)
    return [*text, *(Case(name, question, (image,)) for name, image in pictures.items())]


def compare(made: Exported, branch: str, path: pathlib.Path) -> dict[str, Any]:
    """The engine's greedy answers against JAX's: how many are the text of JAX's tokens, how many tokens those have, and all of them.

    Raises:
        ArtifactError: litert-lm is missing, or cannot run the bundle.
    """
    answers, equal, tokens = [], 0, 0
    for case, jax, count in _expected(made, branch):
        engine = ask(path, case.question, golden.tile_all(case.images, made.settings.config.tiling))
        equal, tokens = equal + int(engine == jax), tokens + count * int(engine == jax)
        answers.append({"prompt": case.name, "question": case.question, "jax": jax, "engine": engine})
    return {"answers_equal": equal, "of": len(answers), "tokens": tokens, "answers": answers}


def golden_tiles(tiling: TilingConfig) -> dict[str, np.ndarray]:
    """The tiles of the prompts by the names of golden arrays; a prompt without pictures has none."""
    return {f"{TILES}/{case.name}": golden.tile_all(case.images, tiling) for case in cases(tiling) if case.images}


def ask_again(path: pathlib.Path, answers: Sequence[Mapping[str, str]], arrays: Mapping[str, np.ndarray]) -> int:
    """How many prompts of `compare` the engine answers as it did then, or as JAX does.

    Args:
        path: of the bundle.
        answers: as `compare` gave them.
        arrays: with those of `golden_tiles`.
    """
    found = [ask(path, each["question"], arrays.get(f"{TILES}/{each['prompt']}", ())) for each in answers]
    return sum(text in (each["engine"], each["jax"]) for text, each in zip(found, answers, strict=True))


def _expected(made: Exported, branch: str) -> list[tuple[Case, str, int]]:
    """Prompts with JAX's answers and how many tokens those have. The parameters are let go before the engine has its own."""
    tokenizer, config = made.source.tokenizer, made.settings.config
    params, found = {**made.read_encoder(branch), **made.read_decoder()}, []
    for case in cases(config.tiling):
        generated = golden.compute(case, config, params, tokenizer, branch, ANSWER_TOKENS).generated
        ids = _until_stop(generated.tolist(), (tokenizer.end_of_turn, tokenizer.end_of_text))
        found.append((case, tokenizer.decode(ids), len(ids)))
    return found


def _until_stop(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in stops, ids))


def ask(path: pathlib.Path, question: str, tiles: Sequence[np.ndarray]) -> str:
    """One answer of the engine on this CPU, tiles as pictures of their own.

    Raises `ArtifactError` when litert-lm is missing, or cannot run the bundle.
    """
    _, engine = packages()
    engine.set_min_log_severity(engine.LogSeverity.ERROR)
    with tempfile.TemporaryDirectory() as name:
        home, content = pathlib.Path(name), []
        for number, tile in enumerate(tiles):
            file = home / f"{number}.png"
            Image.fromarray(tile).save(file)
            content.append({"type": "image", "path": str(file)})
        content.append({"type": "text", "text": question})
        vision = {"vision_backend": engine.Backend.CPU()} if len(tiles) else {}
        try:
            opened = engine.Engine(str(path), backend=engine.Backend.CPU(), cache_dir=str(home), **vision)
            with opened, opened.create_conversation(max_output_tokens=ANSWER_TOKENS) as conversation:
                message = conversation.send_message({"role": "user", "content": content})
        except RuntimeError as error:
            raise ArtifactError(f"the engine of litert-lm cannot run {path.name}: {str(error)[:200]}") from error
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
