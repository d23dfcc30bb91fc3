"""Labelling and compressor training end to end, on a small random model and small sources."""

import collections
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from data_pipelines.records import PARAPHRASE_SEPARATOR, Record, content_hash
from data_pipelines.sources import Source, read_alphas
from experiments import launch
from hypervl_jax.architecture import CompressorConfig, HyperVLConfig
from hypervl_jax.models.compressor_io import abstract_compressor, load_compressor, predict_log_areas, save_compressor
from hypervl_jax.models.hypervl import HyperVL
from hypervl_jax.models.qwen3 import head_weights, logits
from hypervl_jax.models.safetensors_files import CheckpointError
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn, encode_conversation
from hypervl_jax.training.batch import BatchShape, empty_batch
from hypervl_jax.training.checkpoint import CheckpointConfig, Checkpoints, Description, write_description
from hypervl_jax.training.compression import RATIOS, summarise_labels
from hypervl_jax.training.compressor_training import CompressorTrainConfig
from hypervl_jax.training.optimizer import OptimizerConfig
from hypervl_jax.training.state import abstract_parameters, fresh_state
from hypervl_jax.vision.anyres import plan_image, tile_image
from hypervl_jax.vision.decoding import decode_image
from hypervl_jax.vision.resolution import alpha_from_prediction, make_proxies
from tests.data_pipelines import corpora
from tests.small import RUNTIME, small_architecture
from tools import label_models, label_resolutions, predict_alphas, train_compressor
from tools.label_files import LabelError, read_file, read_labels
from tools.label_resolutions import Shard, label

SHAPE = BatchShape(rows=8, length=160, tiles=12)
COMPRESSOR = CompressorConfig(
    proxy_size=16, stem_width=8, stages=((3, 8, 8, False, "relu", 2),), head_width=16, hidden_size=16
)
SETTINGS = CompressorTrainConfig(steps=6, batch_size=4, warmup_steps=1, evaluate_every=3, allowed_loss=0.5)


def architecture() -> HyperVLConfig:
    """The small model with the vocabulary of the test tokenizer and a small compressor."""
    small = small_architecture()
    decoder = dataclasses.replace(small.decoder, vocab_size=512)
    return dataclasses.replace(small, decoder=decoder, compressor=COMPRESSOR)


def random_params(config: HyperVLConfig) -> dict:
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(centre, 0.2, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_parameters(config, RUNTIME)[0])


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params(architecture())


@pytest.fixture(scope="module")
def checkpoint(params, tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    corpora.tokenizer().save(directory.parent / "tokenizer")
    details = {"config": {"batch.length": SHAPE.length, "batch.tiles": SHAPE.tiles}}
    checkpoints = Checkpoints(directory, CheckpointConfig(asynchronous=False))
    write_description(directory, Description(architecture(), details, epath.Path(directory.parent / "tokenizer")))
    state = fresh_state(OptimizerConfig(frozen=("decoder",)), jax.device_put(params), 1)
    checkpoints.save(state, jax.numpy.zeros((1, 3), jax.numpy.int32), {})
    checkpoints.close()
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """`one`: ten single images, a damaged one, a text, two with two images. `two`: four single images."""
    root = tmp_path_factory.mktemp("data")
    single = [corpora.sample(number, [(20 + 7 * number, 60 - 4 * number)], 3, "one") for number in range(10)]
    pair = [corpora.sample(20 + number, [(16, 20), (50, 9)], 3, "one") for number in range(2)]
    broken = corpora.png(40, 40, 5)[:90]
    damaged = Record((broken,), (Turn("user", f"{IMAGE_SLOT}?"), Turn("assistant", "red.")), "one", task="test")
    text = Record((), (Turn("assistant", "seven above."),), "one", task="text")
    corpora.write(root, "one", [*single, *pair, damaged, text], per_shard=5)
    corpora.write(root, "two", [corpora.sample(40 + number, [(33, 33)], 2, "two") for number in range(4)])
    return root


@pytest.fixture(scope="module")
def labelled(checkpoint, data, tmp_path_factory) -> tuple[pathlib.Path, label_resolutions.LabelRun]:
    directory = tmp_path_factory.mktemp("labels") / "labels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_resolutions, "IMAGES_PER_FILE", 4)
        return directory, label(checkpoint, data, directory, sources=["one", "two"])


def loss_alone(params: dict, record: Record, alpha: float, blind: bool = False) -> float:
    """Mean cross-entropy of the answer of one record that fills a row by itself, from the logits of all positions."""
    config, tokenizer = architecture(), corpora.tokenizer()
    rgb = decode_image(record.images[0])
    plan = plan_image(*rgb.shape[:2], alpha, config.tiling)
    encoded = encode_conversation(record.turns, tokenizer, [plan], config.tiling)
    batch, length = empty_batch(BatchShape(1, SHAPE.length, SHAPE.tiles), config.tiling.tile_size), len(encoded.tokens)
    batch.tokens[0, :length], batch.visual_index[0, :length] = encoded.tokens, encoded.visual_index
    batch.segments[0, :length], batch.positions[0, :length] = 1, np.arange(length)
    seen = np.full_like(rgb, 128) if blind else rgb
    batch.tiles[0, : plan.tiles] = tile_image(seen, plan, config.tiling)
    hidden = HyperVL(config, RUNTIME).apply({"params": params}, batch, "base", method="hidden_states")
    scores = jax.nn.log_softmax(logits(hidden, head_weights(params["decoder"])))[0]
    wanted = np.flatnonzero(encoded.loss_weights)
    return float(-np.mean([scores[place - 1, encoded.tokens[place]] for place in wanted]))


def test_packed_losses_are_those_of_each_image_alone(labelled, params, data):
    source = Source(data / "train" / "one", corpora.tokenizer().fingerprint)
    record, found = source.record(7), labelled[1].labels[7]
    assert found.content_hash == content_hash(record)
    for alpha in (0.1, 0.6, 1.0):
        assert found.losses[RATIOS.index(alpha)] == pytest.approx(loss_alone(params, record, alpha), rel=1e-4)
    assert found.blind_loss == pytest.approx(loss_alone(params, record, 1.0, blind=True), rel=1e-4)
    assert found.blind_loss != pytest.approx(found.losses[-1], rel=1e-3)
    plans = [plan_image(found.height, found.width, alpha, architecture().tiling) for alpha in RATIOS]
    assert found.tokens == tuple(plan.tokens for plan in plans)


def test_labels_keep_the_order_and_leave_out_what_cannot_be_labelled(labelled):
    directory, run = labelled
    assert [found.source for found in run.labels] == ["one"] * 10 + ["two"] * 4
    assert run.left_out == {"one": 1, "two": 0}
    assert sorted(path.name for path in directory.iterdir()) == [
        "labels.json", "one-00000.array_record", "one-00001.array_record", "one-00002.array_record",
        "question.json", "two-00000.array_record",
    ]  # fmt: skip
    again, question = read_labels(directory)
    assert [dataclasses.replace(found, losses=(), blind_loss=0) for found in again] == [
        dataclasses.replace(found, losses=(), blind_loss=0) for found in run.labels
    ]
    np.testing.assert_allclose([x.losses for x in again], [x.losses for x in run.labels], rtol=1e-6)
    assert (question["split"], question["left_out"]) == ("train", run.left_out)


def test_a_killed_run_goes_on_with_the_missing_file(labelled, checkpoint, data, monkeypatch):
    monkeypatch.setattr(label_resolutions, "IMAGES_PER_FILE", 4)
    directory, _ = labelled
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    (directory / "labels.json").unlink()
    (directory / "one-00001.array_record").unlink()
    (directory / "one-00001.array_record.tmp").write_bytes(b"half")
    with pytest.raises(LabelError, match="to its end"):
        read_labels(directory)
    run = label(checkpoint, data, directory, sources=["one", "two"])
    assert run.resumed == 10
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_shards_make_the_same_directory_together(labelled, checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr(label_resolutions, "IMAGES_PER_FILE", 4)
    first = label(checkpoint, data, tmp_path, sources=["one", "two"], shard=Shard(0, 2))
    assert (first.missing, len(first.labels)) == (2, 6)
    with pytest.raises(LabelError, match="to its end"):
        read_labels(tmp_path)
    assert label(checkpoint, data, tmp_path, sources=["one", "two"], shard=Shard(1, 2)).missing == 0
    whole = {path.name: path.read_bytes() for path in labelled[0].iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    for text in ("2/2", "1", "-1/2", "a/b"):
        with pytest.raises(LabelError, match="--shard"):
            label_resolutions.parse_shard(text)


def test_a_truncated_file_is_not_an_empty_one(labelled, tmp_path):
    path = tmp_path / "cut.array_record"
    path.write_bytes((labelled[0] / "one-00000.array_record").read_bytes()[:100])
    with pytest.raises(LabelError, match=r"cut.array_record cannot be read"):
        read_file(path)


def test_paraphrases_are_asked_at_full_resolution(checkpoint, params, tmp_path):
    said = {"paraphrases": PARAPHRASE_SEPARATOR.join(("blue square", "green"))}
    plain = corpora.sample(60, [(30, 30)], 2, "one")
    corpora.write(tmp_path, "one", [plain, dataclasses.replace(plain, metadata=said)])
    first, second = label(checkpoint, tmp_path, tmp_path / "labels", sources=["one"]).labels
    assert first.paraphrase_losses == ()
    for text, loss in zip(("blue square", "green"), second.paraphrase_losses, strict=True):
        other = dataclasses.replace(plain, turns=(*plain.turns[:-1], Turn("assistant", text)))
        assert loss == pytest.approx(loss_alone(params, other, 1.0), rel=1e-4)
    assert summarise_labels([first, second], 1e-6)["all"].drift == 1.0
    assert summarise_labels([first], 0.05)["all"].drift is None


def test_each_image_is_decoded_once(checkpoint, data, tmp_path, monkeypatch):
    decoded = collections.Counter()

    def counting(image: bytes) -> np.ndarray:
        decoded[image] += 1
        return decode_image(image)

    monkeypatch.setattr(label_models, "decode_image", counting)
    assert len(label(checkpoint, data, tmp_path / "labels", sources=["two"]).labels) == 4
    # Four pictures of one size, and the grey one that stands for all of them.
    assert list(decoded.values()) == [1] * 5


def test_labels_of_another_question_are_not_mixed(labelled, checkpoint, data, monkeypatch):
    monkeypatch.setattr(label_resolutions, "IMAGES_PER_FILE", 4)
    for change, key in (({"encoder": "large"}, "encoder, weights"), ({"limit": 2}, "files, limit")):
        with pytest.raises(LabelError, match=key):
            label(checkpoint, data, labelled[0], sources=["one", "two"], **change)


def test_damaged_label_files_are_refused(labelled, tmp_path):
    for path in labelled[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "two-00000.array_record").write_bytes(b"no arrow")
    with pytest.raises(LabelError, match=r"two-00000.array_record cannot be read"):
        read_labels(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({"format_version": 2, "files": ["../one-00000.array_record"]}))
    with pytest.raises(LabelError, match="label again"):
        read_labels(tmp_path)


def test_training_saves_what_inference_loads_and_a_table_the_pipeline_reads(labelled, checkpoint, data, tmp_path):
    table, output = tmp_path / "alphas.arrow", tmp_path / "vrc"
    report = train_compressor.train(
        labelled[0], data, checkpoint, output, epsilon=0.1, settings=SETTINGS, alphas_output=table
    )
    saved = load_compressor(output)
    assert (saved.config, saved.details["epsilon"]) == (COMPRESSOR, 0.1)
    assert report.metrics["all"].chance_lost <= SETTINGS.allowed_loss
    assert (report.alphas, report.unreadable) == (16, 1)
    one = Source(data / "train" / "one", corpora.tokenizer().fingerprint)
    stored = one.alphas(read_alphas(table))
    for record in (3, 10):
        proxies, sides = make_proxies([*map(decode_image, one.record(record).images)], COMPRESSOR.proxy_size)
        outputs = predict_log_areas(COMPRESSOR, saved.params, proxies)
        expected = alpha_from_prediction(outputs, sides, COMPRESSOR.proxy_size).max()
        assert stored[record] == round(1000 * float(expected))
    again = tmp_path / "again.arrow"
    words = ["--compressor", str(output), "--data", str(data), "--sources", "one,two", "--output", str(again)]
    assert predict_alphas.main(words) == 0
    assert again.read_bytes() == table.read_bytes()
    assert predict_alphas.main([*words[:-4], "--sources", "three", *words[-2:]]) == 2
    with pytest.raises(CheckpointError, match="already exists"):
        train_compressor.train(labelled[0], data, checkpoint, output)
    with pytest.raises(LabelError, match="no label of task charts"):
        train_compressor.train(labelled[0], data, checkpoint, tmp_path / "other", left_out=["charts"])


def test_labels_of_other_data_are_refused(labelled, checkpoint, data, tmp_path):
    others = [corpora.sample(90 + number, [(33, 33)], 2, "two") for number in range(4)]
    for name in ("one", "two"):
        corpora.write(tmp_path, name, others)
    with pytest.raises(LabelError, match="other data"):
        train_compressor.train(labelled[0], tmp_path, checkpoint, tmp_path / "vrc", settings=SETTINGS)


def test_the_commands_print_json(labelled, checkpoint, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(label_resolutions, "IMAGES_PER_FILE", 4)
    common = ["--checkpoint", str(checkpoint), "--data", str(data), "--json"]
    labels = str(labelled[0])
    assert label_resolutions.main([*common, "--sources", "one,two", "--output", labels]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["resumed"], printed["tasks"]["test"]["images"]) == (14, 14)
    workdir = ["--checkpoint", str(checkpoint.parent)]
    assert label_resolutions.main([*common, *workdir, "--sources", "one,two", "--output", labels]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] == 14, "a workdir stands for its checkpoints"
    assert label_resolutions.main([*common, "--sources", "one", "--output", labels]) == 2
    assert label_resolutions.main([*common, "--sources", "one", "--output", "/proc/nope"]) == 2
    assert "error: '/proc/nope': No such file or directory; give another path\n" in capsys.readouterr().err
    command = [
        *common,
        *workdir,
        "--labels",
        labels,
        "--output",
        str(tmp_path / "vrc"),
        "--steps",
        "2",
        "--batch-size",
        "4",
    ]
    assert train_compressor.main(command) == 0
    assert set(json.loads(capsys.readouterr().out)["metrics"]) == {"test", "all"}
    assert train_compressor.main(command) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_launch_trains_a_compressor_once(labelled, checkpoint, data, tmp_path, capfd):
    words = ["--config", "compressor", "--workdir", str(tmp_path / "vrc"), "--data", str(data)]
    words += [f"--config.labels={labelled[0]}", f"--config.checkpoint={checkpoint}", "--config.training.steps=2"]
    words += ["--config.training.batch_size=4", "--config.epsilon=0.1", f"--config.alphas={tmp_path / 'alphas.arrow'}"]
    assert launch.main(words) == 0, capfd.readouterr().err
    saved = load_compressor(tmp_path / "vrc")
    assert (saved.config, saved.details["settings"]["steps"]) == (COMPRESSOR, 2)
    assert len(read_alphas(tmp_path / "alphas.arrow")) == 16
    assert launch.main(words) == 0
    assert "compressor is complete" in capfd.readouterr().err
    assert launch.main([*words, "--config.epsilon=0.2"]) == 2
    assert "holds a compressor that differs in epsilon" in capfd.readouterr().err
    assert launch.main([*words, "--workdir", str(tmp_path)]) == 2
    assert "exists and holds no compressor" in capfd.readouterr().err
    assert launch.main([*words, "--print"]) == 0
    assert "training.steps = 2\n" in capfd.readouterr().out


def test_labels_of_all_sources_go_beside_the_checkpoints(checkpoint, data, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints")
    assert label_resolutions.main(["--checkpoint", str(run), "--data", str(data), "--limit", "2"]) == 0
    labels, question = read_labels(run / "labels")
    assert (len(labels), list(question["sources"])) == (4, ["one", "two"])
    assert label_resolutions.main(["--checkpoint", str(run), "--data", str(tmp_path)]) == 2
    assert "holds no source; give --data ROOT" in capsys.readouterr().err
    assert label_resolutions.main(["--reference", str(run), "--data", str(data)]) == 2


def test_a_saved_compressor_that_does_not_fit_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    leaves = abstract_compressor(COMPRESSOR)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), leaves)
    save_compressor(tmp_path / "vrc", COMPRESSOR, params, {"epsilon": 0.05})
    loaded = load_compressor(tmp_path / "vrc")
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    description = tmp_path / "vrc" / "description.json"
    values = json.loads(description.read_text())
    values["compressor"]["hidden_size"] = 24
    description.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="its description needs"):
        load_compressor(tmp_path / "vrc")
    for damage in ({"stages": 3}, {"stages": None}, {"width": 1}, {"norm": "batch"}):
        description.write_text(json.dumps({**values, "compressor": {**values["compressor"], **damage}}))
        with pytest.raises(CheckpointError, match="does not describe a compressor"):
            load_compressor(tmp_path / "vrc")
    values["compressor"]["hidden_size"] = 16
    description.write_text(json.dumps(values))
    (tmp_path / "vrc" / "compressor.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_compressor(tmp_path / "vrc")
    with pytest.raises(CheckpointError, match="no compressor"):
        load_compressor(tmp_path)
