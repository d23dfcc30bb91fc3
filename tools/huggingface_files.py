"""The files beside the weights of an exported Hugging Face directory: configs, generation settings, tokenizer, chat template, processor.

The whole model with one encoder is a class that others have already (`models.key_table.LFM2`, `EAGLE`): nothing here is code.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hypervl_jax.architecture import HyperVLConfig, ProjectorConfig, VisionConfig, require
from hypervl_jax.models.huggingface import decoder_identity, vision_identity
from hypervl_jax.models.key_table import EAGLE, LFM2, Naming
from hypervl_jax.text.conversation import ROLES, THINK_BLOCK
from hypervl_jax.text.tokenizer import (
    END_OF_TEXT,
    END_OF_TURN,
    IMAGE,
    START_OF_TURN,
    VISION_END,
    VISION_START,
    ChatTemplate,
    Tokenizer,
)
from hypervl_jax.text.tokenizer_json import write_tokenizer_json

LAYER_NORM_EPS = 1e-5
"""Of the projector in both classes: PyTorch's default, which no config of theirs can change."""

EAGLE_NAMES = {IMAGE: "<IMG_CONTEXT>", VISION_START: "<img>", VISION_END: "</img>"}
"""What vLLM and SGLang look for in the vocabulary of an Eagle 2.5; the ids are ours."""

TEMPLATE = """\
{%- set default_system = @SYSTEM@ -%}
{%- set think_block = @BLOCK@ -%}
{%- set state = namespace(asked=false) -%}
{%- if default_system and messages[0]['role'] != 'system' -%}
{{- '@START@system\\n' + default_system + '@END@\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] not in @ROLES@ -%}{{- raise_exception('unknown role ' + message['role']) -}}{%- endif -%}
{%- if message['content'] is string -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] -%}
{%- else -%}
{%- set parts = message['content'] -%}
{%- endif -%}
{{- '@START@' + message['role'] + '\\n' -}}
{%- set closes = message['role'] == 'assistant' and loop.last and state.asked and think_block -%}
{%- if closes -%}{{- think_block -}}{%- endif -%}
{%- for part in parts -%}
{%- if part['type'] == 'image' -%}
{{- '@PICTURE@' -}}
{%- elif closes and loop.first -%}
{{- part['text'].lstrip('\\n') -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{{- '@END@\\n' -}}
{%- set words = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
{%- set tool = words.startswith('<tool_response>') and words.endswith('</tool_response>') -%}
{%- if message['role'] == 'user' and not tool -%}{%- set state.asked = true -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '@START@assistant\\n' + think_block -}}{%- endif -%}
"""
"""`text.conversation` as a Jinja template; pictures are content parts of type "image"."""


class Format(NamedTuple):
    """A class that holds HyperVL with one encoder: its keys, its `config.json`, and its names of our special tokens."""

    naming: Naming
    config: Callable[[HyperVLConfig, str, Tokenizer], dict[str, Any]]
    renamed: Mapping[str, str]


def lfm2_config(config: HyperVLConfig, branch: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """`config.json` of `Lfm2VlForConditionalGeneration`."""
    vision = config.vision(branch)
    require_projector(config.projector)
    tower = vision_identity(vision) | {
        "model_type": "siglip2_vision_model",
        "num_patches": vision.num_patches,
        "vision_use_head": False,
    }
    return {
        "model_type": "lfm2_vl",
        "image_token_id": tokenizer.image,
        "downsample_factor": config.tiling.shuffle,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": config.decoder.hidden_size,
        "projector_bias": True,
        "projector_use_layernorm": config.projector.layer_norm,
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": tower,
        "text_config": text_config(config),
    }


def eagle_config(config: HyperVLConfig, branch: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """`config.json` of `Eagle2_5_VLForConditionalGeneration`."""
    vision: VisionConfig = config.vision(branch)
    require_projector(config.projector)
    require(config.projector.layer_norm, "the eagle format needs projector.layer_norm; use --format lfm2")
    require(config.tiling.shuffle == 2, f"the eagle format joins 2 × 2 patches, this model {config.tiling.shuffle}")
    return {
        "model_type": "eagle_2_5_vl",
        "image_token_index": tokenizer.image,
        "downsample_ratio": 1 / config.tiling.shuffle,
        "select_layer": -1,
        "force_image_size": config.tiling.tile_size,
        "dynamic_image_size": True,
        "min_dynamic_tiles": 1,
        "max_dynamic_tiles": config.tiling.max_tiles,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": config.tiling.max_tiles,
        "use_thumbnail": config.tiling.thumbnail,
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "vision_config": vision_identity(vision) | {"image_size": vision.image_size, "vision_use_head": False},
        "text_config": text_config(config),
    }


FORMATS = {
    "lfm2": Format(LFM2, lfm2_config, {}),
    "eagle": Format(EAGLE, eagle_config, EAGLE_NAMES),
}


def require_projector(projector: ProjectorConfig) -> None:
    """Raises `ConfigError` when the projector's LayerNorm is not the one that these classes have."""
    require(
        not projector.layer_norm or projector.layer_norm_eps == LAYER_NORM_EPS,
        f"projector.layer_norm_eps {projector.layer_norm_eps} has no place in these formats, which take {LAYER_NORM_EPS}",
    )


def text_config(config: HyperVLConfig) -> dict[str, Any]:
    """The decoder's part of `config.json`."""
    values = decoder_identity(config.decoder) | {"architectures": ["Qwen3ForCausalLM"]}
    return values | {"rope_parameters": {"rope_theta": config.decoder.rope_theta, "rope_type": values.pop("rope_type")}}


def chat_template(template: ChatTemplate, renamed: Mapping[str, str]) -> str:
    """The Jinja form of a chat template; `renamed` are other names of special tokens."""
    name = lambda token: renamed.get(token, token)
    values = {
        "@SYSTEM@": json.dumps(template.default_system) if template.default_system is not None else "none",
        "@BLOCK@": json.dumps(THINK_BLOCK if template.think_block else ""),
        "@ROLES@": json.dumps(ROLES),
        "@START@": START_OF_TURN,
        "@END@": END_OF_TURN,
        "@PICTURE@": name(VISION_START) + name(IMAGE) + name(VISION_END),
    }
    text = TEMPLATE
    for mark, value in values.items():
        text = text.replace(mark, value)
    return text


def write_tokenizer(directory: pathlib.Path, tokenizer: Tokenizer, renamed: Mapping[str, str], longest: int) -> None:
    """Writes `tokenizer.json`, its config and the chat template; `longest` is what the config says of a prompt's length."""
    path = write_tokenizer_json(tokenizer, directory)
    if renamed:
        path.write_text(rename_tokens(path.read_text(encoding="utf-8"), renamed), encoding="utf-8")
    name = lambda token: renamed.get(token, token)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "image_token": name(IMAGE),
        "image_start_token": name(VISION_START),
        "image_end_token": name(VISION_END),
        # Read by Lfm2VlProcessor as its default: the chat template writes start and end of a picture itself.
        "use_image_special_tokens": False,
    }
    write_json(directory / "tokenizer_config.json", config)
    (directory / "chat_template.jinja").write_text(chat_template(tokenizer.template, renamed), encoding="utf-8")


def rename_tokens(text: str, renamed: Mapping[str, str]) -> str:
    """A `tokenizer.json` whose added tokens, and their entries in the vocabulary, have other names and the same ids."""
    values = json.loads(text)
    for token in values["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = {renamed.get(piece, piece): number for piece, number in vocabulary.items()}
    return json.dumps(values, ensure_ascii=False)


def write_generation_config(directory: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Greedy decoding that ends at the end of a turn or text."""
    stops = [tokenizer.end_of_turn, tokenizer.end_of_text]
    write_json(
        directory / "generation_config.json",
        {"do_sample": False, "eos_token_id": stops, "pad_token_id": tokenizer.pad},
    )


def write_processor(directory: pathlib.Path, config: HyperVLConfig) -> None:
    """The image processor and processor of `transformers` for this model's tiles (`Lfm2VlProcessor`)."""
    tiling = config.tiling
    image_processor = {
        "image_processor_type": "Lfm2VlImageProcessor",
        "processor_class": "Lfm2VlProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_image_splitting": tiling.max_tiles > 1,
        "tile_size": tiling.tile_size,
        "encoder_patch_size": tiling.patch_size,
        "downsample_factor": tiling.shuffle,
        "min_tiles": min(2, tiling.max_tiles),
        "max_tiles": tiling.max_tiles,
        "use_thumbnail": tiling.thumbnail,
        "min_image_tokens": max(1, tiling.tokens_per_tile // 4),
        "max_image_tokens": tiling.tokens_per_tile,
    }
    write_json(directory / "preprocessor_config.json", image_processor)
    write_json(directory / "processor_config.json", {"processor_class": "Lfm2VlProcessor"})


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """A JSON file as Hugging Face writes them."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
