"""Model FLOPs utilization (MFU; PaLM, arXiv 2204.02311, appendix B), and the memory in use on the devices.

Which FLOPs count is said in `hypervl_jax.planning.useful`: decoder, active towers, projectors and the teacher's forward pass, attention
included; every position and tile slot of the batch's shape, padded or not; recomputation not. The time is that of the steps,
waiting for data included; start, compilation, checkpoints and evaluations are not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import jax

from hypervl_jax.architecture import HyperVLConfig
from hypervl_jax.planning.chips import peak_flops
from hypervl_jax.planning.useful import step_flops
from hypervl_jax.training.batch import BatchShape
from hypervl_jax.training.consistency import ConsistencyConfig

CONVENTION = (
    "decoder + active towers + projectors + teacher forward, attention included; padding counted, recomputation not; "
    "over step time, data wait included"
)


def arms_flops(
    architecture: HyperVLConfig, shape: BatchShape, consistency: ConsistencyConfig, trainable: Collection[str]
) -> dict[str, int]:
    """FLOPs of one step of each arm of the step's switch, by its name ("base", "base+large")."""
    return {
        "+".join(arm): sum(step_flops(architecture, shape, arm, trainable, consistency.uses_teacher).values())
        for arm in consistency.arms
    }


class Utilization:
    """MFU of the steps of a run.

    Args:
        arm_flops: FLOPs of one step of each arm, by the arm's name, in the order of the arms.
        devices: of the mesh.
    """

    def __init__(self, arm_flops: Mapping[str, int], devices: Sequence[jax.Device]) -> None:
        self._arm_flops = dict(arm_flops)
        self._kind, self._devices = devices[0].device_kind, len(devices)
        self._peak = peak_flops(self._kind)
        self.chips = count_chips(devices)

    def mfu(self, steps_by_arm: Mapping[int, int], seconds: float) -> float | None:
        """Share of the peak that the given steps (by number of the arm) reached; None where the peak is not known."""
        if self._peak is None:
            return None
        flops = list(self._arm_flops.values())
        done = sum(flops[arm] * steps for arm, steps in steps_by_arm.items())
        return done / (seconds * self._devices * self._peak)

    def describe(self) -> str:
        """The convention, the FLOPs of a step and the peak, for the log."""
        steps = ", ".join(f"{flops / 1e12:.4g} TFLOP a step of {arm}" for arm, flops in self._arm_flops.items())
        if self._peak is None:
            return f"MFU is left out: no published peak is known for devices of kind {self._kind!r}. {steps} ({CONVENTION})"
        return f"MFU counts {CONVENTION}: {steps}; {self._devices} × {self._kind} of {self._peak / 1e12:.4g} TFLOP/s"


def count_chips(devices: Sequence[jax.Device]) -> int:
    """Chips that the devices belong to: on tpu7x two share the coordinates of one. Devices without coordinates count as chips."""
    places = {(getattr(device, "slice_index", 0), *getattr(device, "coords", (device.id,))) for device in devices}
    return len(places)


def memory_in_use(devices: Sequence[jax.Device]) -> dict[str, float]:
    """Bytes in use now, at the peak and at most, on the fullest of this process's devices; empty where devices do not tell."""
    found = [stats for device in devices if (stats := device.memory_stats())]
    names = {"now": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    values = {name: [stats[key] for stats in found if key in stats] for name, key in names.items()}
    return {f"device_bytes/{name}": float(max(sizes)) for name, sizes in values.items() if sizes}
