import random

import pytest
from corpora import TILING, WORDS, png, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import RecordError
from data_pipelines.lane_state import MAX_PARTS
from data_pipelines.packing import Budget
from data_pipelines.pieces import Pieces, cut_text, cut_turns, measure_pieces, showing
from data_pipelines.records import Record
from data_pipelines.splitting import PartSample, SplitRecord, split_record, take_part
from hypervl_jax.text.conversation import (
    IMAGE_SLOT,
    Turn,
    count_image_slots,
    encode_conversation,
    text_length,
)
from hypervl_jax.text.tokenizer import ChatTemplate, SentencePieceTokenizer
from hypervl_jax.vision.anyres import plan_image

BUDGET = Budget(tokens=160, tiles=3)
PLAN = plan_image(64, 64, 1.0, TILING)


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count)) + "."


def talk(exchanges: list[tuple[int, int, int]], system: bool = False) -> Record:
    """Exchanges of (images, words of the question, words of the answer)."""
    turns = [Turn("system", "Be brief.")] if system else []
    for number, (images, asked, answered) in enumerate(exchanges):
        turns.append(Turn("user", IMAGE_SLOT * images + words(asked, number)))
        turns.append(Turn("assistant", words(answered, 1000 + number)))
    return record_of(turns)


def record_of(turns: list[Turn]) -> Record:
    images = tuple(png(64, 64, number) for number in range(count_image_slots(turns)))
    return Record(images, tuple(turns), "s")


def split(record: Record, budget: Budget = BUDGET, of: SentencePieceTokenizer | None = None) -> SplitRecord:
    pieces = measure_pieces(record.turns, of or tokenizer())
    assert Pieces.from_numbers(pieces.to_numbers()) == pieces
    return split_record(pieces, [PLAN] * len(record.images), TILING, budget)


def taken(record: Record, found: SplitRecord, of: SentencePieceTokenizer | None = None) -> list[PartSample]:
    plans = [PLAN] * len(record.images)
    return [take_part(record, part, plans, of or tokenizer(), TILING) for part in found.parts]


def with_template(**changes: object) -> SentencePieceTokenizer:
    """The tokenizer of the tests with another template."""
    data, template = tokenizer().__getstate__()
    changed = SentencePieceTokenizer.__new__(SentencePieceTokenizer)
    changed.__setstate__((data, ChatTemplate(**{**vars(template), **changes})))
    return changed


exchanges = st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(st.lists(exchanges, min_size=2, max_size=12), st.booleans(), st.booleans(), st.sampled_from([None, "red."]))
def test_parts_fit_keep_every_exchange_whole_and_cost_what_they_say(
    talks: list, system: bool, think: bool, default: str | None
) -> None:
    record, of = talk(talks, system), with_template(think_block=think, default_system=default)
    found = split(record, of=of)
    own_system, cut = cut_turns(record.turns)
    covered = []
    for part, sample in zip(found.parts, taken(record, found, of), strict=True):
        assert BUDGET.fits(part.tokens, part.tiles)
        assert part.tokens == len(sample.conversation.tokens)
        assert part.tiles == sum(plan.tiles for plan in sample.plans)
        first, *others = (turn for exchange in cut[part.first : part.end] for turn in exchange)
        turns = (*own_system, showing(first, part.again), *others)
        plain = encode_conversation(turns, of, sample.plans, TILING)
        assert plain.tokens.tolist() == sample.conversation.tokens.tolist()
        covered += range(part.first, part.end)
    assert covered == sorted(set(covered)), "each once, in order"
    assert found.left_out > 0 or covered == list(range(len(cut)))


@settings(max_examples=60, deadline=None)
@given(st.lists(exchanges, min_size=2, max_size=8), st.booleans())
def test_pieces_add_up_to_the_whole(talks: list, system: bool) -> None:
    record = talk(talks, system)
    pieces = measure_pieces(record.turns, tokenizer())
    total = pieces.system + sum(exchange.tokens for exchange in pieces.exchanges) + pieces.exchanges[-1].closing
    assert total == text_length(record.turns, tokenizer())


def test_a_tool_answer_is_no_question_of_a_user() -> None:
    of = with_template(think_block=True)
    asked = [Turn("user", "red?"), Turn("assistant", words(60, 0))]
    tool = [Turn("user", "<tool_response>blue</tool_response>"), Turn("assistant", "\n\n" + words(60, 1))]
    opening = Turn("assistant", words(20, 2))
    for turns in (asked + tool, tool + asked, tool + tool, [opening, *asked, *asked]):
        record = record_of(turns)
        found = split(record, Budget(200, 1), of)
        assert [part.tokens for part in found.parts] == [len(s.conversation.tokens) for s in taken(record, found, of)]
        assert len(found.parts) == 2


def test_a_later_part_begins_with_the_images_last_shown() -> None:
    record = talk([(1, 3, 40), (0, 3, 40), (1, 3, 40), (0, 3, 40)])
    found = split(record, Budget(130, 3))
    assert [part.images for part in found.parts] == [(0,), (0,), (1,), (1,)]
    assert [part.again for part in found.parts] == [0, 1, 0, 1]
    assert [sample.images for sample in taken(record, found)] == [record.images[:1]] * 2 + [record.images[1:]] * 2
    assert found.left_out == 0


def test_an_answer_that_fits_no_row_is_left_out_and_counted_never_cut() -> None:
    found = split(talk([(1, 3, 10), (0, 3, 400), (0, 3, 10)]))
    assert found.left_out == 1
    assert [(part.first, part.end) for part in found.parts] == [(0, 1), (2, 3)]


def test_plain_text_is_split_between_paragraphs() -> None:
    text = "\n\n".join(words(30, seed) for seed in range(20))
    record = Record((), (Turn("assistant", text),), "s")
    found = split(record)
    samples = taken(record, found)
    assert [part.tokens for part in found.parts] == [len(sample.conversation.tokens) for sample in samples]
    assert all(part.tokens <= BUDGET.tokens for part in found.parts)
    assert "".join(tokenizer().decode(sample.conversation.tokens) for sample in samples) == text
    assert all(sample.conversation.tokens[-1] == tokenizer().end_of_text for sample in samples)
    assert all(sample.conversation.loss_weights.all() for sample in samples)
    assert 1 < len(found.parts) < 20


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab \n", max_size=40))
def test_paragraphs_are_never_blank_and_lose_nothing(text: str) -> None:
    paragraphs = cut_text(text)
    assert "".join(paragraphs) == (text if text.strip() else "")
    assert all(paragraph.strip() for paragraph in paragraphs)
    assert all(paragraph.endswith("\n\n") for paragraph in paragraphs[:-1])


def test_more_parts_than_a_state_can_name_are_counted_as_left_out() -> None:
    found = split(talk([(0, 3, 70)] * (MAX_PARTS + 4)))
    assert len(found.parts) == MAX_PARTS
    assert found.left_out == 4


def test_a_question_without_an_answer_is_not_trained_on() -> None:
    record = talk([(0, 3, 80), (0, 3, 80)])
    unanswered = Record((), (*record.turns, Turn("user", "purple?")), "s")
    texts = [tokenizer().decode(sample.conversation.tokens) for sample in taken(unanswered, split(unanswered))]
    assert len(texts) == 2
    assert not any("purple" in text for text in texts)


@pytest.mark.parametrize("turns", [[Turn("user", "red?"), Turn("assistant", words(90, 0))], [Turn("assistant", "red")]])
def test_what_cannot_be_cut_has_no_pieces_and_is_left_out(turns: list[Turn]) -> None:
    assert measure_pieces(turns, tokenizer()).to_numbers() == ()
    assert split(record_of(turns)) == SplitRecord([], 1)


def test_a_record_that_is_another_now_is_refused() -> None:
    record = talk([(1, 3, 60), (0, 3, 60)])
    found = split(record)
    with pytest.raises(RecordError, match="1 exchanges, its index says 2 or more"):
        take_part(talk([(1, 3, 60)]), found.parts[1], [PLAN], tokenizer(), TILING)
    with pytest.raises(RecordError, match="1 images in its pieces, 0 in its index"):
        split_record(measure_pieces(record.turns, tokenizer()), [], TILING, BUDGET)
    with pytest.raises(RecordError, match="tells wrongly"):
        Pieces.from_numbers([3, 1, 2])
