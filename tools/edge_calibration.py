"""What the graphs of a model are called with while it answers prompts: the inputs that ranges of whole numbers are taken from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tools.edge_runtime import EdgeModel, Signature
from tools.golden import Case

ANSWER_TOKENS = 8
"""Greedy tokens of each prompt that the decoder's ranges are taken from, besides its prompt."""

MOST_FEEDS = 48
"""Calls of each signature that ranges are taken from, spread evenly over the prompts."""

Feeds = dict[str, list[dict[str, np.ndarray]]]
"""Inputs by name, of each call of each signature."""


class Recorder:
    """Signatures that keep copies of the first calls of each, up to `limit` since `limit` was last raised."""

    def __init__(self, signatures: Mapping[str, Signature]) -> None:
        self.feeds: Feeds = {name: [] for name in signatures}
        self.limit = 0
        self.signatures = {name: self._recorded(name, run) for name, run in signatures.items()}

    def _recorded(self, name: str, run: Signature) -> Signature:
        def call(**inputs: np.ndarray) -> Mapping[str, np.ndarray]:
            if len(self.feeds[name]) < self.limit:
                # The cache is written in place after the call.
                self.feeds[name].append({key: value.copy() for key, value in inputs.items()})
            return run(**inputs)

        return call


def record(model: EdgeModel, cases: Sequence[Case]) -> Feeds:
    """What every signature is called with as a float32 model answers these prompts through each of its branches."""
    recorder = Recorder(model.signatures)
    watched = EdgeModel(model.settings, model.tokenizer, recorder.signatures)
    for number, case in enumerate(cases, 1):
        recorder.limit = -(-MOST_FEEDS * number // len(cases))
        prompt, tiles = watched.prompt(case.request.turns, case.images, [1.0] * len(case.images))
        for branch in model.settings.branches:
            visual = watched.encode(tiles, branch)
            if model.settings.prefill:
                list(watched.generate(watched.embed(prompt, visual), ANSWER_TOKENS))
    return recorder.feeds
