"""The embedded data set: deterministic, split cleanly, balanced, and its answers are what the pixels show."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from data_pipelines.records import MANIFEST, Record, decode, read_index, verify_source
from data_pipelines.rendered import digits, documents, scenes
from data_pipelines.rendered.__main__ import main
from data_pipelines.rendered.build import SIZES, VOCAB_SIZE, BuildError, Report, build, draw_record
from data_pipelines.rendered.passages import PASSAGES, passages
from data_pipelines.rendered.pictures import COLOURS, HELD_OUT, TRAIN, Picture, item_random
from data_pipelines.rendered.questions import PARAPHRASE_SEPARATOR, TASKS
from hypervl_jax.architecture import hypervl_tiny
from hypervl_jax.text.conversation import IMAGE_SLOT
from hypervl_jax.text.tokenizer import load_tokenizer
from hypervl_jax.vision.anyres import plan_image
from hypervl_jax.vision.decoding import decode_image, image_size

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Report]:
    directory = tmp_path_factory.mktemp("rendered") / "data"
    return directory, build(directory, "test", workers=0)


def read(directory: pathlib.Path) -> list[Record]:
    shards = verify_source(directory).shards
    readers = [array_record_module.ArrayRecordReader(str(directory / shard.file)) for shard in shards]
    return [decode(data) for reader in readers for data in reader.read_all()]


def checksums(root: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_sources_hold_what_the_size_says(built: tuple[pathlib.Path, Report]) -> None:
    directory, report = built
    expected = SIZES["test"].sources()
    assert {(row.split, row.source): row.records for row in report.sources} == expected
    fingerprint = load_tokenizer(directory).fingerprint
    for split, source in expected:
        manifest = verify_source(directory / split / source)
        assert (manifest.name, manifest.records, manifest.fingerprint) == (source, expected[split, source], fingerprint)
        assert manifest.licence


GOLDEN = {
    "captions": "e9c87fe37277b57e",
    "digits": "552ab7f76273be87",
    "documents": "91246c08b2453cdd",
    "charts": "939af1c938c03693",
    "scenes": "092eee9b2876f91f",
    "text": "ce053f4aa8c10a2d",
}
"""Digests of the demo data's first records without their pictures, whose bytes depend on the versions of Pillow and its libraries."""


@pytest.mark.parametrize("source", GOLDEN)
def test_the_demo_data_does_not_change_without_its_version(source: str) -> None:
    records = [draw_record(TRAIN, source, index) for index in range(12)]
    sizes = [[image_size(image) for image in record.images] for record in records]
    texts = [[turn.text for turn in record.turns] for record in records]
    assert hashlib.sha256(json.dumps([sizes, texts]).encode()).hexdigest()[:16] == GOLDEN[source]


def test_the_study_draws_the_same_tasks_at_three_resolutions_and_size_does_not_tell_which() -> None:
    drawn = {task: [draw_record(HELD_OUT, task, index, "study") for index in range(60)] for task in TASKS}
    scales = {task: [record.metadata["scale"] for record in records] for task, records in drawn.items()}
    sharp = {task: values.count(1.0) / len(values) for task, values in scales.items()}
    assert sharp["documents"] < sharp["scenes"] < sharp["charts"] < sharp["digits"]
    asked = [record.metadata["kind"] for record in drawn["documents"]]
    assert asked.count("stamp") > asked.count("title")
    assert "first_word" not in asked
    assert {scale for values in scales.values() for scale in values} == {1.0, 2.0, 3.0}
    by_size: dict[tuple[int, int], set[float]] = {}
    for records in drawn.values():
        for record in records:
            by_size.setdefault(image_size(record.images[0]), set()).add(record.metadata["scale"])
    assert by_size[128, 128] == {1.0, 2.0}


def test_interrupted_build_is_done_again_with_the_same_bytes(
    built: tuple[pathlib.Path, Report], tmp_path: pathlib.Path
) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "writing train/charts":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, "test", workers=0, progress=interrupt)
    assert (tmp_path / TRAIN / "charts" / MANIFEST).exists()
    assert not (tmp_path / TRAIN / "scenes" / MANIFEST).exists()
    assert not build(tmp_path, "test", workers=2).already_complete
    assert checksums(tmp_path) == checksums(built[0])


def test_complete_is_kept(built: tuple[pathlib.Path, Report]) -> None:
    directory, report = built
    times = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    kept = build(directory, "test")
    assert kept == dataclasses.replace(report, already_complete=True)
    assert times == {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_foreign_directory_is_not_touched(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BuildError, match="not empty"):
        build(tmp_path, "test")
    assert main(["--output", str(tmp_path), "--size", "test"]) == 2
    assert "new directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_command_prints_json(built: tuple[pathlib.Path, Report], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(built[0]), "--size", "test", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["already_complete"]
    assert {row["source"] for row in printed["sources"]} == {*TASKS, "captions", "text"}


def test_records_follow_their_conventions(built: tuple[pathlib.Path, Report]) -> None:
    directory, _ = built
    for split, source in SIZES["test"].sources():
        for record in read(directory / split / source):
            assert len(record.images) == (source != "text")
            assert record.source == record.task == source
            assert record.metadata["level"] in (1, 2, 3)
            assert record.metadata.get("answer", record.turns[-1].text) == record.turns[-1].text
            if split == HELD_OUT:
                assert len(record.turns) == 2
            paraphrases = str(record.metadata.get("paraphrases", "")).split(PARAPHRASE_SEPARATOR)
            assert record.metadata.get("answer") not in paraphrases


def test_pictures_decode_to_the_indexed_size(built: tuple[pathlib.Path, Report]) -> None:
    directory = built[0] / HELD_OUT / "scenes"
    index = read_index(directory / "shard-00000-of-00001.index.arrow")
    for row, record in enumerate(read(directory)):
        assert [decode_image(record.images[0]).shape[:2]] == index.image_sizes(row)


def test_splits_share_no_scan_passage_or_picture() -> None:
    pixels = {split: {scan.tobytes() for scans in digits.scans(split) for scan in scans} for split in (TRAIN, HELD_OUT)}
    assert not pixels[TRAIN] & pixels[HELD_OUT]
    assert sum(len(scans) for split in (TRAIN, HELD_OUT) for scans in digits.scans(split)) == 1797
    assert all(len(scans) >= 20 for scans in digits.scans(HELD_OUT))
    assert not set(passages(TRAIN)) & set(passages(HELD_OUT))
    assert len(set(passages(TRAIN)) | set(passages(HELD_OUT))) == len(PASSAGES)
    images = {
        split: {draw_record(split, task, index).images[0] for task in TASKS for index in range(50)}
        for split in (TRAIN, HELD_OUT)
    }
    assert len(images[TRAIN]) == len(images[HELD_OUT]) == 200
    assert not images[TRAIN] & images[HELD_OUT]


@pytest.fixture(scope="module")
def heldout() -> dict[str, list[Record]]:
    return {task: [draw_record(HELD_OUT, task, index) for index in range(300)] for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_guessing_without_the_picture_scores_low(task: str, heldout: dict[str, list[Record]]) -> None:
    answers: dict[str, list[str]] = {}
    for record in (draw_record(TRAIN, task, index) for index in range(500)):
        for question, answer in zip(record.turns[::2], record.turns[1::2], strict=True):
            answers.setdefault(question.text.replace(IMAGE_SLOT, ""), []).append(answer.text)
    best = {question: max(set(given), key=given.count) for question, given in answers.items()}
    right = [best.get(record.turns[0].text.replace(IMAGE_SLOT, "")) == record.turns[1].text for record in heldout[task]]
    assert np.mean(right) <= 0.30


@pytest.mark.parametrize("task", TASKS)
def test_sizes_and_levels_are_graded(task: str, heldout: dict[str, list[Record]]) -> None:
    tiling = hypervl_tiny().tiling
    sizes = [image_size(record.images[0]) for record in heldout[task]]
    tiles = [plan_image(*size, 1.0, tiling).tiles for size in sizes]
    assert np.mean([count >= 3 for count in tiles]) >= 0.1
    assert np.mean([count == 1 for count in tiles]) >= 0.25
    # None is scaled down by the tile budget.
    assert all(plan_image(*size, 1.0, tiling).height == size[0] for size in sizes)
    levels = [record.metadata["level"] for record in heldout[task]]
    assert np.mean([level == 1 for level in levels]) >= 0.5
    assert {2, 3} <= set(levels)
    assert {1.0, 2.0} <= {record.metadata["scale"] for record in heldout[task]}


def pictures(task: str, count: int) -> list[tuple[Picture, np.ndarray]]:
    """Pictures and, for each pixel, the position of the nearest named colour in `COLOURS`, or -1 far from all."""
    found = []
    names = np.array(list(COLOURS.values()), np.int32)
    for index in range(count):
        picture = TASKS[task].draw(item_random(HELD_OUT, task, index), HELD_OUT)
        distance = np.abs(decode_image(picture.image).astype(np.int32)[:, :, None] - names).max(-1)
        found.append((picture, np.where(distance.min(-1) <= 30, distance.argmin(-1), -1)))
    return found


def answers_of(picture: Picture, kind: str) -> list[str]:
    return [question.answer for question in picture.questions if question.kind == kind]


def agreement(
    task: str, kind: str, answer_from_pixels: Callable[[np.ndarray, list[str]], str], count: int = 150
) -> tuple[float, int]:
    """How often the answer equals what a plain look at the pixels says, and for how many pictures."""
    names = list(COLOURS)
    pairs = [
        (answer, answer_from_pixels(near, names))
        for picture, near in pictures(task, count)
        for answer in answers_of(picture, kind)
    ]
    return float(np.mean([answer == seen for answer, seen in pairs])), len(pairs)


def most_common_colour(near: np.ndarray, names: list[str]) -> str:
    return names[np.bincount(near[near >= 0], minlength=len(names)).argmax()]


def highest_colour(near: np.ndarray, names: list[str]) -> str:
    """The colour that fills the tallest column; axes and printed values are black or grey and thin."""
    heights = [max((near == colour).sum(0)) if (near == colour).sum() > 0 else 0 for colour in range(len(names))]
    return names[int(np.argmax(heights))]


def test_answers_are_what_the_pixels_show() -> None:
    for task, kind, look in (
        ("scenes", "colour", most_common_colour),
        ("charts", "largest", most_common_colour),
        ("charts", "tallest", highest_colour),
    ):
        share, looked = agreement(task, kind, look)
        assert looked >= 15, (task, kind)
        assert share >= 0.9, (task, kind, share)


def test_heldout_digits_are_legible() -> None:
    """A nearest neighbour among the training scans reads the rendered single digits."""
    train = [
        (np.asarray(scan, np.float32).ravel(), digit)
        for digit, scans in enumerate(digits.scans(TRAIN))
        for scan in scans
    ]
    scans, labels = np.stack([scan for scan, _ in train]), np.array([digit for _, digit in train])
    right = []
    for index in range(200):
        picture = TASKS["digits"].draw(item_random(HELD_OUT, "digits", index), HELD_OUT)
        for answer in answers_of(picture, "which"):
            grey = np.asarray(Image.open(io.BytesIO(picture.image)).convert("L"), np.float32)
            ink = np.abs(grey - np.median(grey))
            rows, columns = (np.flatnonzero((ink > 0.4 * ink.max()).sum(axis) > 1) for axis in (1, 0))
            height = rows[-1] - rows[0] + 1
            # Scans are cut to the digit's height and centred.
            middle = (columns[0] + columns[-1] + 1) // 2
            padded = np.pad(ink, ((0, 0), (height, height)))[
                rows[0] : rows[-1] + 1, middle + height // 2 : middle + height // 2 + height
            ]
            small = np.asarray(Image.fromarray(padded).resize((8, 8), Image.Resampling.BOX)).ravel()
            small = small * (scans.mean() / small.mean())
            right.append(labels[((scans - small) ** 2).sum(1).argmin()] == int(answer))
    assert len(right) >= 80
    assert np.mean(right) >= 0.75


def test_closed_answers_are_single_tokens(built: tuple[pathlib.Path, Report]) -> None:
    tokenizer = load_tokenizer(built[0])
    assert tokenizer.vocab_size == VOCAB_SIZE
    for name in (*scenes.PAINTS, *scenes.SHAPES, *documents.TITLES, "rising", "falling"):
        (alone,) = tokenizer.encode(name)
        assert tokenizer.encode(f"A {name}.").count(alone) == 1
    text = "Transcribe the digits. Zürich, 北京 and\ttabs"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_jax_is_needed() -> None:
    script = "import sys; sys.modules['jax'] = None; import data_pipelines.rendered.__main__, data_pipelines.records"
    subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=60
    )
