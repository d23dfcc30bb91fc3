"""Runs as JobSets on Google Kubernetes Engine, queued by Kueue: the manifests that `kubectl apply` takes.

A JobSet (jobset.sigs.k8s.io) is one run: a Job for each TPU slice, a pod for each TPU machine. GKE tells the pods of a slice and
the slices of a JobSet of each other. When a pod fails or its machine goes away, the whole JobSet starts again and the run resumes
from its checkpoint. docs/pods.md makes the cluster, the queue and the bucket that a manifest names.

`--set` takes the fields of `Options`: image, topology, bucket, and what differs from their defaults.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from experiments.sweep_runs import Run
from hypervl_jax.architecture import ConfigError, require
from hypervl_jax.planning import chips

ACCELERATORS: Mapping[str, str] = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
"""Node label cloud.google.com/gke-tpu-accelerator of each generation (cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus)."""

CHIPS_PER_MACHINE = 4
PREEMPTED = 75
"""Status of a pod whose run has saved but is not complete (EX_TEMPFAIL of sysexits.h): the JobSet starts again."""

PATIENCE_SECONDS = 60
"""How long a pod waits for the proof that its run is complete."""

GRACE_SECONDS = 300
"""Seconds from SIGTERM to the end of a pod; a run saves in them."""

PORTS = (8471, 8080)
"""TPU runtime and multislice (MEGASCALE) coordination."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a manifest needs to know beside the run.

    Attributes:
        image: container image with this code.
        topology: e.g. `v5e-256`, `2xv5e-256`.
        bucket: Cloud Storage bucket that holds data, weights and workdirs.
        mount: where the pods see the bucket; `--workdir` lies in it.
        queue: Kueue's LocalQueue; empty: not queued.
        namespace: of everything.
        service_account: Kubernetes service account with access to the bucket.
        restarts: times that a JobSet starts again.
    """

    image: str
    topology: str
    bucket: str
    mount: str = "/gcs"
    queue: str = "hypervl"
    namespace: str = "default"
    service_account: str = "hypervl"
    restarts: str = "100"


def parse_options(given: Mapping[str, str]) -> Options:
    """The options of `--set`. Raises `ConfigError` when one is unknown or missing."""
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(Options)}
    unknown = [name for name in given if name not in fields]
    require(not unknown, f"--set {', '.join(unknown)}: the gke engine has {', '.join(fields)}")
    missing = [name for name, needed in fields.items() if needed and not given.get(name)]
    require(not missing, f"the gke engine needs {' '.join(f'--set {name}=…' for name in missing)}")
    require(given.get("restarts", "0").isdecimal(), f"--set restarts={given.get('restarts')} must be a whole number")
    return Options(**given)


def describe(runs: Sequence[Run], options: Mapping[str, str]) -> str:
    """The manifests of all runs as YAML documents."""
    parsed = parse_options(options)
    return "---\n".join(to_yaml(manifest(run, parsed)) for run in runs)


def execute(runs: Sequence[Run], options: Mapping[str, str]) -> dict[str, str]:
    """Applies a manifest for each run; what is there already stays. Returns why some could not be applied, by name."""
    parsed, failures = parse_options(options), {}
    if shutil.which("kubectl") is None:
        raise ConfigError("there is no kubectl here: install it, or write the manifests with --dry-run")
    for run in runs:
        text = to_yaml(manifest(run, parsed))
        applied = subprocess.run(
            ["kubectl", "apply", "-f", "-"], input=text, capture_output=True, text=True, check=False
        )
        if applied.returncode:
            failures[run.name] = f"not applied: {applied.stderr.strip()}"
    return failures


def mounted(options: Mapping[str, str]) -> bool:
    """Whether the bucket is mounted on this machine where the pods see it."""
    return os.path.ismount(parse_options(options).mount)


def manifest(run: Run, options: Options) -> dict[str, Any]:
    """The JobSet of one run. Raises `ConfigError` when its directory would be lost, or it cannot be laid out on the topology."""
    topology = chips.topology(options.topology)
    _check(run, options, topology)
    per_slice = math.prod(topology.shape)
    machines = max(per_slice // CHIPS_PER_MACHINE, 1)
    labels = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    job = {
        "parallelism": machines,
        "completions": machines,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": _pod(run, options, topology, min(per_slice, CHIPS_PER_MACHINE)),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": run.job_name,
            "namespace": options.namespace,
            "labels": labels,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": int(options.restarts)},
            "replicatedJobs": [{"name": "slice", "replicas": topology.slices, "template": {"spec": job}}],
        },
    }


def _check(run: Run, options: Options, topology: chips.Topology) -> None:
    require(
        run.directory.is_relative_to(options.mount),
        f"--workdir {run.directory.parent} does not lie in {options.mount}, where pods see the bucket: all would be lost with a pod",
    )
    per_slice = math.prod(topology.shape)
    require(
        per_slice < CHIPS_PER_MACHINE or per_slice % CHIPS_PER_MACHINE == 0,
        f"--set topology={options.topology}: {per_slice} chips are no whole number of machines of {CHIPS_PER_MACHINE}",
    )
    run.check_on(topology)


def _pod(run: Run, options: Options, topology: chips.Topology, machine_chips: int) -> dict[str, Any]:
    """The pod of one TPU machine. Host networking, since slices exchange gradients over it."""
    return {
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
        "spec": {
            "hostNetwork": True,
            "dnsPolicy": "ClusterFirstWithHostNet",
            "restartPolicy": "Never",
            "serviceAccountName": options.service_account,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "nodeSelector": {
                "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[topology.chip.name],
                "cloud.google.com/gke-tpu-topology": "x".join(map(str, topology.shape)),
            },
            "containers": [_container(run, options, machine_chips)],
            "volumes": [_bucket(options), {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
        },
    }


def _container(run: Run, options: Options, machine_chips: int) -> dict[str, Any]:
    """The training container. As root and privileged, unlike the image's own user: the TPU devices of a machine belong to root,
    and their driver locks more memory than a container may.
    """
    return {
        "name": "train",
        "image": options.image,
        "command": ["sh", "-c", script(run)],
        "ports": [{"containerPort": port} for port in PORTS],
        "securityContext": {"runAsUser": 0, "privileged": True},
        "resources": {"limits": {"google.com/tpu": machine_chips}},
        "volumeMounts": [
            {"name": "bucket", "mountPath": options.mount},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }


def _bucket(options: Options) -> dict[str, Any]:
    """The bucket as a volume; under host networking it must be told to go by the pod's own service account."""
    attributes = {"bucketName": options.bucket, "mountOptions": "implicit-dirs", "hostNetworkPodKSA": "true"}
    return {"name": "bucket", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}


def script(run: Run, patience: int = PATIENCE_SECONDS) -> str:
    """The pod's shell script: the run, to which SIGTERM is passed on, and then a look at whether it is complete.

    A run that is preempted saves and ends with 0, which would end the JobSet; so every pod waits `patience` seconds for the
    proof of completeness, which process 0 writes, and fails without it.
    """
    return f"""\
python {shlex.join(run.words)} &
child=$!
trap 'kill -TERM $child' TERM
wait $child
status=$?
# A signal ends the first wait while the run still saves.
trap - TERM
wait $child && status=0
test $status = 0 || exit $status
for second in $(seq {patience}); do
  test -e {shlex.quote(str(run.proof))} && exit 0
  sleep 1
done
exit {PREEMPTED}
"""


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(document: Mapping[str, Any]) -> str:
    """A manifest as `kubectl apply` reads it."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000)
