import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from hypervl_jax.training.telemetry.metrics_log import MetricsLog, read_metrics, truncate_metrics


def steps_of(path):
    return [line["step"] for line in read_metrics(path)]


def events_of(directory):
    """Events of all TensorBoard files in name order, parsed by the record format: length, its CRC, data, its CRC."""
    events = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_values_come_back_and_unmeasured_ones_are_left_out(tmp_path):
    log = MetricsLog(tmp_path, "train")
    log.write(0, {"loss": 1.5, "kl": math.nan, "norm": math.inf})
    log.close()
    (line,) = (tmp_path / "train.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 0, "loss": 1.5, "norm": "inf"}
    assert read_metrics(tmp_path / "train.jsonl") == [{"step": 0, "loss": 1.5, "norm": math.inf}]


def test_resuming_keeps_each_step_once(tmp_path):
    for start, stop in ((0, 7), (4, 9), (8, 10)):
        log = MetricsLog(tmp_path, "train", resume_step=start)
        for step in range(start, stop):
            log.write(step, {"loss": float(start)})
        log.close()
    assert steps_of(tmp_path / "train.jsonl") == list(range(10))
    assert [line["loss"] for line in read_metrics(tmp_path / "train.jsonl")] == [0.0] * 4 + [4.0] * 4 + [8.0] * 2


def test_rewinding_forgets_steps_and_writing_goes_on(tmp_path):
    log = MetricsLog(tmp_path, "train")
    for step in range(5):
        log.write(step, {"loss": 1.0})
    log.rewind(3)
    log.write(3, {"loss": 2.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "train.jsonl")] == [
        (0, 1.0),
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
    ]


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b'{"step": 2}', b"\x00\x00\x00", b"[2]\n"])
def test_a_broken_last_line_is_removed(tmp_path, tail):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n' + tail)
    truncate_metrics(path, 100)
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n'
    assert os.listdir(tmp_path) == ["train.jsonl"]


def test_a_killed_process_loses_no_line(tmp_path):
    code = f"""
        import os, signal
        from hypervl_jax.training.telemetry.metrics_log import MetricsLog
        log = MetricsLog({str(tmp_path)!r}, "train")
        for step in range(200):
            log.write(step, {{"loss": 1.0}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert steps_of(tmp_path / "train.jsonl") == list(range(200))


def test_tensorboard_gets_the_scalars_and_forgets_what_is_rewound(tmp_path):
    log = MetricsLog(tmp_path, "train")
    log.write(0, {"loss": 0.5, "kl": 0.125})
    log.write(1, {"loss": 9.0})
    log.rewind(1)
    log.write(1, {"loss": 0.25})
    log.close()
    events = events_of(tmp_path / "tensorboard" / "train")
    scalars = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    starts = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert scalars == [(0, "loss", 0.5), (0, "kl", 0.125), (1, "loss", 9.0), (1, "loss", 0.25)]
    assert starts == [0, 1]


def test_other_processes_write_nothing(tmp_path):
    log = MetricsLog(tmp_path / "metrics", "train", enabled=False)
    log.write(0, {"loss": 1.0})
    log.rewind(0)
    log.flush()
    log.close()
    assert not (tmp_path / "metrics").exists()
