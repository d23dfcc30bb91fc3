import base64
import dataclasses
import io
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from data_pipelines.lanes import LaneLoader
from experiments.configs import stage2, tiny
from hypervl_jax.evaluation import batch_page
from hypervl_jax.evaluation.gallery import tile_mosaic
from hypervl_jax.text.conversation import encode_conversation
from hypervl_jax.training.batch import Batch
from hypervl_jax.vision.anyres import plan_image
from hypervl_jax.vision.decoding import decode_image
from tests.data_pipelines import corpora
from tools import inspect_data

SOURCES = [source.name for source in tiny.experiment().data.mixture]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The sources of `tiny`, small; every fourth record of the first has a broken image."""
    made = tmp_path_factory.mktemp("inspect")
    corpora.tokenizer().save(made)
    for number, name in enumerate(SOURCES):
        records = corpora.mixed_records(24, name, seed=100 * number)
        if not number:
            records = [corpora.sample(k, [(40, 60)], 5, name) for k in range(24)]
            records[::4] = [dataclasses.replace(r, images=(r.images[0][:-40],)) for r in records[::4]]
        corpora.write(made, name, records)
    return made


def run(root: pathlib.Path, output: pathlib.Path, *more: str) -> int:
    unlimited = "--config.data.epoch_limit=0", "--config.data.failure_limit=0.9"
    return inspect_data.main(
        ["--config", "tiny", "--data", str(root), "--output", str(output), "--planned", "40", *unlimited, *more]
    )


@pytest.fixture(scope="module")
def document(root: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("page") / "page.html"
    assert run(root, output, "--rows", "6") == 0
    return output.read_text()


def test_rows_go_on_over_several_batches(document: str) -> None:
    rows = tiny.experiment().batch.rows
    found = re.findall(r"batch (\d+), row (\d+)", document)
    assert found == [(str(row // rows), str(row % rows)) for row in range(6)]


def test_the_page_needs_no_other_file(document: str) -> None:
    assert document.startswith("<!doctype html>")
    assert not re.search(r'(src|href)="(?!data:|#)', document)


def test_broken_samples_are_named_with_their_reason(document: str) -> None:
    assert "left out: record" in document
    assert "undecodable image: truncated" in document


def test_answers_are_marked_and_questions_are_not(document: str) -> None:
    marked, context = (re.findall(f"<{tag}>(.*?)</", document, re.DOTALL) for tag in ("mark", 'span class="context"'))
    assert marked
    assert all(text.endswith("&lt;|im_end|&gt;") and "im_start" not in text for text in marked)
    assert any("user" in text for text in context)
    assert not any(re.search(r"\w\.&lt;\|im_end", text) for text in context)


def test_figures_add_up(root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, tmp_path / "page.html", "--rows", "1", "--json") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = summary["sources"].values()
    assert list(summary["sources"]) == SOURCES
    assert summary["rows"] == 40
    assert summary["samples"] == sum(figure["samples"] for figure in figures)
    assert sum(figure["token_share"] for figure in figures) == pytest.approx(1)
    assert sum(figure["wanted_share"] for figure in figures) == pytest.approx(1)
    length = tiny.experiment().batch.length
    tokens = sum(figure["samples"] * figure["mean_tokens"] for figure in figures)
    assert summary["token_fill"] == pytest.approx(tokens / (40 * length))
    assert max(summary["token_bound"], summary["tile_bound"]) == 1
    assert summary["token_fill"] / summary["tile_fill"] == pytest.approx(summary["token_bound"] / summary["tile_bound"])


def decoded(
    root: pathlib.Path,
) -> tuple[LaneLoader, list[tuple[inspect_data.PlannedRow, Batch, list[batch_page.Segment]]]]:
    config = tiny.experiment()
    data = dataclasses.replace(config.data, root=str(root), epoch_limit=0.0)
    config = dataclasses.replace(config, data=data)
    loader = inspect_data.open_data(config, 4)
    planned = [row for row, _ in zip(inspect_data.plan_rows(loader), range(8), strict=False)]
    return loader, [(row, *inspect_data.decoded_row(loader, row)) for row in planned]


def test_segments_are_drawn_from_the_batch(root: pathlib.Path) -> None:
    loader, rows = decoded(root)
    mixture, seen = loader.mixture, 0
    for planned, row, segments in rows:
        for sample, segment in zip(planned.samples, segments, strict=True):
            record = mixture.sources[sample.source].record(sample.record)
            if segment.failure or not segment.plans or sample.part:
                continue
            encoded = encode_conversation(record.turns, mixture.tokenizer, segment.plans, mixture.tiling)
            np.testing.assert_array_equal(batch_page.token_weights(row)[segment.place][1:], encoded.loss_weights[1:])
            drawn = batch_page.mosaics(row.tiles[segment.tiles], segment.plans, mixture.tiling)
            for html, image, plan in zip(drawn, record.images, segment.plans, strict=True):
                png = base64.b64decode(re.search(r"base64,([^\"]+)", html).group(1))
                expected = tile_mosaic(decode_image(image), plan, mixture.tiling)
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), expected)
                seen += 1
    assert seen >= 5


def test_the_bar_covers_every_token_once(root: pathlib.Path) -> None:
    _, rows = decoded(root)
    for _, row, _ in rows:
        bar = batch_page.token_bar(row)
        widths = [int(width) for width in re.findall(r'width="(\d+)" height="10" fill="hsl', bar)]
        assert sum(widths) == (row.segments > 0).sum()


def test_large_mosaics_are_drawn_smaller() -> None:
    tiling = dataclasses.replace(corpora.TILING, tile_size=512)
    plan = plan_image(512, 2048, 1.0, tiling)
    html = next(batch_page.mosaics(np.zeros((plan.tiles, 512, 512, 3), np.uint8), [plan], tiling))
    png = base64.b64decode(re.search(r"base64,([^\"]+)", html).group(1))
    assert max(Image.open(io.BytesIO(png)).size) == 640


def test_length_edges_rise_to_the_limit() -> None:
    for limit in (16, 256, 4096, 8192):
        edges = inspect_data.length_edges(limit)
        assert (edges[0], edges[-1]) == (8, limit)
        assert edges == sorted(set(edges))


def test_what_is_missing_is_listed(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    assert inspect_data.main(["--config", "stage2", "--data", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: data:")
    assert "tokenizer:" in said
    assert all(source.name in said for source in stage2.experiment().data.mixture)


def test_an_unknown_configuration_is_an_error_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_data.main(["--config", "stage22"]) == inspect_data.USAGE_ERROR
    assert "unknown configuration" in capsys.readouterr().err
