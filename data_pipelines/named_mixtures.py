"""The mixtures of the three stages, and the public data sets that they name: what each is, where it is published, under which licence.

HyperVL (arXiv 2512.14052) publishes how many tokens each stage reads and what kind of data it is: captions, multi-task, high
quality. **Every source and every share below is our choice.** Shares are of tokens: LLM positions, visual tokens included.

A source's directory is called like its key here. Licences are of the set as a whole, as its Hugging Face page (`PublicSource.page`)
named them in a stored copy, of 2023 to 2026, that we looked at on 2026-11-22; KALE's and OS-Atlas's earlier that month. No live page
was seen: **read it before you use the set**. Parts and linked images have licences of their own, and what may be used is decided by
whoever brings a set into our record format. "Addresses" are of images that are not part of the data set: they must be downloaded, and
some are gone. docs/sources.md says how `data_pipelines.ingest` reads each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from data_pipelines.config import SourceShare

_BY_SUBSET = "by subset"


@dataclasses.dataclass(frozen=True)
class PublicSource:
    """A public data set: what kind of data it is, one line about it, its Hugging Face name, and the licence on its page."""

    kind: str
    description: str
    dataset: str
    licence: str

    @property
    def page(self) -> str:
        """Where the set is published, and where its licence was looked up."""
        return f"https://huggingface.co/datasets/{self.dataset}"

    def __str__(self) -> str:
        return f"{self.description}; Hugging Face data set {self.dataset}, licence {self.licence}"


PUBLIC_SOURCES: Mapping[str, PublicSource] = {
    "recap-datacomp": PublicSource(
        "captions",
        "addresses of web images with captions by a LLaVA model",
        "UCSC-VLAA/Recap-DataComp-1B",
        "CC-BY-4.0",
    ),
    "kale": PublicSource(
        "captions",
        "addresses of web images with dense captions that keep the facts of the alt text",
        "Salesforce/blip3-kale",
        "Apache-2.0, for research",
    ),
    "pixelprose": PublicSource(
        "captions",
        "addresses of web images with dense captions by Gemini",
        "tomg-group-umd/pixelprose",
        "CC-BY-4.0",
    ),
    "pixmo-cap": PublicSource(
        "captions",
        "addresses of images with dense captions made from what people said of them",
        "allenai/pixmo-cap",
        "ODC-BY-1.0",
    ),
    "blip3-ocr": PublicSource(
        "OCR",
        "addresses of web images with their text and its places",
        "Salesforce/blip3-ocr-200m",
        "Apache-2.0",
    ),
    "pdfa": PublicSource(
        "documents",
        "pages of English PDF files with their text",
        "pixparse/pdfa-eng-wds",
        "pdfa-eng-wds, its own",
    ),
    "idl": PublicSource(
        "documents",
        "scanned industry documents with their text",
        "pixparse/idl-wds",
        "idl-train, its own",
    ),
    "docmatix": PublicSource(
        "documents",
        "document pages with questions",
        "HuggingFaceM4/Docmatix",
        "MIT",
    ),
    "pixmo-docs": PublicSource(
        "charts",
        "synthetic charts, tables, diagrams and documents with questions",
        "allenai/pixmo-docs",
        "ODC-BY-1.0",
    ),
    "blip3-grounding": PublicSource(
        "grounding",
        "addresses of web images with captions and the boxes of what they name",
        "Salesforce/blip3-grounding-50m",
        "Apache-2.0",
    ),
    "os-atlas": PublicSource(
        "GUI",
        "screenshots of phones, desktops and web pages with the boxes of their elements",
        "OS-Copilot/OS-Atlas-data",
        "Apache-2.0",
    ),
    "finevision": PublicSource(
        "VQA and STEM",
        "about two hundred vision-language sets in one form, charts, science and mathematics among them",
        "HuggingFaceM4/FineVision",
        f"{_BY_SUBSET}, prompts CC-BY-4.0",
    ),
    "cambrian": PublicSource(
        "VQA and STEM",
        "vision instructions",
        "nyu-visionx/Cambrian-10M",
        "Apache-2.0",
    ),
    "cauldron": PublicSource(
        "VQA",
        "fifty vision-language tasks in one form",
        "HuggingFaceM4/the_cauldron",
        f"{_BY_SUBSET}, prompts CC-BY-4.0",
    ),
    "llava-onevision": PublicSource(
        "VQA",
        "single-image instructions",
        "lmms-lab/LLaVA-OneVision-Data",
        "Apache-2.0",
    ),
    "obelics": PublicSource(
        "multi-image",
        "texts of web pages with the addresses of the images between their paragraphs",
        "HuggingFaceM4/OBELICS",
        "CC-BY-4.0",
    ),
    "mantis": PublicSource(
        "multi-image",
        "instructions about several images at once",
        "TIGER-Lab/Mantis-Instruct",
        "Apache-2.0",
    ),
    "mammoth-vl": PublicSource(
        "instruction",
        "vision instructions with rewritten, longer answers",
        "MAmmoTH-VL/MAmmoTH-VL-Instruct-12M",
        "Apache-2.0",
    ),
    "fineweb-edu": PublicSource(
        "text",
        "educational web text",
        "HuggingFaceFW/fineweb-edu",
        "ODC-BY-1.0",
    ),
    "finemath": PublicSource(
        "text, STEM",
        "mathematical web text",
        "HuggingFaceTB/finemath",
        "ODC-BY-1.0",
    ),
    "smoltalk": PublicSource(
        "text, instruction",
        "text-only conversations",
        "HuggingFaceTB/smoltalk",
        f"none named for the whole, {_BY_SUBSET}",
    ),
    "tulu-3": PublicSource(
        "text, instruction",
        "text-only instructions",
        "allenai/tulu-3-sft-mixture",
        "ODC-BY-1.0, some subsets not for commerce",
    ),
}

MIXTURES: Mapping[str, tuple[SourceShare, ...]] = {
    "stage1": (
        SourceShare("recap-datacomp", 0.40),
        SourceShare("kale", 0.25),
        SourceShare("pixelprose", 0.15),
        SourceShare("blip3-ocr", 0.10),
        SourceShare("blip3-grounding", 0.07),
        SourceShare("pixmo-cap", 0.03),
    ),
    "stage2": (
        SourceShare("recap-datacomp", 0.12),
        SourceShare("kale", 0.08),
        SourceShare("blip3-ocr", 0.06),
        SourceShare("pdfa", 0.14),
        SourceShare("idl", 0.05),
        SourceShare("docmatix", 0.05),
        SourceShare("pixmo-docs", 0.02),
        SourceShare("blip3-grounding", 0.05),
        SourceShare("os-atlas", 0.04),
        SourceShare("finevision", 0.10),
        SourceShare("cambrian", 0.03),
        SourceShare("cauldron", 0.03),
        SourceShare("llava-onevision", 0.04),
        SourceShare("obelics", 0.08),
        SourceShare("mantis", 0.01),
        SourceShare("fineweb-edu", 0.06),
        SourceShare("finemath", 0.04),
    ),
    "stage3": (
        SourceShare("mammoth-vl", 0.25),
        SourceShare("finevision", 0.15),
        SourceShare("llava-onevision", 0.12),
        SourceShare("cambrian", 0.08),
        SourceShare("cauldron", 0.06),
        SourceShare("docmatix", 0.08),
        SourceShare("pixmo-docs", 0.05),
        SourceShare("pixmo-cap", 0.04),
        SourceShare("os-atlas", 0.03),
        SourceShare("mantis", 0.02),
        SourceShare("smoltalk", 0.05),
        SourceShare("finemath", 0.04),
        SourceShare("tulu-3", 0.03),
    ),
}
"""Named mixtures: the sources of a stage and their shares of its tokens. All of it is our choice."""
