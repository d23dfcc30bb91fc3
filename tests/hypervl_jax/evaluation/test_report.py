"""The page: complete, without outside files, and safe whatever a model generates."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from hypervl_jax.architecture import TilingConfig
from hypervl_jax.evaluation.benchmarks import BLANK, UNTRAINED, Item, ItemResult, group
from hypervl_jax.evaluation.gallery import choose_samples, shrink, tile_mosaic, token_opacity
from hypervl_jax.evaluation.plots import Series, series, smooth
from hypervl_jax.evaluation.report import Contents, TrainingRun, build_page
from hypervl_jax.vision.anyres import plan_image
from tests.hypervl_jax.evaluation.examples import item, result

TILING = TilingConfig(tile_size=16, patch_size=4, shuffle=2, max_tiles=4)
HOSTILE = "<script>alert('&')</script>"


def results() -> list[ItemResult]:
    rows = []
    for encoder in ("base", "large"):
        for condition, alpha, right in (("image", 1.0, 8), ("image", "auto", 7), (BLANK, 1.0, 2), (UNTRAINED, 1.0, 0)):
            changes = {"encoder": encoder, "condition": condition, "alpha": alpha, "prediction": HOSTILE}
            rows += [
                result(n, float(n < right), **changes, alphas=(0.5 if alpha == "auto" else 1.0,)) for n in range(10)
            ]
    return rows


def items() -> dict[str, Item]:
    return {each.identity: each for each in (item(number, 24, 30, answer="a < b") for number in range(10))}


def run(name: str) -> TrainingRun:
    metrics = [{"step": n, "cross_entropy/base": 2.0 - n / 10, "kl": 0.1, "tokens_seen": 10.0 * n} for n in range(8)]
    evaluations = [{"step": 8, "kl/words": 0.1, "cross_entropy/base": 1.0, "cross_entropy/base/words": 1.0}]
    card = {"name": name, "parameters": {"decoder": 1234567}, "tokens": {"words": 70}}
    return TrainingRun(name, metrics, evaluations, card)


@pytest.fixture(scope="module")
def contents() -> Contents:
    return Contents(
        title="A & B",
        runs=[run("stage1"), run("stage2")],
        results=results(),
        tiling=TILING,
        items=items(),
        facts=[("Machine", "abacus <2>")],
        commands=["python -m tools.demo"],
        seconds={"stage1": 90.0, "stage2": 30.0},
    )


@pytest.fixture(scope="module")
def document(contents: Contents) -> str:
    return build_page(contents)


class Elements(html.parser.HTMLParser):
    """Collects tags, attributes and text; checks that tags are closed in order."""

    VOID = ("meta", "img", "br", "path", "use", "rect", "image")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_no_other_file(document: str) -> None:
    elements = Elements()
    elements.feed(document)
    assert elements.open == []
    assert elements.links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in elements.links)
    assert not {"script", "link", "iframe"} & set(elements.tags)
    for svg in re.findall(r"<svg.*?</svg>", document, re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)


def test_what_a_model_says_is_text(document: str) -> None:
    assert HOSTILE not in document
    assert "&lt;script&gt;" in document
    assert "a &lt; b" in document
    assert "abacus &lt;2&gt;" in document


def test_every_section_is_there(document: str) -> None:
    anchors = re.findall(r'<section id="(\w+)"', document)
    assert anchors == ["learned", "samples", "training", "compression", "encoders", "latency", "making"]
    assert all(f'href="#{anchor}"' in document for anchor in anchors)
    for text in (
        "80.0 <small>[49.0, 94.3]</small>",
        "trained",
        "blank image",
        "untrained",
        "α = auto",
        "1,234,567",
        "2:00",
    ):
        assert text in document


def test_kinds_of_question_show_each_encoder_beside_its_own_blank_image(contents: Contents) -> None:
    right = {("base", "image"): 9, ("large", "image"): 8, ("base", BLANK): 1, ("large", BLANK): 4}
    rows = [
        result(number, float(number < count), encoder=encoder, condition=condition)
        for (encoder, condition), count in right.items()
        for number in range(10)
    ]
    table = build_page(dataclasses.replace(contents, results=rows)).split("By level and kind of question")[1]
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", table.split("</table>")[0], re.DOTALL)
    assert cells[3:7] == ["base", "large", "base, blank image", "large, blank image"]
    assert cells[9:] == ["10", "90", "80", "10", "40"]


def test_ids_of_plots_do_not_clash(document: str) -> None:
    plots = re.findall(r"<svg.*?</svg>", document, re.DOTALL)
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', plot)) for plot in plots]
    assert len(plots) >= 6
    assert sum(map(len, clips)) == len(set.union(*clips))


def test_what_was_not_measured_is_left_out(contents: Contents) -> None:
    only_runs = build_page(dataclasses.replace(contents, results=[], tiling=None, items={}, seconds={}))
    assert re.findall(r'<section id="(\w+)"', only_runs) == ["training", "making"]
    only_results = build_page(dataclasses.replace(contents, runs=[], items={}, facts=[], commands=[], seconds={}))
    assert re.findall(r'<section id="(\w+)"', only_results) == ["learned", "compression", "encoders", "latency"]


def test_samples_are_right_and_wrong_ones_and_do_not_depend_on_the_order() -> None:
    chosen = choose_samples(group(results()), "words")
    scores = [answers["base"].score for _, answers in chosen]
    assert scores == [1, 1, 1, 0, 0, 0]
    assert [name for name, _ in choose_samples(group(results()[::-1]), "words")] == [name for name, _ in chosen]
    assert {answers["base"].alpha for _, answers in chosen} == {"auto"}


def test_the_mosaic_shows_the_picture_where_tokens_are() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    plan = plan_image(20, 30, 1.0, TILING)
    mosaic = tile_mosaic(rgb, plan, TILING)
    assert mosaic.shape == (35, 35, 4)
    np.testing.assert_array_equal(mosaic[:16, :16, :3], rgb[:16, :16])
    np.testing.assert_array_equal(mosaic[19:23, 19:33, :3], rgb[16:20, 16:30])
    assert (mosaic[16:19] == 0).all()
    opacity = token_opacity(plan, TILING)
    assert (opacity == 255).sum() == plan.tokens * TILING.cell_size**2
    assert (mosaic[..., 3] == 255).sum() == (opacity == 255).sum()


def test_large_pictures_are_embedded_small(document: str) -> None:
    assert shrink(np.zeros((2000, 1000, 3), np.uint8)).shape == (480, 240, 3)
    first = re.search(r'src="data:image/png;base64,([^"]+)"', document)
    assert first is not None
    assert Image.open(io.BytesIO(base64.b64decode(first[1]))).size == (30, 24)


def test_curves_keep_their_mean_and_skip_what_was_not_measured() -> None:
    curve = series(
        [{"step": 0, "kl": 1.0}, {"step": 1}, {"step": 2, "kl": 3.0}, {"step": 3, "kl": float("inf")}], "kl", 10
    )
    np.testing.assert_array_equal(curve, Series(np.array([10.0, 12.0]), np.array([1.0, 3.0])))
    many = Series(np.arange(1000.0), np.sin(np.arange(1000.0)))
    assert len(smooth(many, 50).steps) == 50
    np.testing.assert_allclose(smooth(many, 50).values.mean(), many.values.mean(), atol=1e-12)
    assert len(series([], "kl").steps) == len(smooth(series([], "kl")).steps) == 0
