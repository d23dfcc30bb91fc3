"""How far an edge artifact is from JAX in float32: signal-to-noise ratios, top-1 agreement, equal tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hypervl_jax.models.compressor_io import SavedCompressor, predict_log_areas
from hypervl_jax.vision.resolution import alpha_from_prediction, make_proxies
from tools.edge_runtime import EdgeModel
from tools.golden import Case, Golden

EXACT = 200.0
"""What is reported for a ratio above what float32 can show."""


def snr(reference: np.ndarray, found: np.ndarray) -> float:
    """Signal-to-noise ratio in dB: 10 · log10(|reference|² / |reference - found|²), at most `EXACT`."""
    wide = np.asarray(reference, np.float64)
    signal, noise = np.square(wide).sum(), np.square(wide - found).sum()
    if not np.isfinite(noise):
        return -EXACT
    return min(EXACT, 10 * math.log10(signal / noise)) if noise > 0 < signal else EXACT


def compare(
    model: EdgeModel, cases: Sequence[Case], references: Mapping[str, Mapping[str, Golden]], vrc: SavedCompressor | None
) -> dict[str, dict[str, Any]]:
    """Each part alone, on the inputs that JAX gives it, and all of them together.

    Args:
        model: the artifact.
        cases: prompts.
        references: what JAX makes of them, by branch and case; by `DECODER` and case for a decoder alone.
        vrc: the compressor that was exported.

    Returns:
        By part: "snr_db"; of the decoder "top1" too (the likeliest next token after JAX's own answer, at each of its positions);
        of "answer_BRANCH" how many tokens are those of JAX when the artifact goes on by itself from pixels.
    """
    branches = {branch: found for branch, found in references.items() if branch in model.settings.branches}
    report = {f"encoder_{branch}": _encoder(model, branch, found) for branch, found in branches.items()}
    if vrc is not None:
        report["compressor"] = _compressor(model, cases, vrc)
    if "decode" in model.signatures:
        found = next(iter(references.values()))
        report["decoder"] = _decoder(model, [case for case in cases if case.name in found], found)
        report |= {f"answer_{branch}": _answers(model, cases, found, branch) for branch, found in branches.items()}
    return report


def _encoder(model: EdgeModel, branch: str, references: Mapping[str, Golden]) -> dict[str, Any]:
    seen = [found for found in references.values() if len(found.tiles)]
    visual = [model.encode(found.tiles, branch) for found in seen]
    ratio = snr(np.concatenate([found.visual for found in seen]), np.concatenate(visual))
    return {"tiles": sum(len(found.tiles) for found in seen), "snr_db": ratio}


def _compressor(model: EdgeModel, cases: Sequence[Case], vrc: SavedCompressor) -> dict[str, Any]:
    images = [image for case in cases for image in case.images]
    proxies, sides = make_proxies(images, vrc.config.proxy_size)
    outputs = predict_log_areas(vrc.config, vrc.params, proxies)
    run = model.signatures["compressor"]
    scaled = proxies.astype(np.float32)[:, None] / 255
    found = [run(proxy=proxy, longest_side=side[None]) for proxy, side in zip(scaled, sides, strict=True)]
    alphas = np.concatenate([one["alpha"] for one in found])
    expected = alpha_from_prediction(outputs, sides, vrc.config.proxy_size)
    areas = np.concatenate([one["log_area"] for one in found])
    return {
        "images": len(images),
        "snr_db": snr(outputs, areas),
        "alpha_difference": float(np.abs(alphas - expected).max()),
    }


def _decoder(model: EdgeModel, cases: Sequence[Case], references: Mapping[str, Golden]) -> dict[str, Any]:
    """The decoder on JAX's visual tokens and JAX's own answers."""
    expected, found, equal, compared = [], [], 0, 0
    for case in cases:
        reference = references[case.name]
        embeddings = model.embed(_prompt(model, case), reference.visual)
        cache, scores = model.start(embeddings)
        expected, found = [*expected, reference.logits[-1]], [*found, scores]
        for token in reference.generated:
            equal, compared = equal + int(scores.argmax() == token), compared + 1
            if compared % len(reference.generated):
                scores = model.step(cache, int(token))
    return {"prompts": len(cases), "snr_db": snr(np.stack(expected), np.stack(found)), "top1": equal, "of": compared}


def _answers(model: EdgeModel, cases: Sequence[Case], references: Mapping[str, Golden], branch: str) -> dict[str, Any]:
    """Greedy answers from pixels on; stop tokens do not stop."""
    equal, whole, compared = 0, 0, 0
    for case in cases:
        reference = references[case.name]
        embeddings = model.embed(_prompt(model, case), model.encode(reference.tiles, branch))
        same = np.array(list(model.generate(embeddings, len(reference.generated)))) == reference.generated
        equal, whole, compared = equal + int(same.sum()), whole + int(same.all()), compared + same.size
    return {"tokens_equal": equal, "of": compared, "whole_answers": whole, "prompts": len(cases)}


def _prompt(model: EdgeModel, case: Case) -> Any:
    return model.prompt(case.request.turns, case.images, [1.0] * len(case.images))[0]
