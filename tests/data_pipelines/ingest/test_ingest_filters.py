"""Each filter is provoked, and lets its neighbour through; every drop has its own reason."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import pathlib

import numpy as np
import pytest
from PIL import Image, ImageOps

pytest.importorskip("py3langid")
pytest.importorskip("imagehash")

from data_pipelines.ingest import staging
from data_pipelines.ingest.config import IngestConfig, ScorerConfig, load_config
from data_pipelines.ingest.errors import IngestError, Skip
from data_pipelines.ingest.lists import compile_lists, load_lists
from data_pipelines.ingest.readers.registry import make_reader
from data_pipelines.ingest.reading import Reading, UnitStager, check_failure_rate, exclusions_path
from data_pipelines.ingest.samples import SourceTags
from data_pipelines.ingest.scorers import Scorer, load_scorer, personal_data, score
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
    source = source or f"jsonl:{tmp_path}/unit.jsonl"
    units = tuple(make_reader(source, {}).units())
    reading = Reading(directory, source, {}, units, (), SourceTags("s"), config)
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


def test_sound_texts_with_marks_of_the_template_are_no_failures(tmp_path: pathlib.Path) -> None:
    """More than the failure limit of a text source may be about HTML, reason aloud, or call tools."""
    talk = lambda *turns: {"messages": [{"role": role, "content": text} for role, text in turns]}
    rows = [
        {"text": f"{SENTENCE} In SVG an <image> shows a raster picture."},
        talk(("user", "What is 1 + 1?"), ("assistant", "<think>Easy.</think>The sum of both is two.")),
        talk(("user", "What time is it?"), ("tool", "12:00"), ("assistant", "It is noon, to the minute.")),
        {"text": SENTENCE},
    ]
    drops, records = stage(tmp_path, rows, IngestConfig(failure_limit=0.0))
    assert drops == {"image_mark_in_text": 1, "reasoning": 1, "tool_role": 1}
    assert not staging.read_unit(str(tmp_path / "staging"), 0).failures
    assert [record.turns for record in records] == [(Turn("assistant", SENTENCE),)]


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


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda records, pictures: 1 / 0, "scorer 'clip' fails on the batch from .*: division by zero"),
        (lambda records, pictures: [math.nan], "one finite number a record"),
        (lambda records, pictures: [1.0, 2.0], "2 numbers.* for 1 records"),
        (lambda records, pictures: [None], "TypeError"),
    ],
)
def test_scorer_that_fails_is_named(scorer: Scorer, message: str) -> None:
    with pytest.raises(IngestError, match=message):
        score("clip", scorer, [Record((), (Turn("assistant", SENTENCE),), "s", metadata={"key": "x:1"})], [[]])


def test_factory_of_something_else_is_refused() -> None:
    with pytest.raises(IngestError, match="it returns a str, not a function"):
        load_scorer(ScorerConfig("here", "os:getcwd"))


@pytest.mark.parametrize("tag", ["english", "EN"])
def test_language_that_is_never_detected_is_refused(tmp_path: pathlib.Path, tag: str) -> None:
    with pytest.raises(IngestError, match=f"'{tag}' is none of py3langid's tags, which are ace, af, "):
        stage(tmp_path, [{"text": SENTENCE}], IngestConfig(languages=(tag,)))


def test_one_damaged_file_stops_the_ingest_unless_it_is_allowed() -> None:
    """A file may have lost any number of samples, so a share of samples says nothing."""
    report = staging.UnitReport(10_000, 9_998, {"file_damaged": 2}, {"file_damaged": 2}, {"file_damaged": "x.tar"})
    check_failure_rate(report, IngestConfig(failure_limit=0.0, damaged_files=2))
    with pytest.raises(IngestError, match=r"damaged files: 2, such as x\.tar; .* set damaged_files to 2"):
        check_failure_rate(report, IngestConfig(failure_limit=1.0, damaged_files=1))


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
    assert loaded.counts() == {
        "opt_outs": 0,
        "hashes of held-out pictures and their mirror images": 5,
        "runs of words of held-out questions": len(question.split()) - config.held_out_words + 1,
    }
    assert 0x0123456789ABCDEF in loaded.pictures.tolist()


def test_a_mirrored_held_out_picture_is_kept_out(tmp_path: pathlib.Path) -> None:
    """However it was scaled and compressed; a source and a list of pictures alike."""
    held = [corpora.sample(0, [(64, 64)], 3)]
    corpora.write(tmp_path / "root", "exam", held, split="heldout")
    write_jsonl(tmp_path / "exam.jsonl", [{"image": base64.b64encode(picture(5)).decode()}])
    config = IngestConfig(held_out=(str(tmp_path / "root" / "heldout" / "exam"), str(tmp_path / "exam.jsonl")))
    mirrored = []
    for image in (held[0].images[0], picture(5)):
        buffer = io.BytesIO()
        turned = ImageOps.mirror(Image.open(io.BytesIO(image)).convert("RGB"))
        turned.resize((100, 100)).save(buffer, "JPEG", quality=80)
        mirrored.append(buffer.getvalue())
    drops, records = stage_pictures(tmp_path, [*mirrored, picture(6)], config)
    assert drops == {"held_out:image": 2}
    assert [record.images[0] for record in records] == [picture(6)]


def held_out(tmp_path: pathlib.Path, rows: list[dict[str, object]], **settings: object) -> IngestConfig:
    write_jsonl(tmp_path / "exam.jsonl", rows)
    return IngestConfig(held_out=(str(tmp_path / "exam.jsonl"),), text_similarity=0, **settings)


def test_instruction_that_many_held_out_questions_share_is_not_looked_for(tmp_path: pathlib.Path) -> None:
    template = "Answer the question using a single word or phrase, please."
    exam = [
        {"question": f"What stands left of object {number} in this wide view of town? {template}"}
        for number in range(30)
    ]
    config = held_out(tmp_path, exam, held_out_words=8)
    rows = [
        {"question": f"Which colour has the roof? {template}", "answer": "red"},
        {"question": f"What stands left of object 7 in this wide view of town? {template}", "answer": "a mill"},
        {"question": "Where?", "answer": "Here: what stands left of object 7 in this wide view of town?"},
    ]
    drops, records = stage(tmp_path, rows, config)
    assert drops == {"held_out:question": 1}
    assert [record.turns[1].text for record in records] == ["red", rows[2]["answer"]]


def test_question_about_one_picture_in_several_orders_is_no_template(tmp_path: pathlib.Path) -> None:
    question = "Which of these four names is that of the mountain in the picture?"
    exam = [{"image_hash": "0123456789abcdef", "question": f"{question} {order}"} for order in ("AB", "BA", "CA", "AC")]
    drops, _ = stage(tmp_path, [{"question": question, "answer": "Rigi"}, {"text": SENTENCE}], held_out(tmp_path, exam))
    assert drops == {"held_out:question": 1}


def test_prompt_of_the_settings_is_not_looked_for(tmp_path: pathlib.Path) -> None:
    prompt = "Describe what you can see in this picture in one sentence."
    turns = [Turn("user", f"<image>{prompt}"), Turn("assistant", SENTENCE)]
    exclusions = compile_lists(
        held_out(tmp_path, [{"image": base64.b64encode(picture(5)).decode(), "question": prompt}])
    )
    with pytest.raises(Skip, match="held_out:question"):
        exclusions.check(Record((picture(6),), tuple(turns), "s"), [])
    exclusions = compile_lists(
        dataclasses.replace(held_out(tmp_path, [{"image_hash": "f" * 16, "question": prompt}]), prompt=prompt)
    )
    exclusions.check(Record((picture(6),), tuple(turns), "s"), [])


def test_held_out_question_in_chinese(tmp_path: pathlib.Path) -> None:
    config = held_out(tmp_path, [{"question": "委员会在哪一天开会讨论新桥的修建计划?"}])
    rows = [
        {"question": "请问委员会在哪一天开会讨论新桥的修建计划", "answer": "星期一"},
        {"question": "图中有多少人站在桥上?", "answer": "五人"},
    ]
    drops, records = stage(tmp_path, rows, config)
    assert (drops, [record.turns[1].text for record in records]) == ({"held_out:question": 1}, ["五人"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "x"},
            "line 1 of held-out list .*unknown key 'prompt'; an entry has any of image, image_hash, question",
        ),
        ({"question": "How many?", "images": "a.png"}, "unknown key 'images'"),
        ({"question": ["How many?"]}, "an object of texts"),
        ({"question": "How many?"}, "would keep nothing out: of 1 entries"),
    ],
)
def test_held_out_list_that_does_nothing_is_refused(
    tmp_path: pathlib.Path, row: dict[str, object], message: str
) -> None:
    with pytest.raises(IngestError, match=message):
        compile_lists(held_out(tmp_path, [row]))
    with pytest.raises(IngestError, match=r"exam\.parquet is not JSON Lines; ingest it first"):
        compile_lists(IngestConfig(held_out=(str(tmp_path / "exam.parquet"),)))


def test_opt_outs_in_every_form(tmp_path: pathlib.Path) -> None:
    def refused(line: str, url: str) -> bool:
        (tmp_path / "out.txt").write_text(line)
        lists = compile_lists(IngestConfig(opt_out=(str(tmp_path / "out.txt"),)))
        try:
            lists.check(Record((), (Turn("assistant", "x"),), "s", metadata={"url": url}), [])
        except Skip:
            return True
        return False

    assert refused("example.com/path", "https://www.example.com/path")
    assert not refused("example.com/path", "https://example.com/other")
    assert refused("*.example.com", "http://a.example.com/x")
    assert refused("Example.com", "http://example.com:8080/x")
    for line in ("example.com:8080", "*.example.*", "*.example.com/x", "some words", "e3b0c442", "http://"):
        with pytest.raises(IngestError, match="is no URL, domain"):
            refused(line, "http://example.com/")


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
        ("max_characters: -1", "at least 1 and at least min_characters"),
        ("{max_characters: 5, min_characters: 6}", "at least min_characters, 6"),
        ("blank_deviation: -3", "in 0..127"),
        ("leaked_words: -2", "at least 0"),
        ("language_characters: -1", "at least 0"),
        (
            "scorers: [{name: a, factory: 'm:f', minimum: 5, maximum: 1}]",
            "'a': minimum is 5; it must be no more than maximum",
        ),
        ("scorers: [{name: a, factory: 'm:f'}, {name: a, factory: 'm:g'}]", "of different names"),
        ("scorers: [{name: a}]", "factory"),
        ("- 1", "must be a mapping"),
    ]:
        path.write_text(text)
        with pytest.raises(IngestError, match=message):
            load_config(str(path))
