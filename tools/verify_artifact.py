"""`python -m tools.verify_artifact DIR`: re-checks an artifact against its manifest, and runs it on its golden inputs where that is possible.

    every file's SHA-256 ─► what the manifest says ─► the golden outputs again, in the runtime of its kind

A directory of several artifacts (`to_torch --encoder both`) is checked one by one; its `artifacts.json` says which there must be.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hypervl_jax.architecture import DECODER
from hypervl_jax.inference.assistant import ask
from tools import artifacts, edge_runtime, litert_bundle, to_torch
from tools.artifacts import MANIFEST, ArtifactError, Manifest
from tools.edge_parity import snr
from tools.edge_runtime import EdgeModel
from tools.edge_sources import COMPRESSOR
from tools.qnn_chips import EXTRA
from tools.qnn_chips import KIND as QNN
from tools.qnn_litert import KIND as LITERT_QNN

FAILURE, SUCCESS = 1, 0

_EPILOG = """\
examples:
  python -m tools.verify_artifact exports/base
  python -m tools.verify_artifact exports/hypervl --hashes-only

exit status:
  0  all as the manifest says    1  something differs or cannot be read    2  wrong usage
"""

SNR_SLACK = 15.0
"""dB. The golden pictures are one or two of those in the manifest's ratio, and a compressor's output is one number a picture."""

TOKEN_SLACK = 0.1
"""The golden prompts are a few of those in the manifest. A file that computes something else has no likeliest token right."""

Run = Callable[[pathlib.Path, Manifest, Mapping[str, np.ndarray]], dict[str, Any]]


def run_torch(directory: pathlib.Path, manifest: Manifest, golden: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A directory of `to_torch` on its golden prompts."""
    if manifest.preprocessing.get("code") is None:
        return {"torch": "not run: no class of transformers holds this format"}
    return to_torch.run_in_torch(directory, manifest.preprocessing["prompts"], golden)


def run_tflite(directory: pathlib.Path, manifest: Manifest, golden: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """An artifact of `export_tflite` in ai-edge-litert, on this CPU, and its bundles in litert-lm."""
    found = run_edge(edge_runtime.open_model(directory), manifest, golden)
    bundles = (name for name in sorted(manifest.files) if name.endswith(litert_bundle.SUFFIX))
    return found | {name: _bundle(directory / name, manifest, golden) for name in bundles}


def run_qnn(directory: pathlib.Path, manifest: Manifest, golden: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """An artifact of `export_qnn` on the simulator of onnxruntime-qnn; reports a runtime other than the one it was made with."""
    try:
        from tools import qnn_artifact, qnn_contexts
    except ImportError as error:
        raise ArtifactError(EXTRA) from error
    made, here = manifest.versions.get("qairt"), qnn_contexts.runtime_version()
    found = run_edge(qnn_artifact.open_model(directory), manifest, golden)
    note = {} if made == here else {"runtime": f"QAIRT {here} here, {made} when it was made;"}
    return note | found


def run_edge(model: EdgeModel, manifest: Manifest, golden: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Each part alone on its golden inputs, and how often the likeliest next token is JAX's, along JAX's answers, from pixels on.

    Returns:
        For each encoder and the compressor "snr_db" and "passed"; for each branch with a decoder, or for a decoder alone, "top1", "of" and
        "passed". Nothing may be worse than the manifest says, less `SNR_SLACK` and `TOKEN_SLACK`.
    """
    settings = model.settings
    found = {f"encoder_{branch}": _encoder(model, manifest, golden, branch) for branch in settings.branches}
    if settings.compressor is not None:
        found[COMPRESSOR] = _compressor(model, manifest, golden)
    if settings.prefill and not settings.branches:
        found[DECODER] = _along(model, manifest, golden, DECODER, _share(manifest, DECODER, "top1"))
    for branch in settings.branches if settings.prefill else ():
        name = f"answer_{branch}"
        found[name] = _along(model, manifest, golden, branch, _share(manifest, name, "tokens_equal"))
    return found


def _encoder(model: EdgeModel, manifest: Manifest, golden: Mapping[str, np.ndarray], branch: str) -> dict[str, Any]:
    (key,) = (key for key in golden if key.startswith(f"{branch}/") and key.endswith("/visual"))
    found = model.encode(golden[key.replace("/visual", "/tiles")], branch)
    return _near(manifest, f"encoder_{branch}", golden[key], found)


def _compressor(model: EdgeModel, manifest: Manifest, golden: Mapping[str, np.ndarray]) -> dict[str, Any]:
    proxies, sides = (golden[f"{COMPRESSOR}/{name}"].astype(np.float32) for name in ("proxy", "longest_side"))
    run = model.signatures[COMPRESSOR]
    each = [run(proxy=proxy[None] / 255, longest_side=side[None]) for proxy, side in zip(proxies, sides, strict=True)]
    areas = np.concatenate([one["log_area"] for one in each])
    return _near(manifest, COMPRESSOR, golden[f"{COMPRESSOR}/log_area"], areas)


def _bundle(path: pathlib.Path, manifest: Manifest, golden: Mapping[str, np.ndarray]) -> dict[str, Any]:
    answers = manifest.parity[path.name]["answers"]
    equal = litert_bundle.ask_again(path, answers, golden)
    return {"answers_equal": equal, "of": len(answers), "passed": equal == len(answers)}


def _near(manifest: Manifest, part: str, expected: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    ratio = snr(expected, found)
    return {"snr_db": ratio, "passed": ratio >= manifest.parity[part]["snr_db"] - SNR_SLACK}


def _share(manifest: Manifest, part: str, figure: str) -> float:
    return manifest.parity[part][figure] / manifest.parity[part]["of"]


def _along(
    model: EdgeModel, manifest: Manifest, golden: Mapping[str, np.ndarray], name: str, said: float
) -> dict[str, Any]:
    """Along the answers that stand under a name in the golden arrays; `said` is the manifest's share of equal tokens."""
    equal, compared = 0, 0
    for prompt in manifest.preprocessing["prompts"]:
        start = f"{name}/{prompt['name']}"
        images = [golden[f"{start}/image_{number}"] for number in range(prompt["images"])]
        encoded, tiles = model.prompt(ask(prompt["question"], *images).turns, images, [1.0] * len(images))
        cache, scores = model.start(model.embed(encoded, model.encode(tiles, name)))
        for token in golden[f"{start}/generated"]:
            equal, compared = equal + int(scores.argmax() == token), compared + 1
            scores = model.step(cache, int(token))
    if not compared:
        raise ArtifactError("the manifest names no golden prompts; export the checkpoint again")
    passed = equal / compared >= said - TOKEN_SLACK
    return {"top1": equal, "of": compared, "passed": passed}


RUNTIMES: dict[str, Run] = {to_torch.KIND: run_torch, edge_runtime.KIND: run_tflite, QNN: run_qnn}
"""How artifacts of each kind are run. An exporter of another kind adds its own."""

ELSEWHERE = (LITERT_QNN,)
"""Kinds that run on no machine of ours."""


def artifacts_in(directory: pathlib.Path) -> list[pathlib.Path]:
    """The directory itself, or its subdirectories. Raises `ArtifactError` when one of them is no artifact."""
    if (directory / MANIFEST).exists():
        return [directory]
    found = sorted(path for path in directory.glob("*/") if not path.name.startswith("."))
    lost = sorted(set(artifacts.read_list(directory)) - {path.name for path in found})
    if lost:
        raise ArtifactError(f"{directory} has lost {' and '.join(lost)}, which stand in its {artifacts.LIST}")
    without = [path.name for path in found if not (path / MANIFEST).exists()]
    if len(without) == len(found):
        raise ArtifactError(
            f"{directory} holds no {MANIFEST}, nor does a directory in it: there is no artifact to check"
        )
    if without:
        raise ArtifactError(f"{directory} holds artifacts, and {', '.join(without)} with no {MANIFEST}")
    return found


def verify(directory: pathlib.Path, run: bool = True) -> dict[str, Any]:
    """Checks one artifact.

    Returns:
        A report with "passed", "problems", "files" and, where it was run, what came out.

    Raises:
        ArtifactError: there is no manifest, or it cannot be read.
    """
    manifest = artifacts.read_manifest(directory)
    problems = artifacts.damage(directory, manifest)
    report: dict[str, Any] = {
        "kind": manifest.kind,
        "files": len(manifest.files),
        "problems": problems,
        "ran": "not run",
    }
    runtime = RUNTIMES.get(manifest.kind)
    if runtime is None and manifest.kind not in ELSEWHERE:
        problems.append(f"this code knows no artifacts of kind {manifest.kind!r}")
    if run and not problems and runtime is not None:
        try:
            report["ran"] = runtime(directory, manifest, artifacts.read_golden(directory))
        except KeyError as error:
            raise ArtifactError(f"{directory}: manifest or golden arrays lack {error}; export again") from error
        found = [name for name, part in report["ran"].items() if isinstance(part, dict) and not part["passed"]]
        problems += [f"{name} no longer gives the golden outputs" for name in found]
    return report | {"passed": not problems}


def line(report: Mapping[str, Any]) -> str:
    """A report in one line."""
    parts = report["ran"].items() if isinstance(report["ran"], dict) else [("golden outputs", report["ran"])]
    ran = ", ".join(f"{name} {_outcome(found)}" for name, found in parts)
    verdict = "as the manifest says" if report["passed"] else "; ".join(report["problems"])
    return f"{report['kind']}, {report['files']} files, {ran}: {verdict}"


def _outcome(found: Any) -> str:
    if isinstance(found, str):
        return found
    if "snr_db" in found:
        return f"run, {found['snr_db']:.1f} dB"
    if "answers_equal" in found:
        return f"run, {found['answers_equal']} of {found['of']} answers"
    return f"run, {found['top1']} of {found['of']} tokens" if "top1" in found else "run"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify_artifact",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", type=pathlib.Path, help="an artifact, or a directory of some")
    parser.add_argument("--hashes-only", action="store_true", help="do not run anything")
    parser.add_argument("--json", action="store_true", help="print the reports as one JSON object")
    options = parser.parse_args(arguments)
    try:
        found = artifacts_in(options.directory)
        reports = {str(path): verify(path, not options.hashes_only) for path in found}
    except ArtifactError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    if options.json:
        print(json.dumps(reports))
    for path, report in reports.items() if not options.json else ():
        print(f"{path}: {line(report)}")
    return SUCCESS if all(report["passed"] for report in reports.values()) else FAILURE


if __name__ == "__main__":
    sys.exit(main())
