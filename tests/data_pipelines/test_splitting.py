import random

import pytest
from corpora import TILING, WORDS, png, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import RecordError
from data_pipelines.lane_state import MAX_PARTS
from data_pipelines.packing import Budget
from data_pipelines.records import Record
from data_pipelines.splitting import split_record, take_part
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn, count_image_slots, encode_conversation
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
    images = tuple(png(64, 64, number) for number in range(count_image_slots(turns)))
    return Record(images, tuple(turns), "s")


def answers(record: Record) -> list[str]:
    return [turn.text for turn in record.turns if turn.role == "assistant"]


def questions(record: Record) -> list[str]:
    return [turn.text.replace(IMAGE_SLOT, "").strip() for turn in record.turns if turn.role == "user"]


exchanges = st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(st.lists(exchanges, min_size=2, max_size=12), st.booleans())
def test_parts_fit_keep_every_exchange_whole_and_cost_what_they_say(talks: list, system: bool) -> None:
    record = talk(talks, system)
    plans = [PLAN] * len(record.images)
    split = split_record(record, plans, tokenizer(), TILING, BUDGET)
    found = []
    for number, part in enumerate(split.parts, start=1):
        taken, own = take_part(record, plans, number, tokenizer(), TILING, BUDGET)
        assert BUDGET.fits(part.tokens, part.tiles)
        assert part.tokens == len(encode_conversation(taken.turns, tokenizer(), own, TILING).tokens)
        assert part.tiles == sum(plan.tiles for plan in own)
        assert len(taken.images) == count_image_slots(taken.turns)
        assert (taken.turns[0].role == "system") == system
        found += list(zip(questions(taken), answers(taken), strict=True))
    whole = list(zip(questions(record), answers(record), strict=True))
    assert [exchange for exchange in whole if exchange in found] == found, "each once, in order, uncut"
    if not split.left_out:
        assert found == whole


def test_a_later_part_begins_with_the_images_last_shown() -> None:
    record = talk([(1, 3, 40), (0, 3, 40), (1, 3, 40), (0, 3, 40)])
    split = split_record(record, [PLAN] * 2, tokenizer(), TILING, Budget(130, 3))
    assert [part.images for part in split.parts] == [(0,), (0,), (1,), (1,)]
    assert all(part.turns[0].text.startswith(IMAGE_SLOT) for part in split.parts)
    assert split.left_out == 0


def test_an_answer_that_fits_no_row_is_left_out_and_counted_never_cut() -> None:
    record = talk([(1, 3, 10), (0, 3, 400), (0, 3, 10)])
    split = split_record(record, [PLAN], tokenizer(), TILING, BUDGET)
    assert split.left_out == 1
    assert [part.turns[-1].text for part in split.parts] == [answers(record)[0], answers(record)[2]]


def test_plain_text_is_split_between_paragraphs() -> None:
    paragraphs = [words(30, seed) for seed in range(20)]
    record = Record((), (Turn("assistant", "\n\n".join(paragraphs)),), "s")
    split = split_record(record, [], tokenizer(), TILING, BUDGET)
    assert "\n\n".join(part.turns[0].text for part in split.parts) == record.turns[0].text
    assert all(len(part.turns) == 1 and part.tokens <= BUDGET.tokens for part in split.parts)
    assert 1 < len(split.parts) < 20


def test_more_parts_than_a_state_can_name_are_counted_as_left_out() -> None:
    record = talk([(0, 3, 70)] * (MAX_PARTS + 4))
    split = split_record(record, [], tokenizer(), TILING, BUDGET)
    assert len(split.parts) == MAX_PARTS
    assert split.left_out == 4


def test_a_question_without_an_answer_is_not_trained_on() -> None:
    record = talk([(0, 3, 80), (0, 3, 80)])
    unanswered = Record((), (*record.turns, Turn("user", "red?")), "s")
    split = split_record(unanswered, [], tokenizer(), TILING, BUDGET)
    assert [turn.role for part in split.parts for turn in part.turns] == ["user", "assistant"] * 2


def test_a_record_that_is_another_now_is_refused() -> None:
    record = talk([(1, 3, 60), (0, 3, 60)])
    with pytest.raises(RecordError, match="part 9 of 2 was packed"):
        take_part(record, [PLAN], 9, tokenizer(), TILING, BUDGET)
    with pytest.raises(RecordError, match="1 images, its index says 0"):
        take_part(record, [], 1, tokenizer(), TILING, BUDGET)
