import itertools

import numpy as np
import pytest

from data_pipelines.config import DataConfig, SourceShare
from data_pipelines.lane_state import SourceCounters
from data_pipelines.lanes import LaneLoader
from experiments.run import shown_log, source_epochs, source_figures
from hypervl_jax.architecture import hypervl_tiny
from hypervl_jax.models.runtime import RuntimeConfig, resolve_kernels
from hypervl_jax.text.tokenizer import load_tokenizer
from hypervl_jax.training.batch import BatchShape


def epochs_after(data, lanes, batches):
    config = DataConfig(root=str(data), mixture=(SourceShare("text", 3.0), SourceShare("digits", 1.0)), seed=0)
    shape, tokenizer = BatchShape(4, 256, 12), load_tokenizer(data)
    loader = LaneLoader(config, shape, hypervl_tiny().tiling, tokenizer, lanes)
    *_, last = itertools.islice(loader.iterate(loader.initial_states()), batches)
    drawn = {name: counters.drawn for name, counters in loader.report(last.lane_states).items()}
    sizes = {source.name: len(source) for source in loader.mixture.sources}
    return source_epochs(loader, last.lane_states), drawn, sizes


def test_passes_over_a_source_are_the_same_whichever_lanes_a_host_reads(data):
    whole, drawn, sizes = epochs_after(data, (0, 1, 2, 3), batches=12)
    assert whole == {name: pytest.approx(drawn[name] / sizes[name]) for name in ("text", "digits")}
    halves = [epochs_after(data, lanes, batches=12)[0] for lanes in ((0, 1), (2, 3))]
    for name, value in whole.items():
        assert np.mean([half[name] for half in halves]) == pytest.approx(value)
        assert all(half[name] == pytest.approx(value, rel=0.25) for half in halves), "a host's share stands for all"


def test_what_was_dropped_is_told_by_source(data):
    config = DataConfig(root=str(data), mixture=(SourceShare("text", 3.0), SourceShare("digits", 1.0)), seed=0)
    tiling = hypervl_tiny().tiling
    loader = LaneLoader(config, BatchShape(2, 256, 12), tiling, load_tokenizer(data))
    *_, last = itertools.islice(loader.iterate(loader.initial_states()), 4)
    figures = source_figures(loader, last.lane_states)
    assert figures.keys() == {f"{kind}/{name}" for kind in ("epochs", "dropped") for name in ("text", "digits")}
    for name, counters in loader.report(last.lane_states).items():
        assert figures[f"dropped/{name}"] == counters.oversize / (counters.oversize + counters.used)
    assert SourceCounters(drawn=9, used=5, oversize=2, image=1, record=2).dropped_share == 0.5


def test_the_choice_of_the_kernel_is_said_while_a_run_is_on(capsys):
    with shown_log():
        resolve_kernels(RuntimeConfig(), "tpu")
    assert capsys.readouterr().err == "attention kernel splash: runtime.attention is 'auto' and the devices are 'tpu'\n"
    resolve_kernels(RuntimeConfig(), "tpu")
    assert capsys.readouterr().err == ""
