"""The page of sources says how each named source comes in."""

from __future__ import annotations

import pathlib

from data_pipelines.ingest.readers.registry import READERS
from data_pipelines.named_mixtures import MIXTURES, PUBLIC_SOURCES

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "sources.md").read_text()


def test_the_page_has_each_source_and_its_reader() -> None:
    rows = {
        cells[1]: cells[3] for line in PAGE.splitlines() if len(cells := list(map(str.strip, line.split("|")))) == 6
    }
    assert PUBLIC_SOURCES.keys() == {name for name in rows if name in PUBLIC_SOURCES}
    for name in PUBLIC_SOURCES:
        kind, _, location = rows[name].removeprefix("`").partition(":")
        assert kind in READERS
        assert location.startswith(f"raw/{name}/")
    assert f"All {len(PUBLIC_SOURCES)} can be read" in PAGE


def test_mixtures_name_public_sources_and_all_of_them_are_used() -> None:
    assert {entry.name for mixture in MIXTURES.values() for entry in mixture} == PUBLIC_SOURCES.keys()
