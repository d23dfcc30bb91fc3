import dataclasses
import json
from pathlib import Path

import pytest

from hypervl_jax.architecture import HyperVLConfig, TilingConfig
from hypervl_jax.inference.latency import (
    ALPHAS,
    Choice,
    DeviceProfile,
    ProfileError,
    Workload,
    choose,
    interpolate,
    load_profile,
    model_digest,
    predict,
    save_profile,
)

TILING = TilingConfig(tile_size=64, patch_size=8, shuffle=2, max_tiles=9)
PROFILE = DeviceProfile(
    device="cpu",
    date="2026-01-01T00:00:00+00:00",
    versions={"jax": "0"},
    model="",
    dtype="float32",
    compressor=2.0,
    proxy_per_megapixel=3.0,
    resize_per_megapixel=100.0,
    tiling_per_tile=0.5,
    encoder={"base": ((1, 15.0), (9, 95.0)), "large": ((1, 50.0), (9, 370.0))},
    tower_per_tile={"base": 10.0, "large": 40.0},
    projector_per_tile={"base": 1.0, "large": 2.0},
    prefill=((32, 8.0), (128, 32.0), (256, 80.0)),
    decode_start=((48, 2.0), (112, 4.0)),
    decode=((48, 1.0), (112, 3.0)),
)
# 128 x 128 pixels at α = 1: 4 tiles and 64 visual tokens.
SIZES = [(128, 128)]
TEXT, NEW = 20, 16


def total(choice: Choice) -> float:
    return sum(choice.predicted_ms.values())


def decide(budget_ms: float, **options: object) -> Choice:
    return choose(PROFILE, SIZES, TEXT, NEW, budget_ms, TILING, **({"wanted": (1.0,)} | options))


def test_interpolation() -> None:
    assert interpolate(PROFILE.prefill, 16) == 8.0
    assert interpolate(PROFILE.prefill, 32) == 8.0
    assert interpolate(PROFILE.prefill, 80) == 20.0
    assert interpolate(PROFILE.prefill, 192) == 56.0
    assert interpolate(PROFILE.prefill, 512) == 160.0


def test_prediction_counts_the_padded_sizes_that_run() -> None:
    # 5 tiles run as 6 (but are written as 5), 84 tokens as 96, and 96 + 16 slots hold the cache; prefill gives the first of 11 tokens.
    predicted = predict(PROFILE, "large", Workload(0.5, tiles=5, tokens=84, new_tokens=11, compressed_images=2))
    assert predicted == {"compressor": 5.5, "resize": 52.5, "encoder": 250.0, "prefill": 24.0, "decode": 34.0}
    without = predict(PROFILE, "base", Workload(0.0, tiles=0, tokens=20, new_tokens=1, compressed_images=0))
    assert without == {"compressor": 0.0, "resize": 0.0, "encoder": 0.0, "prefill": 8.0, "decode": 2.0}


def test_the_largest_branch_and_alpha_are_taken_until_the_budget_is_passed() -> None:
    full = decide(1e9)
    assert (full.branch, full.alphas) == ("large", (1.0,))
    # Exactly at the threshold it fits; a microsecond below it does not.
    assert decide(total(full)).alphas == (1.0,)
    below = decide(total(full) - 1e-3)
    assert below.branch == "large"
    assert below.alphas[0] < 1.0
    assert total(below) <= total(full) - 1e-3


def test_the_smaller_branch_comes_after_the_smallest_alpha_of_the_larger_one() -> None:
    smallest = decide(1e9, limits=(0.1,))
    assert smallest.branch == "large"
    at, below = decide(total(smallest)), decide(total(smallest) - 1e-3)
    assert (at.branch, total(at)) == ("large", total(smallest))
    assert below.branch == "base"
    # Nothing larger of the smaller branch would have fitted.
    for limit in ALPHAS[: ALPHAS.index(below.alphas[0])]:
        assert total(decide(1e9, branches=("base",), limits=(limit,))) > total(smallest) - 1e-3


def test_nothing_fits() -> None:
    choice = decide(0.5)
    assert (choice.branch, choice.alphas) == ("base", (0.1,))
    assert choice.reason.startswith(
        "nothing fits 0.5 ms; branch base at α 0.1, the smallest candidate, is predicted to take "
    )
    assert f"{total(choice):.1f} ms" in choice.reason


def test_the_reason_gives_the_numbers_of_both_sides() -> None:
    full = decide(1e9)
    reason = decide(total(full) - 1e-3).reason
    assert f"within {total(full) - 1e-3:g} ms" in reason
    # At α 0.6 the padded sizes, and so the prediction, are still those of α = 1.
    assert f"branch large at α 0.6, the next larger candidate, would take {total(full):.1f} ms" in reason
    assert full.reason.endswith("nothing larger is on offer")


def test_a_limit_never_raises_the_wanted_alpha() -> None:
    choice = choose(PROFILE, SIZES * 2, TEXT, NEW, 1e9, TILING, wanted=(0.3, 0.9), limits=(0.5,), compressed=True)
    assert choice.alphas == (0.3, 0.5)
    assert choice.predicted_ms["compressor"] == pytest.approx(2 * 2.0 + 2 * 128 * 128 / 1e6 * 3.0)


def test_text_alone_takes_the_largest_branch() -> None:
    choice = choose(PROFILE, [], TEXT, NEW, 1e9, TILING, wanted=())
    assert (choice.branch, choice.alphas, choice.predicted_ms["encoder"]) == ("large", (), 0.0)


def test_profiles_are_saved_and_checked(tmp_path: Path, config: HyperVLConfig) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(ProfileError, match=r"no device profile at .*tools\.profile_device"):
        load_profile(path, config)
    profile = dataclasses.replace(PROFILE, model=model_digest(config))
    save_profile(profile, path)
    assert load_profile(path, config) == profile
    other = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=9))
    with pytest.raises(ProfileError, match="another model"):
        load_profile(path, other)


@pytest.mark.parametrize(
    "damage",
    [
        {"prefill": []},
        {"encoder": {"base": [[1, 1.0]]}},
        {"encoder": {"base": [[1, 1.0]], "large": []}},
        {"tower_per_tile": {"base": 1.0}},
        {"format_version": 0},
        {"compressor": None},
        {"decode": [1]},
        {"x": 1},
    ],
)
def test_damaged_profiles_are_refused(damage: dict, tmp_path: Path, config: HyperVLConfig) -> None:
    path = tmp_path / "profile.json"
    save_profile(dataclasses.replace(PROFILE, model=model_digest(config)), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ProfileError, match="not a device profile"):
        load_profile(path, config)


@pytest.mark.parametrize("text", ["", "[]", "{", "1", "\udcff"])
def test_what_is_no_profile_is_refused(text: str, tmp_path: Path, config: HyperVLConfig) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ProfileError, match="not a device profile"):
        load_profile(path, config)
