import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hypervl_jax.architecture import DECODER, ConfigError, HyperVLConfig, branch_parts
from hypervl_jax.inference.assistant import (
    Answer,
    Assistant,
    LatencyBudget,
    Options,
    Request,
    ask,
    inference_dtypes,
    load_assistant,
)
from hypervl_jax.inference.generate import COMPILATION, PROGRAMS, Sampling
from hypervl_jax.inference.latency import DeviceProfile, choose
from hypervl_jax.models.compressor import Compressor
from hypervl_jax.models.compressor_io import abstract_compressor, save_compressor
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.models.runtime import RuntimeConfig
from hypervl_jax.text.conversation import ConversationError, Turn, encode_prompt
from hypervl_jax.text.tokenizer import SentencePieceTokenizer, train_sentencepiece
from hypervl_jax.training.batch import Batch
from hypervl_jax.training.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    Checkpoints,
    Description,
    write_description,
)
from hypervl_jax.training.state import TrainState, initial_counters
from hypervl_jax.vision.anyres import plan_image, tile_image
from hypervl_jax.vision.decoding import UndecodableImage
from hypervl_jax.vision.resolution import alpha_from_prediction, make_proxies

NEW = 12
SHORT = Options(max_new_tokens=NEW)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(rgb: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return buffer.getvalue()


# All prompts pad to one length, so that the tests compile little.
REQUESTS = [
    ask("What is two plus two, and what are " + "two " * 12 + "together?"),
    ask("How many circles?", png(picture(64, 120))),
    Request((Turn("user", "Compare <image> with <image>"),), (picture(40, 60, 1), picture(64, 50, 2))),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    texts = [
        "What is the number in the picture? How many red circles are there? There are 3 red circles. user assistant"
    ]
    return train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=320)


@pytest.fixture(scope="module")
def compressor_params(config: HyperVLConfig, runtime: RuntimeConfig) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    abstract = abstract_compressor(config.compressor)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), abstract)


@pytest.fixture(scope="module")
def assistant(
    config: HyperVLConfig,
    runtime: RuntimeConfig,
    params: dict,
    tokenizer: SentencePieceTokenizer,
    compressor_params: dict,
) -> Assistant:
    return Assistant(config, runtime, params, tokenizer, compressor_params)


@pytest.fixture(scope="module")
def answers(assistant: Assistant) -> list[Answer]:
    return assistant.answer(REQUESTS, SHORT)


@pytest.mark.parametrize("branch", ["base", "large"])
def test_the_first_token_is_the_argmax_of_the_training_model(branch: str, assistant: Assistant, params: dict) -> None:
    rgb, alpha, tiling = picture(80, 150), 0.6, assistant.config.tiling
    request = ask("How many circles?", png(rgb))
    plan = plan_image(80, 150, alpha, tiling)
    prompt = encode_prompt(request.turns, assistant.tokenizer, [plan], tiling)
    tiles = tile_image(rgb, plan, tiling)[None]
    tokens, ones = prompt.tokens[None], np.ones_like(prompt.tokens)[None]
    positions = np.arange(len(prompt.tokens))[None]
    index = prompt.visual_index[None]
    batch = Batch(tokens, tokens, ones * 1.0, ones, positions, tiles, ones[:, : plan.tiles], index, ones)
    model = HyperVL(assistant.config, assistant.runtime)
    expected = int(jax.jit(lambda p: model.apply({"params": p}, batch, branch)[0, -1].argmax())(params))
    (answer,) = assistant.answer([request], Options(encoder=branch, alpha=alpha, max_new_tokens=1))
    assert answer.tokens == (expected,)
    assert (answer.branch, answer.alphas) == (branch, (alpha,))
    assert (answer.tiles, answer.visual_tokens) == (plan.tiles, plan.tokens)
    assert answer.prompt_tokens == len(prompt.tokens)


def test_a_batch_answers_as_its_requests_alone(assistant: Assistant, answers: list[Answer]) -> None:
    assert len({answer.tokens for answer in answers}) == 3
    for alone, together in zip(assistant.answer(REQUESTS, SHORT, rows=1), answers, strict=True):
        assert dataclasses.replace(alone, milliseconds={}) == dataclasses.replace(together, milliseconds={})
    assert assistant.answer([], SHORT) == []


def test_streaming_gives_the_same_answer_in_pieces(assistant: Assistant) -> None:
    options = dataclasses.replace(SHORT, sampling=Sampling(temperature=2.0, seed=4))
    stream, pieces = assistant.stream(REQUESTS[1], options), []
    try:
        while True:
            pieces.append(next(stream))
    except StopIteration as end:
        streamed = end.value
    (expected,) = assistant.answer([REQUESTS[1]], options)
    assert "".join(pieces) == expected.text
    assert len(pieces) > 1
    assert dataclasses.replace(streamed, milliseconds={}) == dataclasses.replace(expected, milliseconds={})


def test_branches_and_pixels_change_the_answer_and_blank_hides_pixels(assistant: Assistant) -> None:
    def tokens(seed: int, **options: Any) -> tuple[int, ...]:
        request = ask("How many circles?", picture(64, 120, seed))
        (answer,) = assistant.answer([request], dataclasses.replace(SHORT, **options))
        assert (answer.tiles, answer.visual_tokens) == (2, 32)
        return answer.tokens

    seen, other = tokens(0), tokens(1)
    assert seen != other
    assert tokens(0, encoder="large") != seen
    assert tokens(0, blank=True) == tokens(1, blank=True)
    assert tokens(0, blank=True) not in (seen, other)


def test_alpha_auto_is_the_compressors_prediction(assistant: Assistant, compressor_params: dict) -> None:
    images = [picture(90, 90, 1), np.full((120, 60, 3), 255, np.uint8)]
    compressor = Compressor(assistant.config.compressor)
    proxies, sides = make_proxies(images, assistant.config.compressor.proxy_size)
    outputs = jax.jit(compressor.apply)({"params": compressor_params}, proxies)
    expected = alpha_from_prediction(np.asarray(outputs), sides, assistant.config.compressor.proxy_size)
    request = ask("How many circles are there in these? " * 2, *images)
    for blank in (False, True):
        (answer,) = assistant.answer([request], dataclasses.replace(SHORT, alpha="auto", blank=blank))
        np.testing.assert_allclose(answer.alphas, expected, rtol=1e-4)
        plans = [
            plan_image(*image.shape[:2], alpha, assistant.config.tiling)
            for image, alpha in zip(images, answer.alphas, strict=True)
        ]
        assert answer.visual_tokens == sum(plan.tokens for plan in plans)
        assert "compressor" in answer.milliseconds
    assert min(answer.alphas) < 1.0


def test_a_picture_stays_whole_where_its_views_are_judged_differently(assistant: Assistant) -> None:
    # One half is noise, so the picture and its mirror image differ; the flat one is the same from every side.
    half = picture(160, 160, 3)
    half[:80, :100] = 255
    request = ask("How many circles are there in these? " * 2, half, np.full((160, 160, 3), 90, np.uint8))
    answers = [
        assistant.answer([request], dataclasses.replace(SHORT, alpha="auto", unsure=spread))[0].alphas
        for spread in (None, 0.0, 1e6)
    ]
    free, strict, lax = answers
    assert lax == pytest.approx(free, rel=1e-5)
    assert free[0] < 1.0
    assert strict[0] == 1.0
    assert strict[1] == pytest.approx(free[1], rel=1e-5), "equal views are no reason to doubt"


def test_a_request_may_bring_its_own_alphas(assistant: Assistant) -> None:
    images = (picture(90, 90, 1), picture(120, 60, 2))
    request = dataclasses.replace(ask("How many circles are there in these? " * 2, *images), alphas=(0.3, 0.8))
    (answer,) = assistant.answer([request], dataclasses.replace(SHORT, alpha=0.5))
    assert answer.alphas == (0.3, 0.8)
    plans = [
        plan_image(*image.shape[:2], alpha, assistant.config.tiling)
        for image, alpha in zip(images, answer.alphas, strict=True)
    ]
    assert answer.visual_tokens == sum(plan.tokens for plan in plans)
    with pytest.raises(ConfigError, match="give one each"):
        Request(request.turns, images, (0.3,))


def test_few_programs_serve_many_sizes(assistant: Assistant) -> None:
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def run(*sizes: tuple[int, int], new: int) -> list[Answer]:
        requests = [ask("How many circles?", picture(*size)) for size in ((64, 128), *sizes)]
        return assistant.answer(requests, Options(max_new_tokens=new))

    jax.monitoring.register_event_duration_secs_listener(listen)
    (first, *_) = run((64, 64), (128, 64), (70, 30), new=16)
    assert "compilation" in first.milliseconds
    # Encoder, embedding, prefill, loop: fewer where an earlier test has made one.
    assert 1 <= len(compiled) <= 4
    compiled.clear()
    for size in ((64, 65), (60, 120), (66, 20)):
        answers = run((50, 60), size, (70, 10), new=10)
        assert all("compilation" not in answer.milliseconds for answer in answers)
    # Every compilation of JAX counts, also those of stray operations outside our programs.
    assert compiled == []


def test_every_step_is_timed(answers: list[Answer]) -> None:
    assert set(answers[1].milliseconds) - {"compilation"} == {
        "image_decoding",
        "resize",
        "encoder",
        "prefill",
        "decode",
    }
    assert all(milliseconds >= 0 for milliseconds in answers[1].milliseconds.values())


PROFILE = DeviceProfile(
    device="cpu",
    date="",
    versions={},
    model="",
    dtype="float32",
    compressor=2.0,
    proxy_per_megapixel=3.0,
    resize_per_megapixel=100.0,
    tiling_per_tile=0.0,
    encoder={"base": ((1, 11.0),), "large": ((1, 42.0),)},
    tower_per_tile={"base": 10.0, "large": 40.0},
    projector_per_tile={"base": 1.0, "large": 2.0},
    prefill=((32, 8.0), (128, 32.0)),
    decode_start=((48, 0.0),),
    decode=((48, 1.0), (112, 3.0)),
)


def test_a_budget_chooses_branch_and_alpha_on_both_sides_of_its_threshold(assistant: Assistant) -> None:
    request = ask("How many circles? " * 5, picture(64, 120))

    def answer(milliseconds: float, **options: Any) -> Answer:
        budget = LatencyBudget(PROFILE, milliseconds)
        (found,) = assistant.answer([request], dataclasses.replace(SHORT, encoder="auto", budget=budget, **options))
        return found

    whole = answer(1e6, alpha=1.0)
    text = whole.prompt_tokens - whole.visual_tokens
    predicted = choose(PROFILE, [(64, 120)], text, NEW, 1e6, assistant.config.tiling, wanted=(1.0,)).predicted_ms
    threshold = sum(predicted.values())
    fits, not_fits = answer(threshold, alpha=1.0), answer(threshold - 1e-3, alpha=1.0)
    assert (fits.branch, fits.alphas) == ("large", (1.0,))
    # A number for α is kept; only the branch gives way.
    assert (not_fits.branch, not_fits.alphas) == ("base", (1.0,))
    assert f"would take {threshold:.1f} ms" in not_fits.reason
    free, limited = answer(1e6, alpha="auto"), answer(1.0, alpha="auto")
    assert (limited.branch, limited.alphas) == ("base", (0.1,))
    assert limited.visual_tokens < free.visual_tokens
    assert limited.reason.startswith("nothing fits 1 ms")


def test_under_a_budget_programs_run_once_before_time_is_measured(assistant: Assistant) -> None:
    fresh = Assistant(assistant.config, assistant.runtime, assistant.params, assistant.tokenizer)
    request, plain = ask("How many circles? " * 5, picture(64, 120)), dataclasses.replace(SHORT, encoder="base")
    budgeted = dataclasses.replace(plain, budget=LatencyBudget(PROFILE, 1e6))

    def streamed(options: Options) -> Answer:
        stream = fresh.stream(request, options)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                return end.value

    for way in (lambda options: fresh.answer([request], options)[0], streamed):
        expected = way(plain)
        before = PROGRAMS.compile_ms
        first, second = way(budgeted), way(budgeted)
        assert first.milliseconds[COMPILATION] > PROGRAMS.compile_ms - before, "the first run is not compilation alone"
        assert COMPILATION not in second.milliseconds
        assert first.tokens == second.tokens == expected.tokens


def test_options_that_cannot_work_are_refused(assistant: Assistant, params: dict) -> None:
    for alpha in (0.05, 1.5, "full"):
        with pytest.raises(ConfigError, match=r"from 0\.1 to 1"):
            Options(alpha=alpha)
    with pytest.raises(ConfigError, match="latency budget"):
        Options(encoder="auto")
    for milliseconds in (math.nan, math.inf, -5.0, 0.0):
        with pytest.raises(ConfigError, match=f"a latency budget of {milliseconds:g} ms is none"):
            LatencyBudget(PROFILE, milliseconds)
    with pytest.raises(ConfigError, match="not one of base, large, auto"):
        Options(encoder="huge")
    with pytest.raises(ConfigError, match="max_new_tokens 0"):
        Options(max_new_tokens=0)
    base = {part: params[part] for part in branch_parts("base")}
    small = Assistant(assistant.config, assistant.runtime, base, assistant.tokenizer)
    assert small.branches == ("base",)
    with pytest.raises(ConfigError, match="no parameters of branch large were loaded, only of base"):
        small.answer(REQUESTS, Options(encoder="large"))


def test_bad_requests_are_refused(assistant: Assistant) -> None:
    with pytest.raises(UndecodableImage, match=r"unknown_format \(image 2 of the request\)"):
        assistant.answer([ask("What is it?", picture(9, 9), b"no image")])
    with pytest.raises(ConversationError, match="1 image slots"):
        assistant.answer([ask("What is <image>?", picture(9, 9), picture(9, 9))])


def write_checkpoint(directory: Path, description: Description, params: dict[str, Any]) -> None:
    checkpoints = Checkpoints(directory, CheckpointConfig(asynchronous=False))
    on_device = jax.tree.map(jnp.asarray, params)
    checkpoints.save(TrainState(jnp.int32(3), on_device, {}, initial_counters(1)), jnp.zeros((1, 1), jnp.int32), {})
    checkpoints.close()
    write_description(directory, description)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, assistant: Assistant) -> Path:
    """A directory with the checkpoints `model` and `compressor`."""
    home = tmp_path_factory.mktemp("saved")
    assistant.tokenizer.save(home / "tokenizer")
    write_checkpoint(home / "model", Description(assistant.config, {}, home / "tokenizer"), assistant.params)
    save_compressor(home / "compressor", assistant.config.compressor, assistant.compressor_params, {})
    return home


def test_a_loaded_checkpoint_answers_as_the_saved_model(saved: Path, assistant: Assistant) -> None:
    loaded = load_assistant(saved / "model", compressor=saved / "compressor", runtime=assistant.runtime)
    assert loaded.tokenizer.fingerprint == assistant.tokenizer.fingerprint
    options = dataclasses.replace(SHORT, alpha="auto")
    request = ask("How many circles? " * 3, picture(64, 120))
    (found,), (expected,) = (each.answer([request], options) for each in (loaded, assistant))
    assert dataclasses.replace(found, milliseconds={}) == dataclasses.replace(expected, milliseconds={})


def test_one_branch_in_bfloat16_is_read_alone_and_computes_the_same_bits(saved: Path, assistant: Assistant) -> None:
    runtime = dataclasses.replace(assistant.runtime, dtype="bfloat16")
    loaded = load_assistant(saved / "model", branches=("base",), runtime=runtime)
    assert set(loaded.params) == set(branch_parts("base"))
    decoder = loaded.params[DECODER]
    assert decoder["embedding"].dtype == jnp.bfloat16
    assert decoder["final_norm"]["scale"].dtype == jnp.float32
    tiles = np.stack([picture(64, 64)])[None]
    model = HyperVL(loaded.config, runtime)
    encode = jax.jit(lambda params: model.apply({"params": params}, tiles, "base", method="encode_tiles"))
    np.testing.assert_array_equal(
        encode(loaded.params), encode({part: assistant.params[part] for part in loaded.params})
    )


def test_what_is_no_checkpoint_is_refused(saved: Path, assistant: Assistant, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "bare", Description(assistant.config, {}, None), assistant.params)
    with pytest.raises(CheckpointError, match="not a HyperVL checkpoint directory"):
        load_assistant(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        load_assistant(saved / "model", step=7)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_assistant(tmp_path / "bare")


def test_inference_dtypes_name_every_large_parameter(
    config: HyperVLConfig, runtime: RuntimeConfig, params: dict
) -> None:
    stored = inference_dtypes(params, "bfloat16")
    wide = sum(leaf.size for leaf in jax.tree.leaves(stored) if leaf.dtype == jnp.float32)
    assert wide < 0.01 * sum(leaf.size for leaf in jax.tree.leaves(stored))
