"""Models of `transformers` in the shapes of our configurations: the outside references of parity and conversion tests."""

from __future__ import annotations

from transformers import Qwen3Config, SiglipConfig, SiglipModel

from hypervl_jax.architecture import DecoderConfig, VisionConfig


def vision_values(tower: VisionConfig, image_size: int | None = None) -> dict[str, int]:
    """Fields of a `SiglipVisionConfig`; made for pictures of another size where `image_size` is given."""
    return {
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "patch_size": tower.patch_size,
        "image_size": image_size or tower.image_size,
    }


def whole_siglip(tower: VisionConfig) -> SiglipModel:
    """A model with both towers and pooling head, as SigLIP2 is published; its text tower is small."""
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 30,
    }
    return SiglipModel(SiglipConfig(vision_config=vision_values(tower), text_config=text))


def qwen3_config(decoder: DecoderConfig) -> Qwen3Config:
    """The decoder as `transformers` configures it."""
    return Qwen3Config(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        rope_parameters={"rope_theta": decoder.rope_theta, "rope_type": "default"},
        rms_norm_eps=decoder.rms_norm_eps,
        tie_word_embeddings=decoder.tie_embeddings,
    )
