import csv
import inspect
import json
import math
import pathlib
import subprocess
import sys
import textwrap

import pytest

from experiments import sweep, sweep_table, sweeps
from experiments.config import ExperimentConfig
from experiments.engines import local
from experiments.launch import resolve
from experiments.named import load_config
from experiments.overrides import flatten, from_config_dict
from experiments.sweep_runs import expand
from experiments.sweep_table import Row
from hypervl_jax.architecture import ConfigError
from tests.experiments.processes import SMALL

LAUNCHES = [name for name in sweeps.SWEEPS if sweeps.command(name) == sweeps.LAUNCH]
HOME = pathlib.Path("home")


def typed(name):
    return from_config_dict(ExperimentConfig, load_config(name))


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_a_sweep_says_what_it_asks_and_what_varies(name):
    text = inspect.cleandoc(sweeps.SWEEPS[name].__doc__)
    assert sweeps.question(name).split(".")[0].endswith("?") or "?" in sweeps.question(name)
    assert "\nVaries: " in text
    assert "Held fixed: " in text


@pytest.mark.parametrize("config", ["tiny", "stage1", "stage2", "stage3"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_every_variant_is_a_configuration_that_changes_only_what_it_sets(name, config):
    from experiments import launch

    runs = expand(config, name, HOME, [])
    assert len({run.name for run in runs}) == len(runs) >= 2
    base = flatten(typed(config))
    for run in runs:
        values = flatten(resolve(*launch.parse(run.words[2:])))
        assert {key for key in base if values[key] != base[key]} <= set(run.settings)
        assert run.directory == HOME / run.name
        assert not set(run.name) & set('/\\: "')


def test_directories_do_not_depend_on_the_place_in_the_sweep(monkeypatch):
    def reversed_weights(config):
        return list(sweeps.dcl_weight(config))[::-1] + sweeps.vary("consistency.kl_weight", (9.0,))

    before = {run.name: run.directory for run in expand("tiny", "dcl_weight", HOME, [])}
    monkeypatch.setitem(sweeps.SWEEPS, "dcl_weight", reversed_weights)
    after = {run.name: run.directory for run in expand("tiny", "dcl_weight", HOME, [])}
    assert before.items() < after.items()


def test_tile_sizes_keep_the_pixels_of_rows_and_images():
    sizes = [resolve_run(run) for run in expand("stage1", "tile_size", HOME, [])]
    assert [config.architecture.tiling.tile_size for config in sizes] == [128, 256, 512]
    assert len({config.batch.tiles * config.architecture.tiling.tile_size**2 for config in sizes}) == 1
    assert (
        len({config.architecture.tiling.max_tiles * config.architecture.tiling.tile_size**2 for config in sizes}) == 1
    )


def resolve_run(run):
    from experiments import launch

    return resolve(*launch.parse(run.words[2:]))


def test_doubled_shares_keep_the_others_among_themselves():
    runs = {run.name: resolve_run(run).data.mixture for run in expand("stage2", "data_shares", HOME, [])}
    shares = {source.name: source.share for source in runs["as_configured"]}
    assert list(shares) == [source.name for source in typed("stage2").data.mixture]
    assert {source.name: source.share for source in runs["more_kale"]} == shares | {"kale": 2 * shares["kale"]}


def test_the_compressor_sweep_names_its_own_command():
    run = expand("stage2", "vrc_epsilon", HOME, ["--labels", "L", "--data", "D", "--checkpoint", "C"])[0]
    assert run.words[:4] == ("-m", "tools.train_compressor", "--output", str(HOME / "epsilon=0.01"))
    assert run.words[-2:] == ("--epsilon", "0.01")
    from tools.train_compressor import _parser

    assert _parser().parse_args(run.words[2:]).epsilon == 0.01


def test_help_lists_the_sweeps_without_starting_jax():
    code = """
        import sys
        sys.modules["jax"] = sys.modules["flax"] = None
        from experiments import sweep
        sweep.main(["--help"])
    """
    shown = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert all(f"  {name} " in shown.stdout for name in sweeps.SWEEPS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "kl_weight=7"), "the sweep has no run kl_weight=7; it has kl_weight=0.0"),
        (("--config.batch.tiles=50",), "more than the row's 256"),
        (("--set", "nodes"), "--set takes KEY=VALUE"),
        (("--set", "nodes=2"), "--set nodes: the local engine has no options"),
    ],
)
def test_mistakes_are_told_before_anything_starts(tmp_path, capsys, words, message):
    arguments = ["--config", "tiny", "--sweep", "dcl_weight", "--on", "local", "--workdir", str(tmp_path), *words]
    assert sweep.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def small_sweep(data, directory, *words):
    overrides = {**SMALL, "loop.steps": 4, "loop.log_every": 2, "loop.evaluate_every": 0, "optimizer.warmup_steps": 1}
    overrides |= {"checkpoint.every": 3, "data.mixture": "captions:1", "heldout.left_out": ""}
    return [
        *("--config", "tiny", "--sweep", "dcl_weight", "--on", "local", "--workdir", str(directory), "--data", str(data)),
        *("--only", "kl_weight=0.5", "--only", "kl_weight=1.0", *words),
        *(f"--config.{key}={value}" for key, value in overrides.items()),
    ]  # fmt: skip


def test_a_local_sweep_ends_in_a_table_and_a_plot_and_is_not_run_twice(data, tmp_path, capsys, monkeypatch):
    # Nothing depends on their speed or last digits: unoptimised programs compile in half the time.
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0")
    home = tmp_path / "tiny" / "dcl_weight"
    home.mkdir(parents=True)
    in_the_way = home / "kl_weight=1.0"
    in_the_way.write_text("no directory")
    assert sweep.main(small_sweep(data, tmp_path, "--json")) == 1
    shown = capsys.readouterr()
    rows = [row for row in json.loads(shown.out) if row["state"] != "new"]
    assert rows[0]["state"] == "complete", "a failed run does not keep others from running"
    assert "failed with status " in rows[1]["state"]
    assert "kl_weight=1.0" in rows[1]["state"]
    assert rows[0]["results"]["step"] == 4

    in_the_way.unlink()
    release = home / "kl_weight=0.5" / "checkpoints" / "release.json"
    before = release.stat().st_mtime_ns
    assert sweep.main(small_sweep(data, tmp_path)) == 0
    shown = capsys.readouterr()
    assert "complete, skipped: kl_weight=0.5\n" in shown.err
    assert "1/1 kl_weight=1.0: done" in shown.err
    assert release.stat().st_mtime_ns == before
    assert shown.out == (home / "table.md").read_text().split("\n\n", 1)[1]
    every = json.loads((home / "table.json").read_text())
    rows = [row for row in every if row["state"] == "complete"]
    assert [row["run"] for row in rows] == ["kl_weight=0.5", "kl_weight=1.0"]
    assert {row["state"] for row in every} == {"complete", "new"}, "--only leaves the table whole"
    assert all(row["results"]["cross_entropy/base"] > 0 for row in rows)
    assert (home / "plot.png").read_bytes().startswith(b"\x89PNG")
    with (home / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["consistency.kl_weight"]) for line in lines if line["kl"]] == [0.5, 1.0]
    assert [float(line["kl"]) for line in lines if line["kl"]] == [row["results"]["kl"] for row in rows]

    assert sweep.main(small_sweep(data, tmp_path, "--dry-run")) == 0
    shown = capsys.readouterr()
    assert "complete, skipped: kl_weight=0.5, kl_weight=1.0" in shown.err
    assert shown.out.strip() == ""

    changed = small_sweep(data, tmp_path, "--config.optimizer.learning_rate=0.05")
    assert sweep.main(changed) == 2, "results of other settings are not passed off as these"
    assert "kl_weight=0.5 belongs to another run: optimizer.learning_rate was" in capsys.readouterr().err


def test_a_run_that_ends_before_it_is_complete_is_no_success(data, tmp_path, capsys, monkeypatch):
    """What a preempted run does: it saves and ends with 0."""
    monkeypatch.setattr(local.sys, "executable", "true")
    assert sweep.main(small_sweep(data, tmp_path, "--only", "kl_weight=0.5")) == 1
    assert "stopped before it was complete" in capsys.readouterr().out


def test_a_compressor_made_by_another_command_is_not_taken_for_this_one(tmp_path, capsys):
    words = ["--config", "tiny", "--sweep", "vrc_epsilon", "--on", "local", "--workdir", str(tmp_path)]
    extra = ["--labels", "a", "--data", "b", "--checkpoint", "c"]
    (run, *_) = expand("tiny", "vrc_epsilon", tmp_path / "tiny" / "vrc_epsilon", extra)
    run.claim()
    run.directory.mkdir()
    run.proof.write_text("{}")
    assert sweep.main([*words, *extra, "--dry-run"]) == 0
    assert f"complete, skipped: {run.name}" in capsys.readouterr().err
    assert sweep.main([*words, "--labels", "other", *extra[2:], "--dry-run"]) == 2
    assert "was made by another command" in capsys.readouterr().err


def test_tables_show_what_was_measured(tmp_path):
    rows = [
        Row("a", "complete", {"x.y": "1"}, {"step": 10, "cross_entropy/base": 2.5, "cross_entropy/large": math.nan}),
        Row("b", "failed | badly", {"x.y": "two"}, {}),
    ]
    assert sweep_table.markdown(rows).splitlines() == [
        "| run | state | step | cross_entropy/base | cross_entropy/large |",
        "| --- | --- | --- | --- | --- |",
        "| a | complete | 10 | 2.5000 |  |",
        "| b | failed / badly |  |  |  |",
    ]
    assert sweep_table.horizontal(rows) == ("", [0.0, 1.0], False)
    assert sweep_table.horizontal(rows[:1]) == ("x.y", [1.0], True)
    paths = sweep_table.write(rows, tmp_path, "title")
    assert [path.name for path in paths] == ["table.md", "table.csv", "table.json", "plot.png"]
    assert json.loads(paths[2].read_text())[0]["results"]["cross_entropy/large"] is None
    assert [path.name for path in sweep_table.write(rows[1:], tmp_path, "title")][-1] == "table.json"


def test_an_unknown_configuration_gets_a_suggestion(capsys):
    assert sweep.main(["--config", "stage_2", "--sweep", "dcl_weight", "--on", "local", "--dry-run"]) == 2
    assert "did you mean stage2?" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        expand("stage_2", "vrc_epsilon", HOME, [])
