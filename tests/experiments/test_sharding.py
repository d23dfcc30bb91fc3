import os
import pathlib

import pytest

from experiments.named import config_names
from tests.experiments.sharding_text import sharding_text

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "sharding"
PODS = ("v5e-256", "2xv5e-256", "v6e-256", "v5p-512", "v5p-4096", "v5p-8192")
CASES = [(name, topology) for name in config_names() for topology in (PODS if name.startswith("stage") else ("v5e-4",))]


@pytest.mark.parametrize(("name", "topology"), CASES)
def test_every_parameter_and_activation_is_split_as_the_golden_says(name, topology):
    """After a change that is meant: UPDATE_GOLDENS=1 pytest tests/experiments/test_sharding.py, and read the diff."""
    text, golden = sharding_text(name, topology), GOLDENS / f"{name}.{topology}.txt"
    if os.environ.get("UPDATE_GOLDENS"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_there_is_no_golden_without_a_case():
    assert {path.stem for path in GOLDENS.glob("*.txt")} == {f"{name}.{topology}" for name, topology in CASES}
