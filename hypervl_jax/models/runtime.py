"""How the model is computed, apart from what it is: compute dtype, attention kernel, rematerialisation."""

from __future__ import annotations

import dataclasses
import logging

from hypervl_jax.architecture import require

DTYPES = ("bfloat16", "float32")
ATTENTION_KERNELS = ("auto", "xla", "chunked", "splash", "splash_interpreted")
DECODER_REMAT = ("full", "attention", "dots", "none")
TOWER_REMAT = ("tile", "layer", "nested", "none")

ATTENTION_OUTPUT = "attention_output"
"""Name that every attention kernel gives, by `checkpoint_name`, to what its backward pass would otherwise recompute."""

LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """Settings that change speed and memory, never the function the model computes (beyond rounding).

    `dtype` is the compute dtype; parameters, norms, softmax, rotary angles and logits stay float32. `attention`: "xla" runs
    everywhere; "chunked" does too, and holds the scores of a block of queries at one time; "splash" is the Pallas kernel for TPU (`models.splash`), and what it cannot compute (`models.attention`)
    goes through XLA; "auto" is settled by `resolve_kernels`, and is XLA until then; "splash_interpreted" runs the TPU
    kernel step by step on any device, far too slow for anything but tests. `decoder_remat`: "full" recomputes each layer in
    the backward pass, "attention" the same but for the attention kernel, whose output is kept, "dots" keeps the results of
    the matrix products with weights and the attention's output, "none" keeps everything.
    `tower_remat`: "tile" recomputes tower and projector once per chunk of tiles, so that activations never outlive a
    chunk; "layer" recomputes each layer, so that every layer's input of every tile is kept; "nested" does both, for the
    least memory at the price of one more forward pass; "none" keeps everything.
    `tile_chunk` is the number of tiles of each row that pass through the tower together.
    """

    dtype: str = "bfloat16"
    attention: str = "auto"
    decoder_remat: str = "full"
    tower_remat: str = "tile"
    tile_chunk: int = 1

    def __post_init__(self) -> None:
        choices = {
            "dtype": DTYPES,
            "attention": ATTENTION_KERNELS,
            "decoder_remat": DECODER_REMAT,
            "tower_remat": TOWER_REMAT,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"runtime {name} {value!r} is not one of {', '.join(allowed)}")
        require(self.tile_chunk >= 1, f"runtime tile_chunk {self.tile_chunk} must be at least 1")


def resolve_kernels(runtime: RuntimeConfig, platform: str) -> RuntimeConfig:
    """`runtime` with "auto" settled for the devices that will run the model, and the choice said in the log.

    Args:
        runtime: as configured.
        platform: of the mesh's devices, `mesh.devices.flat[0].platform`; not of the process, which may be a CPU process
            that compiles for a TPU topology.

    Raises:
        ConfigError: "splash" is asked for on a platform that cannot run it.
    """
    require(
        runtime.attention != "splash" or platform == "tpu",
        f"runtime.attention 'splash' runs on TPU only and these devices are {platform!r}; set it to 'auto' or 'xla'",
    )
    if runtime.attention != "auto":
        LOGGER.info("attention kernel %s: set by runtime.attention", runtime.attention)
        return runtime
    kernel = "splash" if platform == "tpu" else "xla"
    LOGGER.info("attention kernel %s: runtime.attention is 'auto' and the devices are %r", kernel, platform)
    return dataclasses.replace(runtime, attention=kernel)
