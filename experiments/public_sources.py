"""Public data sets that the stages' mixtures name: what each is, and where it is published.

A source's directory is called like its key here. Which records of it are used, and under which licence, is decided when it is
brought into our record format. "Addresses" are of images that are not part of the data set: they must be downloaded, and some are
gone.
"""

from __future__ import annotations

from collections.abc import Mapping

PUBLIC_SOURCES: Mapping[str, str] = {
    "recap-datacomp": "addresses of web images with captions by a LLaVA model; Hugging Face data set UCSC-VLAA/Recap-DataComp-1B",
    "kale": "addresses of web images with dense captions that keep the facts of the alt text; Hugging Face data set Salesforce/blip3-kale",
    "pixelprose": "addresses of web images with dense captions by Gemini; Hugging Face data set tomg-group-umd/pixelprose",
    "blip3-ocr": "addresses of web images with their text and its places; Hugging Face data set Salesforce/blip3-ocr-200m",
    "blip3-grounding": "addresses of web images with captions and the boxes of what they name; Hugging Face data set Salesforce/blip3-grounding-50m",
    "pixmo-cap": "addresses of images with dense captions made from what people said of them; Hugging Face data set allenai/pixmo-cap",
    "pixmo-docs": "synthetic charts, tables, diagrams and documents with questions; Hugging Face data set allenai/pixmo-docs",
    "obelics": "texts of web pages with the addresses of the images between their paragraphs; Hugging Face data set HuggingFaceM4/OBELICS",
    "pdfa": "pages of English PDF files with their text; Hugging Face data set pixparse/pdfa-eng-wds",
    "idl": "scanned industry documents with their text; Hugging Face data set pixparse/idl-wds",
    "docmatix": "document pages with questions; Hugging Face data set HuggingFaceM4/Docmatix",
    "cauldron": "fifty vision-language tasks in one form; Hugging Face data set HuggingFaceM4/the_cauldron",
    "llava-onevision": "single-image instructions; Hugging Face data set lmms-lab/LLaVA-OneVision-Data",
    "cambrian": "vision instructions; Hugging Face data set nyu-visionx/Cambrian-10M",
    "mammoth-vl": "vision instructions with rewritten, longer answers; Hugging Face data set MAmmoTH-VL/MAmmoTH-VL-Instruct-12M",
    "fineweb-edu": "educational web text; Hugging Face data set HuggingFaceFW/fineweb-edu",
    "finemath": "mathematical web text; Hugging Face data set HuggingFaceTB/finemath",
    "smoltalk": "text-only conversations; Hugging Face data set HuggingFaceTB/smoltalk",
    "tulu-3": "text-only instructions; Hugging Face data set allenai/tulu-3-sft-mixture",
}
