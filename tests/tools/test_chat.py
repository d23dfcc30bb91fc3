import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypervl_jax.architecture import BRANCHES
from hypervl_jax.inference.latency import DeviceProfile, model_digest, save_profile
from hypervl_jax.models.compressor_io import abstract_compressor, save_compressor
from tests.tools.runs import CONFIG, random_like, write_run
from tools import chat

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workdirs of a model and a compressor, a device profile, a picture, and a file that is none."""
    home = tmp_path_factory.mktemp("home")
    write_run(home / "run")
    vrc = CONFIG.compressor
    save_compressor(home / "compressor", vrc, random_like(abstract_compressor(vrc)), {})
    per_tile = {branch: 10.0 * (1 + number) for number, branch in enumerate(BRANCHES)}
    profile = DeviceProfile(
        device="cpu",
        date="",
        versions={},
        model=model_digest(CONFIG),
        dtype="float32",
        compressor=1.0,
        proxy_per_megapixel=1.0,
        resize_per_megapixel=1.0,
        tiling_per_tile=0.0,
        encoder={branch: ((1, 2 * milliseconds),) for branch, milliseconds in per_tile.items()},
        tower_per_tile=per_tile,
        projector_per_tile=per_tile,
        prefill=((64, 1.0),),
        decode_start=((64, 0.0),),
        decode=((64, 1.0),),
    )
    save_profile(profile, home / "profile.json")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 120, 3), dtype=np.uint8)).save(home / "photo.png")
    (home / "notes.txt").write_text("no picture")
    return home


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture) -> Run:
    """Runs the command on the model; returns status, standard output and standard error."""

    def chatting(*arguments: str) -> tuple[int, str, str]:
        status = chat.main(["--checkpoint", str(home / "run"), "--max-new-tokens", "6", *arguments])
        return status, *capsys.readouterr()

    return chatting


def test_one_question_streams_what_json_reports(run: Run, home: Path) -> None:
    question = ("--image", str(home / "photo.png"), "--prompt", "How many circles?")
    status, text, report = run(*question)
    assert status == 0
    assert "branch base as asked" in report
    assert "2 tiles" in report
    status, output, _ = run(*question, "--json")
    answer = json.loads(output.splitlines()[-1])
    assert status == 0
    assert text == answer["text"] + "\n"
    assert answer["new_tokens"] == 6
    assert (answer["alphas"], answer["tiles"], answer["visual_tokens"]) == ([1.0], 2, 32)
    assert {"image_decoding", "resize", "encoder", "prefill", "decode"} <= set(answer["milliseconds"])


def test_a_budget_is_met_on_both_sides_of_its_threshold(run: Run, home: Path) -> None:
    def branch(budget: str) -> dict[str, Any]:
        budgeted = ("--profile", str(home / "profile.json"), "--latency-budget-ms", budget)
        question = (
            "--image",
            str(home / "photo.png"),
            "--prompt",
            "How many circles?",
            "--encoder",
            "auto",
            "--alpha",
            "1",
        )
        status, output, _ = run(*question, *budgeted, "--json")
        assert status == 0
        return json.loads(output)

    # Two tiles of the large branch take 80 ms, of the base branch 40 ms; all the rest together takes under 10 ms.
    assert branch("90")["branch"] == "large"
    smaller = branch("79")
    assert smaller["branch"] == "base"
    assert "within 79 ms; branch large at α 1, the next larger candidate, would take 8" in smaller["reason"]


def test_alpha_is_the_compressors_where_there_is_one(run: Run, home: Path) -> None:
    question = ("--image", str(home / "photo.png"), "--prompt", "How many circles?", "--json")
    _, output, _ = run(*question, "--compressor", str(home / "compressor"))
    assert "predicted by the compressor" in json.loads(output)["reason"]
    assert "compressor" in json.loads(output)["milliseconds"]
    _, careful, _ = run(*question, "--compressor", str(home / "compressor"), "--unsure", "0")
    assert json.loads(careful)["alphas"] == [1.0] > json.loads(output)["alphas"], "its views are judged differently"
    _, same, _ = run(*question, "--compressor", str(home / "compressor"), "--unsure", "1e9")
    assert json.loads(same)["alphas"] == json.loads(output)["alphas"]
    status, _, message = run(*question, "--alpha", "auto")
    assert (status, message) == (2, "error: --alpha auto needs --compressor DIR or --latency-budget-ms N\n")


def test_a_conversation_remembers_its_turns_and_survives_mistakes(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["How many?", "How many?", "/image nothing.png", f"/image {home / 'notes.txt'}", "What is it?"]
    lines += [f"/image {home / 'photo.png'}", "What is it?", "/new", "How many?", "/quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    status, output, messages = run("--json")
    assert status == 0
    first, second, pictured, again = map(json.loads, output.splitlines())
    assert first["prompt_tokens"] < second["prompt_tokens"] < pictured["prompt_tokens"]
    assert (pictured["visual_tokens"], second["visual_tokens"]) == (32, 0)
    assert (again["text"], again["prompt_tokens"]) == (first["text"], first["prompt_tokens"])
    assert "error: cannot read the image nothing.png: No such file or directory" in messages
    assert "error: undecodable image: unknown_format" in messages


def test_what_cannot_be_answered_is_one_clear_sentence(run: Run, home: Path, tmp_path: Path) -> None:
    picture = ("--image", str(home / "photo.png"))
    cases = {
        ("--image", str(home / "notes.txt"), "--prompt", "What is it?"): "undecodable image: unknown_format (image 1",
        ("--image", "nothing.png", "--prompt", "What is it?"): "cannot read the image nothing.png: No such file",
        (*picture, "--prompt", "<image> and <image>?"): "2 image slots (<image>) but 1 images",
        ("--prompt", " "): "a user turn without text",
        ("--prompt", "What?", "--step", "9"): "no checkpoint of step 9",
        ("--prompt", "What?", "--top-p", "2"): "sampling top_p 2.0",
        ("--prompt", "What?", "--checkpoint", str(tmp_path)): "not a HyperVL checkpoint directory",
        ("--prompt", "What?", "--compressor", str(tmp_path)): "is no compressor",
        ("--prompt", "What?", "--latency-budget-ms", "9", "--profile", "none.json"): "no device profile at none.json",
    }
    for arguments, expected in cases.items():
        status, output, message = run(*arguments)
        assert (status, output) == (2, "")
        assert message.startswith("error: ")
        assert expected in message
        assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--alpha", "0.05"], "'0.05' is neither 'auto' nor a number from 0.1 to 1.0"),
        (["--alpha", "nan"], "'nan' is neither"),
        (["--unsure", "-1"], "'-1' is no number of 0 or more"),
        (["--encoder", "huge"], "invalid choice: 'huge'"),
        (["--encoder", "auto"], "give --latency-budget-ms"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        chat.main(["--checkpoint", "nowhere", "--prompt", "What?", *arguments])
    assert expected in capsys.readouterr().err
