"""TFDS builders that are already prepared (`data_dir/NAME/VERSION`), without TensorFlow. A shard of a split is a unit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import google_crc32c
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import FILE_DAMAGED, IngestError, Skip, unreadable
from data_pipelines.ingest.samples import Sample

_DESCRIPTIONS = (".json", ".txt")
_EXAMPLE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class TfdsReader:
    """Reads the shards of `split`, in ArrayRecord or TFRecord; pictures stay encoded, class labels become their names."""

    location: str
    split: str = "train"

    def units(self) -> list[str]:
        """The shards of the split."""
        return [storage.join(self.location, name) for name in self._lengths()]

    def _lengths(self) -> dict[str, int]:
        """Shard of the split -> examples in it, as its description says."""
        splits = _info(self.location).splits
        if self.split not in splits:
            raise IngestError(f"{self.location} has no split {self.split!r}; it has {', '.join(splits) or 'none'}")
        split = splits[self.split]
        return dict(zip(map(os.path.basename, split.filenames), split.shard_lengths, strict=True))

    def read(self, unit: str) -> Iterator[Sample | Skip]:
        """One sample an example; a shard with fewer than its description says is damaged."""
        features, expected = _info(self.location).features, self._lengths()[os.path.basename(unit)]
        with storage.local_copy(unit) as path:
            for number, data in enumerate(_examples(path, expected)):
                yield data if isinstance(data, Skip) else _sample(f"{unit}:{number}", data, features)


@functools.lru_cache(1)
def _info(location: str) -> tfds.core.DatasetInfo:
    """The builder's description; of a remote builder, the small files are copied first."""
    names = [name for name in storage.names_in(location) if name.endswith(_DESCRIPTIONS)]
    with tempfile.TemporaryDirectory(prefix="hypervl-ingest-") as directory:
        for name in names:
            (pathlib.Path(directory) / name).write_bytes(storage.read_bytes(storage.join(location, name)))
        try:
            return tfds.builder_from_directory(directory).info
        except Exception as error:  # TFDS raises many types
            raise IngestError(
                f"{location} is not a prepared TFDS builder ({error}); name the version's directory"
            ) from error


def _examples(path: pathlib.Path, expected: int) -> Iterator[bytes | Skip]:
    """The examples' bytes; a damaged shard, or one of fewer than `expected` examples, ends with a skip."""
    count = 0
    try:
        for data in _array_records(path) if ".array_record" in path.name else _tf_records(path):
            count += 1
            yield data
        if count < expected:
            raise ValueError(f"{count} examples where the description says {expected}")
    except (RuntimeError, ValueError, OSError, IndexError) as error:
        yield unreadable(FILE_DAMAGED, f"{path.name}: {error}")


def _array_records(path: pathlib.Path) -> Iterator[bytes]:
    reader = array_record_module.ArrayRecordReader(str(path))
    with contextlib.closing(reader):
        if not reader.num_records():
            raise ValueError("it has no records; an ArrayRecord that was cut short says the same")
        for number in range(reader.num_records()):
            yield reader.read([number])[0]


def _tf_records(path: pathlib.Path) -> Iterator[bytes]:
    """TFRecord framing: length (8 bytes, little-endian), its checksum (4), the data, its checksum (4)."""
    with path.open("rb") as file:
        while header := file.read(8):
            _check(header, file.read(4))
            length = int.from_bytes(header, "little")
            if length > _EXAMPLE_BYTES:
                raise ValueError(f"an example of {length} bytes, the limit is {_EXAMPLE_BYTES}")
            data = file.read(length)
            _check(data, file.read(4))
            yield data


def _check(data: bytes, checksum: bytes) -> None:
    """TensorFlow's masked CRC-32C."""
    crc = google_crc32c.value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if masked != int.from_bytes(checksum, "little"):
        raise ValueError("an example differs from its checksum, or the file was cut short")


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves pictures as they are, those of a sequence too."""

    def decode_batch_example_np(self, serialized_example: Any) -> list[bytes]:
        """The encoded pictures of a sequence."""
        return list(serialized_example)


def _holds_pictures(feature: tfds.features.FeatureConnector) -> bool:
    inner = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
    return isinstance(inner, tfds.features.Image)


def _sample(key: str, data: bytes, features: tfds.features.FeaturesDict) -> Sample | Skip:
    decoders = {name: _Encoded() for name, kind in features.items() if _holds_pictures(kind)}
    try:
        example = features.deserialize_example_np(data, decoders=decoders)
    except Exception as error:  # TFDS raises many types
        return unreadable("example_damaged", f"{key}: {type(error).__name__}: {error}")
    return Sample(key, {name: _plain(value, features[name]) for name, value in example.items()})


def _plain(value: Any, feature: tfds.features.FeatureConnector) -> Any:
    """A feature as bytes, text, list or number."""
    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(int(value))
    return value.tolist() if hasattr(value, "tolist") else value
