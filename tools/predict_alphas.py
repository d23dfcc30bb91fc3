"""`python -m tools.predict_alphas`: what the compressor (VRC) predicts for every picture of some sources, as a side table.

    sources ─► proxies ─► VRC ─► α by content hash (Arrow IPC: `content_hash`, `alpha`) ─► `--config.data.alphas=FILE` of a training run

The loader then scales each picture by its α before it is tiled; records that the table does not know keep α = 1.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from data_pipelines.records import RecordError, read_manifest
from data_pipelines.sources import Source
from experiments import storage
from hypervl_jax.models.compressor_io import load_compressor
from tools.label_resolutions import EXPLAINED, USAGE_ERROR, progress_line
from tools.train_compressor import write_alphas

_DESCRIPTION = """\
Writes α for every record with a picture of some sources: the side table that a training run reads with --config.data.alphas=FILE. A
record's α holds for all its pictures, so it is the largest of theirs."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("python -m tools.predict_alphas", description=_DESCRIPTION)
    add = made.add_argument
    add("--compressor", required=True, metavar="DIR", help="what tools.train_compressor wrote")
    add("--data", required=True, metavar="ROOT", help="sources lie in ROOT/SPLIT/NAME")
    add("--split", default="train", help="(default: train)")
    add("--sources", required=True, metavar="A,B", help="by name, separated by commas")
    add("--output", required=True, metavar="FILE", help="of the table; written whole by a rename")
    add("--json", action="store_true", help="print the counts as one JSON object on the last line")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        with storage.explained(), progress_line() as progress:
            saved = load_compressor(options.compressor)
            homes = [pathlib.Path(options.data) / options.split / name for name in options.sources.split(",")]
            # Only pictures are read, so any tokenizer that the sources were counted with will do.
            sources = [Source(home, read_manifest(home).fingerprint) for home in homes]
            written, unreadable = write_alphas(options.output, sources, saved.config, saved.params, progress)
    except (*EXPLAINED, RecordError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    if options.json:
        print(json.dumps({"records": written, "unreadable": unreadable, "table": options.output}))
    else:
        print(f"α of {written:,} records in {options.output}; {unreadable} left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
