import json
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from data_pipelines.rendered.build import VOCAB_SIZE, build
from experiments import debug, launch, workdir
from experiments.config import ExperimentConfig
from experiments.distributed import start_processes
from experiments.named import config_names, load_config
from experiments.overrides import config_text, from_config_dict
from experiments.run import description
from hypervl_jax.architecture import ConfigError
from hypervl_jax.text.tokenizer import load_tokenizer
from hypervl_jax.training.checkpoint import write_description
from hypervl_jax.training.telemetry.metrics_log import read_metrics
from hypervl_jax.training.telemetry.records import write_json

EMBEDDED = ("captions", "digits", "documents", "charts", "scenes", "text")


def run(*arguments):
    """The exit status; argparse leaves by `SystemExit`."""
    try:
        return launch.main(arguments)
    except SystemExit as leaving:
        return leaving.code


def test_help_tells_all_without_starting_jax():
    code = """
        import sys
        sys.modules["jax"] = sys.modules["flax"] = sys.modules["grain"] = None
        from experiments import launch
        launch.main(["--help"])
    """
    shown = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0, shown.stderr
    for name in config_names():
        assert f"  {name} " in shown.stdout
    for words in ("--debug", "--workdir", "exit status", "examples", "JAX_PLATFORMS"):
        assert words in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config"),
        (("--config", "tinny"), "unknown configuration 'tinny'; did you mean tiny?"),
        (("--config", "compressor"), "compressor needs --config.labels=DIR"),
        (("--config", "compressor", "--config.labels=x"), "compressor needs --config.checkpoint=DIR"),
        (("--config", "compressor", "--config.training.stps=1"), "did you mean config.training.steps?"),
        (("--config", "compressor", "--config.training.loss=l1"), "compressor loss 'l1' is not one of"),
        (("--config", "compressor", "--process-id", "0"), "--process-id: the compressor is trained on one device"),
        (("--config", "tiny", "--wrkdir", "x"), "unknown argument --wrkdir; did you mean --workdir?"),
        (("--config", "tiny", "--config.optimizer.lr"), "--config.optimizer.lr has no value"),
        (("--config", "tiny", "--config.optimizer.learnin_rate=1"), "did you mean config.optimizer.learning_rate?"),
        (("--config", "tiny", "--config.batch.tiles", "50"), "more than the row's 256"),
        (("--config", "tiny", "--config.loop.steps=0.5"), "must be a whole number"),
        (("--config", "tiny", "--profile-steps", "9:3"), "steps '9:3' are not a range; write FIRST:END"),
        (("--config", "tiny", "--hang-seconds", "-1"), "hang_seconds -1.0 must not be negative"),
        (("--config", "tiny", "--devices", "0"), "argument --devices: 0 is not a whole number of 1 or more"),
        (("--config", "tiny", "--devices", "-2"), "argument --devices: -2 is not a whole number of 1 or more"),
    ],
)
def test_usage_errors_are_one_clear_line_and_status_2(arguments, message, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert sum(line.startswith(("error:", "python -m experiments.launch: error:")) for line in error.splitlines()) == 1
    assert "Traceback" not in error


def test_print_shows_the_configuration_with_overrides_in_their_order(capsys):
    arguments = ("--config.loop.steps=300", "--config.loop.steps", "200", "--data", "here")
    assert run("--config", "tiny", "--print", *arguments) == 0
    shown = capsys.readouterr().out
    assert "loop.steps = 200\n" in shown
    assert "data.root = 'here'\n" in shown
    assert len(shown.splitlines()) == len(config_text(typed("tiny")).splitlines())


def test_debug_is_changed_by_overrides_too(capsys):
    assert run("--config", "stage1", "--debug", "--print", "--config.loop.steps=7") == 0
    shown = capsys.readouterr().out
    assert "loop.steps = 7\n" in shown
    assert f"architecture.decoder.vocab_size = {VOCAB_SIZE}\n" in shown
    assert "optimizer.frozen = ('decoder',)\n" in shown


def test_debug_fits_its_own_warm_up_to_the_steps_asked_for(capsys):
    assert run("--config", "stage1", "--debug", "--print", "--config.loop.steps=4") == 0
    assert "optimizer.warmup_steps = 0\n" in capsys.readouterr().out
    given = "--config.optimizer.warmup_steps=5"
    assert run("--config", "stage1", "--debug", "--print", "--config.loop.steps=4", given) == 2
    assert "warmup_steps 5 must be below loop.steps 4" in capsys.readouterr().err


def test_stage1_without_anything_says_all_it_needs_at_once(tmp_path, capsys):
    assert run("--config", "stage1", "--workdir", str(tmp_path / "run"), "--data", str(tmp_path / "data")) == 2
    error = capsys.readouterr().err
    for source in typed("stage1").data.mixture:
        assert f"train, heldout: {source.name}  (" in error
    assert "UCSC-VLAA/Recap-DataComp-1B" in error
    assert "write_qwen3_tokenizer" in error
    for part in ("vision_base", "vision_large", "llm"):
        assert f"--config.initialize_from.{part}=DIR or random" in error
    assert error.index("data:") < error.index("tokenizer:") < error.index("parameters:")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("choice", "environment", "kept"),
    [
        (None, None, "{workdir}/compilation_cache"),
        (None, "/elsewhere", "/elsewhere"),
        ("/chosen", "/elsewhere", "/chosen"),
        ("off", "/elsewhere", None),
    ],
)
def test_where_compiled_programs_are_kept(tmp_path, choice, environment, kept):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", environment)
        launch.keep_compiled(choice, tmp_path)
        assert jax.config.jax_compilation_cache_dir == (kept and kept.format(workdir=tmp_path))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def typed(name):
    return from_config_dict(ExperimentConfig, load_config(name))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    build(directory, size="test")
    return str(directory)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("initialize_from.llm=", "--config.initialize_from.llm=DIR or random"),
        ("initialize_from.llm=/nowhere", "llm: there is no directory /nowhere"),
        ("architecture.decoder.vocab_size=500", f"has {VOCAB_SIZE} ids, more than architecture.decoder.vocab_size 500"),
        ("tokenizer=/nowhere", "tokenizer: /nowhere"),
        ("data.mixture=captions:1,screens:1", "data: 1 of 2 sources are missing"),
        ("heldout.left_out=", "  heldout: text  (embedded)"),
    ],
)
def test_what_is_missing_is_found_before_anything_starts(data, tmp_path, capsys, override, message):
    overrides = [f"--config.{override}"] + ["--config.heldout.left_out="] * ("mixture" in override)
    assert run("--config", "tiny", "--data", data, "--workdir", str(tmp_path / "run"), *overrides) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def saved(directory, name="tiny"):
    """Makes the directory of a run that has saved step 4."""
    workdir.claim(directory, typed(name))
    (directory / "checkpoints" / "4").mkdir(parents=True)


def test_a_start_that_failed_before_its_first_checkpoint_leaves_no_claim(tmp_path, capsys):
    workdir.claim(tmp_path, typed("tiny"))
    arguments = ("--config", "tiny", "--workdir", str(tmp_path), "--data", "/nowhere")
    assert run(*arguments, "--config.optimizer.b1=0.8") == 2
    assert "belongs to another run" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"name": "ti', "[]"])
def test_a_damaged_record_of_the_configuration_is_a_sentence(tmp_path, capsys, text):
    saved(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert run("--config", "tiny", "--workdir", str(tmp_path), "--data", "/nowhere") == 2
    assert f"error: {tmp_path}/config.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("place", "reason"), [("/proc/nope", "No such file"), ("{file}", "File exists")])
def test_a_workdir_that_cannot_be_written_is_a_sentence(data, tmp_path, capsys, place, reason):
    (tmp_path / "file").touch()
    assert run("--config", "tiny", "--data", data, "--workdir", place.format(file=tmp_path / "file")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error
    assert "give another path" in error


def prepared(directory, data, *options):
    """Whether `--config tiny` may go on in a directory, by the checks before any device is touched."""
    chosen, overrides = launch.parse(["--config", "tiny", "--data", str(data), *options])
    return launch.prepare(launch.resolve(chosen, overrides), directory, chosen)


def test_a_run_resumes_on_the_data_and_with_the_tokenizer_it_began_with(data, tmp_path):
    moved, run_directory = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, moved)
    saved(run_directory)
    config, tokenizer = launch.resolve(*launch.parse(["--config", "tiny", "--data", data])), load_tokenizer(moved)
    tokenizer.save(tmp_path / "tokenizer")
    described = description(config, tokenizer, tmp_path / "tokenizer")
    write_description(run_directory / "checkpoints", described)
    assert prepared(run_directory, moved), "the same data elsewhere"

    manifest = moved / "train" / "charts" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(launch.LaunchError, match="was trained on other data: the manifests of charts in"):
        prepared(run_directory, moved)
    assert prepared(run_directory, moved, "--accept-changes")

    other = described._replace(details={**described.details, "tokenizer": "another"})
    write_description(run_directory / "checkpoints", other)
    with pytest.raises(launch.LaunchError, match="was trained with tokenizer and chat template 'another'"):
        prepared(run_directory, data)
    assert prepared(run_directory, data, "--accept-changes")


def test_of_several_processes_one_makes_the_debug_data(tmp_path):
    words = ["--config", "stage1", "--debug", "--data", str(tmp_path / "debug")]
    config = launch.resolve(*launch.parse(words))
    with ThreadPoolExecutor(2) as together:
        assert sorted(together.map(debug.make_data, (config, config))) == [False, True]


def test_a_workdir_belongs_to_one_configuration(tmp_path, capsys):
    saved(tmp_path)
    arguments = ("--config", "tiny", "--workdir", str(tmp_path), "--data", "/nowhere")
    changes = ("--config.optimizer.b1=0.8", "--config.mesh.tensor=2", "--config.loop.evaluate_every=7")
    assert run(*arguments, *changes) == 2
    error = capsys.readouterr().err
    assert "belongs to another run: optimizer.b1 was 0.9 and is 0.8." in error
    assert run(*arguments, *changes, "--accept-changes") == 2
    assert "belongs to another run" not in capsys.readouterr().err


def test_a_workdir_is_used_by_one_run_at_a_time_and_free_when_it_ends_however(tmp_path):
    program = f"import pathlib, time; from experiments import workdir; workdir.lock(pathlib.Path({str(tmp_path)!r})); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ConfigError, match=f"is in use by process {other.pid} on "):
            workdir.lock(tmp_path)
        other.kill()
    workdir.lock(tmp_path)
    assert (tmp_path / workdir.LOCK).read_text().startswith("process ")


def test_the_horizon_of_a_schedule_is_not_changed_silently():
    before = workdir.as_json(typed("tiny"))
    assert workdir.differing_keys(before, before | {"loop.steps": 9, "loop.token_budget": 9}) == ["loop.steps"]


def test_a_complete_run_says_so(tmp_path, capsys):
    config = typed("tiny")
    saved(tmp_path)
    write_json(tmp_path / "checkpoints" / "release.json", {"config": workdir.as_json(config)})
    assert run("--config", "tiny", "--workdir", str(tmp_path), "--data", "/nowhere") == 0
    assert f"tiny is complete: {tmp_path}" in capsys.readouterr().err
    assert (
        run("--config", "tiny", "--workdir", str(tmp_path), "--data", "/nowhere", "--config.loop.token_budget=1e5") == 2
    )
    assert "tiny cannot start" in capsys.readouterr().err, "a longer run goes on, here without its data"


@pytest.mark.parametrize("given", [("localhost:1", None, None), (None, 0, 2), ("localhost:1", 2, 2)])
def test_processes_need_all_three_flags(given):
    with pytest.raises(ConfigError, match="--process-id"):
        start_processes(*given)


def test_rows_that_do_not_split_over_the_devices_are_refused(data, tmp_path):
    command = [sys.executable, "-m", "experiments.launch", "--config", "tiny", "--data", data, "--devices", "3"]
    ended = subprocess.run(
        [*command, "--workdir", str(tmp_path / "run")], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert (
        "error: batch.rows 4 cannot be split into objective.accumulation 1 micro-batches over 3 row shards"
        in ended.stderr
    )
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_stages_run_hand_over_and_complete(data, tmp_path, capsys):
    first, second = tmp_path / "one", tmp_path / "two"
    short = (
        "--data", data, "--config.loop.steps=4", "--config.loop.log_every=2", "--config.loop.evaluate_every=2",
        "--config.optimizer.warmup_steps=1", "--config.heldout.batches=1", "--config.checkpoint.every=3",
        "--config.batch.rows=8",
    )  # fmt: skip
    assert run("--config", "tiny", "--workdir", str(first), *short) == 0
    assert [line["step"] for line in read_metrics(first / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [line["step"] for line in read_metrics(first / "evaluations.jsonl")] == [2, 4]
    card = json.loads((first / "checkpoints" / "release.json").read_text())
    assert card["step"] == 4
    assert card["branch_steps"] == {"base": 2, "large": 2}
    assert set(card["tokens"]) == set(EMBEDDED)
    assert {"train/text", "heldout/digits"} <= set(card["manifests"])
    assert card["heldout"]["cross_entropy/large/charts"] > 0
    assert "| charts |" in (first / "checkpoints" / "RELEASE.md").read_text()

    assert run("--config", "tiny", "--workdir", str(first), *short) == 0
    assert "tiny is complete" in capsys.readouterr().err
    assert len(json.loads((first / "run.json").read_text())["starts"]) == 1

    later = (*short, "--workdir", str(second))
    assert run("--config", "tiny_stage2", *later) == 2
    assert run("--config", "tiny_stage2", *later, f"--config.initialize_from.checkpoint={tmp_path}") == 2
    deeper = "--config.architecture.decoder.num_layers=2"
    assert run("--config", "tiny_stage2", *later, f"--config.initialize_from.checkpoint={first}", deeper) == 2
    assert "was trained with another architecture: decoder differ" in capsys.readouterr().err
    assert run("--config", "tiny_stage2", *later, f"--config.initialize_from.checkpoint={first}") == 0
    assert f"all parameters from step 4 in {first}" in capsys.readouterr().err
    started = read_metrics(second / "metrics.jsonl")[0]["cross_entropy/base"]
    trained = read_metrics(first / "metrics.jsonl")
    assert started < trained[0]["cross_entropy/base"], "stage 2 goes on from stage 1's parameters"
