"""Labels by a random vision-language model of transformers, against its own loss computed in one plain pass."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from data_pipelines.records import PARAPHRASE_SEPARATOR
from hypervl_jax.training.compression import RATIOS
from hypervl_jax.vision.decoding import decode_image
from tests.data_pipelines import corpora
from tools import label_resolutions
from tools.label_files import LabelError, read_labels
from tools.label_transformers import TransformersReference

WORDS = (
    "[PAD]",
    "[UNK]",
    "<image>",
    "user",
    "assistant",
    ":",
    "red",
    "blue",
    "circle",
    "square",
    "left",
    "seven",
    ".",
    "?",
)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for p in m['content'] %}{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A LLaVA of a few thousand parameters with its processor: 28-pixel pictures of 4 patches."""
    directory = tmp_path_factory.mktemp("reference")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", extra_special_tokens={"image_token": "<image>"}
    )
    images = transformers.CLIPImageProcessor(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(directory)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=16)
    text = transformers.LlamaConfig(**sizes, vocab_size=len(WORDS), num_key_value_heads=2)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("data")
    first, second = (corpora.sample(number, [(40, 56)], 3, "one") for number in range(2))
    said = {"paraphrases": PARAPHRASE_SEPARATOR.join(("blue circle",))}
    corpora.write(root, "one", [first, dataclasses.replace(second, metadata=said)])
    return root


def test_losses_are_the_models_own(reference: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = [
        "--reference",
        str(reference),
        "--data",
        str(data),
        "--sources",
        "one",
        "--output",
        str(tmp_path / "labels"),
    ]
    assert label_resolutions.main(words) == 0
    labels, question = read_labels(tmp_path / "labels")
    assert question["reference"] == "llava"
    model = TransformersReference(reference)
    source = model.open(data / "train" / "one")
    record, found = source.record(1), labels[1]
    assert len(found.paraphrase_losses) == 1
    assert found.tokens[-1] == 4, "four patches"
    inner = transformers.LlavaForConditionalGeneration.from_pretrained(reference)
    processor = transformers.AutoProcessor.from_pretrained(reference)
    text = " ".join(f"{turn.role} : {turn.text.replace('<image>', '<image> ')} " for turn in record.turns)
    inputs = processor(images=[decode_image(record.images[0])], text=[text], return_tensors="pt")
    answer = len(record.turns[-1].text.split())
    labelled = inputs["input_ids"].clone()
    labelled[:, :-answer] = -100
    with torch.no_grad():
        expected = float(inner(**inputs, labels=labelled).loss)
    assert found.losses[-1] == pytest.approx(expected, rel=1e-4)
    assert np.ptp(found.losses) > 1e-4, "the model sees the scaled picture"
    assert found.blind_loss != pytest.approx(found.losses[-1], rel=1e-4)
    assert len(found.losses) == len(RATIOS)


def test_labels_of_two_models_are_not_mixed_and_a_directory_without_one_is_refused(
    reference: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(LabelError, match="no vision-language model"):
        TransformersReference(tmp_path)
    model = TransformersReference(reference)
    label_resolutions.label_with(model, data, tmp_path / "labels", sources=["one"])
    model.identity = {**model.identity, "weights": "other"}
    with pytest.raises(LabelError, match="weights"):
        label_resolutions.label_with(model, data, tmp_path / "labels", sources=["one"])
