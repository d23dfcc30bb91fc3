"""A SentencePiece model rewritten as a `tokenizer.json` gives the same ids and texts."""

import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from hypervl_jax.text.tokenizer import SENTENCEPIECE_FILE, TokenizerError, load_tokenizer, train_sentencepiece
from hypervl_jax.text.tokenizer_json import byte_pairs, write_tokenizer_json

TEXTS = ["What is the number in the picture? How many red circles are there?", "aaa aaaa banana 12 120 0012, the user"]
ODD = [
    "user",
    "system",
    "assistantuser",
    " ",
    "   ",
    "\n",
    "\t",
    "é",
    "中文",
    "😀",
    "\u2581",
    "<0x0A>",
    "\x00",
    "1",
    "99",
    "aaaaa",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tokenizer of our kind."""
    home = tmp_path_factory.mktemp("model")
    train_sentencepiece(TEXTS * 3, home / SENTENCEPIECE_FILE, vocab_size=340)
    return home


def test_ids_and_texts_are_equal_on_thousands_of_texts(model: Path) -> None:
    ours = load_tokenizer(model)
    theirs = byte_pairs((model / SENTENCEPIECE_FILE).read_bytes())
    processor = sentencepiece.SentencePieceProcessor(str(model / SENTENCEPIECE_FILE))
    pieces = [processor.id_to_piece(number).replace("\u2581", " ") for number in range(265, 340)] + ODD
    rng = random.Random(0)
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(4000)]
    texts += [piece * count for piece in pieces for count in (2, 3, 7, 20)]
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert theirs.decode(ids) == ours.decode(ids), repr(text)


def test_special_tokens_have_their_ids_and_are_left_out_of_texts(model: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(model)
    theirs = tokenizers.Tokenizer.from_file(str(write_tokenizer_json(ours, tmp_path)))
    ids = theirs.encode("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>red<|im_end|>").ids
    start, end = [ours.start_of_turn, *ours.encode("user\n")], [*ours.encode("red"), ours.end_of_turn]
    assert ids == [*start, ours.vision_start, ours.image, ours.vision_end, *end]
    assert theirs.decode(ids) == "user\nred"
    # Read by our own code the same file keeps special tokens written in a text as text.
    assert ours.image not in load_tokenizer(tmp_path).encode("<|image_pad|>")


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name, options in {
        "unigram": {"model_type": "unigram", "byte_fallback": True, "add_dummy_prefix": False},
        "prefix": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": True},
    }.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 3), model_prefix=str(tmp_path / name), vocab_size=300, hard_vocab_limit=False,
            minloglevel=2, **options,
        )  # fmt: skip
        with pytest.raises(TokenizerError, match=r"byte-pair SentencePiece|leave the text as it is"):
            byte_pairs((tmp_path / f"{name}.model").read_bytes())
