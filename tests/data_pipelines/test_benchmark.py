import json
import pathlib

import numpy as np
import pytest
from corpora import SHAPE, TILING, config, mixed_records, write

from data_pipelines.benchmark import corpus, peers, steps
from data_pipelines.benchmark.__main__ import main
from data_pipelines.lanes import open_loader
from hypervl_jax.vision.decoding import decode_image


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    from corpora import tokenizer

    made = tmp_path_factory.mktemp("benchmark")
    write(made, "a", mixed_records(12, "a"))
    write(made, "b", mixed_records(12, "b", seed=50))
    tokenizer().save(made)
    return made


def planned(root: pathlib.Path) -> steps.Work:
    loader = open_loader(config(root, {"a": 1.0, "b": 1.0}), SHAPE, TILING, root)
    return steps.plan_work(loader, batches=2)


def test_the_timed_samples_are_those_of_the_batches(root: pathlib.Path) -> None:
    work = planned(root)
    batches = [
        loaded.batch for _, loaded in zip(range(2), work.loader.iterate(work.loader.initial_states()), strict=False)
    ]
    assert len(work.samples) == sum(int(batch.segments.max(axis=1).sum()) for batch in batches)
    assert work.tiles == sum(int((batch.tile_segments > 0).sum()) for batch in batches)
    assert sum(sample.tokens for sample in work.samples) == sum(int((batch.segments > 0).sum()) for batch in batches)


def test_every_step_takes_time(root: pathlib.Path) -> None:
    work = planned(root)
    assert set(steps.step_seconds(work)) == set(steps.STEPS)
    assert min(steps.bare_seconds(work).values()) > 0
    assert steps.whole_seconds(work)[steps.WHOLE] > 0


def test_decoders_agree_at_full_size_and_on_the_scaled_sizes() -> None:
    data = corpus._encoded(corpus.page("what a page says " * 200, 331, 250)[0], "JPEG")
    for scale in peers.SCALES:
        decoded = [decode(data, scale) for decode in peers.jpeg_decoders().values()]
        assert {pixels.shape for pixels in decoded} == {(-(-331 // scale), -(-250 // scale), 3)}
        if scale == 1:
            assert all(np.array_equal(pixels, decode_image(data)) for pixels in decoded)


def test_pictures_grow_in_mirrors() -> None:
    picture = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    grown = corpus.grown(picture, 4, 5)
    assert grown.shape == (4, 5, 3)
    np.testing.assert_array_equal(grown[:2, :3], picture[..., :3])
    np.testing.assert_array_equal(grown[2:, :3], picture[::-1, :, :3])
    np.testing.assert_array_equal(corpus.grown(picture, 1, 2), picture[:1, :2, :3])


def test_pages_are_full_of_the_text_they_come_with() -> None:
    pixels, text = corpus.page("word " * 5_000, 1754, 1240)
    lines = (pixels.min(axis=(1, 2)) < 128).astype(int)
    assert np.count_nonzero(np.diff(lines) == 1) == len(text.splitlines()) == 52
    assert text.split() == ["word"] * len(text.split())


def test_the_command_on_sources_of_ones_own(root: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(root), "--rows", "1", "--rounds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["stage"]["samples"] > 1
    assert report["share_of_bare"] > 0
    assert report["transformers"] == {"missing": f"{root} has no tokenizer.json"}


def test_missing_data_is_an_error_of_one_sentence(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--rows", "1"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_the_command_beside_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rows", "2", "--rounds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    other = report["transformers"]
    assert other["tiles_of_transformers"] == other["tiles"] > 10
    assert other["times_faster"] > 1
    assert 0.5 < report["share_of_bare"] < 1.1
