"""Question records: a picture with one question (held out) or two to four (training), fewer where fewer can be asked."""

from __future__ import annotations

from data_pipelines.records import PARAPHRASE_SEPARATOR, Record
from data_pipelines.rendered import charts, digits, documents, scenes
from data_pipelines.rendered.pictures import FRAMINGS, HELD_OUT, Question, choose_questions, item_random, reweighted
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn

TASKS = {"digits": digits, "documents": documents, "charts": charts, "scenes": scenes}
"""The four picture tasks and their generators."""


def question_record(split: str, task: str, index: int, sizes: str = "demo") -> Record:
    """The record of a task with a number; `sizes` is a key of `pictures.FRAMINGS`.

    `metadata` tells of the last question: `answer` (the text of the last turn), `paraphrases` (other right answers, joined by
    `PARAPHRASE_SEPARATOR`), `kind`, `level`; and of the picture: `scale`, its pixels per unit of detail.
    """
    rng = item_random(split, task, index)
    framing = FRAMINGS[sizes][task]
    picture = TASKS[task].draw(rng, split, framing=framing)
    count = 1 if split == HELD_OUT else rng.randint(2, 4)
    questions = choose_questions(rng, reweighted(picture.questions, framing.asked), count)
    metadata = {**_tags(questions[-1]), "scale": picture.scale}
    return Record((picture.image,), _turns(questions), task, task=task, metadata=metadata)


def _turns(questions: list[Question]) -> tuple[Turn, ...]:
    """The conversation; the picture stands before the first question."""
    pairs = ((Turn("user", question.text), Turn("assistant", question.answer)) for question in questions)
    first, *others = (turn for pair in pairs for turn in pair)
    return (Turn(first.role, f"{IMAGE_SLOT}{first.text}"), *others)


def _tags(question: Question) -> dict[str, str | int]:
    tags = {"kind": question.kind, "level": question.level, "answer": question.answer}
    others = [text for text in dict.fromkeys(question.paraphrases) if text != question.answer]
    return tags | ({"paraphrases": PARAPHRASE_SEPARATOR.join(others)} if others else {})
