"""The plugin of lmms-eval against lmms-eval itself, where that is installed; a stand-in for its task list is a dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hypervl_jax.inference.assistant import Options, ask
from hypervl_jax.text.conversation import IMAGE_SLOT
from tests.hypervl_jax.evaluation import examples

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from hypervl_jax.evaluation.lmms_eval_model import MANIFEST, HyperVLModel, cut, to_request


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HyperVLModel:
    return HyperVLModel(str(examples.save_checkpoint(tmp_path_factory.mktemp("home"))), encoder="base", batch_size="2")


def test_answers_are_the_assistants(model: HyperVLModel) -> None:
    pictures = [Image.fromarray(np.full((16, 20, 3), 40 * number, np.uint8)) for number in range(3)]
    model.task_dict = {"task": {"test": pictures}}
    settings = {"max_new_tokens": 4, "until": ["\n"]}
    requests = [
        Instance(
            "generate_until",
            ("Which word?", settings, lambda doc: [doc], number, "task", "test"),
            0,
            {"task": "task", "doc_id": number, "repeats": 1},
        )
        for number in range(3)
    ]
    asked = [ask("Which word?", np.asarray(picture)) for picture in pictures]
    expected = [answer.text.split("\n")[0] for answer in examples.assistant().answer(asked, Options(max_new_tokens=4))]
    assert model.generate_until(requests) == expected


def test_pictures_keep_their_slots() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    assert to_request(f"a{IMAGE_SLOT}b", [picture]).turns[0].text == f"a{IMAGE_SLOT}b"
    assert to_request("ab", [picture, picture]).turns[0].text == f"{IMAGE_SLOT}{IMAGE_SLOT}ab"
    assert to_request(f"a{IMAGE_SLOT}b", []).turns[0].text == "ab"


def test_an_ending_cuts() -> None:
    assert cut("one\ntwo;", [";", "\n"]) == "one"
    assert cut("one", [""]) == "one"


def test_lmms_eval_loads_the_model() -> None:
    registry = ModelRegistryV2()
    registry.register_manifest(MANIFEST)
    assert registry.get_model_class("hypervl") is HyperVLModel
