"""Benchmark files in VLMEvalKit's format: tab-separated rows with the pictures inside, to questions; and predictions back to rows.

Columns: index, question, image (base64, a list of base64, or the index of another row with the same picture) or image_path (below
images/NAME beside the file), answer, options A, B, C, …, hint, category, split. Nothing in a file is executed.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import hashlib
import pathlib
import re
import string
from collections.abc import Mapping, Sequence

from hypervl_jax.architecture import ConfigError
from hypervl_jax.evaluation.benchmarks import HeldoutTask, Item, TaskResult
from hypervl_jax.evaluation.metrics import MULTIPLE_CHOICE
from hypervl_jax.evaluation.registry import BY_GROUP, CIRCULAR, CIRCULAR_STEP, HALLUSION, Benchmark
from hypervl_jax.text.conversation import IMAGE_SLOT, Turn

CELL_LIMIT = 1 << 28
"""Longest cell in characters, which holds a picture of 190 MiB: a broken quote must not read a whole file into one cell."""

REFERENCE_LIMIT = 64
"""An image cell of at most so many characters is the index of the row that holds the picture."""

_FORMULAS = "Handwritten Mathematical Expression Recognition"
"""OCRBench's category with a rule of its own."""

_NUMBERED_SLOT = re.compile(r"<image (\d+)>")

Row = Mapping[str, str]


class BenchmarkFileError(ValueError):
    """A benchmark file that cannot be used; the message says where and why."""


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """All rows of a file, cells as text; empty cells are left out. Raises `BenchmarkFileError`."""
    csv.field_size_limit(CELL_LIMIT)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [_filled(row) for row in csv.DictReader(file, delimiter="\t")]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise BenchmarkFileError(f"{path} cannot be read as a benchmark file ({error})") from error
    for number, row in enumerate(rows, 1):
        missing = [name for name in ("index", "question") if name not in row]
        if missing:
            raise BenchmarkFileError(f"row {number} of {path} has no {' and no '.join(missing)}")
    return rows


def _filled(row: Mapping[str | None, str | list[str] | None]) -> dict[str, str]:
    return {name: value for name, value in row.items() if name and isinstance(value, str) and value not in ("", "nan")}


def read_task(directory: str | pathlib.Path, task: Benchmark, limit: int | None = None) -> HeldoutTask:
    """The questions of NAME.tsv in a directory, in the file's order; `limit` takes the first ones.

    Raises:
        BenchmarkFileError: the file is missing or damaged, or a row has no picture that can be found.
    """
    path = pathlib.Path(directory) / f"{task.name}.tsv"
    rows = read_rows(path)
    pictures = {row["index"]: row["image"] for row in rows if len(row.get("image", "")) > REFERENCE_LIMIT}
    wanted = [row for row in rows if not task.split or row.get("split") == task.split][:limit]
    if not wanted:
        raise BenchmarkFileError(f"{path} holds no row{f' of split {task.split!r}' if task.split else ''}")
    decoded: dict[str, tuple[bytes, ...]] = {}
    items = [_item(task, row, _images(path, task, row, pictures, decoded)) for row in wanted]
    return HeldoutTask(task.name, tuple(items), task.metric, task.max_new_tokens)


def _images(
    path: pathlib.Path, task: Benchmark, row: Row, pictures: Row, decoded: dict[str, tuple[bytes, ...]]
) -> tuple[bytes, ...]:
    """The pictures of a row; those of a cell that several rows refer to are decoded once."""
    if "image" not in row:
        names = _list(row["image_path"]) if "image_path" in row else []
        return tuple(_read_picture(path, task, name) for name in names)
    owner = row["index"] if row["index"] in pictures else row["image"]
    if owner not in pictures:
        raise BenchmarkFileError(
            f"row {row['index']} of {path} refers to the picture of row {owner[:40]!r}, which has none"
        )
    if owner not in decoded:
        try:
            decoded[owner] = tuple(base64.b64decode(text, validate=True) for text in _list(pictures[owner]))
        except binascii.Error as error:
            raise BenchmarkFileError(f"row {owner} of {path} has a picture that is no base64 ({error})") from error
    return decoded[owner]


def _read_picture(path: pathlib.Path, task: Benchmark, name: str) -> bytes:
    home = (path.parent / "images" / task.name).resolve()
    file = (home / name).resolve()
    if not file.is_relative_to(home):
        raise BenchmarkFileError(f"{path} names the picture {name!r} outside of {home}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise BenchmarkFileError(f"picture {file} of {path} cannot be read ({error.strerror})") from error


def _list(cell: str) -> list[str]:
    """A cell that may be a written list, as its parts."""
    if cell.startswith("[") and cell.endswith("]"):
        try:
            found = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [cell]
        if isinstance(found, list):
            return [str(part) for part in found]
    return [cell]


def _item(task: Benchmark, row: Row, images: tuple[bytes, ...]) -> Item:
    choices = _choices(row)
    text, placed = _question(task, row, choices, images)
    return Item(
        identity=_identity(row, images),
        task=task.name,
        turns=(Turn("user", text),),
        images=placed,
        answers=_answers(row, choices),
        kind=row.get("category", ""),
        choices=choices,
        metric="ocr_bench_formula" if task.metric == "ocr_bench" and row.get("category") == _FORMULAS else "",
        groups=_groups(task, row),
    )


def _identity(row: Row, images: Sequence[bytes]) -> str:
    """A hash of the row, its pictures included."""
    digest = hashlib.sha256()
    for name in sorted(row.keys() - {"image"}):
        digest.update(f"{name}\0{row[name]}\0".encode())
    for image in images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:32]


def _choices(row: Row) -> tuple[str, ...]:
    """Options in the columns A, B, … up to the first empty one, or MathVista's written list."""
    columns = []
    for letter in string.ascii_uppercase:
        if letter not in row:
            break
        columns.append(row[letter])
    listed = _list(row["choices"]) if row.get("question_type") == "multi_choice" and "choices" in row else []
    return tuple(columns or listed)


def _answers(row: Row, choices: Sequence[str]) -> tuple[str, ...]:
    """Right answers: letters where there are options. Empty where the file keeps them secret."""
    if choices and "answer_option" in row:
        return (row["answer_option"],)
    if "answer" not in row:
        return ()
    return (row["answer"].strip(),) if choices else tuple(_list(row["answer"]))


def _question(
    task: Benchmark, row: Row, choices: Sequence[str], images: tuple[bytes, ...]
) -> tuple[str, tuple[bytes, ...]]:
    """Hint, question, options and instruction with slots for pictures, and the pictures in the slots' order.

    Pictures come first, unless the text says with `<image 1>` where they go. Raises `BenchmarkFileError`.
    """
    options = (f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, choices, strict=False))
    instruction = "" if task.metric == MULTIPLE_CHOICE and not choices else task.instruction
    hint = f"Hint: {row['hint']}" if "hint" in row else ""
    text = "\n".join(part for part in (hint, row["question"], *options, instruction) if part).replace(IMAGE_SLOT, "")
    numbers = [int(found) for found in _NUMBERED_SLOT.findall(text)]
    if not images or not numbers:
        return IMAGE_SLOT * len(images) + _NUMBERED_SLOT.sub("", text), images
    if not all(1 <= number <= len(images) for number in numbers):
        raise BenchmarkFileError(
            f"row {row['index']} of {task.name} names picture {max(numbers)} and has {len(images)} pictures"
        )
    return _NUMBERED_SLOT.sub(IMAGE_SLOT, text), tuple(images[number - 1] for number in numbers)


def _groups(task: Benchmark, row: Row) -> tuple[str, ...]:
    """What the item is part of, for the task's aggregate; empty where the row does not say."""
    if task.aggregate == CIRCULAR and row["index"].isdecimal():
        return (str(int(row["index"]) % CIRCULAR_STEP),)
    if task.aggregate == BY_GROUP:
        return (row.get("split", row.get("type", "")),)
    if task.aggregate == HALLUSION:
        fields = row["index"].split("_")
        if len(fields) >= 6:
            home = f"{row.get('l2-category', '')}_{fields[3]}"
            return home, f"{home}_figure_{fields[4]}", f"{home}_question_{fields[5]}"
    return ()


def write_predictions(
    directory: str | pathlib.Path, path: pathlib.Path, task: HeldoutTask, split: str, result: TaskResult
) -> None:
    """The rows of a file without pictures, with a column `prediction`: what VLMEvalKit's judges and MMBench's server take.

    Args:
        directory: of the benchmark files.
        path: to write, tab-separated.
        task: as `read_task` gave it.
        split: of the benchmark; all rows when empty.
        result: answers to some or all of its items.
    """
    rows = [
        row for row in read_rows(pathlib.Path(directory) / f"{task.name}.tsv") if not split or row.get("split") == split
    ]
    said = {row.identity: row.prediction for row in result.items}
    kept = [(row, said[item.identity]) for row, item in zip(rows, task.items, strict=False) if item.identity in said]
    columns = list(dict.fromkeys(name for row, _ in kept for name in row if name != "image"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(
            file, [*columns, "prediction"], delimiter="\t", extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows({**row, "prediction": text} for row, text in kept)


def parse_scores(text: str) -> dict[str, float]:
    """Scores of judges and servers, "MMVet=44.2,MMBench_TEST_EN_V11=70.1". Raises `ConfigError`."""
    try:
        pairs = [part.split("=") for part in text.split(",") if part.strip()]
        return {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise ConfigError(f"--scores {text!r} is no list of NAME=SCORE") from None
