"""`tools.compare_encoders` end to end, and its numbers against full logits in float64."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import pathlib

import numpy as np
import pytest

from data_pipelines.packing import Sample
from data_pipelines.records import Record
from data_pipelines.sources import Source
from data_pipelines.transforms import fill_row
from hypervl_jax.architecture import BRANCHES
from hypervl_jax.evaluation.consistency import ItemComparison, compare_task, imbalance_warnings, worst
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.training.batch import Batch, BatchShape, empty_batch
from tests.data_pipelines import corpora
from tests.hypervl_jax.evaluation import examples
from tools.compare_encoders import PAGE, Comparer, main

SHAPE = BatchShape(rows=2, length=128, tiles=16)


def record(number: int) -> Record:
    turns = (Turn("user", f"{IMAGE_SLOT}{number}?"), Turn("assistant", "red circle"))
    return Record((corpora.png(16, 20 + number, number),), turns, "s")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    home = tmp_path_factory.mktemp("home")
    examples.save_checkpoint(home)
    corpora.write(home / "data", "scenes", [record(number) for number in range(5)], split="heldout")
    return home


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_the_numbers_are_those_of_full_logits(home: pathlib.Path) -> None:
    assistant = examples.assistant()
    source = Source(home / "data" / "heldout" / "scenes", assistant.tokenizer.fingerprint)
    found = dict(Comparer(assistant, SHAPE).compare(source, len(source), 1000))
    assert sorted(found) == list(range(5))
    tiling, model = assistant.config.tiling, HyperVL(assistant.config, assistant.runtime)
    batch = empty_batch(dataclasses.replace(SHAPE, rows=1), tiling.tile_size)
    sample = Sample(0, 0, 3, 1000, *source.cost(3, 1000, tiling))
    assert not fill_row(Batch(*(field[0] for field in batch)), [sample], [source], assistant.tokenizer, tiling)
    answer = batch.loss_weights[0] > 0
    base, large = (
        softmax(np.asarray(model.apply({"params": assistant.params}, batch, branch), np.float64)[0, answer])
        for branch in BRANCHES
    )
    assert found[3]["answer_tokens"] == answer.sum()
    assert found[3]["kl"] == pytest.approx((large * np.log(large / base)).sum(), rel=1e-4)
    assert found[3]["reverse_kl"] == pytest.approx((base * np.log(base / large)).sum(), rel=1e-4)
    assert found[3]["agreement"] == (base.argmax(-1) == large.argmax(-1)).sum()
    visual = [
        np.asarray(model.apply({"params": assistant.params}, batch.tiles, branch, method="encode_tiles"))[0]
        for branch in BRANCHES
    ]
    index = batch.visual_index[0][batch.visual_index[0] >= 0]
    left, right = (tokens[index] / np.linalg.norm(tokens[index], axis=-1, keepdims=True) for tokens in visual)
    assert found[3]["visual_tokens"] == len(index)
    assert found[3]["visual_distance"] == pytest.approx((1 - (left * right).sum(-1)).sum(), rel=1e-4)


class Tags(html.parser.HTMLParser):
    """Counts the pictures of a page."""

    pictures = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.pictures += tag == "img"


def test_branches_that_never_learned_together_are_told(home: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "--checkpoint",
        str(home / "run"),
        "--data",
        str(home / "data"),
        "--tasks",
        "scenes",
        "--rows",
        "2",
        "--worst",
        "3",
    ]
    assert main([*command, "--json"]) == 0
    told = capsys.readouterr()
    values = json.loads(told.out.splitlines()[-1])
    (task,) = values["tasks"]
    assert (task["items"], task["left_out"]) == (5, 0)
    assert task["kl"]["low"] <= task["kl"]["mean"] <= task["kl"]["high"]
    (warning,) = values["warnings"]
    assert f"{100 * task['same_answer']['mean']:.1f} [" in warning
    assert "warning: branch imbalance: outputs differ when switching encoders: on scenes" in told.err
    tags = Tags()
    tags.feed((home / "run" / "comparison" / PAGE).read_text())
    assert tags.pictures == 3 * 2


def test_one_alpha_only(home: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(home / "run"), "--data", str(home / "data"), "--alpha", "auto"]) == 2
    assert "must be one number" in capsys.readouterr().err


def comparison(number: int, kl: float, large: str = "red") -> ItemComparison:
    losses = {"base": 0.5, "large": 0.4}
    return ItemComparison(f"{number:032x}", "words", 2, kl, kl, 1.0, losses, 0.1, 0.2, {"base": "Red.", "large": large})


def test_the_worst_come_first() -> None:
    row = compare_task("words", [comparison(number, kl) for number, kl in enumerate((0.1, 0.5, 0.3))])
    assert [item.kl for item in worst(row, 2)] == [0.5, 0.3]


def test_a_warning_needs_certainty() -> None:
    same = [comparison(number, 0.1) for number in range(100)]
    half = [comparison(number, 0.1, "red" if number % 2 else "blue") for number in range(100)]
    assert imbalance_warnings([compare_task("words", same)], 0.9) == []
    assert imbalance_warnings([compare_task("words", half[:2])], 0.9) == []
    (warning,) = imbalance_warnings([compare_task("words", half)], 0.9)
    assert "50.0 [40.4, 59.6] % of 100 answers" in warning
