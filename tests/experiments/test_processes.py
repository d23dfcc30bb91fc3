"""The same run on one device and on eight; `test_multihost` moves a run over other meshes and several processes."""

import pathlib

import numpy as np
import pytest

from tests.experiments import processes

RUN = {"loop.steps": 20, "checkpoint.every": 20, "checkpoint.asynchronous": "true"}


@pytest.fixture(scope="module")
def one_device(data, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("one")
    processes.finish(processes.start(processes.command(data, workdir, RUN)))
    return workdir


def losses(workdir: pathlib.Path) -> np.ndarray:
    lines = processes.metric_lines(workdir)
    assert [line["step"] for line in lines] == list(range(RUN["loop.steps"]))
    return np.array([line["loss"] for line in lines])


def assert_same_losses_and_data(workdir: pathlib.Path, reference: pathlib.Path) -> None:
    np.testing.assert_allclose(losses(workdir), losses(reference), rtol=1e-4)
    lanes = [processes.last_checkpoint(run)["lanes/states"] for run in (workdir, reference)]
    np.testing.assert_array_equal(*lanes)


def test_eight_devices(data, one_device, tmp_path):
    overrides = {**RUN, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    processes.finish(processes.start(processes.command(data, tmp_path, overrides), devices=8))
    assert_same_losses_and_data(tmp_path, one_device)
