"""`tools.evaluate` and `tools.report` end to end: a saved random model, a source on disk, results, table, page."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from data_pipelines.records import Record, RecordError, content_hash
from data_pipelines.rendered.questions import PARAPHRASE_SEPARATOR
from hypervl_jax.architecture import ConfigError
from hypervl_jax.evaluation.benchmarks import read_results
from hypervl_jax.evaluation.runs import RESULTS, SUMMARY, parse_alphas, planned
from hypervl_jax.models.compressor_io import abstract_compressor, save_compressor
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.training.checkpoint import CheckpointConfig, Checkpoints, Description, write_description
from hypervl_jax.training.state import TrainState, initial_counters
from tests.data_pipelines import corpora
from tests.hypervl_jax.evaluation.examples import architecture, random_params
from tools import evaluate, report
from tools.evaluate import main, parser, read_items

TASKS = ("digits", "scenes")


def record(number: int) -> Record:
    """A picture, one question and its answer; every third with a paraphrase."""
    turns = (Turn("user", f"{IMAGE_SLOT}{number}?"), Turn("assistant", "red"))
    paraphrases = {"paraphrases": PARAPHRASE_SEPARATOR.join(("Red circle", "blue"))} if number % 3 == 0 else {}
    metadata = {"kind": "colour", "level": 2, **paraphrases}
    return Record((corpora.png(16, 20 + number, number),), turns, "s", metadata=metadata)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run's directory `run`, a VRC that asks for about half of the area `compressor`, and the data `data`."""
    home = tmp_path_factory.mktemp("home")
    corpora.tokenizer().save(home / "tokenizer")
    checkpoints = Checkpoints(home / "run" / "checkpoints", CheckpointConfig(asynchronous=False))
    state = TrainState(jnp.int32(7), random_params(), {}, initial_counters(1))
    checkpoints.save(state, jnp.zeros((1, 1), jnp.int32), {})
    checkpoints.close()
    write_description(home / "run" / "checkpoints", Description(architecture(), {}, epath.Path(home / "tokenizer")))
    config = architecture().compressor
    halves = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), abstract_compressor(config))
    halves["output"]["bias"] = jnp.full_like(halves["output"]["bias"], math.log(0.5))
    save_compressor(home / "compressor", config, halves, {})
    for task in TASKS:
        corpora.write(home / "data", task, [record(number) for number in range(6)], split="heldout")
    return home


EVERYTHING = ("--alpha", "1.0,auto", "--conditions", "image,blank,untrained", "--rows", "8")


def arguments(home: pathlib.Path, *more: str) -> list[str]:
    given = {
        "checkpoint": home / "run",
        "compressor": home / "compressor",
        "data": home / "data",
        "tasks": ",".join(TASKS),
    }
    return [*(part for name, value in given.items() for part in (f"--{name}", str(value))), *more]


@pytest.fixture(scope="module")
def summary(home: pathlib.Path) -> dict:
    assert main(arguments(home, *EVERYTHING)) == 0
    return json.loads((home / "run" / "evaluation" / SUMMARY).read_text())


def test_every_item_is_answered_in_every_way(home: pathlib.Path, summary: dict) -> None:
    _, rows = read_results(home / "run" / "evaluation" / RESULTS)
    assert len({row.key for row in rows}) == len(rows) == 2 * 6 * 2 * 4
    cells = {(row["task"], row["encoder"], row["condition"], row["alpha"]) for row in summary["table"]}
    assert len(cells) == len(summary["table"]) == 16
    assert {row["items"] for row in summary["table"]} == {6}
    assert {name for row in summary["learned"] for name in row["margins"]} == {"blank", "untrained"}


def test_the_untrained_model_is_another_one(home: pathlib.Path, summary: dict) -> None:
    _, rows = read_results(home / "run" / "evaluation" / RESULTS)
    said = {
        condition: [row.prediction for row in rows if row.condition == condition and row.alpha == 1.0]
        for condition in ("image", "untrained")
    }
    assert len(said["image"]) == len(said["untrained"])
    assert said["image"] != said["untrained"]


def test_the_compressor_is_in_the_path(home: pathlib.Path, summary: dict) -> None:
    _, rows = read_results(home / "run" / "evaluation" / RESULTS)
    assert all(0.1 <= alpha < 1 for row in rows if row.alpha == "auto" for alpha in row.alphas)
    assert {alpha for row in rows if row.alpha == 1.0 for alpha in row.alphas} == {1.0}
    assert all("compressor" in row.milliseconds for row in rows if row.alpha == "auto")
    assert all(0 < row["visual_tokens"] < 1 for row in summary["savings"])


def test_a_second_call_answers_nothing_and_says_the_same(
    home: pathlib.Path, summary: dict, capsys: pytest.CaptureFixture
) -> None:
    before = (home / "run" / "evaluation" / RESULTS).read_bytes()
    assert main(arguments(home, *EVERYTHING, "--json")) == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert (home / "run" / "evaluation" / RESULTS).read_bytes() == before


def test_other_data_is_not_mixed_into_old_results(
    home: pathlib.Path, summary: dict, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    for task in TASKS:
        corpora.write(tmp_path, task, [record(number) for number in range(2)], split="heldout")
    status = main(arguments(home, "--data", str(tmp_path)))
    assert (status, "(manifests differ)" in capsys.readouterr().err) == (2, True)


def test_the_page_shows_the_evaluation(home: pathlib.Path, summary: dict, capsys: pytest.CaptureFixture) -> None:
    output = home / "page.html"
    command = ["--workdir", str(home / "run"), "--data", str(home / "data"), "--output", str(output)]
    assert report.main(command) == 0
    assert capsys.readouterr().out == f"report: {output}\n"
    page = output.read_text()
    assert page.count('<article class="sample">') > 0
    assert "step 7, split heldout" in page


def test_a_directory_without_a_run_gives_no_page(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    assert report.main(["--workdir", str(tmp_path)]) == 2
    assert "no metrics.jsonl and no evaluation" in capsys.readouterr().err
    assert report.main(["--workdir", str(tmp_path / "missing")]) == 2


def test_the_page_is_told_as_json(home: pathlib.Path, summary: dict, capsys: pytest.CaptureFixture) -> None:
    output = home / "again.html"
    command = ["--workdir", str(home / "run"), "--data", str(home / "data"), "--output", str(output), "--json"]
    assert report.main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["page"], told["results"], told["runs"]) == (str(output), 2 * 6 * 2 * 4, {})
    assert "step 7, split heldout" in told["facts"]["Evaluated"]


def test_an_output_that_cannot_be_written_is_a_sentence(
    home: pathlib.Path, summary: dict, capsys: pytest.CaptureFixture
) -> None:
    assert main(arguments(home, "--tasks", "digits", "--limit", "1", "--output", "/proc/nope")) == 2
    assert report.main(["--workdir", str(home / "run"), "--output", "/proc/nope/page.html"]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert re.match(r"(no samples|error: '/proc/nope.*': No such file or directory; give another path$)", line), (
            line
        )


def test_items_are_the_records(home: pathlib.Path) -> None:
    items = read_items(home / "data", "heldout", "digits", corpora.tokenizer().fingerprint)
    assert [item.identity for item in items] == [content_hash(record(number)) for number in range(6)]
    assert items[0].answers == ("red", "Red circle", "blue")
    assert items[1].answers == ("red",)
    assert items[1].turns == (Turn("user", f"{IMAGE_SLOT}1?"),)
    assert (items[1].kind, items[1].level, items[1].task) == ("colour", 2, "digits")
    assert len(read_items(home / "data", "heldout", "digits", corpora.tokenizer().fingerprint, limit=4)) == 4


def test_a_record_without_a_question_is_refused(tmp_path: pathlib.Path) -> None:
    text = dataclasses.replace(record(0), images=(), turns=(Turn("assistant", "red"),))
    corpora.write(tmp_path, "digits", [text], split="heldout")
    with pytest.raises(RecordError, match="does not end with a question and its answer"):
        read_items(tmp_path, "heldout", "digits", corpora.tokenizer().fingerprint)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--alpha", "auto"), "--alpha auto needs --compressor"),
        (("--alpha", "2"), "--alpha 2.0 is not in"),
        (("--alpha", "half"), "no list of numbers"),
        (("--conditions", "dark"), "condition 'dark'"),
        (("--limit", "0"), "--limit 0"),
        (("--rows", "0"), "--rows 0"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_read(more: tuple[str, str], message: str) -> None:
    options = parser().parse_args(["--checkpoint", "missing", "--data", "missing", *more])
    with pytest.raises(ConfigError, match=message):
        planned(options)


def test_a_missing_checkpoint_is_explained(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate.main(["--checkpoint", str(tmp_path), "--data", str(tmp_path)]) == 2
    assert "not a HyperVL checkpoint directory" in capsys.readouterr().err


def test_alphas() -> None:
    assert parse_alphas("1.0, auto,0.25") == [1.0, "auto", 0.25]
