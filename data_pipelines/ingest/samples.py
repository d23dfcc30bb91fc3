"""From a source's own fields to the common record: pictures, turns, licence, language."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.ingest.config import FieldNames, IngestConfig
from data_pipelines.ingest.errors import unreadable
from data_pipelines.records import MAX_IMAGES, MAX_TURNS, Record
from hypervl_jax.text.conversation import IMAGE_SLOT, ROLES, Turn, count_image_slots

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"} | {
    role: role for role in ROLES
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a reader brings: the fields as the source calls them, and a key that finds the sample in the source again."""

    key: str
    fields: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class SourceTags:
    """What all records of a source have in common."""

    name: str
    task: str = ""
    language: str = ""


def to_record(sample: Sample, tags: SourceTags, config: IngestConfig) -> Record:
    """The record of a sample.

    Its turns come from the first of: a conversation, a question with its answer, a caption, plain text. `language` is empty
    where neither the sample nor the source says it.

    Raises:
        Skip: a failure, because a field is missing or is not what its name says.
    """
    names = config.fields
    images = tuple(_images(_first(sample.fields, names.images)))
    turns = tuple(_turns(sample.fields, names, len(images), config.prompt))
    slots = count_image_slots(turns)
    if slots != len(images):
        raise unreadable("wrong_image_count", f"{len(images)} pictures, {slots} image slots")
    url = _text(sample.fields, names.url)
    return Record(
        images=images,
        turns=turns,
        source=tags.name,
        task=tags.task,
        licence=_text(sample.fields, names.licence),
        language=_text(sample.fields, names.language) or tags.language,
        metadata={"key": sample.key} | ({"url": url} if url else {}),
    )


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _text(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """A text field, stripped; empty where there is none."""
    value = _first(fields, names)
    return "" if value is None else _as_text(value).strip()


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise unreadable("text_not_utf8", str(error)) from error
    if not isinstance(value, str):
        raise unreadable("field_type", f"a {type(value).__name__} where a text is expected")
    return value


def _images(value: Any) -> Iterator[bytes]:
    """The pictures of a field: nothing, one or a list, each bytes or `{"bytes": …}`."""
    items = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if len(items) > MAX_IMAGES:
        raise unreadable("too_many_images", f"{len(items)}, the limit is {MAX_IMAGES}")
    for item in items:
        data = item.get("bytes") if isinstance(item, Mapping) else item
        if not isinstance(data, bytes):
            raise unreadable("image_not_embedded", f"a {type(item).__name__} without the picture's bytes")
        if not data:
            raise unreadable("undecodable:empty")
        yield data


def _turns(fields: Mapping[str, Any], names: FieldNames, images: int, prompt: str) -> list[Turn]:
    conversation = _first(fields, names.conversation)
    if conversation is not None:
        return _with_slots(_conversation(conversation), images)
    question = _text(fields, names.question) or prompt
    answer = _answer(_first(fields, names.answer)) if question else ""
    if question and answer:
        return _with_slots([Turn("user", question), Turn("assistant", answer)], images)
    caption = _text(fields, names.caption)
    if images and caption:
        return _with_slots([Turn("user", prompt), Turn("assistant", caption)], images)
    text = _text(fields, names.text)
    if text and not images:
        return [Turn("assistant", text)]
    raise unreadable("missing_fields", f"has only {', '.join(sorted(fields))}")


def _answer(value: Any) -> str:
    """One answer; of a list the commonest, the first of equals."""
    if isinstance(value, (list, tuple)):
        texts = [_as_text(item).strip() for item in value]
        return Counter(texts).most_common(1)[0][0] if texts else ""
    return "" if value is None else _as_text(value).strip()


def _conversation(value: Any) -> list[Turn]:
    if not isinstance(value, (list, tuple)) or len(value) > MAX_TURNS:
        raise unreadable("conversation_type", f"a {type(value).__name__} where a list of turns is expected")
    return [turn for item in value for turn in _turn(item)]


def _turn(item: Any) -> list[Turn]:
    """The turns of one entry; The Cauldron's `{"user": …, "assistant": …}` is two."""
    if not isinstance(item, Mapping):
        raise unreadable("conversation_type", f"a {type(item).__name__} as a turn")
    if "user" in item and "assistant" in item:
        return [Turn(role, _as_text(item[role]).strip()) for role in ("user", "assistant")]
    role = item.get("from", item.get("role"))
    if role not in _ROLES:
        raise unreadable("unknown_role", repr(role)[:80])
    return [Turn(_ROLES[role], _content(item.get("value", item.get("content"))).strip())]


def _content(value: Any) -> str:
    """The text of a turn; a list of chat parts gives their texts, with a slot for each picture."""
    if isinstance(value, (list, tuple)):
        return "".join(_part(part) for part in value)
    return _as_text(value)


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return IMAGE_SLOT
    if kind != "text":
        raise unreadable("conversation_type", f"a part of type {kind!r} in a turn")
    return _as_text(part.get("text"))


def _with_slots(turns: list[Turn], images: int) -> list[Turn]:
    """The same turns; where no turn says where the pictures go, they open the first of the user."""
    if not images or count_image_slots(turns):
        return turns
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise unreadable("wrong_image_count", f"{images} pictures and no turn of the user")
    opened = Turn("user", IMAGE_SLOT * images + turns[first].text)
    return [*turns[:first], opened, *turns[first + 1 :]]
