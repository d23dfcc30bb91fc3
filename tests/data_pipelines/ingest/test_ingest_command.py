"""The command from raw source to manifest: two workers, kills, restarts, refusals."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import pytest

pytest.importorskip("apache_beam")
pytest.importorskip("webdataset")

import apache_beam as beam

from data_pipelines.ingest.__main__ import main
from data_pipelines.ingest.errors import IngestError
from data_pipelines.ingest.pipeline import _pipeline, beam_options
from data_pipelines.ingest.staging import claim
from data_pipelines.ingest.storage import locked
from data_pipelines.records import MANIFEST, RecordError, content_hash, read_manifest, source_statistics, verify_source
from data_pipelines.sources import Source
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.tokenizer import TokenizerError
from tests.data_pipelines.corpora import tokenizer
from tests.data_pipelines.ingest.raw_sources import write_jsonl, write_webdataset

ROOT = pathlib.Path(__file__).parents[3]
SAMPLES, PER_TAR = 96, 12
SLOW = "scorers: [{name: slow, factory: 'tests.data_pipelines.ingest.raw_sources:slow_scorer'}]\nfailure_limit: 0.2\nmin_side: 8\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with a WebDataset, a tokenizer and a table of filters."""
    root = tmp_path_factory.mktemp("ingest")
    write_webdataset(root / "tars", SAMPLES, PER_TAR)
    tokenizer().save(root)
    (root / "filters.yaml").write_text(SLOW)
    return root


def arguments(place: pathlib.Path, output: pathlib.Path, *more: str) -> list[str]:
    named = {
        "--source": f"webdataset:{place}/tars/*.tar",
        "--name": "notes",
        "--output": str(output),
        "--licence": "CC0-1.0",
    }
    named |= {
        "--tokenizer": str(place),
        "--config": str(place / "filters.yaml"),
        "--shard-size": "48K",
        "--task": "captions",
    }
    return [text for pair in named.items() for text in pair] + list(more)


def text_command(place: pathlib.Path, directory: pathlib.Path, *more: str) -> list[str]:
    """Of `x.jsonl` in a directory into `out` beside it."""
    base = ["--source", f"jsonl:{directory}/x.jsonl", "--name", "x", "--licence", "CC0-1.0", "--tokenizer", str(place)]
    return [*base, "--output", str(directory / "out"), *more]


def ingest(command: Sequence[str]) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of the command, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        levels = [logging.getLogger(name).level for name in (None, "apache_beam")]
        status = main(command)
        assert [logging.getLogger(name).level for name in (None, "apache_beam")] == levels
    return status, output.getvalue(), errors.getvalue()


def start(command: Sequence[str], seconds_a_record: float = 0.0) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TEST_SECONDS_A_RECORD": str(seconds_a_record)}
    whole = [sys.executable, "-m", "data_pipelines.ingest", *command]
    return subprocess.Popen(
        whole, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    """SIGKILL to the command as soon as `ready`; its workers, which hold its pipes too, end with it."""
    limit = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "the command got nowhere"
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=30)


def finished(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(directory.glob("[0-9]*.json"))


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def spoil(path: pathlib.Path) -> None:
    """Makes a file unreadable that looks the same from outside."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture(scope="module")
def reference(place: pathlib.Path) -> dict[str, bytes]:
    """The files of an ingest that nothing disturbed, by one worker."""
    output = place / "one" / "train" / "notes"
    status, printed, errors = ingest(arguments(place, output, "--json"))
    assert status == 0, errors
    assert json.loads(printed.splitlines()[-1])["records"] == read_manifest(output).records
    return contents(output)


def test_two_workers_killed_twice_end_with_the_same_bytes(place: pathlib.Path, reference: dict[str, bytes]) -> None:
    tars = place / "tars"
    saved = shutil.copytree(tars, place / "saved")
    output = place / "two" / "train" / "notes"
    staging = output.with_name("notes.staging")
    command = arguments(place, output)
    two_workers = [*command, "--workers", "2"]

    kill_when(start(two_workers, 0.02), lambda: len(finished(staging / "units")) >= 2)
    units = finished(staging / "units")
    assert 2 <= len(units) < SAMPLES // PER_TAR
    with pytest.raises(RecordError, match="not a complete source"):
        read_manifest(output)
    # A finished unit is not read again; one whose rows were damaged is.
    for unit in units[1:]:
        spoil(tars / f"{unit.stem}.tar")
    units[0].with_suffix(".rows").write_bytes(b"damaged")

    kill_when(start(command), lambda: len(finished(staging / "shards")) >= 2)
    shutil.copytree(saved, tars, dirs_exist_ok=True)
    assert not (output / MANIFEST).exists()
    # A shard that lost its end since its summary was written is made again.
    first = output / json.loads(finished(staging / "shards")[0].read_text())["entry"]["file"]
    first.write_bytes(first.read_bytes()[:-1])

    process = start(two_workers)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    assert not errors  # neither the command nor its workers pass Beam's log on
    assert contents(output) == reference
    assert not staging.exists()


def test_manifest_adds_up_and_the_loader_reads_it(place: pathlib.Path, reference: dict[str, bytes]) -> None:
    directory = place / "one" / "train" / "notes"
    manifest = verify_source(directory)
    # 9, 19, ... 89 but 59, which is damaged, repeat another; 15, 31 and 63 show another as a JPEG.
    assert manifest.drops == {"undecodable:unknown_format": SAMPLES // 12, "duplicate:exact": 8, "duplicate:image": 3}
    assert manifest.samples_read == SAMPLES == manifest.records + sum(manifest.drops.values())
    assert manifest.licences == {"CC0-1.0": manifest.records}
    assert set(json.loads(manifest.origin["excluded"]).values()) == {0}
    assert len(manifest.shards) > 4
    source = Source(directory, tokenizer().fingerprint)
    records = [source.record(number) for number in range(len(source))]
    hashes = list(map(content_hash, records))
    assert hashes == sorted(set(hashes))
    tiling = TilingConfig()
    costs = [source.cost(number, 1000, tiling) for number in range(len(source))]
    assert manifest.statistics == source_statistics(directory, tiling)
    assert (manifest.statistics.tokens, manifest.statistics.tiles) == tuple(map(sum, zip(*costs, strict=True)))
    assert sum(cell.records for cell in manifest.statistics.lengths) == manifest.records
    assert manifest.statistics.pixels == 64 * 64 * manifest.records


def test_what_an_earlier_source_holds_is_left_out(place: pathlib.Path, reference: dict[str, bytes]) -> None:
    """The same pictures once more with twelve new ones, of which one is damaged and one repeats another."""
    write_webdataset(place / "more", SAMPLES + 12, 60)
    (place / "earlier.yaml").write_text(f"failure_limit: 0.2\nmin_side: 8\nearlier: [{place}/one/train/notes]\n")
    output = place / "one" / "train" / "more"
    changed = {"--source": f"webdataset:{place}/more/*.tar", "--config": str(place / "earlier.yaml")}
    command = arguments(place, output, *(text for pair in changed.items() for text in pair))
    status, _, errors = ingest(command)
    assert status == 0, errors
    manifest, before = read_manifest(output), read_manifest(place / "one" / "train" / "notes")
    source = Source(output, tokenizer().fingerprint)
    keys = sorted(int(source.record(number).metadata["key"].rpartition("/")[2]) for number in range(len(source)))
    assert keys == [*range(96, 99), *range(100, 107)]
    assert manifest.drops == {
        "undecodable:unknown_format": 9,
        "duplicate:exact": before.records + before.drops["duplicate:exact"] + 1,
        "duplicate:image": 3,
    }


@pytest.mark.slow
def test_a_source_of_which_nothing_is_new_is_refused(
    place: pathlib.Path, reference: dict[str, bytes], tmp_path: pathlib.Path
) -> None:
    filters = tmp_path / "earlier.yaml"
    filters.write_text(f"failure_limit: 0.2\nmin_side: 8\nearlier: [{place}/one/train/notes]\n")
    status, _, errors = ingest(arguments(place, tmp_path / "again", "--config", str(filters)))
    assert status == 1
    assert "all 96 samples are left out" in errors
    assert not (tmp_path / "again" / MANIFEST).exists()


def test_complete_output_and_other_settings_are_refused(place: pathlib.Path, reference: dict[str, bytes]) -> None:
    status, _, errors = ingest(arguments(place, place / "one" / "train" / "notes"))
    assert (status, "already holds a complete source" in errors) == (1, True)
    output = place / "other" / "train" / "notes"
    settings = output.with_name("notes.staging") / "settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"shard_bytes": 1}))
    status, _, errors = ingest(arguments(place, output))
    assert status == 1
    assert "was begun with another config" in errors
    assert errors.count("\n") == 1


def test_of_two_runs_into_one_output_one_writes(
    place: pathlib.Path, reference: dict[str, bytes], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": "A sentence that stands for itself."}])
    output = tmp_path / "out"
    base = ["--source", f"jsonl:{tmp_path}/x.jsonl", "--name", "x", "--licence", "CC0-1.0", "--tokenizer", str(place)]
    command = [*base, "--output", str(output), "--staging", str(tmp_path / "ours")]
    claim(str(output), str(tmp_path / "theirs"))
    status, _, errors = ingest(command)
    assert status == 1
    assert f"another ingest writes {output}, with its staging in {tmp_path}/theirs; wait for it" in errors
    shutil.rmtree(output)
    # The other one completes the output while this one reads its source.
    monkeypatch.setenv("TEST_FINISHED", str(place / "one" / "train" / "notes"))
    monkeypatch.setenv("TEST_OUTPUT", str(output))
    (tmp_path / "c.yaml").write_text(
        "scorers: [{name: other, factory: 'tests.data_pipelines.ingest.raw_sources:finishing_scorer'}]"
    )
    shutil.rmtree(tmp_path / "ours")
    status, _, errors = ingest([*command, "--config", str(tmp_path / "c.yaml")])
    assert (status, "already holds a complete source" in errors) == (1, True)
    assert contents(output) == reference


def test_a_restart_refuses_files_that_were_replaced(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    raw = tmp_path / "x.jsonl"
    write_jsonl(raw, [{"text": "A sentence that stands for itself."}, {"title": "?"}])
    base = ["--name", "x", "--licence", "CC0-1.0", "--tokenizer", str(place), "--output", str(tmp_path / "out")]
    assert ingest(["--source", f"jsonl:{raw}", *base])[0] == 1
    write_jsonl(raw, [{"text": "A sentence that stands for nothing."}])
    status, _, errors = ingest(["--source", f"jsonl:{raw}", *base])
    assert status == 1
    assert "was begun with another state of the source's files" in errors


def test_a_restart_names_the_setting_that_changed(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"title": "?"}])
    filters = tmp_path / "filters.yaml"
    command = [*text_command(place, tmp_path), "--config", str(filters)]
    filters.write_text("min_side: 8\n")
    assert ingest(command)[0] == 1
    filters.write_text("min_side: 16\n")
    status, _, errors = ingest(command)
    assert status == 1
    assert f"{tmp_path}/out.staging was begun with another config.min_side (8, now 16); give the command" in errors


def test_source_without_samples_is_not_called_filtered(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [])
    status, _, errors = ingest(text_command(place, tmp_path))
    assert (status, errors.count("\n")) == (1, 1)
    assert f"jsonl:{tmp_path}/x.jsonl holds no sample at all" in errors


def test_output_that_cannot_be_written_is_found_before_the_source_is_read(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").touch()
    for output in (
        "/proc/hypervl/out",
        tmp_path / "file" / "out",
        tmp_path / "file" / "deep" / "out",
        tmp_path / "file",
    ):
        status, _, errors = ingest(text_command(place, tmp_path, "--output", str(output)))
        assert (status, errors.count("\n")) == (1, 1), errors
        assert errors.startswith("error: cannot write "), errors


def test_a_second_process_is_kept_out_at_once(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": "A sentence that stands for itself."}])
    staging = tmp_path / "out.staging"
    with locked(str(staging)):
        status, _, errors = ingest(text_command(place, tmp_path))
        assert (status, errors.count("\n")) == (1, 1)
        assert f"{staging} is in use by process {os.getpid()} on " in errors
        assert not (staging / "settings.json").exists()
    (tmp_path / "x.jsonl").write_text("")
    assert "holds no sample" in ingest(text_command(place, tmp_path))[2]


def test_source_that_cannot_be_read_stops_with_its_reasons(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    rows = [{"text": "A sentence that stands for itself."}] * 8 + [{"title": "?"}] * 2
    write_jsonl(tmp_path / "raw" / "x.jsonl", rows)
    base = ["--name", "x", "--licence", "CC0-1.0", "--tokenizer", str(place), "--output", str(tmp_path / "out")]
    status, _, errors = ingest(["--source", f"jsonl:{tmp_path}/raw/x.jsonl", *base])
    assert status == 1
    assert "2 of 10 samples cannot be read, over the limit of 5.0%: missing_fields 2, such as " in errors
    assert "x.jsonl:9 has only title; check that the source is what --source says" in errors
    assert not (tmp_path / "out").exists()
    # A raised limit goes on with what is staged: the raw file is not read again.
    spoil(tmp_path / "raw" / "x.jsonl")
    (tmp_path / "c.yaml").write_text("failure_limit: 0.2")
    status, _, errors = ingest(
        ["--source", f"jsonl:{tmp_path}/raw/x.jsonl", *base, "--config", str(tmp_path / "c.yaml")]
    )
    assert status == 0, errors
    assert read_manifest(tmp_path / "out").drops == {"missing_fields": 2, "duplicate:exact": 7}


def test_worker_errors_are_one_sentence(
    place: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.json").write_text("{}")
    base = ["--name", "x", "--licence", "CC0-1.0", "--tokenizer", str(place), "--output", str(tmp_path / "out")]
    status, _, errors = ingest(["--source", f"llava:{tmp_path}/x.json", *base])
    assert (status, errors.count("\n")) == (1, 1)
    assert "is not a JSON list" in errors
    write_jsonl(tmp_path / "x.jsonl", [{"text": "One."}])
    (tmp_path / "c.yaml").write_text("scorers: [{name: clip, factory: 'nowhere:make'}]")
    status, _, errors = ingest(["--source", f"jsonl:{tmp_path}/x.jsonl", *base, "--config", str(tmp_path / "c.yaml")])
    assert status == 1
    assert errors.strip().startswith("error: scorer 'clip' cannot be made from 'nowhere:make'")
    assert "Traceback" not in errors
    assert errors.count("\n") == 1
    assert not caplog.records


def test_errors_of_others_lose_their_place_in_the_pipeline() -> None:
    def fail(number: int) -> None:
        raise TokenizerError("no vocabulary")

    with pytest.raises(IngestError, match=r"^no vocabulary$"), _pipeline(beam_options("DirectRunner", 1)) as pipeline:
        _ = pipeline | beam.Create([0]) | beam.Map(fail)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            ["--confg", "x", "--worker=3", "--region", "r"],
            r"knows --confg \(did you mean --config\?\), --worker \(did you",
        ),
        (["stray"], "knows stray"),
        (["--conf", "x"], "did you mean --config"),
        (["--workers", "-2"], "1 or more"),
        (["--workers", "0"], "1 or more"),
        (["--name", "a/b"], "'a/b' is not a plain name"),
    ],
)
def test_wrong_arguments_are_usage_errors(
    place: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], wrong: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(text_command(place, tmp_path, *wrong))
    assert ended.value.code == 2
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])


def test_arguments_of_beam_are_taken(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    more = ["--max_num_workers=3", "--sdk_container_image", "x", "--parallelism", "2", "--flink_master", "local"]
    status, _, errors = ingest(text_command(place, tmp_path, *more))
    assert (status, "x.jsonl names no file" in errors) == (1, True)


def test_remote_source_and_output(place: pathlib.Path) -> None:
    """A store that is not local (fsspec's memory) holds source, staging and output; workers see local copies only."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for number in range(3):
        store.pipe_file(
            f"/raw/{number}.jsonl", json.dumps({"text": f"Remote line number {number} has its own words."}).encode()
        )
    base = ["--name", "x", "--licence", "CC0-1.0", "--tokenizer", str(place), "--json"]
    status, _, errors = ingest(["--source", "jsonl:memory://raw/*.jsonl", "--output", "memory://data/train/x", *base])
    assert status == 0, errors
    names = sorted(name.rpartition("/")[2] for name in store.ls("/data/train/x", detail=False))
    assert names == [MANIFEST, "shard-00000-of-00001.array_record", "shard-00000-of-00001.index.arrow"]
    assert json.loads(store.cat_file("/data/train/x/manifest.json"))["records"] == 3
    assert not store.exists("/data/train/x.staging")


def test_help_names_every_kind_and_needs_no_beam() -> None:
    script = "import sys; from data_pipelines.ingest.__main__ import _parser; print(_parser().format_help()); assert 'apache_beam' not in sys.modules"
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert all(f"{kind}:" in process.stdout for kind in ("webdataset", "parquet", "tfds", "llava", "jsonl"))
