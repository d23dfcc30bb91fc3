"""`python -m tools.to_torch`: a checkpoint in, a directory out that `transformers` loads with no code of ours.

    checkpoint ─► weights by the key table ─► config, tokenizer, chat template, processor ─► round trip into Flax
               └► JAX on golden prompts ─► the directory in PyTorch on the same ─► report.json, manifest.json

`Lfm2VlForConditionalGeneration` holds HyperVL with one encoder exactly; two encoders are two directories. The compressor
(VRC), for which no class has a place, lies in a directory of its own inside, with a PyTorch module.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from rich.console import Console
from rich.table import Table

import hypervl_jax
from experiments.stopping import terminate_as_interrupt
from hypervl_jax.architecture import BRANCHES, ConfigError, HyperVLConfig, branch_parts, require
from hypervl_jax.models.compressor_io import DESCRIPTION as COMPRESSOR_DESCRIPTION
from hypervl_jax.models.compressor_io import WEIGHTS as COMPRESSOR_WEIGHTS
from hypervl_jax.models.compressor_io import load_compressor, predict_log_areas
from hypervl_jax.models.huggingface import pending_tensors
from hypervl_jax.models.key_table import LFM2, Entry, model_tables
from hypervl_jax.models.safetensors_files import WRITABLE, CheckpointError, read_directory, write_directory
from hypervl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from hypervl_jax.training.checkpoint import Description, checkpoint_home, find_step, load_params, read_description
from hypervl_jax.training.state import abstract_parameters
from hypervl_jax.vision.resolution import make_proxies
from tools import artifacts, golden, huggingface_files
from tools.artifacts import ArtifactError, Manifest
from tools.golden import RUNTIME, Case
from tools.huggingface_files import FORMATS, Format
from tools.label_resolutions import ReportProgress, progress_line

FAILURE, SUCCESS, INTERRUPTED = 1, 0, 130
BOTH = "both"
KIND = "torch"
COMPRESSOR, CODE, SETTINGS = "compressor", "code", "hypervl.json"
PACKAGES = ("jax", "flax", "numpy", "safetensors", "tokenizers", "torch", "torchvision", "transformers")
LONGEST_PROMPT = 32_768
"""What the tokenizer's config says of a prompt's length: the context that Qwen3 was pretrained with."""

SHIPPED = (
    "__init__.py",
    "architecture.py",
    "mobilenet.py",
    "vision/__init__.py",
    "vision/anyres.py",
    "vision/resolution.py",
)
"""Files of `hypervl_jax` that go with `hypervl_torch.py`, unchanged."""

_DESCRIPTION = """\
Writes a checkpoint as a Hugging Face directory: safetensors (in shards), configs, tokenizer, chat template and processor, for
AutoModelForImageTextToText (format lfm2) or with the names that vLLM and SGLang use (format eagle). Then loads it in PyTorch,
compares ids, pixels, logits and 64 greedy tokens with JAX on text, one image and many tiles, reads the weights back into the
Flax tree, and writes report.json and manifest.json. Nothing is left behind when anything fails.
"""
_EPILOG = """\
examples:
  python -m tools.to_torch --checkpoint runs/demo/stage3 --compressor runs/demo/compressor --encoder base --output exports/base
  python -m tools.to_torch --checkpoint runs/stage3 --encoder both --dtype bfloat16 --output exports/hypervl
  python -m tools.verify_artifact exports/base

exit status:
  0  written, and equal to JAX    1  it cannot be written, or differs from JAX
  2  wrong usage                       130  stopped; nothing was written
"""


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint to export, opened."""

    home: pathlib.Path
    step: int
    description: Description
    tokenizer: Tokenizer

    @property
    def config(self) -> HyperVLConfig:
        """What the model is."""
        return self.description.architecture


def open_source(checkpoint: str, step: int | None) -> Source:
    """A checkpoint and its tokenizer. Raises `CheckpointError` or `TokenizerError` when either cannot be read."""
    home = checkpoint_home(checkpoint)
    description = read_description(home)
    if description.tokenizer_directory is None:
        raise CheckpointError(f"{home} holds no tokenizer; a model without one cannot be exported")
    tokenizer = load_tokenizer(pathlib.Path(description.tokenizer_directory))
    return Source(pathlib.Path(home), find_step(home, step), description, tokenizer)


def load_parts(source: Source, parts: Sequence[str], leaf: str | None = None) -> dict[str, Any]:
    """Some parts of a checkpoint as float32 arrays on one device, or one leaf of each. They are read leaf by leaf: what is under way is held twice.

    Raises `CheckpointError` when they cannot be read.
    """
    abstract, _ = abstract_parameters(source.config, RUNTIME)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found: dict[str, Any] = {}
    for part in parts:
        flat = traverse_util.flatten_dict(abstract[part], sep="/")
        for path in flat if leaf is None else (leaf,):
            target = {path: jax.ShapeDtypeStruct(flat[path].shape, flat[path].dtype, sharding=device)}
            wanted = {part: traverse_util.unflatten_dict(target, sep="/")}
            read = load_params(source.home, wanted, source.step, (part,))
            found |= traverse_util.flatten_dict(read, sep="/")
    return traverse_util.unflatten_dict(found, sep="/")


def leaf_paths(source: Source, part: str) -> tuple[str, ...]:
    """The leaves of a part that `load_parts` can read alone."""
    return tuple(traverse_util.flatten_dict(abstract_parameters(source.config, RUNTIME)[0][part], sep="/"))


def export(
    checkpoint: str,
    output: str,
    *,
    encoder: str = BRANCHES[0],
    compressor: str | None = None,
    layout: str = "lfm2",
    dtype: str = "float32",
    step: int | None = None,
    comparison: Comparison | None = None,
    progress: ReportProgress = lambda what, done, total: None,
) -> dict[str, dict[str, Any]]:
    """Writes one directory for each encoder; `output` appears only when all of them are complete and equal to JAX.

    Args:
        checkpoint: a run's workdir or its `checkpoints` directory.
        output: the directory for one encoder, or the parent of `base` and `large`.
        encoder: "base", "large" or "both".
        compressor: directory of a VRC.
        layout: one of `FORMATS`.
        dtype: of the stored weights, "float32" or "bfloat16".
        step: the newest when None.
        comparison: what is compared with JAX; everything when None.
        progress: told what is being done, and how much of it is.

    Returns:
        The report of each encoder.

    Raises:
        CheckpointError, ConfigError, TokenizerError: an input is missing or of another kind.
        ArtifactError: the output is taken, the disk is full, or the result differs from JAX.
    """
    artifacts.check_output(output)
    if FORMATS[layout].naming is LFM2:
        check_torch()
    source = open_source(checkpoint, step)
    encoders = BRANCHES if encoder == BOTH else (encoder,)
    counts, size = source.config.parameter_counts(), WRITABLE[dtype][1].itemsize
    needed = sum(counts[part] * size for branch in encoders for part in branch_parts(branch))
    reports = {}
    with artifacts.writing(output, needed) as temporary:
        for number, branch in enumerate(encoders):
            home = temporary / branch if encoder == BOTH else temporary
            told = lambda what, done, total, shift=number: progress(what, done + shift * total, total * len(encoders))
            compared = comparison or Comparison()
            reports[branch] = Export(source, branch, FORMATS[layout], dtype, compressor, home, compared).run(told)
        artifacts.write_list(temporary, encoders)
    return reports


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Which golden prompts are run, and how many greedy tokens follow each."""

    prompts: tuple[str, ...] = golden.PROMPTS
    new_tokens: int = golden.NEW_TOKENS

    def __post_init__(self) -> None:
        unknown = sorted(set(self.prompts) - set(golden.PROMPTS))
        require(bool(self.prompts) and not unknown, f"prompts are some of {', '.join(golden.PROMPTS)}, not {unknown}")
        require(self.new_tokens >= 1, f"{self.new_tokens} new tokens cannot be compared; give at least 1")


@dataclasses.dataclass(frozen=True)
class Export:
    """One directory: a checkpoint's decoder with one encoder."""

    source: Source
    branch: str
    format: Format
    dtype: str
    compressor: str | None
    home: pathlib.Path
    comparison: Comparison = dataclasses.field(default_factory=Comparison)

    def run(self, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        """Writes everything; returns the report."""
        steps = iter(("weights", "files", "round trip", "JAX", "PyTorch", "hashes"))
        advance = lambda done: progress(next(steps), done, 6)
        advance(0)
        params = self._parameters()
        self._write_weights(params)
        advance(1)
        self._write_files()
        advance(2)
        report = self._head() | {"round_trip": round_trip(self.home, self.tables, params)}
        advance(3)
        made = tuple(case for case in golden.cases(self.config.tiling) if case.name in self.comparison.prompts)
        arrays = self._golden(params, made)
        del params  # room for the same weights in PyTorch
        advance(4)
        report |= self._compare(made, arrays)
        advance(5)
        self._finish(made, arrays, report)
        return report

    @property
    def config(self) -> HyperVLConfig:
        """What the model is."""
        return self.source.config

    @property
    def tables(self) -> dict[str, tuple[Entry, ...]]:
        """The key tables of the three parts."""
        return model_tables(self.config, self.branch, self.format.naming)

    def _parameters(self) -> dict[str, Any]:
        """The three parts in float32 on one device, rounded to the dtype that is stored."""
        params = load_parts(self.source, branch_parts(self.branch))
        if self.dtype != "float32":
            round_in_place(params, self.dtype)
        return params

    def _write_weights(self, params: Mapping[str, Any]) -> None:
        naming = self.format.naming
        values = {"architectures": [naming.architecture], "dtype": self.dtype, "torch_dtype": self.dtype}
        values |= self.format.config(self.config, self.branch, self.source.tokenizer)
        tensors = [tensor for part, table in self.tables.items() for tensor in pending_tensors(params[part], table)]
        write_directory(self.home, values, tensors, self.dtype)

    def _write_files(self) -> None:
        tokenizer = self.source.tokenizer
        huggingface_files.write_tokenizer(self.home, tokenizer, self.format.renamed, LONGEST_PROMPT)
        huggingface_files.write_generation_config(self.home, tokenizer)
        if self.format.naming is LFM2:
            huggingface_files.write_processor(self.home, self.config)
            copy_code(self.home / CODE)
        tiling = dataclasses.asdict(self.config.tiling)
        huggingface_files.write_json(self.home / SETTINGS, {"encoder": self.branch, "tiling": tiling})
        if self.compressor is not None:
            copy_compressor(pathlib.Path(self.compressor), self.home / COMPRESSOR)

    def _head(self) -> dict[str, Any]:
        counts = self.config.parameter_counts()
        return {
            "encoder": self.branch,
            "class": self.format.naming.architecture,
            "dtype": self.dtype,
            "parameters": {part: counts[part] for part in branch_parts(self.branch)},
        }

    def _golden(self, params: Mapping[str, Any], made: tuple[Case, ...]) -> dict[str, np.ndarray]:
        tokenizer, new_tokens = self.source.tokenizer, self.comparison.new_tokens
        found = {
            case.name: golden.compute(case, self.config, params, tokenizer, self.branch, new_tokens) for case in made
        }
        arrays = golden.arrays(found, made)
        if self.compressor is not None:
            vrc = load_compressor(self.compressor)
            proxies, _ = make_proxies([image for case in made for image in case.images], vrc.config.proxy_size)
            outputs = predict_log_areas(vrc.config, vrc.params, proxies)
            arrays |= {"compressor/proxies": proxies, "compressor/outputs": outputs}
        return arrays

    def _compare(self, made: tuple[Case, ...], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        if self.format.naming is not LFM2:
            return {"torch": f"not run: no class of transformers is a {self.format.naming.architecture}"}
        return run_in_torch(self.home, prompts_of(made), arrays)

    def _finish(self, made: tuple[Case, ...], arrays: Mapping[str, np.ndarray], report: Mapping[str, Any]) -> None:
        """Writes golden arrays, report and manifest. Raises `ArtifactError` when the result differs from JAX."""
        failed = [name for name, found in report.items() if isinstance(found, dict) and found.get("passed") is False]
        if failed:
            details = json.dumps({name: report[name] for name in failed})
            raise ArtifactError(f"the exported model differs from JAX in {' and '.join(failed)}: {details}")
        artifacts.write_golden(self.home, arrays)
        artifacts.write_json(self.home / artifacts.REPORT, report)
        vision, tiling = self.config.vision(self.branch), self.config.tiling
        shapes = {
            "pixel_values": ["tiles", vision.num_patches, vision.patch_size**2 * 3],
            "visual_tokens_per_tile": tiling.tokens_per_tile,
            "logits": ["rows", "tokens", self.config.decoder.vocab_size],
        }
        preprocessing = {
            "tiling": dataclasses.asdict(tiling),
            "pixels": "(byte - 127.5) / 127.5, patches row by row, each flattened as (row, column, channel)",
            "padding": "byte 128; visual tokens wholly in padding have attention_mask 0",
            "code": f"{CODE}/hypervl_torch.py" if (self.home / CODE).exists() else None,
            "prompts": prompts_of(made),
        }
        source = artifacts.source_of(self.source.home, self.source.step, self.source.description)
        versions = artifacts.versions(PACKAGES)
        manifest = Manifest(KIND, source, shapes, self.dtype, preprocessing, versions, report)
        artifacts.write_manifest(self.home, manifest)


def check_torch() -> None:
    """Raises `ArtifactError` when the result could not be compared, before anything is written."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ArtifactError(f"{' and '.join(missing)} is needed to check the result; install the extra 'torch'")


def run_in_torch(
    home: pathlib.Path, prompts: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Everything of a directory that PyTorch can be asked. Raises `ArtifactError` where it is not installed."""
    check_torch()
    # PyTorch is an extra: this module serves --help and the eagle format without it.
    from tools import torch_parity

    report = {"torch": torch_parity.compare(home, prompts, arrays)}
    if "compressor/proxies" in arrays:
        proxies, outputs = arrays["compressor/proxies"], arrays["compressor/outputs"]
        found = torch_parity.compare_compressor(home, proxies, outputs)
        report["compressor"] = found | {"passed": found["difference"] <= torch_parity.TOLERANCE}
    return report


def prompts_of(made: Sequence[Case]) -> list[dict[str, Any]]:
    """The golden prompts as JSON; their pictures are golden arrays."""
    return [{"name": case.name, "question": case.question, "images": len(case.images)} for case in made]


def round_in_place(params: dict[str, Any], dtype: str) -> None:
    """Rounds every parameter to `dtype` and back to float32, one after another, so that no second copy of all exists."""
    for name, value in params.items():
        if isinstance(value, dict):
            round_in_place(value, dtype)
        else:
            params[name] = value.astype(dtype).astype(np.float32)


def round_trip(home: pathlib.Path, tables: Mapping[str, Sequence[Entry]], params: Mapping[str, Any]) -> dict[str, Any]:
    """Reads every parameter back through the key table, one at a time, and compares all bits."""
    reader = read_directory(home)
    wanted = [key for table in tables.values() for entry in table for key in entry.keys]
    different = []
    for part, table in tables.items():
        flat = traverse_util.flatten_dict(params[part], sep="/")
        for entry in table:
            found = entry.read(reader, tuple(slice(None) for _ in entry.shape))
            if not np.array_equal(found.view(np.uint32), np.asarray(flat[entry.path]).view(np.uint32)):
                different.append(f"{part}/{entry.path}")
    return {
        "parameters": sum(map(len, tables.values())),
        "keys": len(reader.keys),
        "different": different,
        "passed": not different and sorted(wanted) == sorted(reader.keys),
    }


def copy_code(target: pathlib.Path) -> None:
    """Copies what runs beside the weights: our inputs and VRC for PyTorch, and the files of `hypervl_jax` they use."""
    shipped = pathlib.Path(__file__).parent / "shipped" / "hypervl_torch.py"
    package = pathlib.Path(hypervl_jax.__file__).parent
    pairs = {target / shipped.name: shipped} | {target / "hypervl_jax" / name: package / name for name in SHIPPED}
    for place, file in pairs.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def copy_compressor(directory: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a VRC after reading it once, so that a damaged one is refused."""
    load_compressor(directory)
    target.mkdir()
    for name in (COMPRESSOR_WEIGHTS, COMPRESSOR_DESCRIPTION):
        shutil.copyfile(directory / name, target / name)


def show(reports: Mapping[str, Mapping[str, Any]], output: str) -> None:
    """Prints the reports as tables."""
    for branch, report in reports.items():
        table = Table(
            title=f"{branch}: {report['class']}, {report['dtype']}, against JAX in float32", title_justify="left"
        )
        for heading in ("prompt", "tokens", "tiles", "ids", "pixels", "logits differ by", "greedy tokens equal"):
            table.add_column(heading, justify="left" if heading == "prompt" else "right")
        prompts = report["torch"]["prompts"] if isinstance(report["torch"], dict) else {}
        for name, row in prompts.items():
            same = ["equal" if row[key] else "DIFFERENT" for key in ("ids_equal", "tiles_equal")]
            counts = (str(row["prompt_tokens"]), str(row["tiles"]))
            equal = f"{row['tokens_equal']} of {row['tokens_compared']}"
            table.add_row(name, *counts, *same, f"{row['logits_relative_difference']:.1e}", equal)
        Console().print(table) if prompts else print(f"{branch}: {report['torch']}")
        trip = report["round_trip"]
        print(f"round trip into Flax: {trip['parameters']} parameters from {trip['keys']} keys, all bits equal")
        if prompts:
            print(f"processor of transformers on our tiles: {processor_line(report['torch']['processor'])}")
        if "compressor" in report:
            print(f"compressor: outputs differ by {report['compressor']['difference']:.1e}")
    print(f"written: {output}")


def processor_line(found: str | Mapping[str, Mapping[str, bool]]) -> str:
    """The processor's part of a report, in words."""
    return found if isinstance(found, str) else f"inputs bit-equal on {', '.join(found)}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options. Ends the program with status 2 on anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.to_torch",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", required=True, help="a run's workdir or its checkpoints directory")
    add("--step", type=int, help="checkpoint to read (default: the newest)")
    add(
        "--encoder",
        choices=(*BRANCHES, BOTH),
        default=BRANCHES[0],
        help="default: %(default)s; both writes two directories",
    )
    add("--output", metavar="DIR", required=True, help="directory to make; must not exist, or be empty")
    add("--compressor", metavar="DIR", help="what tools.train_compressor wrote, to go with the model")
    add("--format", choices=tuple(FORMATS), default="lfm2", help="lfm2: transformers (default); eagle: vLLM, SGLang")
    add("--dtype", choices=tuple(WRITABLE), default="float32", help="of the stored weights (default: %(default)s)")
    add(
        "--prompts",
        metavar="LIST",
        default=",".join(golden.PROMPTS),
        help="golden prompts to compare on (default: %(default)s)",
    )
    add(
        "--new-tokens",
        type=int,
        metavar="N",
        default=golden.NEW_TOKENS,
        help="after each prompt (default: %(default)s)",
    )
    add("--json", action="store_true", help="print the reports as one JSON object")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    try:
        with terminate_as_interrupt(), progress_line() as progress:
            reports = export(
                options.checkpoint,
                options.output,
                encoder=options.encoder,
                compressor=options.compressor,
                layout=options.format,
                dtype=options.dtype,
                step=options.step,
                comparison=Comparison(tuple(options.prompts.split(",")), options.new_tokens),
                progress=progress,
            )
    except (ArtifactError, CheckpointError, ConfigError, TokenizerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        print(json.dumps(reports))
    else:
        show(reports, options.output)
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
