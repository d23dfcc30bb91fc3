"""Each filter is provoked, and lets its neighbour through; every drop has its own reason."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("py3langid")
pytest.importorskip("imagehash")

from data_pipelines.ingest import staging
from data_pipelines.ingest.config import IngestConfig, ScorerConfig, load_config
from data_pipelines.ingest.errors import IngestError
from data_pipelines.ingest.lists import compile_lists, load_lists
from data_pipelines.ingest.reading import Reading, UnitStager, exclusions_path
from data_pipelines.ingest.samples import SourceTags
from data_pipelines.ingest.scorers import personal_data
from data_pipelines.records import Record, content_hash, decode
from hypervl_jax.text.conversation import Turn
from tests.data_pipelines import corpora
from tests.data_pipelines.ingest.raw_sources import caption, picture, write_jsonl

SENTENCE = "The committee meets on the first Monday of every month in the town hall to hear all reports."


def stage(
    tmp_path: pathlib.Path, rows: list[dict[str, object]], config: IngestConfig, source: str = ""
) -> tuple[dict[str, int], list[Record]]:
    """(drops by reason, records) of one unit: JSON Lines, or LLaVA's layout in `source`."""
    write_jsonl(tmp_path / "unit.jsonl", rows)
    directory = str(tmp_path / "staging")
    compile_lists(config).save(exclusions_path(directory))
    staging.write_tokenizer(directory, corpora.tokenizer())
    units = ("0",) if source else (str(tmp_path / "unit.jsonl"),)
    reading = Reading(directory, source or f"jsonl:{tmp_path}", {}, units, (), SourceTags("s"), config)
    report = UnitStager(reading).stage(0)
    rows_kept = staging.read_rows(directory, 0)
    assert report == staging.read_unit(directory, 0)
    assert report.records == len(rows_kept) == report.samples - sum(report.drops.values())
    return dict(report.drops), list(map(decode, staging.read_records(directory, rows_kept)))


def stage_pictures(
    tmp_path: pathlib.Path, pictures: list[bytes], config: IngestConfig, **fields: object
) -> tuple[dict[str, int], list[Record]]:
    for number, data in enumerate(pictures):
        (tmp_path / f"{number}.img").write_bytes(data)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": SENTENCE}]
    entries = [{"image": f"{number}.img", "conversations": turns, **fields} for number in range(len(pictures))]
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    return stage(tmp_path, [], config, f"llava:{tmp_path}/chat.json")


def plain(height: int, width: int, form: str = "PNG") -> bytes:
    """A picture with a gradient, of any size."""
    buffer = io.BytesIO()
    ramp = np.linspace(0, 255, height * width).reshape(height, width).astype(np.uint8)
    Image.fromarray(ramp).save(buffer, form)
    return buffer.getvalue()


def test_pictures(tmp_path: pathlib.Path) -> None:
    blank = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(blank, "PNG")
    config = IngestConfig(min_side=32, max_pixels=10_000, max_aspect=4.0, failure_limit=1.0)
    good, cut = plain(32, 128), picture(0, 90, "JPEG")
    pictures = [
        good,
        plain(31, 64),
        plain(32, 129),
        plain(101, 100),
        blank.getvalue(),
        b"GIF89a?",
        cut[: len(cut) // 2],
        b"",
    ]
    drops, records = stage_pictures(tmp_path, pictures, config)
    assert [record.images[0] for record in records] == [good]
    bad = {reason: drops.pop(reason) for reason in list(drops) if reason.startswith("undecodable")}
    assert drops == {"too_small": 1, "extreme_aspect": 1, "too_large": 1, "blank": 1}
    assert bad.keys() >= {"undecodable:truncated", "undecodable:empty"}
    assert sum(bad.values()) == 3


def test_texts(tmp_path: pathlib.Path) -> None:
    repeated = "Buy the new phone now. " * 20
    rows = [
        {"text": SENTENCE},
        {"text": "Short."},
        {"text": SENTENCE * 40},
        {"text": repeated},
        {"question": f"Say after me: {SENTENCE}", "answer": SENTENCE},
        {"question": "Which day is it, Monday or Tuesday?", "answer": "Monday"},
    ]
    config = IngestConfig(min_characters=6, max_characters=1000, leaked_words=4, text_similarity=0)
    drops, records = stage(tmp_path, [*rows, {"text": "Hi."}], config)
    assert drops == {"text_too_long": 1, "repetitive": 1, "answer_leaked": 1, "text_too_short": 1}
    assert [record.turns[-1].text for record in records] == [SENTENCE, "Short.", "Monday"]


def test_language(tmp_path: pathlib.Path) -> None:
    german = "Der Ausschuss trifft sich am ersten Montag jedes Monats im Rathaus der Stadt."
    rows = [{"text": SENTENCE}, {"text": german}, {"text": "Ja."}, {"text": german, "lang": "de"}]
    drops, records = stage(tmp_path, rows, IngestConfig(languages=("en",)))
    assert drops == {"language": 2}
    assert [record.language for record in records] == ["en", "und"]
    _, records = stage(tmp_path, rows, IngestConfig())
    assert [record.language for record in records] == ["en", "de", "und", "de"]


def test_scorers(tmp_path: pathlib.Path) -> None:
    here = "tests.data_pipelines.ingest.raw_sources:brightness"
    dark, light = plain(64, 64), io.BytesIO()
    Image.fromarray(255 - np.asarray(Image.open(io.BytesIO(dark))) // 8).save(light, "PNG")
    config = IngestConfig(scorers=(ScorerConfig("light", here, minimum=200.0),))
    drops, records = stage_pictures(tmp_path, [dark, light.getvalue()], config)
    assert drops == {"score:light": 1}
    assert records[0].quality["light"] > 200


def test_personal_data() -> None:
    texts = [
        "Write to ada@example.org.",
        "Call +44 20 7946 0958 or 555-010-0199 now",
        "Card 4111 1111 1111 1111",
        "1234 5678 9012 3456 in 2024, 17.5 % of 1,024",
    ]
    records = [Record((), (Turn("assistant", text),), "s") for text in texts]
    assert personal_data()(records, [[]] * 4) == [1.0, 2.0, 1.0, 0.0]


def test_opt_out(tmp_path: pathlib.Path) -> None:
    listed = [
        {"text": f"{SENTENCE} {number}", "url": url}
        for number, url in enumerate(
            ["https://www.a.example/x#top", "http://sub.b.example/y", "http://c.example/z", "http://notb.example/"]
        )
    ]
    named = Record((), (Turn("assistant", f"{SENTENCE} named"),), "s")
    lines = ["# opt-outs", "http://a.example/x", "b.example", content_hash(named)]
    (tmp_path / "out.txt").write_text("\n".join(lines))
    config = IngestConfig(opt_out=(str(tmp_path / "out.txt"),), text_similarity=0)
    drops, records = stage(tmp_path, [*listed, {"text": named.turns[0].text}], config)
    assert drops == {"opted_out": 3}
    assert [record.metadata["url"] for record in records] == ["http://c.example/z", "http://notb.example/"]
    (tmp_path / "out.txt").write_text(hashlib.sha256(plain(64, 64)).hexdigest())
    assert stage_pictures(tmp_path, [plain(64, 64), plain(64, 80)], config)[0] == {"opted_out": 1}


def test_decontamination(tmp_path: pathlib.Path) -> None:
    question = "How many people voted in favour of the new bridge in spring?"
    held = [corpora.sample(0, [(64, 64)], 3)]
    corpora.write(tmp_path / "root", "exam", held, split="heldout")
    write_jsonl(
        tmp_path / "exam.jsonl",
        [{"question": question}, {"image": base64.b64encode(picture(5)).decode()}, {"image_hash": "0123456789abcdef"}],
    )
    config = IngestConfig(
        held_out=(str(tmp_path / "root" / "heldout" / "exam"), str(tmp_path / "exam.jsonl")), failure_limit=1.0
    )
    again = io.BytesIO()
    Image.open(io.BytesIO(held[0].images[0])).resize((80, 80)).save(again, "PNG")
    drops, records = stage_pictures(tmp_path, [again.getvalue(), picture(5, 100), picture(6)], config)
    assert drops == {"held_out:image": 2}
    assert [record.images[0] for record in records] == [picture(6)]
    rows = [
        {"question": f"Look. {question.upper()}", "answer": "9"},
        {"question": "How many people voted?", "answer": "8"},
        {"text": f"{caption(1)} {question}"},
    ]
    drops, records = stage(tmp_path, rows, config)
    assert drops == {"held_out:question": 2}
    loaded = load_lists(exclusions_path(str(tmp_path / "staging")))
    assert len(loaded.pictures) == 3
    assert 0x0123456789ABCDEF in loaded.pictures.tolist()


def test_configuration_is_checked(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "min_side: 64\nlanguages: en\nfields: {caption: [alt]}\nscorers: [{name: a, factory: 'm:f', maximum: 0}]\n"
    )
    config = load_config(str(path))
    assert (config.min_side, config.languages, config.fields.caption) == (64, ("en",), ("alt",))
    assert config.scorers == (ScorerConfig("a", "m:f", maximum=0),)
    for text, message in [
        ("min_sides: 3", "did you mean 'min_side'"),
        ("min_side: 0", "at least 1"),
        ("min_side: big", "of type int"),
        ("same_image: some", "drop or same_text or keep"),
        ("a: [", "not YAML"),
        ("scorers: [{name: a}]", "factory"),
        ("- 1", "must be a mapping"),
    ]:
        path.write_text(text)
        with pytest.raises(IngestError, match=message):
            load_config(str(path))
