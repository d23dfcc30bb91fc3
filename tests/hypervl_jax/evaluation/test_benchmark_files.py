"""Benchmark files in VLMEvalKit's format: pictures, prompts, groups, predictions; and the command end to end."""

from __future__ import annotations

import base64
import csv
import json
import pathlib
from collections.abc import Iterable, Mapping

import pytest

from hypervl_jax.evaluation.__main__ import main
from hypervl_jax.evaluation.benchmark_files import BenchmarkFileError, parse_scores, read_task
from hypervl_jax.evaluation.benchmarks import read_results
from hypervl_jax.evaluation.registry import OPENCOMPASS, benchmark, expand
from hypervl_jax.text.conversation import IMAGE_SLOT
from tests.data_pipelines import corpora
from tests.hypervl_jax.evaluation.examples import save_checkpoint


def encoded(number: int) -> str:
    return base64.b64encode(corpora.png(16, 20, number)).decode()


def write(directory: pathlib.Path, name: str, rows: Iterable[Mapping[str, object]]) -> None:
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (directory / f"{name}.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def choice_row(index: int, image: str, answer: str = "A") -> dict[str, object]:
    return {"index": index, "question": "What\nis it?", "A": "a cat", "B": "a dog", "answer": answer, "image": image}


def test_a_picture_may_be_another_rows(tmp_path: pathlib.Path) -> None:
    write(tmp_path, "MMBench_DEV_EN_V11", [choice_row(3, encoded(1)), choice_row(1_000_003, "3", "B")])
    first, second = read_task(tmp_path, benchmark("MMBench_DEV_EN_V11")).items
    assert first.images == second.images == (corpora.png(16, 20, 1),)
    assert first.groups == second.groups == ("3",)
    assert (first.answers, second.answers, first.choices) == (("A",), ("B",), ("a cat", "a dog"))
    assert first.identity != second.identity
    text = first.turns[0].text
    assert text.startswith(f"{IMAGE_SLOT}What\nis it?\nA. a cat\nB. a dog\nAnswer with")


def test_pictures_stand_where_the_question_names_them(tmp_path: pathlib.Path) -> None:
    pictures = str([encoded(1), encoded(2)])
    row = {
        "index": 1,
        "question": "Is <image 2> like <image 1>?",
        "A": "<image 1>",
        "B": "no",
        "answer": "B",
        "split": "validation",
    }
    write(
        tmp_path, "MMMU_DEV_VAL", [{**row, "image": pictures}, {**row, "index": 2, "split": "dev", "image": encoded(3)}]
    )
    (item,) = read_task(tmp_path, benchmark("MMMU_DEV_VAL")).items
    assert item.images == tuple(corpora.png(16, 20, number) for number in (2, 1, 1))
    assert item.turns[0].text.count(IMAGE_SLOT) == 3


def test_pictures_may_be_files_below_the_task(tmp_path: pathlib.Path) -> None:
    home = tmp_path / "images" / "OCRBench"
    home.mkdir(parents=True)
    (home / "one.png").write_bytes(corpora.png(16, 20, 1))
    row = {
        "index": 0,
        "question": "Read it.",
        "answer": "['12', 'twelve']",
        "category": "Doc-oriented VQA",
        "image_path": "one.png",
    }
    write(tmp_path, "OCRBench", [row])
    (item,) = read_task(tmp_path, benchmark("OCRBench")).items
    assert (item.images, item.answers) == ((corpora.png(16, 20, 1),), ("12", "twelve"))
    write(tmp_path, "OCRBench", [{**row, "image_path": "../../secret.png"}])
    with pytest.raises(BenchmarkFileError, match="outside"):
        read_task(tmp_path, benchmark("OCRBench"))


def test_a_formula_has_a_rule_of_its_own(tmp_path: pathlib.Path) -> None:
    row = {"index": 0, "question": "Formula?", "answer": "['x']", "image": encoded(1)}
    write(
        tmp_path,
        "OCRBench",
        [{**row, "category": "Handwritten Mathematical Expression Recognition"}, {**row, "category": "Other"}],
    )
    assert [item.metric for item in read_task(tmp_path, benchmark("OCRBench")).items] == ["ocr_bench_formula", ""]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"index": 1, "question": "?", "image": "7"}, "refers to the picture of row '7'"),
        ({"index": 1, "question": "?", "image": "=" * 80}, "no base64"),
        ({"index": 1, "image": "7"}, "no question"),
    ],
)
def test_a_broken_row_is_a_sentence(tmp_path: pathlib.Path, row: dict[str, object], message: str) -> None:
    write(tmp_path, "MMStar", [row])
    with pytest.raises(BenchmarkFileError, match=message):
        read_task(tmp_path, benchmark("MMStar"))


def test_opencompass_is_nine_files_of_eight_scores() -> None:
    assert len(OPENCOMPASS) == 8
    assert len(expand(["opencompass", "MMStar"])) == 9


def test_scores_of_judges_are_read() -> None:
    assert parse_scores("MMVet=44.2, X=1") == {"MMVet": 44.2, "X": 1.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint of a random model in `run`, and two benchmark files in `files`."""
    home = tmp_path_factory.mktemp("home")
    save_checkpoint(home)
    (home / "files").mkdir()
    rows = [choice_row(number, encoded(number), answer) for number, answer in enumerate("ABAB")]
    write(home / "files", "MMBench_DEV_EN_V11", [*rows, *({**row, "index": 1_000_000 + row["index"]} for row in rows)])
    write(home / "files", "MMVet", [{"index": "v0", "question": "Why?", "answer": "because", "image": encoded(9)}])
    return home


def arguments(home: pathlib.Path, *more: str) -> list[str]:
    given = {"checkpoint": home / "run", "data": home / "files", "tasks": "MMBench_DEV_EN_V11,MMVet"}
    pairs = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return [*pairs, "--max-new-tokens", "4", "--rows", "8", *more]


def test_the_command_scores_resumes_and_writes_predictions(
    home: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(home, "--json")) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = {(row["task"], row["encoder"]): row for row in told["table"]}
    assert len(lines) == 4
    assert lines["MMVet", "base"]["mean"] is None
    assert lines["MMBench_DEV_EN_V11", "large"]["items"] == 8
    results = home / "run" / "evaluation" / "results.jsonl"
    said = {row.identity: row.prediction for row in read_results(results)[1] if row.encoder == "base"}
    with (home / "run" / "evaluation" / "predictions" / "MMVet-base-image-1.0.tsv").open(newline="") as file:
        (row,) = csv.DictReader(file, delimiter="\t")
    assert row["index"] == "v0"
    assert "image" not in row
    assert row["prediction"] in said.values()
    before = results.read_bytes()
    assert main(arguments(home)) == 0
    assert results.read_bytes() == before
    assert "0 of 8" not in capsys.readouterr().out


def test_a_missing_file_is_a_sentence(home: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(home), "--tasks", "AI2D_TEST"]) == 1
    assert "AI2D_TEST.tsv cannot be read" in capsys.readouterr().err
    assert main([*arguments(home), "--tasks", "NoSuchTask"]) == 2
