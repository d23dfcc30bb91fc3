"""`experiments.launch`, which also writes down the lanes its loader was asked for and a hash of every row it supplied.

    python -m tests.experiments.recording_launch RECORD.jsonl SECONDS ARGUMENTS-OF-LAUNCH…

SECONDS is the time that a batch takes at least, so that a signal meets a run of milliseconds in its middle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Generator

import numpy as np

from data_pipelines.lane_state import LaneState
from data_pipelines.lanes import LaneLoader
from hypervl_jax.training.batch import LoadedBatch

RECORD, PACE = pathlib.Path(sys.argv[1]), float(sys.argv[2])


class RecordingLoader(LaneLoader):
    """The loader of the project with a written record."""

    def iterate(self, lane_states: np.ndarray) -> Generator[LoadedBatch, None, None]:
        with RECORD.open("a") as record, contextlib.closing(super().iterate(lane_states)) as batches:
            for loaded in batches:
                time.sleep(PACE)
                for place, lane in enumerate(self.lanes):
                    record.write(json.dumps(self.entry(loaded, place, lane)) + "\n")
                record.flush()
                yield loaded

    def entry(self, loaded: LoadedBatch, place: int, lane: int) -> dict[str, object]:
        """One row: its lane, its number in the lane, and a hash of all its arrays and of the lane's state after it."""
        state = loaded.lane_states[place]
        content = hashlib.sha256(b"".join([*(field[place].tobytes() for field in loaded.batch), state.tobytes()]))
        number = LaneState.from_vector(state, len(self.mixture.sources)).rows - 1
        return {"lane": lane, "row": number, "hash": content.hexdigest()}


if __name__ == "__main__":
    from experiments import launch, run

    run.LaneLoader = RecordingLoader
    sys.exit(launch.main(sys.argv[3:]))
