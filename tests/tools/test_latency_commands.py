"""`profile_device` measures, `chat` chooses by what it measured: both as processes of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypervl_jax.inference.latency import STEPS, choose, load_profile
from tests.tools.runs import CONFIG, write_run

SIZE, NEW = (64, 120), 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a picture of two tiles."""
    home = tmp_path_factory.mktemp("latency")
    write_run(home / "run")
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(home / "photo.png")
    return home


def command(home: Path, module: str, *options: str) -> dict[str, Any]:
    """The JSON object on the last line that a tool printed about the run; it must end well."""
    words = [sys.executable, "-m", module, "--checkpoint", str(home / "run"), *options, "--json"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_chat_takes_the_largest_branch_and_alpha_that_a_measured_profile_allows(home: Path) -> None:
    path = home / "profile.json"
    printed = command(home, "tools.profile_device", "--output", str(path), "--repeats", "1", "--max-tokens", "64")
    profile = load_profile(path, CONFIG)
    assert printed == {key: value for key, value in json.loads(path.read_text()).items() if key != "format_version"}

    def chat(budget_ms: float) -> dict[str, Any]:
        question = ("--image", str(home / "photo.png"), "--prompt", "How many circles?", "--max-new-tokens", str(NEW))
        budget = ("--encoder", "auto", "--profile", str(path), "--latency-budget-ms", repr(budget_ms))
        return command(home, "tools.chat", *question, *budget)

    fits = chat(1e9)
    text = fits["prompt_tokens"] - fits["visual_tokens"]
    decide = lambda budget_ms: choose(profile, [SIZE], text, NEW, budget_ms, CONFIG.tiling, wanted=(1.0,))
    assert (fits["branch"], fits["alphas"]) == ("large", [1.0])
    assert set(STEPS) - {"compressor"} <= set(fits["milliseconds"])
    threshold = sum(decide(1e9).predicted_ms.values())
    below = chat(threshold - 1e-6)
    expected = decide(threshold - 1e-6)
    assert (below["branch"], tuple(below["alphas"])) == (expected.branch, expected.alphas) != ("large", (1.0,))
    assert below["reason"] == expected.reason
    assert below["visual_tokens"] < fits["visual_tokens"] or below["branch"] == "base"
