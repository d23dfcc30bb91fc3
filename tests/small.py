"""A model of the real kind small enough to compile in seconds, and packed batches of random documents for it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from hypervl_jax import partitioning
from hypervl_jax.architecture import PARTS, DecoderConfig, HyperVLConfig, TilingConfig, VisionConfig, hypervl_tiny
from hypervl_jax.mobilenet import MOBILENET_V4_MEDIUM, MOBILENET_V4_SMALL
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.partitioning import MeshConfig
from hypervl_jax.training import state as training_state
from hypervl_jax.training.batch import Batch, BatchShape, empty_batch
from hypervl_jax.training.consistency import ConsistencyConfig, make_control
from hypervl_jax.training.optimizer import OptimizerConfig, learning_rate_schedule
from hypervl_jax.training.step import ObjectiveConfig, StepFunctions, compile_step

VOCABULARY = 128
SOURCES = 3
RUNTIME = RuntimeConfig(dtype="float32", decoder_remat="full", tower_remat="tile", tile_chunk=2)
SHAPE = BatchShape(rows=4, length=48, tiles=4)


def small_architecture() -> HyperVLConfig:
    """Two-layer towers and decoder, 16-pixel tiles of 4 visual tokens."""
    vision = VisionConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, patch_size=4, image_size=16)
    return dataclasses.replace(
        hypervl_tiny(),
        vision_base=vision,
        vision_large=dataclasses.replace(vision, hidden_size=24, num_layers=2),
        decoder=DecoderConfig(VOCABULARY, 32, 64, 2, 4, 2, 8, rope_theta=1e4),
        tiling=TilingConfig(tile_size=16, patch_size=4, shuffle=2, max_tiles=4),
    )


def random_batch(seed: int, shape: BatchShape = SHAPE, documents: int = 2) -> Batch:
    """Rows of `documents` samples with one tile each; the second half of each sample carries loss."""
    rng = np.random.default_rng(seed)
    batch = empty_batch(shape, 16)
    size = shape.length // documents
    for row in range(shape.rows):
        for number in range(documents):
            length = int(rng.integers(size // 2, size + 1))
            fill_document(batch, row, number * size, length, number, rng, source=int(rng.integers(SOURCES)))
    return batch


def fill_document(
    batch: Batch, row: int, start: int, length: int, number: int, rng: np.random.Generator, source: int
) -> None:
    """Writes one sample: four visual tokens of tile `number`, then random text."""
    place = slice(start, start + length)
    tokens = rng.integers(1, VOCABULARY, length)
    batch.tokens[row, place] = tokens
    batch.targets[row, start : start + length - 1] = tokens[1:]
    batch.loss_weights[row, start + length // 2 : start + length - 1] = 1
    batch.segments[row, place] = number + 1
    batch.positions[row, place] = np.arange(length)
    batch.sources[row, place] = source
    batch.visual_index[row, start : start + 4] = 4 * number + np.arange(4)
    batch.tiles[row, number] = rng.integers(0, 256, batch.tiles.shape[2:])
    batch.tile_segments[row, number] = number + 1


@dataclasses.dataclass
class Setup:
    """A compiled step on one mesh, and a fresh state for it."""

    functions: StepFunctions
    step: object
    state: training_state.TrainState
    mesh: jax.sharding.Mesh
    control: object

    def on_mesh(self, batch: Batch) -> Batch:
        """The batch on the devices."""
        return jax.device_put(batch, partitioning.row_sharding(self.mesh))

    def run(self, state: object, batch: Batch) -> tuple[training_state.TrainState, dict[str, float]]:
        """One step; the given state survives (a copy is donated)."""
        with jax.set_mesh(self.mesh):
            copy = jax.tree.map(lambda x: x.copy(), state)
            new, metrics = self.step(copy, self.on_mesh(batch), self.control)
        return new, metrics.numbers()


def make_setup(
    optimizer: OptimizerConfig | None = None,
    consistency: ConsistencyConfig | None = None,
    objective: ObjectiveConfig | None = None,
    mesh: MeshConfig | None = None,
    devices: int = 1,
) -> Setup:
    """Everything that a test of the step needs, on `devices` devices."""
    optimizer = optimizer or OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant")
    consistency = consistency or ConsistencyConfig()
    architecture = small_architecture()
    mesh = partitioning.make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    shardings = training_state.state_shardings(architecture, RUNTIME, optimizer, SOURCES, mesh)
    schedule = learning_rate_schedule(optimizer, 100)
    functions = StepFunctions(
        architecture,
        RUNTIME,
        optimizer,
        consistency,
        objective or ObjectiveConfig(loss_chunk_tokens=16),
        schedule,
        SOURCES,
    )
    with jax.set_mesh(mesh):
        params = training_state.initialise_parts(architecture, RUNTIME, PARTS, 0, shardings.params)
        fresh = jax.jit(lambda p: training_state.fresh_state(optimizer, p, SOURCES), out_shardings=shardings)
        state = fresh(params)
        step = compile_step(functions, shardings, partitioning.row_sharding(mesh))
        control = make_control(consistency, 0)
    return Setup(functions, step, state, mesh, control)


MOBILENET_V4_FORMS = (
    MOBILENET_V4_MEDIUM[0],
    *MOBILENET_V4_SMALL[1:2],
    *MOBILENET_V4_SMALL[4:6],
    *MOBILENET_V4_SMALL[9:10],
)
"""A bottleneck of every form of MobileNetV4: fused, plain, universal with one and both depthwise convolutions."""
