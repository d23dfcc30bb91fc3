"""What cannot be ingested is said where people look: in the list of missing sources, and on the page of sources."""

from __future__ import annotations

import pathlib
import re

import pytest

from data_pipelines.named_mixtures import MIXTURES, PUBLIC_SOURCES

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "sources.md").read_text()


def test_the_page_has_each_source_and_its_obstacle() -> None:
    lines = {
        cells[1]: cells[3] for line in PAGE.splitlines() if len(cells := list(map(str.strip, line.split("|")))) == 6
    }
    lines = {name: reading for name, reading in lines.items() if name in PUBLIC_SOURCES}
    assert lines.keys() == PUBLIC_SOURCES.keys()
    for name, source in PUBLIC_SOURCES.items():
        assert source.obstacle in lines[name]
        assert lines[name].startswith("**no**" if source.obstacle else ("`webdataset:", "`parquet:"))
        assert ("NOT READABLE YET" in str(source)) == bool(source.obstacle)
    blocked = sum(bool(source.obstacle) for source in PUBLIC_SOURCES.values())
    assert f"**{len(PUBLIC_SOURCES) - blocked} can be read; {blocked} cannot yet**" in PAGE


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shares_and_mixtures_of_the_page_follow_from_the_tables(stage: int) -> None:
    mixture = MIXTURES[f"stage{stage}"]
    blocked = sum(entry.share for entry in mixture if PUBLIC_SOURCES[entry.name].obstacle)
    assert re.search(rf"stage {stage} {blocked * 100:.0f} %", PAGE)
    rest = ",".join(f"{entry.name}:{entry.share:g}" for entry in mixture if not PUBLIC_SOURCES[entry.name].obstacle)
    assert f"| {stage} | `{rest}` |" in PAGE
