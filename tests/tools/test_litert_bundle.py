"""Bundles of LiteRT-LM: the engine answers as JAX does, from text and from tiles, and its template writes our ids."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
import tokenizers

from hypervl_jax.inference.assistant import ask
from hypervl_jax.text.conversation import TEXT_POSITION, encode_prompt
from hypervl_jax.text.tokenizer import ChatTemplate, load_tokenizer
from hypervl_jax.text.tokenizer_json import write_tokenizer_json
from hypervl_jax.vision.anyres import plan_image
from tests.tools import runs
from tests.tools.runs import CONFIG, random_like
from tools import artifacts, export_tflite, litert_bundle, verify_artifact

NEEDS_ENGINE = pytest.mark.skipif(
    not {"litert-converter", *litert_bundle.PACKAGES} <= set(artifacts.versions(export_tflite.PACKAGES)),
    reason="litert-converter, litert-lm-builder and litert-lm are not installed (extra 'export')",
)

WORDS = 40
"""The last pieces of the tokenizer of `write_run`, which are no bytes."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "random_like", speaks_words)
        runs.write_run(workdir)
    return workdir


def speaks_words(abstract: Any) -> Any:
    """Random parameters whose answers are no lone bytes: the engine (0.18) gives up on text that is no UTF-8."""
    params = random_like(abstract)
    bytes_and_specials = range(310 - WORDS)
    for name, axis in {"embedding": 0, "head": 1}.items():
        if name in params["decoder"]:
            moved = jnp.moveaxis(params["decoder"][name], axis, 0).at[jnp.array(bytes_and_specials)].multiply(0.02)
            params["decoder"][name] = jnp.moveaxis(moved, 0, axis)
    return params


@pytest.mark.slow
@NEEDS_ENGINE
def test_the_engine_answers_as_jax_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = run / "bundle"
    call = ["--checkpoint", str(run), "--prefill", "32", "--slots", "128", "--bundle", "--json"]
    assert export_tflite.main([*call, "--output", str(output)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["float32"]
    found = report["parts"]["base.litertlm"]
    # Text, one tile and two; the random model hardly ever stops.
    assert found["answers_equal"] == found["of"] == 3
    assert found["tokens"] > 2 * litert_bundle.ANSWER_TOKENS
    manifest, arrays = artifacts.read_manifest(output), artifacts.read_golden(output)
    assert manifest.files["base.litertlm"]["bytes"] == report["bytes"]["base.litertlm"]
    assert verify_artifact.verify(output)["ran"]["base.litertlm"] == {"answers_equal": 3, "of": 3, "passed": True}
    # Asked with the tiles of another prompt, the same bundle answers something else.
    other = {**arrays, "bundle/one_tile": arrays["bundle/two_tiles"][:1]}
    assert litert_bundle.ask_again(output / "base.litertlm", manifest.parity["base.litertlm"]["answers"], other) == 2


@NEEDS_ENGINE
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--precision", "w8a16"], "give float32, int8 or int4"), (["--parts", "decoder"], "a bundle holds all parts")],
)
def test_what_cannot_be_a_bundle_is_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    output = tmp_path / "out"
    assert export_tflite.main(["--checkpoint", str(run), "--bundle", *arguments, "--output", str(output)]) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("template", [ChatTemplate(False), ChatTemplate(True, "Be brief.")])
def test_the_template_writes_the_ids_of_training(run: Path, tmp_path: Path, template: ChatTemplate) -> None:
    tokenizer = load_tokenizer(run / "tokenizer", template)
    reader = tokenizers.Tokenizer.from_file(str(write_tokenizer_json(tokenizer, tmp_path)))
    side = CONFIG.tiling.tile_size
    written = jinja2.Template(litert_bundle.chat_template(template))
    for tiles in (0, 1, 2):
        images = [np.zeros((side, tiles * side, 3), np.uint8)] if tiles else []
        plans = [plan_image(*image.shape[:2], 1.0, CONFIG.tiling) for image in images]
        prompt = encode_prompt(ask("How many red circles?", *images).turns, tokenizer, plans, CONFIG.tiling)
        content = [*({"type": "image"} for _ in range(tiles)), {"type": "text", "text": "How many red circles?"}]
        text = written.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
        found = reader.encode(text, add_special_tokens=False).ids
        # The engine puts the tokens of a tile where the template writes one.
        kept = (prompt.visual_index == TEXT_POSITION) | (prompt.visual_index % CONFIG.tiling.tokens_per_tile == 0)
        assert found == prompt.tokens[kept].tolist()
        assert found.count(tokenizer.image) == tiles
