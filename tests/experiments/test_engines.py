import functools
import json
import os
import pathlib
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

from experiments import sweep
from experiments.engines import gke, slurm
from experiments.sweep_runs import expand
from hypervl_jax.architecture import ConfigError

# submitit configures logging when it is imported, which closes the handlers that are there, and with absl's pytest's own stderr.
os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"

SCHEMA = json.loads((pathlib.Path(__file__).parent / "jobset_schema.json").read_text())
OPTIONS = {"image": "registry/image:1", "topology": "2xv5e-256", "bucket": "bucket"}


@pytest.fixture(scope="module")
def runs():
    return expand(
        "stage2", "dcl_weight", pathlib.PurePosixPath("/gcs/sweeps/stage2/dcl_weight"), ["--data", "/gcs/data"]
    )


def documents(runs, **options):
    return list(yaml.safe_load_all(gke.describe(runs, {**OPTIONS, **options})))


def test_manifests_follow_the_published_schema(runs):
    made = documents(runs)
    assert len(made) == len(runs)
    for document in made:
        jsonschema.validate(document, SCHEMA)
    wrong = made[0]
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 1
    with pytest.raises(jsonschema.ValidationError, match="paralelism"):
        jsonschema.validate(wrong, SCHEMA)


@pytest.mark.parametrize(
    ("topology", "accelerator", "shape", "slices", "machines"),
    [
        ("v5e-256", "tpu-v5-lite-podslice", "16x16", 1, 64),
        ("2xv5e-256", "tpu-v5-lite-podslice", "16x16", 2, 64),
        ("v6e-256", "tpu-v6e-slice", "16x16", 1, 64),
        ("v5p-512", "tpu-v5p-slice", "4x8x8", 1, 64),
        ("v5p:16x16x16", "tpu-v5p-slice", "16x16x16", 1, 1024),
        ("v5e-4", "tpu-v5-lite-podslice", "2x2", 1, 1),
    ],
)
def test_a_jobset_asks_for_the_whole_topology(runs, topology, accelerator, shape, slices, machines):
    (document,) = documents(runs[:1], topology=topology)
    (replicated,) = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert replicated["replicas"] == slices
    assert job["parallelism"] == job["completions"] == machines
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


def test_names_are_those_that_kubernetes_takes_and_stay(runs):
    names = [document["metadata"]["name"] for document in documents(runs)]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 40 and name.replace("-", "").isalnum() and name.islower() for name in names)
    assert names == [run.job_name for run in reversed(runs)][::-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs --set image=… --set topology=… --set bucket=…"),
        ({**OPTIONS, "qeue": "x"}, "--set qeue: the gke engine has image, topology"),
        ({**OPTIONS, "restarts": "often"}, "restarts=often must be a whole number"),
        ({**OPTIONS, "topology": "v5e-7"}, "no v5e slice has 7"),
        ({**OPTIONS, "topology": "v5e:3x5"}, "15 chips are no whole number of machines of 4"),
        ({**OPTIONS, "topology": "4xv5e-256"}, "512 .* over 1024"),
        ({**OPTIONS, "mount": "/bucket"}, "does not lie in /bucket"),
    ],
)
def test_wrong_options_are_refused(runs, options, message):
    with pytest.raises(ConfigError, match=message):
        gke.describe(runs, options)


def shell(run, directory, body, patience=1):
    """Starts a pod's script with a `python` that does `body`."""
    fake = directory / "bin" / "python"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(f"#!/bin/sh\n{body}\n")
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    return subprocess.Popen(["sh", "-c", gke.script(run, patience)], env={**os.environ, "PATH": path})


@pytest.mark.parametrize(
    ("body", "status"),
    [("mkdir -p {proof} && touch {proof}/release.json", 0), ("exit 3", 3), ("exit 0", gke.PREEMPTED)],
)
def test_a_pod_succeeds_only_when_its_run_is_complete(tmp_path, body, status):
    run = expand("tiny", "dcl_weight", tmp_path / "sweep", [])[0]
    assert shell(run, tmp_path, body.format(proof=run.proof.parent)).wait(timeout=30) == status


def test_a_pod_passes_sigterm_on_and_lets_the_run_save(tmp_path):
    run = expand("tiny", "dcl_weight", tmp_path / "sweep", [])[0]
    saved, begun = tmp_path / "saved", tmp_path / "begun"
    body = f"trap 'sleep 1; touch {saved}; exit 0' TERM; touch {begun}; while true; do sleep 0.1; done"
    process = shell(run, tmp_path, body)
    deadline = time.monotonic() + 30
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == gke.PREEMPTED
    assert saved.exists()


def test_every_sweep_of_the_page_about_pods_expands(capsys):
    page = pathlib.Path("docs/pods.md").read_text().replace("\\\n", " ")
    words = {"$IMAGE": "image", "$BUCKET": "bucket"}
    commands = [line for line in page.splitlines() if line.startswith("python -m experiments.sweep")]
    assert len(commands) >= 3
    for line in commands:
        arguments = [
            functools.reduce(lambda text, pair: text.replace(*pair), words.items(), word) for word in line.split()
        ]
        assert sweep.main([*arguments[3:], "--dry-run"]) == 0
        assert "experiments.launch" in capsys.readouterr().out


def test_runs_in_a_bucket_that_is_not_mounted_are_submitted_without_a_table(tmp_path, monkeypatch, capfd):
    """`kubectl` is stood in for by a script; what it is given is read."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "kubectl").write_text(
        f"#!/bin/sh\ncat >> {tmp_path}/applied.yaml\necho --- >> {tmp_path}/applied.yaml\n"
    )
    (tmp_path / "kubectl").chmod(0o755)
    words = (
        "--config",
        "stage2",
        "--sweep",
        "dcl_weight",
        "--only",
        "kl_weight=1.0",
        "--on",
        "gke",
        "--data",
        "/gcs/data",
    )
    given = [f"--set={key}={value}" for key, value in OPTIONS.items()]
    assert sweep.main([*words, "--workdir", "/gcs/nowhere", *given]) == 0
    shown = capfd.readouterr().err
    assert "which runs are complete is not known here" in shown
    assert "mount it here and give --collect" in shown
    assert not pathlib.Path("/gcs/nowhere").exists()
    (applied,) = (document for document in yaml.safe_load_all((tmp_path / "applied.yaml").read_text()) if document)
    assert "/gcs/nowhere/stage2/dcl_weight/kl_weight=1.0" in json.dumps(applied)


def test_slurm_shows_jobs_and_their_parameters(runs):
    text = slurm.describe(runs[:1], {"nodes": "8", "slurm_partition": "tpu"})
    assert "nodes=8 slurm_partition=tpu" in text
    assert text.endswith("--config.consistency.kl_weight=0.0")
    assert runs[0].job_name in text
    assert slurm.parameters({"nodes": "8"})["nodes"] == 8
    with pytest.raises(ConfigError, match="--set: Parameter 'nonsense' need"):
        slurm.describe(runs[:1], {"nonsense": "8"})


def test_jobs_are_submitted_once_with_their_parameters(tmp_path, monkeypatch, capfd):
    """Slurm's programs are stood in for by scripts; what submitit hands to sbatch is read."""
    runs = expand("tiny", "dcl_weight", tmp_path / "sweep", [])[:2]
    answers = {"srun": "", "sbatch": "echo Submitted batch job 7", "squeue": f"echo {runs[0].job_name}"}
    for name, answer in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.execute(runs, {"nodes": "8", "slurm_partition": "tpu", "timeout_min": "600"}) == {}
    shown = capfd.readouterr().err
    assert f"{runs[0].name}: queued or running already" in shown
    assert f"{runs[1].name}: job 7" in shown
    job = (runs[1].directory.with_name(f"{runs[1].name}.slurm") / "7_submitted.pkl").read_bytes()
    assert b"_timeout_countdown\x94M" + slurm.MOST_TIMEOUTS.to_bytes(2, "little") in job
    script = runs[1].directory.with_name(f"{runs[1].name}.slurm") / "7_submission.sh"
    lines = script.read_text().splitlines()
    for wanted in ("--nodes=8", "--partition=tpu", "--time=600", "--signal=USR2@300", f"--job-name={runs[1].job_name}"):
        assert f"#SBATCH {wanted}" in lines
    with pytest.raises(ConfigError, match="--set: Unknown argument 'partitoin'"):
        slurm.execute(runs[1:], {"slurm_partitoin": "tpu"})


def test_slurm_jobs_run_through_submitit(tmp_path):
    """By submitit's executor for this machine: pickled, started by its own process, result read back."""
    submitit = pytest.importorskip("submitit")
    run = expand("tiny", "dcl_weight", tmp_path / "sweep", [])[0]
    mark = tmp_path / "mark"
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    executor.update_parameters(name=run.job_name, timeout_min=1, **{"stderr_to_stdout": True})
    done = executor.submit(slurm.Command(("-c", f"open({str(mark)!r}, 'w').write('x')")))
    failed = executor.submit(slurm.Command(("-c", "raise SystemExit(3)")))
    assert done.result() is None
    assert mark.read_text() == "x"
    assert "status 3" in str(failed.exception())


def test_a_slurm_task_lets_its_run_save_and_is_queued_again(tmp_path):
    pytest.importorskip("submitit")
    saved, begun = tmp_path / "saved", tmp_path / "begun"
    program = (
        "import pathlib, signal, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(saved)!r}).touch(), exit(0)))\n"
        f"pathlib.Path({str(begun)!r}).touch()\n"
        "time.sleep(60)"
    )
    command = slurm.Command(("-c", program))
    command.process = subprocess.Popen([sys.executable, *command.words])
    while not begun.exists():
        assert command.process.poll() is None
        time.sleep(0.02)
    again = command.checkpoint()
    assert saved.exists()
    assert again.function.words == command.words
    assert again.function.process is None


def test_away_from_slurm_it_says_so(tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sweep.main(["--config", "tiny", "--sweep", "dcl_weight", "--on", "slurm", "--workdir", str(tmp_path)]) == 2
    assert "there is no squeue here" in capsys.readouterr().err
    arguments = ["--config", "tiny", "--sweep", "dcl_weight", "--on", "gke", "--workdir", "/gcs/sweeps"]
    assert sweep.main([*arguments, *(f"--set={key}={value}" for key, value in OPTIONS.items())]) == 2
    assert "there is no kubectl here" in capsys.readouterr().err
