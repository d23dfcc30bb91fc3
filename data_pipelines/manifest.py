"""The manifest of a source directory: what lies there, with checksums. It is written last, so a directory without one is no source."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xxhash

from data_pipelines.errors import RecordError, require_intact
from data_pipelines.shard_index import read_index
from data_pipelines.staged import fetched, is_staged
from data_pipelines.statistics import TokenStatistics, measure, merge_statistics
from hypervl_jax.architecture import TilingConfig

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

_SHARD_PATTERN = re.compile(r"shard-\d{5}(-of-\d{5})?\.(array_record|index\.arrow)(\.tmp)?")


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One shard in a manifest. `checksum` and `index_checksum` are XXH3-128 of the two files, as hex."""

    file: str
    records: int
    bytes: int
    checksum: str
    index_checksum: str

    @property
    def index_file(self) -> str:
        """Name of the Arrow index beside the shard."""
        return self.file.removesuffix(".array_record") + ".index.arrow"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a source directory holds.

    Attributes:
        name: of the source, as mixtures call it.
        licence: of the source as a whole.
        description: one sentence for people.
        fingerprint: names the tokenizer and template that counted `text_tokens`.
        shards: in order.
        records: in all shards.
        images: in all records.
        text_tokens: text positions, image slots not counted.
        tasks: records of each task.
        version: of the format.
        statistics: positions and tiles at α = 1, counted with one tiling; None in sources made before it was counted.
        licences: records of each licence: the record's own, else the source's.
        languages: records of each language tag.
        samples_read: samples that ingest read, those it left out included; 0 where nothing was ingested.
        drops: samples that ingest left out, by reason; with `records` they add up to `samples_read`.
        origin: where ingest found the samples, and with which settings.
    """

    name: str
    licence: str
    description: str
    fingerprint: str
    shards: tuple[ShardEntry, ...]
    records: int
    images: int
    text_tokens: int
    tasks: Mapping[str, int]
    version: int = FORMAT_VERSION
    statistics: TokenStatistics | None = None
    licences: Mapping[str, int] = dataclasses.field(default_factory=dict)
    languages: Mapping[str, int] = dataclasses.field(default_factory=dict)
    samples_read: int = 0
    drops: Mapping[str, int] = dataclasses.field(default_factory=dict)
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)


_MANIFEST_TYPES = {
    **dict.fromkeys(("name", "licence", "description", "fingerprint"), str),
    **dict.fromkeys(("records", "images", "text_tokens", "version"), int),
    **{"shards": list, "tasks": dict},
}
_LATER_TYPES = {
    "statistics": dict,
    "licences": dict,
    "languages": dict,
    "samples_read": int,
    "drops": dict,
    "origin": dict,
}
"""Fields that sources made before they were added lack."""

_SHARD_TYPES = {
    **dict.fromkeys(("file", "checksum", "index_checksum"), str),
    **dict.fromkeys(("records", "bytes"), int),
}


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of a source directory.

    Raises:
        RecordError: there is none, or it does not fit this version, or a shard has another size than it says.
    """
    path = pathlib.Path(directory) / MANIFEST
    if not path.is_file():
        raise RecordError(
            f"{path} does not exist, so {path.parent} is not a complete source. The embedded data is made by "
            f"`python -m data_pipelines.rendered --output DIR`; a raw source becomes one by `python -m data_pipelines.ingest`, your own records by `data_pipelines.records.write_source`."
        )
    try:
        raw = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RecordError(f"{path} is not JSON ({error}); make the source again") from error
    require_intact(type(raw) is dict, path, "holds no JSON object")
    _check_json(raw, _MANIFEST_TYPES | {key: kind for key, kind in _LATER_TYPES.items() if key in raw}, path)
    found = raw["version"]
    require_intact(found == FORMAT_VERSION, path, f"has format version {found}, this code reads {FORMAT_VERSION}")
    for shard in raw["shards"]:
        _check_json(shard, _SHARD_TYPES, path)
        require_intact(_SHARD_PATTERN.fullmatch(shard["file"]) is not None, path, f"names the shard {shard['file']!r}")
        file, expected = path.with_name(shard["file"]), shard["bytes"]
        if not file.is_file() and is_staged(file):
            continue  # its size was compared where it lies
        size = file.stat().st_size if file.is_file() else 0
        require_intact(size == expected, file, f"has {size} bytes, the manifest says {expected}")
    changes = {"shards": tuple(ShardEntry(**shard) for shard in raw["shards"])}
    if "statistics" in raw:
        changes["statistics"] = _read_statistics(raw["statistics"], path)
    return Manifest(**{**raw, **changes})


def _read_statistics(raw: dict[str, Any], path: pathlib.Path) -> TokenStatistics:
    try:
        return TokenStatistics.from_json(raw)
    except (ValueError, TypeError, KeyError) as error:
        raise RecordError(f"{path} has unusable statistics ({error}); make the source again") from error


def source_statistics(directory: str | os.PathLike[str], tiling: TilingConfig) -> TokenStatistics:
    """Positions and tiles of a source at α = 1: from its manifest when that counted with `tiling`, else from its indexes.

    Raises:
        RecordError: not a complete source.
    """
    manifest, root = read_manifest(directory), pathlib.Path(directory)
    if manifest.statistics is not None and manifest.statistics.tiling == tiling:
        return manifest.statistics
    return measure((read_index(root / shard.index_file) for shard in manifest.shards), tiling)


def _check_json(raw: Any, types: Mapping[str, type], path: pathlib.Path) -> None:
    require_intact(
        type(raw) is dict and raw.keys() == types.keys(), path, f"lacks the keys {', '.join(types)}, or has others"
    )
    for key, kind in types.items():
        require_intact(type(raw[key]) is kind, path, f"has a {type(raw[key]).__name__} as {key}, not {kind.__name__}")


def verify_source(directory: str | os.PathLike[str]) -> Manifest:
    """Reads every file of a source and compares it with the manifest's checksums.

    Raises:
        RecordError: the manifest cannot be used, or a file differs.
    """
    manifest, root = read_manifest(directory), pathlib.Path(directory)
    for shard in manifest.shards:
        fetched(root / shard.file, shard.bytes)
        for name, checksum in ((shard.file, shard.checksum), (shard.index_file, shard.index_checksum)):
            file = root / name
            require_intact(
                file.is_file() and file_checksum(file) == checksum, file, "is missing or differs from its checksum"
            )
    return manifest


def remove_source(directory: str | os.PathLike[str]) -> None:
    """Removes the manifest, then the shards and leftovers of killed writers; nothing else that lies in `directory`."""
    root = pathlib.Path(directory)
    for manifest in (root / MANIFEST, root / f"{MANIFEST}.tmp"):
        manifest.unlink(missing_ok=True)
    for path in root.glob("shard-*"):
        if _SHARD_PATTERN.fullmatch(path.name):
            path.unlink()


@dataclasses.dataclass(frozen=True)
class ShardSummary:
    """A written shard, and what it adds to the manifest."""

    entry: ShardEntry
    images: int
    text_tokens: int
    tasks: Mapping[str, int]
    licences: Mapping[str, int]
    languages: Mapping[str, int]
    statistics: TokenStatistics

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> ShardSummary:
        """The summary that `dataclasses.asdict` wrote. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        statistics = TokenStatistics.from_json(raw["statistics"])
        return cls(**{**raw, "entry": ShardEntry(**raw["entry"]), "statistics": statistics})


def shard_stem(place: int, shards: int) -> str:
    """Name of a shard's files without their endings."""
    return f"shard-{place:05d}-of-{shards:05d}"


def make_manifest(
    shards: Sequence[ShardSummary],
    *,
    name: str,
    licence: str,
    description: str,
    fingerprint: str,
    tiling: TilingConfig,
    drops: Mapping[str, int] | None = None,
    origin: Mapping[str, str] | None = None,
) -> Manifest:
    """The manifest of shards that are written; `drops` are given by an ingest only. Records without a licence have the source's."""
    records, drops = sum(shard.entry.records for shard in shards), drops or {}
    licences = _add_counts(shard.licences for shard in shards)
    licences[licence] += licences.pop("", 0)
    return Manifest(
        name=name,
        licence=licence,
        description=description,
        fingerprint=fingerprint,
        shards=tuple(shard.entry for shard in shards),
        records=records,
        images=sum(shard.images for shard in shards),
        text_tokens=sum(shard.text_tokens for shard in shards),
        tasks=_sorted_counts(_add_counts(shard.tasks for shard in shards)),
        statistics=merge_statistics((shard.statistics for shard in shards), tiling),
        licences=_sorted_counts(licences),
        languages=_sorted_counts(_add_counts(shard.languages for shard in shards)),
        samples_read=records + sum(drops.values()) if origin else 0,
        drops=_sorted_counts(drops),
        origin=origin or {},
    )


def _add_counts(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    return sum(map(Counter, counts), Counter[str]())


def _sorted_counts(counts: Mapping[str, int]) -> dict[str, int]:
    return {key: counts[key] for key in sorted(counts) if counts[key]}


def file_checksum(path: pathlib.Path) -> str:
    """XXH3-128 of a file, 32 hex digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes JSON so that `path` holds either its old content or all of the new one, whenever the writer dies."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
