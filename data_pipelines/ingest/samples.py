"""From a source's own fields to the common record: pictures, turns, licence, language."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.ingest.boxes import box_text, marked_caption
from data_pipelines.ingest.config import FieldNames, IngestConfig
from data_pipelines.ingest.errors import Skip, unreadable
from data_pipelines.records import MAX_IMAGES, MAX_TURNS, Record
from hypervl_jax.text.conversation import IMAGE_SLOT, ROLES, Turn, count_image_slots

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"} | {
    role: role for role in ROLES
}

_TOOL_ROLES = frozenset(
    ["tool", "function", "function_call", "function_response", "tool_call", "observation", "ipython"]
)
"""Sound data that the model is not trained on: it has no turns for them."""

_NUMBER = re.compile(r"([0-9]{1,18})")
_PICTURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|....ftyp(?:avif|heic|mif1)", re.DOTALL
)
"""First bytes of JPEG, PNG, GIF, WebP, BMP, TIFF, AVIF and HEIF."""
_PICTURE_PATH = re.compile(r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|avif|heic)$", re.IGNORECASE)


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

    Its turns come from the first of: a conversation, boxes, a question with its answer, a caption, plain text. `language` is empty
    where neither the sample nor the source says it.

    Raises:
        Skip: a failure, because a field is missing or is not what its name says; no failure for turns of tools.
    """
    names = config.fields
    used = _picture_fields(sample.fields, names)
    _check_unused(sample.fields, used, names)
    images = tuple(image for name in used for image in _images(sample.fields[name]))
    if config.images == ("none" if images else "required"):
        raise unreadable(
            f"picture_{'unexpected' if images else 'missing'}", f"the settings say images: {config.images}"
        )
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


def natural_order(name: str) -> list[str | int]:
    """Key that sorts names by the numbers in them, `page2` before `page10`."""
    return [int(part) if place % 2 else part for place, part in enumerate(_NUMBER.split(name))]


def _picture_fields(fields: Mapping[str, Any], names: FieldNames) -> list[str]:
    """The first of `images` that the sample has; of a name with `*`, all fields that match."""
    present = [field for field, value in fields.items() if value is not None]
    found = (fnmatch.filter(present, name) if "*" in name else [name] * (name in present) for name in names.images)
    return sorted(next(filter(None, found), []), key=natural_order)


def _check_unused(fields: Mapping[str, Any], used: Sequence[str], names: FieldNames) -> None:
    """A picture under a name that nobody reads would be lost, and its sample pass for text."""
    for name, value in fields.items():
        if name not in used and name not in names.ignored and _holds_picture(value):
            raise unreadable(
                "unused_picture", f"field {name!r} holds a picture; name it in fields.images or in fields.ignored"
            )


def _holds_picture(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_picture(item) for item in value if isinstance(item, (bytes, Mapping)))
    if isinstance(value, Mapping):
        path = value.get("path")
        return _holds_picture(value.get("bytes")) or (isinstance(path, str) and bool(_PICTURE_PATH.search(path)))
    return isinstance(value, bytes) and bool(_PICTURE.match(value))


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
    if _first(fields, (*names.places, *names.elements, *names.box)) is not None:
        return _with_slots(_placed(fields, names, prompt), images)
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


def _placed(fields: Mapping[str, Any], names: FieldNames, prompt: str) -> list[Turn]:
    """Turns whose answers have boxes: a caption with places, or an exchange for each element."""
    captions = _first(fields, names.places)
    if captions is not None:
        return [Turn("user", prompt), Turn("assistant", marked_caption(captions).strip())]
    elements = _first(fields, names.elements)
    if elements is None:
        elements = [fields]
    if not isinstance(elements, (list, tuple)) or not all(isinstance(element, Mapping) for element in elements):
        raise unreadable("field_type", f"a {type(elements).__name__} where a list of objects with boxes is expected")
    if not 1 <= len(elements) <= MAX_TURNS // 2:
        raise unreadable(
            "missing_fields", f"{len(elements)} elements with boxes; 1 to {MAX_TURNS // 2} make a conversation"
        )
    return [turn for element in elements for turn in _element(element, names, prompt)]


def _element(element: Mapping[str, Any], names: FieldNames, prompt: str) -> list[Turn]:
    question, box = _text(element, names.question), _first(element, names.box)
    if not question or box is None:
        raise unreadable("missing_fields", f"an element has only {', '.join(sorted(element))}")
    return [Turn("user", f"{prompt} {question}".strip()), Turn("assistant", box_text(box))]


def _answer(value: Any) -> str:
    """One answer; of a list the commonest, the first of equals."""
    if isinstance(value, (list, tuple)):
        texts = [_as_text(item).strip() for item in value]
        return Counter(texts).most_common(1)[0][0] if texts else ""
    return "" if value is None else _as_text(value).strip()


def _conversation(value: Any) -> list[Turn]:
    if isinstance(value, Mapping):
        value = _transposed(value)
    if not isinstance(value, (list, tuple)) or len(value) > MAX_TURNS:
        raise unreadable("conversation_type", f"a {type(value).__name__} where a list of turns is expected")
    return [turn for item in value for turn in _turn(item)]


def _transposed(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a conversation that is kept by column, as TFDS keeps sequences and PixMo-Docs its questions."""
    if not all(isinstance(column, (list, tuple)) for column in columns.values()):
        raise unreadable(
            "conversation_type", f"an object with {', '.join(sorted(columns))} where a list of turns is expected"
        )
    if len({len(column) for column in columns.values()}) > 1:
        raise unreadable("conversation_type", f"lists of unequal length under {', '.join(sorted(columns))}")
    return [dict(zip(columns, entry, strict=True)) for entry in zip(*columns.values(), strict=True)]


def _turn(item: Any) -> list[Turn]:
    """The turns of one entry; `{"user": …, "assistant": …}` (The Cauldron) and `{"question": …, "answer": …}` are two."""
    if not isinstance(item, Mapping):
        raise unreadable("conversation_type", f"a {type(item).__name__} as a turn")
    for asked, answered in (("user", "assistant"), ("question", "answer")):
        if asked in item and answered in item:
            return [Turn("user", _as_text(item[asked]).strip()), Turn("assistant", _as_text(item[answered]).strip())]
    role = _as_text(item.get("from", item.get("role", "")))
    if role in _TOOL_ROLES:
        raise Skip("tool_role", repr(role))
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
