"""An artifact for the NPU of a Snapdragon: a checkpoint's parts as QNN contexts, compared with JAX on the simulator.

graphs (tools.edge_graphs) ─► ONNX in float32, run on this CPU: near JAX, or nothing is written
└► records of data/train ─► ranges ─► ONNX in whole numbers ─► compiler ─► NAME.onnx and NAME_qnn.bin of each graph
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypervl_jax.architecture import BRANCHES
from hypervl_jax.models.compressor_io import load_compressor
from hypervl_jax.text.tokenizer import load_tokenizer
from tools import artifacts, edge_calibration, edge_parity, edge_sources, onnx_files, qnn_contexts
from tools.artifacts import ArtifactError
from tools.edge_graphs import Graph
from tools.edge_runtime import TOKENIZER, EdgeModel, Signature, checked, read_settings
from tools.edge_sources import PARTS, Exported, Request, part_graphs
from tools.label_resolutions import ReportProgress
from tools.onnx_graphs import OnnxGraph, onnx_graph
from tools.onnx_quantise import gram_matrices, quantise_graph
from tools.qnn_chips import KIND, VTCM_MB, Soc, find_soc
from tools.qnn_contexts import Compiled, compile_context
from tools.quantisation import FLOAT16, QNN_PRECISIONS, Precision

DECODER_GRAPHS = ("decode", "prefill_")
IN_FLOAT16 = ("compressor",)
"""Parts that stay in float16 at every precision: a small network that decides on α."""

ON_CPU = "embedder"
"""Looking up rows of a table is no work for an NPU; the part is an ONNX file for the CPU, with 8 bits in whole-numbered artifacts."""

PACKAGES = ("jax", "flax", "numpy", "onnx", "onnxruntime", "onnxruntime-qnn")
MINIMUM_SNR = 80.0
"""Of every part in float32 on this CPU, dB; below it the ONNX graphs are wrong, and nothing is written."""


def export(
    checkpoint: str,
    output: str,
    soc: str,
    *,
    precisions: Sequence[str] = (FLOAT16,),
    parts: Sequence[str] = PARTS,
    encoder: str = BRANCHES[0],
    compressor: str | None = None,
    prefill: Sequence[int] = (128,),
    slots: int = 1024,
    data: str | None = None,
    items: int = 4,
    calibration_items: int = 16,
    step: int | None = None,
    progress: ReportProgress = lambda what, done, total: None,
) -> dict[str, dict[str, Any]]:
    """Writes one artifact for each precision; `output` appears only when all are complete.

    Args:
        checkpoint: a run's workdir or its `checkpoints` directory.
        output: the artifact of one precision, or the parent of one directory for each.
        soc: a name in `SOCS`.
        precisions: of `QNN_PRECISIONS`.
        parts, encoder, compressor, prefill, slots, data, items, calibration_items, step: as for `edge_sources.Request`.
        progress: told what is being done, and how much of it is.

    Returns:
        The report of each precision.

    Raises:
        CheckpointError, ConfigError, TokenizerError, RecordError: an input is missing or of another kind.
        ArtifactError: the chip is not known, the output is taken, the disk is full, a package is missing, the NPU does not run an
            operation, or float32 differs from JAX.
    """
    artifacts.check_output(output)
    chip = find_soc(soc)
    qnn_contexts.runtime_version()
    progress("reading", 0, 1)
    calibrated = [name for name in precisions if QNN_PRECISIONS[name].activations is not None]
    vrc = None if compressor is None else load_compressor(compressor)
    request = Request(
        checkpoint, step, parts, encoder, vrc, prefill, slots, data, items, calibration_items, tuple(calibrated)
    )
    made = edge_sources.read(request)
    reports = {}
    with artifacts.writing(output, _bytes(made, precisions)) as temporary:
        exporter = _Exporter(made, chip, soc.lower(), temporary / ".float32", progress, len(precisions))
        for name in precisions:
            home = temporary / name if len(precisions) > 1 else temporary
            home.mkdir(exist_ok=True)
            reports[name] = exporter.export(name, home)
        exporter.close()
        for name, report in reports.items():
            exporter.finish(name, temporary / name if len(precisions) > 1 else temporary, report)
        artifacts.write_list(temporary, precisions)
    return reports


def _bytes(made: Exported, precisions: Sequence[str]) -> int:
    """A lower bound of what will be written, the files in float32 that the compiler reads among it."""
    parameters = made.parameters()
    return 4 * parameters + sum(parameters * (QNN_PRECISIONS[name].layers or 16) // 8 for name in precisions)


class _Exporter:
    """Files in float32 once, and what each precision makes of them."""

    def __init__(
        self, made: Exported, soc: Soc, soc_name: str, work: pathlib.Path, progress: ReportProgress, precisions: int
    ) -> None:
        self.made, self.soc, self.soc_name, self.work = made, soc, soc_name, work
        self.graphs: dict[str, OnnxGraph] = {}
        self._progress, self._done = progress, 0
        files = part_graphs(made, Precision())
        self._steps = 2 + precisions * (len(files) + len(made.settings.prefill) + 1)
        work.mkdir()
        self._tell("ONNX in float32")
        for part, graphs in files.items():
            self._write(part, graphs)
        self.float32 = self._check()
        self.feeds = edge_calibration.record(self._on_cpu(), made.calibration) if made.calibration else {}

    def _tell(self, what: str) -> None:
        self._progress(what, self._done, self._steps)
        self._done += 1

    def _write(self, part: str, graphs: Callable[[], list[Graph]]) -> None:
        """Writes the graphs of a part; their weights lie in one file."""
        written: dict[str, Any] = {}
        for graph in map(onnx_graph, reversed(graphs())):  # the last one has all weights
            written |= onnx_files.save(graph, self.work / f"{graph.name}.onnx", written or None)
            if part != ON_CPU:
                self.graphs[graph.name] = graph

    def _on_cpu(self) -> EdgeModel:
        return _model(self.made, {path.stem: _cpu_signature(path) for path in sorted(self.work.glob("*.onnx"))})

    def _check(self) -> dict[str, Any]:
        """The ONNX graphs on this CPU against JAX."""
        self._tell("ONNX against JAX")
        made = self.made
        parts = edge_parity.compare(self._on_cpu(), made.cases, made.references, made.vrc)
        wrong = [part for part, found in parts.items() if found.get("snr_db", 200) < MINIMUM_SNR]
        if wrong:
            raise ArtifactError(f"at float32 {' and '.join(wrong)} differs from JAX: {json.dumps(parts)}")
        return parts

    def export(self, name: str, home: pathlib.Path) -> dict[str, Any]:
        """Compiles and compares one precision; returns its report."""
        precision = QNN_PRECISIONS[name]
        compiled = {}
        for part, graph in self.graphs.items():
            self._tell(f"{name}: {part}")
            compiled[part] = self._compile(graph, precision, home)
        self._embedder(precision, home)
        self.made.source.tokenizer.save(home / TOKENIZER)
        self._tell(f"{name}: parity")
        model = _model(self.made, open_signatures(home))
        parts = edge_parity.compare(model, self.made.cases, self.made.references, self.made.vrc)
        npu = {part: dataclasses.asdict(found) | {"on_cpu": 0} for part, found in compiled.items()}
        return {
            "precision": name,
            "soc": self.soc_name,
            "vtcm_mb": VTCM_MB,
            "npu": npu,
            "parts": parts,
            "float32_on_cpu": self.float32,
        }

    def _compile(self, graph: OnnxGraph, precision: Precision, home: pathlib.Path) -> Compiled:
        source, part = self.work / f"{graph.name}.onnx", graph.name
        if precision.activations is not None and part not in IN_FLOAT16:
            if not self.feeds.get(part):
                raise ArtifactError(f"no prompt of the calibration data runs {part}; give more or longer records")
            source = self.work / f"{part}.whole.onnx"
            grams = self._grams(part, precision)
            onnx_files.save(quantise_graph(graph, precision, self.feeds[part], grams), source)
        found = compile_context(source, home / f"{part}.onnx", self.soc)
        if source.name.endswith(".whole.onnx"):
            source.with_suffix(".weights").unlink()
            source.unlink()
        return found

    def _grams(self, part: str, precision: Precision) -> dict[str, np.ndarray]:
        """Of all that a part's matrices are multiplied with: prefill and decode have the same, and so are rounded alike."""
        together = [each for each in self.graphs if each.startswith(DECODER_GRAPHS)]
        grams: dict[str, np.ndarray] = {}
        for each in together if part in together else [part]:
            for name, gram in gram_matrices(self.graphs[each], precision, self.feeds.get(each, ())).items():
                grams[name] = grams[name] + gram if name in grams else gram
        return grams

    def _embedder(self, precision: Precision, home: pathlib.Path) -> None:
        graphs = part_graphs(self.made, precision).get(ON_CPU)
        written: dict[str, Any] = {}
        for graph in graphs() if graphs else ():
            written |= onnx_files.save(onnx_graph(graph), home / f"{graph.name}.onnx", written or None)

    def close(self) -> None:
        """Removes the files in float32."""
        for path in self.work.iterdir():
            path.unlink()
        self.work.rmdir()

    def finish(self, name: str, home: pathlib.Path, report: Mapping[str, Any]) -> None:
        """Golden arrays, report, manifest."""
        versions = artifacts.versions(PACKAGES) | {"qairt": qnn_contexts.runtime_version()}
        shapes = {"soc": self.soc_name, "soc_model": self.soc.model, "htp_arch": self.soc.arch}
        edge_sources.finish(self.made, KIND, name, home, report, versions, shapes | {"npu": report["npu"]})


def _model(made: Exported, signatures: Mapping[str, Signature]) -> EdgeModel:
    return EdgeModel(made.settings, made.source.tokenizer, signatures)


def _cpu_signature(path: pathlib.Path) -> Signature:
    return onnx_files.signature(onnx_files.open_session(path))


def open_signatures(directory: pathlib.Path) -> dict[str, Signature]:
    """All graphs of an artifact by name, the NPU's on its simulator. Raises `ArtifactError` when one cannot be loaded."""
    qnn_contexts.runtime_version()
    return {
        path.stem: _cpu_signature(path) if path.stem.startswith(ON_CPU) else qnn_contexts.open_signature(path)
        for path in sorted(directory.glob("*.onnx"))
    }


def open_model(directory: pathlib.Path) -> EdgeModel:
    """The model of an artifact. Raises `ArtifactError` when it is none, or its parts cannot be run."""
    settings = read_settings(artifacts.read_manifest(directory), KIND)
    return EdgeModel(settings, load_tokenizer(directory / TOKENIZER), checked(settings, open_signatures(directory)))
