import json
from pathlib import Path

import jax
import pytest

from hypervl_jax.architecture import BRANCHES, hypervl_2b, hypervl_tiny
from hypervl_jax.inference.latency import Workload, load_profile, predict
from tools import profile_device


def test_a_measured_profile_predicts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "profile.json"
    arguments = ["--config-size", "tiny", "--output", str(path), "--repeats", "2", "--max-tokens", "64", "--json"]
    assert profile_device.main(arguments) == 0
    output = capsys.readouterr()
    printed = json.loads(output.out.splitlines()[-1])
    profile = load_profile(path, hypervl_tiny())
    assert printed["tower_per_tile"] == profile.tower_per_tile
    assert printed["versions"]["jax"] == jax.__version__
    assert jax.devices()[0].device_kind in profile.device
    assert [size for size, _ in profile.prefill] == [64]
    assert [size for size, _ in profile.decode] == [80]
    assert [tiles for tiles, _ in profile.encoder["base"]] == [1, 12]
    assert [slots for slots, _ in profile.decode_start] == [80]
    numbers = [profile.compressor, profile.resize_per_megapixel, *profile.tower_per_tile.values()]
    numbers += [milliseconds for branch in BRANCHES for _, milliseconds in profile.encoder[branch]]
    numbers += [*profile.projector_per_tile.values(), profile.prefill[0][1], profile.decode[0][1]]
    assert all(milliseconds > 0 for milliseconds in numbers)
    for branch in BRANCHES:
        assert all(milliseconds > 0 for milliseconds in predict(profile, branch, Workload(1.0, 4, 80, 32, 1)).values())
    assert "large tower" in output.err
    assert "base encoder, 12 tiles" in output.err
    assert str(path) in output.err.replace("\n", "")


def test_prompts_grow_from_text_to_the_whole_tile_budget() -> None:
    assert profile_device.prompt_lengths(hypervl_2b().tiling, 1 << 20) == [64, 384, 2048, 4096]
    assert profile_device.prompt_lengths(hypervl_2b().tiling, 1000) == [64, 384]
    assert profile_device.prompt_lengths(hypervl_2b().tiling, 1) == [64]


def test_the_median_leaves_out_the_first_call_and_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.002, 1.0, 1.9, 2.0, 2.003])
    monkeypatch.setattr(profile_device.time, "perf_counter", lambda: next(clock))
    calls: list[int] = []
    assert profile_device.median_ms(lambda: calls.append(1), 3) == pytest.approx(3.0)
    assert len(calls) == 4


def test_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert profile_device.main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "profile.json")]) == 2
    assert "error: " in (message := capsys.readouterr().err)
    assert "not a HyperVL checkpoint directory" in message
    for arguments in ([], ["--config-size", "7b"], ["--config-size", "tiny", "--repeats", "0"]):
        with pytest.raises(SystemExit, match="2"):
            profile_device.main(arguments)
