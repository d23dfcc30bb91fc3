"""What the graphs of a model are called with while it answers prompts: the inputs that ranges of whole numbers are taken from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from tools.edge_runtime import EdgeModel, Signature
from tools.golden import Case

ANSWER_TOKENS = 32
"""Greedy tokens of each prompt that the decoder's ranges are taken from, besides its prompt; stop tokens do not stop."""

MOST_FEEDS = 48
"""Calls of each signature that ranges are taken from: a uniform sample of all calls."""

Feeds = dict[str, list[dict[str, np.ndarray]]]
"""Inputs by name, of each call of each signature."""


class Recorder:
    """Signatures that keep copies of what some of their calls got: of each signature a uniform sample of `MOST_FEEDS` calls.

    Reservoir sampling (Vitter, algorithm R), seeded, so the same prompts give the same sample. Keeping the first calls of each prompt
    would take the decoder's ranges from prompts' last tokens and hardly from answers.
    """

    def __init__(self, signatures: Mapping[str, Signature]) -> None:
        self.feeds: Feeds = {name: [] for name in signatures}
        self.signatures = {name: self._recorded(name, run) for name, run in signatures.items()}

    def _recorded(self, name: str, run: Signature) -> Signature:
        kept, rng, seen = self.feeds[name], np.random.default_rng(0), itertools.count()

        def call(**inputs: np.ndarray) -> Mapping[str, np.ndarray]:
            number = next(seen)
            place = number if number < MOST_FEEDS else int(rng.integers(number + 1))
            if place < MOST_FEEDS:
                # The cache is written in place after the call.
                kept[place : place + 1] = [{key: value.copy() for key, value in inputs.items()}]
            return run(**inputs)

        return call


def record(model: EdgeModel, cases: Sequence[Case]) -> Feeds:
    """What every signature is called with as a float32 model answers these prompts through each of its branches."""
    recorder = Recorder(model.signatures)
    watched = EdgeModel(model.settings, model.tokenizer, recorder.signatures)
    for case in cases:
        prompt, tiles = watched.prompt(case.request.turns, case.images, [1.0] * len(case.images))
        for branch in model.settings.branches:
            visual = watched.encode(tiles, branch)
            if model.settings.prefill:
                list(watched.generate(watched.embed(prompt, visual), ANSWER_TOKENS))
    return recorder.feeds
