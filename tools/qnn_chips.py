"""The chips that `tools.export_qnn` compiles for. Needs no package of Qualcomm's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tools.artifacts import ArtifactError

KIND = "qnn"
EXTRA = "onnxruntime-qnn is not installed; it comes with the extra: pip install 'hypervl-jax[qnn]' (Linux on x86-64)"

VTCM_MB = 8
"""Fast memory of the NPUs below, MiB, as the compiler is told."""


@dataclasses.dataclass(frozen=True)
class Soc:
    """A chip.

    Attributes:
        model: its number in Qualcomm's headers (QnnTypes.h, QNN_SOC_MODEL_…).
        arch: version of its NPU (Hexagon v…).
        name: as phones are sold with it.
    """

    model: int
    arch: int
    name: str


SOCS: Mapping[str, Soc] = {
    "sm8450": Soc(36, 69, "Snapdragon 8 Gen 1"),
    "sm8475": Soc(42, 69, "Snapdragon 8+ Gen 1"),
    "sm8550": Soc(43, 73, "Snapdragon 8 Gen 2"),
    "sm8650": Soc(57, 75, "Snapdragon 8 Gen 3"),
    "sm8750": Soc(69, 79, "Snapdragon 8 Elite"),
    "sm8850": Soc(87, 81, "Snapdragon 8 Elite Gen 5"),
}


def find_soc(name: str) -> Soc:
    """The chip of a name. Raises `ArtifactError` that lists the known ones."""
    if name.lower() not in SOCS:
        known = ", ".join(f"{key} ({soc.name})" for key, soc in SOCS.items())
        raise ArtifactError(f"{name!r} is no chip that is known here; known are {known}")
    return SOCS[name.lower()]
