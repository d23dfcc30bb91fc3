"""`tools.profile_tiles`: constant memory of serial tiles, the warning when it is not, one pass against tiles, resumption."""

from __future__ import annotations

import json
import pathlib

import pytest

from hypervl_jax.architecture import ConfigError, hypervl_tiny
from tools import profile_tiles
from tools.process_memory import status_bytes
from tools.profile_tiles import Row, cases, comparisons, growths, main, parse_image, parser, warnings
from tools.tile_probe import BATCHED, CHUNKED, FULL, HERE, SERIAL, Case, Probe, probe, settle


def case(way: str = SERIAL, tile: int = 64, height: int = 64, width: int = 64, **changes: object) -> Case:
    """Compiled and not run, unless changed: a tiny model's resident memory is below what the kernel counts exactly."""
    return Case("tiny", "base", way, tile, height, width, **{"repeats": 1, "chip": HERE, **changes})


def compiled(*wanted: Case) -> list[Row]:
    return [Row(each, probe(each)) for each in wanted]


@pytest.fixture(scope="module")
def one() -> Row:
    return compiled(case())[0]


@pytest.fixture(scope="module")
def many() -> Row:
    return compiled(case(height=384, width=384))[0]


def test_serial_tiles_keep_memory_constant(one: Row, many: Row) -> None:
    (growth,) = growths([one, many])
    assert (growth.tiles, growth.tile) == (36, 64)
    assert growth.ratio <= 1.05
    assert warnings([one, many]) == []


def test_memory_spikes_are_told_when_tiles_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--config-size", "tiny", "--compile-for", HERE, "--tiles", "64", "--images", "64", "--ways", SERIAL]
    assert main([*command, "--growth", "9", "--tile-chunk", "0", "--json"]) == 0
    said = capsys.readouterr()
    values = json.loads(said.out.splitlines()[-1])
    (growth,), (warning,) = values["growth"], values["warnings"]
    assert growth["ratio"] > 5
    assert warning.startswith("memory spikes: tiling not triggered: 9 tiles of 64 pixels take ")
    assert f"{growth['many'] / 2**20:.1f} MiB against {growth['one'] / 2**20:.1f} MiB" in warning
    assert f"warning: {warning}" in said.err


def test_one_pass_takes_more_than_tiles(many: Row) -> None:
    whole, blocks = compiled(case(FULL, 384, 384, 384), case(CHUNKED, 384, 384, 384))
    compared = {row.way: row for row in comparisons([many, whole, blocks])}
    patches, width, layers = 48 * 48, 64, 2
    assert whole.probe.flops - many.probe.flops == layers * 4 * (patches * patches - 36 * 64 * 64) * width
    assert compared[FULL].memory > 2 * compared[CHUNKED].memory > 2
    assert compared[FULL].flops == whole.probe.flops / many.probe.flops
    assert not compared[FULL].measured
    assert whole.probe.tokens == many.probe.tokens == 576


def test_peak_memory_is_what_was_held() -> None:
    before = settle()
    held = bytearray(64 << 20)
    assert status_bytes("VmHWM") - before == pytest.approx(len(held), rel=0.05)


def test_the_command_measures_in_a_process_and_goes_on(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "rows.jsonl"
    command = ["--config-size", "tiny", "--tiles", "64", "--images", "64", "--ways", "serial", "--growth", "0"]
    command += ["--repeats", "1", "--output", str(output), "--json"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["rows"][0]["tiles"] == 1
    assert first["rows"][0]["net_bytes"] >= 0
    assert first["rows"][0]["cpu_milliseconds"] > 0
    monkeypatch.setattr(profile_tiles.sys, "executable", "/nonexistent")
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    assert main([*command[:-3], "--output", str(tmp_path / "other.jsonl")]) == 1
    assert "error: " in capsys.readouterr().err


def test_a_picture_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.tile_probe.HEADROOM", 0.0)
    found = probe(case(chip=""))
    assert "GiB are free" in found.left_out
    assert found.net_bytes is None
    assert found.compiled_bytes > 0


def test_pictures_are_named_or_sized() -> None:
    assert parse_image("document") == (1754, 1240)
    assert parse_image("1200x800") == (800, 1200)
    assert parse_image("512") == (512, 512)
    with pytest.raises(ConfigError, match="neither a side"):
        parse_image("12y4")


def test_one_pass_takes_a_square_of_as_many_patches_and_growth_counts_tiles() -> None:
    options = parser().parse_args(["--tiles", "64", "--images", "128,chart", "--config-size", "tiny", "--growth", "4"])
    made, cell = cases(options), hypervl_tiny().tiling.cell_size
    whole = [each for each in made if each.way in (FULL, CHUNKED)]
    assert [(each.height, each.width, each.tile) for each in whole] == [(128, 128, 128), (800, 1200, 992)] * 2
    assert (800 // cell) * (1200 // cell) <= (992 // cell) ** 2 == whole[1].plan.tokens < 1.03 * 800 * 1200 / cell**2
    assert [each.plan.tiles for each in made if each.way == SERIAL][:2] == [1, 4]
    assert sum(each.way == BATCHED for each in made) == 2


def test_kinds_of_pictures_are_compared_apart() -> None:
    tiles, whole = case(height=800, width=1200), case(FULL, 992, 800, 1200)
    rows = [Row(tiles, Probe(247, 3750, 100, 7)), Row(whole, Probe(1, 3844, 500, 70))]
    (found,) = comparisons(rows)
    assert (found.picture, found.memory, found.flops) == ("chart", 10, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--ways", "slow"], "'slow' is not one of"), (["--tiles", "100"], "100"), (["--ways", "flash"], "TPU only")],
)
def test_what_cannot_be_measured_is_a_sentence(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config-size", "tiny", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n')
    assert main(["--config-size", "tiny", "--tiles", "64", "--images", "64", "--output", str(path)]) == 2
    assert "holds no measurements" in capsys.readouterr().err


def test_memory_of_the_compiler_stands_in_where_nothing_ran() -> None:
    row = Row(case(), Probe(1, 16, 100, 7, net_bytes=None))
    assert row.memory == 7
