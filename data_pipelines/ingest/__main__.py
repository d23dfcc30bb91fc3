"""`python -m data_pipelines.ingest`: makes a source directory from a raw source; `--help` says how."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import logging
import re
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_pipelines.ingest import storage
from data_pipelines.ingest.config import load_config
from data_pipelines.ingest.errors import EXPECTED, IngestError
from data_pipelines.ingest.readers.registry import READERS
from data_pipelines.ingest.samples import SourceTags
from data_pipelines.records import Manifest
from hypervl_jax.architecture import TilingConfig, hypervl_tiny
from hypervl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer

if TYPE_CHECKING:
    from data_pipelines.ingest.pipeline import Ingest

_DESCRIPTION = """\
Reads a raw source, leaves out what cannot be read, what the filters do not want, duplicates, opt-outs and benchmark data,
and writes the rest as a source directory: ArrayRecord shards with an index beside each, and a manifest with checksums, token
statistics and every drop by its reason, written last. It runs on Apache Beam.

A killed ingest is restarted by the same command: finished units and shards are kept, and it ends with the same bytes,
whatever the number of workers."""

_EPILOG = """\
sources (KIND:LOCATION; locations may be gs://, s3:// or local, with {000..123} ranges and * globs):
  webdataset:gs://b/laion/{00000..00099}.tar   tar shards; img2dataset's output for sets that are lists of URLs
  parquet:/data/set/*.parquet                  Parquet with the pictures' bytes, as Hugging Face datasets writes it
  tfds:/data/tfds/coco/2017/1.1.0              a prepared TFDS builder; --option split=train
  llava:/data/chat.json                        LLaVA's JSON list or JSON Lines, and its pictures; --option images=DIR, *.zip or *.tar
  pages:/data/documents/*.tar                  tar shards of PDF or TIFF files with their text; a record a page
  interleaved:/data/obelics/*.parquet          web pages with the addresses of their images; --option pictures=DIR, fetched before
  jsonl:/data/text/*.jsonl.gz                  one object a line

examples:
  python -m data_pipelines.ingest --source webdataset:cc12m/*.tar --name cc12m --output DIR/train/cc12m \\
      --tokenizer DIR --licence "links CC-BY" --task captions --workers 8
  python -m data_pipelines.ingest --source parquet:gs://b/raw/docvqa/*.parquet --name docvqa --output gs://b/data/stage2/train/docvqa \\
      --tokenizer DIR --licence MIT --task documents --config filters.yaml --runner DataflowRunner \\
      --project P --region R --temp_location gs://b/tmp --sdk_container_image IMAGE

filters.yaml holds the fields of data_pipelines.ingest.config.IngestConfig; unnamed ones keep their defaults, as in
  min_side: 64
  languages: [en, zh]
  held_out: [DIR/heldout/docvqa, benchmarks.jsonl]   kept out, with what is near to them
  earlier: [DIR/train/cauldron]                      sources that hold some of it already
  scorers: [{name: personal, factory: "data_pipelines.ingest.scorers:personal_data", maximum: 0}]

Beam's own arguments are taken too, such as --max_num_workers; one that neither knows is an error."""

_RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")
_NAME = re.compile(r"\w[\w.+-]*")
_SIZE = re.compile(r"(\d+)([KMG]?)i?B?", re.IGNORECASE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = _parser()
    options, beam_flags = parser.parse_known_args(arguments)
    try:
        with _errors_only():
            _check_flags(parser, beam_flags)
            manifest = _run(options, beam_flags)
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(dataclasses.asdict(manifest)))
    else:
        _print_manifest(options.output, manifest)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m data_pipelines.ingest",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--source", required=True, metavar="KIND:LOCATION", help=f"what to read; kinds are {', '.join(READERS)}")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the reader; may be repeated")
    add("--name", type=_plain_name, required=True, help="name of the source, as mixtures call it")
    add("--output", required=True, metavar="DIR", help="the source directory to make: ROOT/train/NAME")
    add("--licence", required=True, help="of the source as a whole; samples may bring their own")
    add("--description", default="", help="one sentence for people")
    add("--task", default="", help="task of its records, for reports by task")
    add("--language", default="", help="language of the source (BCP 47); detected where neither it nor a sample says")
    add(
        "--tokenizer",
        metavar="PATH",
        help="counts the text (default: the one in ROOT, two directories above the output)",
    )
    add("--config", metavar="FILE", help="YAML with thresholds of the filters (below)")
    add(
        "--tiling",
        choices=("full", "tiny"),
        default="full",
        help="tiles the statistics are counted in: 512 pixels, or the tiny model's 64",
    )
    add(
        "--shard-size",
        type=_bytes,
        default="512M",
        metavar="BYTES",
        help="records in a shard, such as 512M (default) or 2G",
    )
    add("--staging", metavar="DIR", help="where unfinished work lies; shared by all workers (default: OUTPUT.staging)")
    add("--runner", choices=_RUNNERS, default="DirectRunner", help="Beam's engine (default: this machine)")
    add(
        "--workers",
        type=_positive,
        default=1,
        metavar="N",
        help="processes on this machine, for DirectRunner (default: 1)",
    )
    add("--json", action="store_true", help="print the manifest as one JSON object")
    return parser


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes, 1 or more")
    return int(text)


def _plain_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain name: letters, digits, and . _ + - after the first")
    return text


def _check_flags(parser: argparse.ArgumentParser, flags: Sequence[str]) -> None:
    """Ends the process with a usage error for arguments that Beam does not know either: it would pass over them."""
    unknown = _import_pipeline().unknown_flags(flags) if flags else []
    if unknown:
        names = [flag.partition("=")[0] for flag in unknown if flag.startswith("-")]
        parser.error(f"neither this command nor Beam knows {', '.join(map(_with_closest, names or unknown))}")


def _with_closest(name: str) -> str:
    closest = difflib.get_close_matches(name, re.findall(r"--[a-z-]+", _parser().format_usage()), 1)
    return f"{name} (did you mean {closest[0]}?)" if closest else name


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Beam warns of parts that are not installed, tells when workers start and stop, and logs each error that it raises: not here."""
    levels = {logging.getLogger(): logging.ERROR, logging.getLogger("apache_beam"): logging.CRITICAL}
    before = {logger: logger.level for logger in levels}
    try:
        for logger, level in levels.items():
            logger.setLevel(level)
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


def _import_pipeline() -> types.ModuleType:
    """Beam takes seconds to import; `--help` and wrong arguments should not."""
    try:
        from data_pipelines.ingest import pipeline
    except ImportError as error:
        raise IngestError(f"ingest needs {error.name}: pip install 'hypervl-jax[data]'") from error
    return pipeline


def _run(options: argparse.Namespace, beam_flags: Sequence[str]) -> Manifest:
    ingest_options = _options(options.option)
    config = load_config(options.config)
    pipeline = _import_pipeline()
    output = options.output.rstrip("/")
    ingest = pipeline.Ingest(
        source=options.source,
        options=ingest_options,
        output=output,
        staging=options.staging or f"{output}.staging",
        tags=SourceTags(options.name, options.task, options.language),
        licence=options.licence,
        description=options.description,
        config=config,
        tokenizer=_tokenizer(options.tokenizer, output),
        tiling=hypervl_tiny().tiling if options.tiling == "tiny" else TilingConfig(),
        shard_bytes=options.shard_size,
    )
    with _progress(ingest):
        return pipeline.run(ingest, pipeline.beam_options(options.runner, options.workers, beam_flags))


def _options(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise IngestError(f"--option {pair!r} is not NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def _tokenizer(path: str | None, output: str) -> Tokenizer:
    """The tokenizer that is named, else that of the data root."""
    if path is not None:
        return load_tokenizer(path)
    root = storage.parent(storage.parent(output))
    if not storage.is_local(root):
        raise IngestError("name a --tokenizer on this machine; the output is remote")
    try:
        return load_tokenizer(root)
    except TokenizerError as error:
        raise IngestError(f"{error}; put the tokenizer into {root} or name it by --tokenizer") from error


@contextlib.contextmanager
def _progress(ingest: Ingest) -> Iterator[None]:
    """A line on standard error that counts finished units, then shards, by looking at the staging directory."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stop = threading.Event()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        line = progress.add_task("units", total=None)

        def watch() -> None:
            while not stop.wait(2.0):
                with contextlib.suppress(storage.StorageError):
                    for kind in ("shards", "units"):
                        names = storage.names_in(storage.join(ingest.staging, kind))
                        done = sum(name.endswith(".json") for name in names)
                        if done:
                            progress.update(line, description=kind, completed=done)
                            break

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()


def _print_manifest(output: str, manifest: Manifest) -> None:
    statistics = manifest.statistics
    table = Table(title=f"{output}: {manifest.records:,} of {manifest.samples_read:,} samples", title_justify="left")
    for heading in ("shards", "MB", "images", "text tokens", "tokens", "tiles"):
        table.add_column(heading, justify="right")
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    counts = (manifest.images, manifest.text_tokens, statistics.tokens, statistics.tiles)
    table.add_row(str(len(manifest.shards)), f"{megabytes:,.1f}", *(f"{count:,}" for count in counts))
    Console().print(table)
    for reason, count in sorted(manifest.drops.items(), key=lambda item: -item[1]):
        print(f"  left out  {count:>10,}  {reason}")


if __name__ == "__main__":
    sys.exit(main())
