"""The data planner on the embedded data, as it stands on disk, and on data that is not there."""

import json
import pathlib

import numpy as np
import pytest

from data_pipelines.lanes import LaneLoader
from data_pipelines.rendered.build import build
from data_pipelines.streams import Lane
from experiments.config import ExperimentConfig
from experiments.data_planning import ENOUGH_FILL
from experiments.named import load_config
from experiments.overrides import from_config_dict
from hypervl_jax.text.tokenizer import load_tokenizer
from hypervl_jax.training.batch import BatchShape
from tools import plan_data

TINY = ["--config", "tiny", "--step-seconds", "0.5", "--hosts", "2"]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("embedded")
    build(directory, size="test", workers=0)
    return directory


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert plan_data.main([*TINY, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_plan_of_the_embedded_data(embedded: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--data", str(embedded))
    sources = plan["sources"].values()
    assert plan["reachable"]
    assert sum(source["share"] for source in sources) == pytest.approx(1)
    assert sum(source["odds"] for source in sources) == pytest.approx(1)
    for source in sources:
        assert source["stage_tokens"] == pytest.approx(source["share"] * plan["tokens"])
        assert source["epochs"] == pytest.approx(source["stage_tokens"] / source["tokens"])
    files = embedded.glob("train/*/*.array_record")
    assert plan["stored_bytes"] == sum(path.stat().st_size for path in files)
    assert plan["steps"] == pytest.approx(plan["configured_steps"], abs=1), (
        "without a token budget it is what the steps read"
    )
    host = plan["host"]
    assert host["rows"] == plan["batch"]["rows"] / 2
    assert host["samples_per_second"] == pytest.approx(host["rows"] * plan["samples_per_row"] / 0.5)
    assert host["cores"] > 0
    assert plan["packing_share_of_decode"] < 0.2  # on pictures of a few kB; docs/data.md measures real ones


def test_the_recommended_tile_budget_fills_real_rows(
    embedded: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, "--data", str(embedded), "--no-timing")
    config = from_config_dict(ExperimentConfig, load_config("tiny"))
    shape = BatchShape(4, plan["batch"]["length"], plan["recommended_tiles"])
    tiling = config.architecture.tiling
    assert shape.tiles >= tiling.tile_limit
    data = config.data.__class__(**{**vars(config.data), "root": str(embedded)})
    loader = LaneLoader(data, shape, tiling, load_tokenizer(embedded))
    rows = []
    for lane, vector in zip(loader.lanes, loader.initial_states(), strict=True):
        stream = Lane(loader.mixture, lane, vector)
        rows += [stream.plan() for _ in range(100)]
    token_fill, tile_fill = (
        np.mean([sum(getattr(s, name) for s in row) for row in rows]) for name in ("tokens", "tiles")
    )
    foretold = next(entry for entry in plan["tile_budgets"] if entry["tiles"] == shape.tiles)
    for fill, kind in ((token_fill / shape.length, "token"), (tile_fill / shape.tiles, "tile")):
        assert fill >= ENOUGH_FILL * foretold[f"{kind}_bound"]
        assert fill == pytest.approx(foretold[f"{kind}_fill"], abs=0.015)
    assert max(foretold["token_bound"], foretold["tile_bound"]) == 1


def test_tables_say_what_gives_out(embedded: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit = ["--data", str(embedded), "--no-timing", "--config.data.epoch_limits=charts:0.01"]
    assert plan_data.main([*TINY, *limit]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "stage: tokens" in shown
    assert "NOT reachable, the run stops where a source gives out: charts after" in shown
    assert "of the stage, then the data gives out" in shown.partition("what it reads")[2]
    assert "recommended" in shown
    assert "not timed" in shown
    plan = planned(capsys, *limit, "--config.data.over_limit=reweight")
    assert plan["reachable"]
    assert [source["name"] for source in plan["exhausted"]] == ["charts"]
    assert plan["sources"]["charts"]["epochs"] == pytest.approx(0.01)


def test_what_is_read_is_told_from_what_the_stage_asks(
    embedded: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tenth of the data a tenth of the tiles is read; steps and rows stay those of the stage."""
    options = ["--data", str(embedded), "--no-timing"]
    whole = planned(capsys, *options)
    part = planned(capsys, *options, "--config.data.epoch_limits=charts:0.01")
    assert whole["reached_tokens"] == pytest.approx(whole["tokens"])
    share = part["reached_tokens"] / part["tokens"]
    assert share < 0.5
    assert part["reached_tiles"] == pytest.approx(share * whole["reached_tiles"])
    assert (part["steps"], part["rows"]) == (whole["steps"], whole["rows"])
    assert plan_data.main([*TINY, *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{plan_data.scaled(whole['reached_tiles'])} tiles: the whole stage" in shown


def test_missing_data_is_said_in_sentences(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_data.main(["--config", "stage2", "--data", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "17 of 17 sources are missing" in message
    assert "os-atlas" in message
    assert "licence Apache-2.0" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("wrong", [["--config", "stage9"], ["--config", "tiny", "--topology", "v9-8"]])
def test_what_cannot_be_planned_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_data.main(wrong) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("wrong", [["--mfu", "1.5"], ["--step-seconds", "0"], ["--hosts", "0"], ["--jsn"]])
def test_impossible_options_are_usage_errors(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan_data.main([*TINY, *wrong])
    assert ended.value.code == 2
