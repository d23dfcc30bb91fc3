"""`s3://` through its real client, s3fs, against a store that speaks S3 on this machine (moto): ingest from and to a bucket, a loader
that reads the result there, and one sentence for each thing that goes wrong."""

from __future__ import annotations

import contextlib
import io
import itertools
import pathlib
import re
import socket
import urllib.request
from collections.abc import Iterator

import pytest

pytest.importorskip("apache_beam")
pytest.importorskip("webdataset")
pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import s3fs
from moto.server import ThreadedMotoServer

from data_pipelines.errors import RecordError
from data_pipelines.ingest import storage
from data_pipelines.ingest.__main__ import main
from data_pipelines.lanes import LaneLoader, MissingData
from hypervl_jax.text.tokenizer import load_tokenizer
from tests.data_pipelines.corpora import SHAPE, TILING, assert_batches_equal, config, tokenizer
from tests.data_pipelines.ingest.raw_sources import write_webdataset

SAMPLES, PER_TAR = 24, 12
MARK = "there is no bucket s3://nowhere"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Raw tars, and the source that an ingest makes of them here."""
    root = tmp_path_factory.mktemp("s3")
    write_webdataset(root / "raw", SAMPLES, PER_TAR)
    tokenizer().save(root)
    (root / "filters.yaml").write_text("failure_limit: 0.2\nmin_side: 8\n")
    assert ingest(root, f"{root}/raw", f"{root}/data/train/notes") == (0, "")
    return root


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    yield f"http://{host}:{port}"
    store.stop()


@pytest.fixture
def bucket(
    local: pathlib.Path, endpoint: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An s3:// bucket with the raw tars, and an environment in which s3fs finds its store."""
    names = {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in {**names, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HYPERVL_DATA_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    store, name = s3fs.S3FileSystem(), f"b{abs(hash(tmp_path))}"
    store.mkdir(name)
    store.put(f"{local}/raw", f"{name}/raw", recursive=True)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()


def ingest(root: pathlib.Path, raw: str, output: str, *more: str) -> tuple[int, str]:
    """(exit status, standard error) of the command."""
    named = {"--source": f"webdataset:{raw}/*.tar", "--name": "notes", "--output": output, "--licence": "CC0-1.0"}
    named |= {"--tokenizer": str(root), "--config": f"{root}/filters.yaml", "--tiling": "tiny"}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main([text for pair in named.items() for text in pair] + list(more))
    return status, errors.getvalue()


def test_from_bucket_to_bucket_to_batches(local: pathlib.Path, bucket: str) -> None:
    assert ingest(local, f"{bucket}/raw", f"{bucket}/data/train/notes") == (0, "")
    store, made = s3fs.S3FileSystem(use_listings_cache=False), local / "data" / "train" / "notes"
    found = {path.rpartition("/")[2]: store.cat_file(path) for path in store.find(f"{bucket}/data")}
    assert found.keys() == {path.name for path in made.iterdir()}
    (index,) = made.glob("*.index.arrow")  # records also hold where they came from
    assert found[index.name] == index.read_bytes()
    status, message = ingest(local, f"{bucket}/raw", f"{bucket}/data/train/notes")
    assert (status, "already holds a complete source" in message) == (1, True)
    loaders = [
        LaneLoader(config(root, {"notes": 1.0}), SHAPE, TILING, load_tokenizer(local))
        for root in (local / "data", f"{bucket}/data")
    ]
    pairs = zip(*(each.iterate(each.initial_states()) for each in loaders), strict=True)
    for near, far in itertools.islice(pairs, 2):
        assert_batches_equal(far.batch, near.batch)


def test_what_another_process_writes_is_seen(bucket: str) -> None:
    assert not storage.exists(f"{bucket}/units/0.json")
    assert storage.names_in(f"{bucket}/raw") == ["00000.tar", "00001.tar"]
    other = s3fs.S3FileSystem(skip_instance_cache=True)
    other.pipe_file(f"{bucket}/raw/00002.tar", b"x")
    assert storage.exists(f"{bucket}/raw/00002.tar")
    assert storage.names_in(f"{bucket}/raw") == ["00000.tar", "00001.tar", "00002.tar"]
    assert storage.create(f"{bucket}/owner", b"mine")
    assert not storage.create(f"{bucket}/owner", b"yours")


def test_a_bucket_that_is_not_there_is_named_and_never_made(local: pathlib.Path, bucket: str) -> None:
    status, message = ingest(local, "s3://nowhere/raw", f"{local}/none/train/notes")
    assert (status, message.count("\n"), MARK in message) == (1, 1, True), message
    status, message = ingest(local, f"{bucket}/raw", "s3://nowhere/data/train/notes")
    assert (status, message.count("\n"), "s3://nowhere" in message) == (1, 1, True), message
    assert not s3fs.S3FileSystem(skip_instance_cache=True).exists("nowhere")
    with pytest.raises(MissingData, match=r"s3://nowhere/data/train/notes/manifest\.json"):
        LaneLoader(config("s3://nowhere/data", {"notes": 1.0}), SHAPE, TILING, tokenizer())


def refusal(bucket: str) -> str:
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RecordError) as caught:
        LaneLoader(config(f"{bucket}/data", {"notes": 1.0}), SHAPE, TILING, tokenizer())
    return str(caught.value)


def test_no_credentials_a_refused_and_a_silent_connection(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            changed.delenv(name)
        assert "NoCredentialsError: Unable to locate credentials" in refusal(bucket)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        assert "Could not connect to the endpoint URL" in refusal(bucket)
        silent.listen()
        monkeypatch.setattr(storage, "CALL_SECONDS", 0.5)
        assert "no answer in 0.5 seconds; check the network and the credentials" in refusal(bucket)


def refuse_strangers(endpoint: str, after: str) -> None:
    """Makes the store look at credentials, of which it knows none, after so many calls."""
    plain = {"Content-Type": "text/plain"}
    urllib.request.urlopen(
        urllib.request.Request(f"{endpoint}/moto-api/reset-auth", after.encode(), plain, method="POST")
    ).close()


def test_wrong_credentials_are_told(bucket: str, endpoint: str) -> None:
    refuse_strangers(endpoint, "0")
    try:
        assert re.search(r"PermissionError: .*(Access Key|Forbidden)", refusal(bucket))
    finally:
        refuse_strangers(endpoint, "inf")
