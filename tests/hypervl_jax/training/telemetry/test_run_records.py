import json
import os
import subprocess

import pytest

from hypervl_jax.architecture import ConfigError
from hypervl_jax.training.telemetry import records


def test_every_start_is_recorded(tmp_path):
    records.write_run_record(tmp_path, "name: tiny", 0)
    records.write_run_record(tmp_path, "name: tiny", 12)
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["resume_step"] for start in starts] == [0, 12]
    assert starts[1]["config"] == "name: tiny"
    assert starts[1]["packages"]["jax"]
    assert starts[1]["devices"]["count"] >= 1
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_damaged_record_is_a_sentence(tmp_path):
    for text in ('{"starts": [', "{}", "[]"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ConfigError, match="the record of earlier starts, is damaged"):
            records.write_run_record(tmp_path, "name: tiny", 0)


def test_the_git_revision_is_that_of_the_checkout():
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    expected = head.stdout.strip() if head.returncode == 0 else "unknown"
    assert records.git_revision().removesuffix("+dirty") == expected
