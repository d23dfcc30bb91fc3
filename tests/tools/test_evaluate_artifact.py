"""`tools.evaluate_artifact`: exported models answer as the checkpoint does, in their own runtimes, and rounded ones less often."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from data_pipelines.records import Record, write_source
from hypervl_jax.inference.assistant import Options, Request, load_assistant
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn
from hypervl_jax.text.tokenizer import load_tokenizer
from hypervl_jax.training.telemetry.records import write_json
from tests.data_pipelines import corpora
from tests.tools.runs import write_run
from tools import artifacts, evaluate_artifact, export_tflite
from tools.golden import RUNTIME

TASK, ITEMS = "scenes", 6
pytestmark = pytest.mark.skipif(
    not all(map(artifacts.versions(export_tflite.PACKAGES).__contains__, ("litert-converter", "ai-edge-litert"))),
    reason="litert-converter and ai-edge-litert are not installed (extra 'export')",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, its TFLite files of two precisions, and questions whose answers are what the model says; the last is not."""
    home = tmp_path_factory.mktemp("home")
    write_run(home / "run")
    export_tflite.export(
        str(home / "run"),
        str(home / "tflite"),
        precisions=("float32", "int4"),
        prefill=(16,),
        slots=192,
    )
    assistant = load_assistant(home / "run" / "checkpoints", branches=("base",), runtime=RUNTIME)
    questions = [(Turn("user", f"{IMAGE_SLOT}{number}?"),) for number in range(ITEMS)]
    images = [(corpora.png(40 + 9 * number, 70, number),) for number in range(ITEMS)]
    requests = [Request(turns, image) for turns, image in zip(questions, images, strict=True)]
    said = [answer.text for answer in assistant.answer(requests, Options("base", max_new_tokens=16))]
    said[-1] = "no such thing"
    records = [
        Record(image, (*turns, Turn("assistant", text)), "s")
        for image, turns, text in zip(images, questions, said, strict=True)
    ]
    tokenizer = load_tokenizer(home / "run" / "tokenizer")
    write_source(
        home / "data" / "heldout" / TASK,
        records,
        name=TASK,
        licence="CC0-1.0",
        description="test",
        tokenizer=tokenizer,
    )
    return home


def run(home: Path, *arguments: str) -> int:
    return evaluate_artifact.main([*arguments, "--data", str(home / "data"), "--tasks", TASK])


def test_float32_scores_as_the_checkpoint_and_four_bits_less(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [str(home / "tflite" / name) for name in ("float32", "int4")]
    assert run(home, *both, "--checkpoint", str(home / "run"), "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == [TASK, "all"]
    row = found[TASK]
    # Answers that the task's limit of tokens cuts, and the one that is no answer, score nothing.
    assert 0.3 < row["jax"]["score"]["mean"] == row["tflite float32"]["score"]["mean"] < 1
    assert row["tflite float32"]["difference"]["mean"] == 0
    assert row["tflite int4"]["difference"]["mean"] < 0
    assert run(home, both[0], "--limit", "2") == 0
    assert "differences to tflite float32" in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_sentence(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, str(home / "tflite" / "float32"), "--encoder", "large") == 1
    assert "has the encoder base, not large" in capsys.readouterr().err
    other = home / "other"
    shutil.copytree(home / "tflite" / "float32", other)
    manifest = artifacts.read_manifest(other)
    values = dataclasses.asdict(manifest) | {"format_version": artifacts.FORMAT_VERSION}
    for change, message in (
        ({"source": {**manifest.source, "step": 2}}, "not of one checkpoint"),
        ({"kind": "bundle"}, "cannot be asked questions"),
    ):
        write_json(other / artifacts.MANIFEST, values | change)
        assert run(home, str(home / "tflite" / "float32"), str(other)) == 1
        assert message in capsys.readouterr().err
    assert run(home, str(home)) == 1
    assert "is not an artifact" in capsys.readouterr().err
