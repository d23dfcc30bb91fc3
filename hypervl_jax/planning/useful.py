"""The FLOPs that a step must do, from `architecture.py` alone: the numerator of MFU and of "useful / compiled".

Convention: matrix products only; forward, backward and the teacher's forward pass of one whole batch; recomputation does not count.
Every position and tile slot of the batch counts, padding too, since its shape fixes the work. The decoder's attention counts the pairs of
one causal sequence over each row, l (l + 1) / 2 (packed samples need fewer); the towers' counts all p² pairs. A weight of a moving part
costs its forward FLOPs twice more in the backward pass, of a frozen part that gradients flow through once more; attention always twice.
"""

from __future__ import annotations

import collections
from collections.abc import Collection

from hypervl_jax.architecture import BRANCHES, DECODER, HyperVLConfig, projector_part, vision_part
from hypervl_jax.training.batch import BatchShape

HEAD = "head"
PRODUCT, ATTENTION = "product", "attention"

Useful = collections.Counter[tuple[str, str]]
"""FLOPs by (part, "product" or "attention"); the part "head" is the output head."""


def forward_flops(config: HyperVLConfig, shape: BatchShape, branch: str) -> Useful:
    """FLOPs of one forward pass of a batch through a branch, logits of every position included."""
    vision, decoder, rows = config.vision(branch), config.decoder, shape.rows
    slots = rows * shape.tiles
    mixing = vision.num_layers * 4 * vision.num_patches**2 * vision.hidden_size
    pairs = shape.length * (shape.length + 1) // 2
    weights = decoder.forward_flops(shape.length, attended=0, head_tokens=0)
    return collections.Counter(
        {
            (vision_part(branch), PRODUCT): slots * (vision.forward_flops() - mixing),
            (vision_part(branch), ATTENTION): slots * mixing,
            (projector_part(branch), PRODUCT): slots * config.forward_flops_per_tile(branch)[projector_part(branch)],
            (DECODER, PRODUCT): rows * weights,
            (DECODER, ATTENTION): rows * (decoder.forward_flops(shape.length, pairs, head_tokens=0) - weights),
            (HEAD, PRODUCT): rows * 2 * shape.length * decoder.hidden_size * decoder.vocab_size,
        }
    )


def backward_flops(config: HyperVLConfig, shape: BatchShape, branch: str, moving: Collection[str]) -> Useful:
    """FLOPs of the backward pass after `forward_flops`, when the parts `moving` are trained."""
    forward = forward_flops(config, shape, branch)
    vision, projector = vision_part(branch), projector_part(branch)
    weights = {part: int(part in moving) for part in (vision, projector, DECODER)}
    total: Useful = collections.Counter(
        {
            (DECODER, PRODUCT): (1 + weights[DECODER]) * forward[DECODER, PRODUCT],
            (DECODER, ATTENTION): 2 * forward[DECODER, ATTENTION],
            (HEAD, PRODUCT): (1 + weights[DECODER]) * forward[HEAD, PRODUCT],
        }
    )
    if weights[projector] or weights[vision]:
        total[projector, PRODUCT] = (1 + weights[projector]) * forward[projector, PRODUCT]
        if not weights[vision] and not config.projector.layer_norm:
            total[projector, PRODUCT] -= _first_layer_flops(config, shape, branch)
    if weights[vision]:
        total[vision, PRODUCT] = 2 * forward[vision, PRODUCT] - _patch_flops(config, shape, branch)
        total[vision, ATTENTION] = 2 * forward[vision, ATTENTION]
    return total


def _first_layer_flops(config: HyperVLConfig, shape: BatchShape, branch: str) -> int:
    """The gradient of the projector's input, which neither a frozen tower nor a LayerNorm before the layer needs."""
    vision, shuffle = config.vision(branch), config.tiling.shuffle
    inner = vision.hidden_size * shuffle**2
    return shape.rows * shape.tiles * 2 * (vision.num_patches // shuffle**2) * inner * config.decoder.hidden_size


def _patch_flops(config: HyperVLConfig, shape: BatchShape, branch: str) -> int:
    """The gradient of the pixels, which nobody needs."""
    vision = config.vision(branch)
    return shape.rows * shape.tiles * 2 * vision.num_patches * vision.patch_size**2 * 3 * vision.hidden_size


def step_flops(
    config: HyperVLConfig, shape: BatchShape, arm: Collection[str], moving: Collection[str], teacher: bool
) -> Useful:
    """FLOPs of one step that trains the branches `arm` and of them the parts `moving`.

    Args:
        config: the model.
        shape: of the global batch.
        arm: branches, e.g. ("base",); one of `ConsistencyConfig.arms`.
        moving: parts that are not frozen.
        teacher: whether the base branch learns from the large one (`ConsistencyConfig.uses_teacher`). An arm that trains both has that
            forward pass already.
    """
    total: Useful = collections.Counter()
    for branch in arm:
        total += forward_flops(config, shape, branch) + backward_flops(config, shape, branch, moving)
    if teacher and BRANCHES[0] in arm and BRANCHES[1] not in arm:
        total += forward_flops(config, shape, BRANCHES[1])
    return total
