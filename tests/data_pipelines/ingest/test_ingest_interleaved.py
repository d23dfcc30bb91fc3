"""Several pictures in one conversation: OBELICS's web pages with img2dataset's folders, and Mantis's zips beside its Parquet."""

from __future__ import annotations

import pathlib

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_pipelines.ingest.errors import IngestError
from data_pipelines.ingest.readers.registry import make_reader
from data_pipelines.records import Record, decode, encode, index_row
from hypervl_jax.architecture import TilingConfig
from hypervl_jax.text.conversation import Turn, encode_conversation
from hypervl_jax.vision.anyres import plan_image
from tests.data_pipelines.corpora import tokenizer
from tests.data_pipelines.ingest.raw_sources import picture
from tests.data_pipelines.ingest.test_ingest_llava import write_tar, zip_of
from tests.data_pipelines.ingest.test_ingest_readers import read_all, reasons

PAGES = [
    {"texts": ["First.", None, "Between.", "More.", None, None, "Last.", None], "images": [None, "u/0", None, None, "u/1", "u/2", None, "u/0"]},
    {"texts": [None, "Only gone."], "images": ["u/gone", None]},
    {"texts": [None, "After one that is gone."], "images": ["u/gone", None]},
    {"texts": [None, None, "Two."], "images": ["u/gone", "u/2", None]},
]  # fmt: skip


def write_pages(folder: pathlib.Path) -> str:
    """A Parquet file of pages, and what img2dataset would leave of its addresses."""
    (folder / "data").mkdir()
    columns = {"images": pa.list_(pa.string()), "metadata": pa.string(), "texts": pa.list_(pa.string())}
    rows = [{"metadata": "[]", **page} for page in PAGES]
    pa.parquet.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), folder / "data" / "train-0.parquet")
    fetched = folder / "pictures" / "train-0"
    fetched.mkdir(parents=True)
    for shard, numbers in enumerate(([0, 1], [2])):
        keys = [f"{shard:05d}{number:04d}" for number in numbers]
        write_tar(
            fetched / f"{shard:05d}.tar",
            {f"{key}.jpg": picture(number) for key, number in zip(keys, numbers, strict=True)},
        )
        table = {"url": [f"u/{number}" for number in numbers], "key": keys, "status": ["success"] * len(keys)}
        failed = {"url": ["u/gone"], "key": [f"{shard:05d}0009"], "status": ["failed_to_download"]}
        pa.parquet.write_table(
            pa.table({name: table[name] + failed[name] for name in table}), fetched / f"{shard:05d}.parquet"
        )
        (fetched / f"{shard:05d}_stats.json").write_text("{}")
    return f"interleaved:{folder}/data/*.parquet"


def test_pages_keep_their_order(tmp_path: pathlib.Path) -> None:
    items = read_all(write_pages(tmp_path), pictures=f"{tmp_path}/pictures")
    assert reasons(items) == ["no_picture_left", "no_picture_left"]
    assert not any(item.failure for item in items if not isinstance(item, Record))
    first, second = (item for item in items if isinstance(item, Record))
    assert first.turns == (
        Turn("assistant", "First."),
        Turn("user", "<image>"),
        Turn("assistant", "Between.\n\nMore."),
        Turn("user", "<image><image>"),
        Turn("assistant", "Last."),
    )
    assert first.images == (picture(0), picture(1), picture(2))
    assert (second.images, second.turns) == ((picture(2),), (Turn("user", "<image>"), Turn("assistant", "Two.")))


def test_a_page_is_a_whole_record(tmp_path: pathlib.Path) -> None:
    """Its index row and its ids agree, and the loss counts its texts."""
    record = read_all(write_pages(tmp_path), pictures=f"{tmp_path}/pictures")[0]
    assert decode(encode(record)) == record
    row, tiling, words = index_row(record, tokenizer()), TilingConfig(), tokenizer()
    plans = [plan_image(64, 64, 1.0, tiling)] * 3
    encoded = encode_conversation(record.turns, words, plans, tiling)
    assert (encoded.visual_index < 0).sum() >= row.text_length
    assert encoded.loss_weights.sum() == sum(
        len(words.encode(text)) + 1 for text in ("First.", "Between.\n\nMore.", "Last.")
    )


def test_folder_of_pictures_is_asked_for(tmp_path: pathlib.Path) -> None:
    source = write_pages(tmp_path)
    with pytest.raises(IngestError, match="needs --option pictures=FOLDER"):
        make_reader(source, {}).units()
    reader = make_reader(source, {"pictures": f"{tmp_path}/nowhere"})
    with pytest.raises(IngestError, match="nowhere/train-0 names no file"):
        list(reader.read(reader.units()[0]))


def test_mantis_zip_beside_its_parquet(tmp_path: pathlib.Path) -> None:
    image = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    talk = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    asked = [
        {"role": "user", "content": "<image> and <image>: what has changed?"},
        {"role": "assistant", "content": "The blotches."},
    ]
    named, embedded = {"bytes": None, "path": "pics/0.png"}, {"bytes": picture(7), "path": "7.png"}
    rows = [
        {"id": "0", "images": [named, embedded], "conversation": asked, "source": "x"},
        {"id": "1", "images": [named, named | {"path": "pics/none.png"}], "conversation": asked, "source": "x"},
    ]
    schema = pa.schema({"id": pa.string(), "images": image, "conversation": talk, "source": pa.string()})
    for subset in ("birds", "nlvr2"):
        (tmp_path / subset).mkdir()
        pa.parquet.write_table(pa.Table.from_pylist(rows, schema), tmp_path / subset / "train-00000-of-00001.parquet")
        seed = ("birds", "nlvr2").index(subset)
        (tmp_path / subset / "train_images.zip").write_bytes(zip_of({f"{subset}/pics/0.png": picture(seed)}))
    items = read_all(f"parquet:{tmp_path}/*/train-*.parquet", images="{folder}/train_images.zip")
    assert reasons(items) == ["missing_file", "missing_file"]
    assert [record.images for record in items[::2]] == [(picture(0), picture(7)), (picture(1), picture(7))]
    assert items[0].turns[1] == Turn("assistant", "The blotches.")
    assert reasons(read_all(f"parquet:{tmp_path}/birds/*.parquet")) == ["image_not_embedded", "image_not_embedded"]
