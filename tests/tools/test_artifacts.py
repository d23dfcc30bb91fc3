"""Artifacts appear whole or not at all, and any change of a file is found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tools import artifacts, verify_artifact
from tools.artifacts import ArtifactError, Manifest

EMPTY = Manifest("litert-qnn", {}, {}, "float32", {}, {}, {})


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact of two files besides the golden arrays."""
    with artifacts.writing(tmp_path / "made") as home:
        (home / "weights").write_bytes(bytes(range(256)))
        (home / "code").mkdir()
        (home / "code" / "run.py").write_text("pass\n")
        artifacts.write_golden(home, {"x": np.arange(6.0).reshape(2, 3).T})
        artifacts.write_manifest(home, EMPTY)
    return tmp_path / "made"


def check(path: Path, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    status = verify_artifact.main([str(path)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_an_artifact_is_as_its_manifest_says(artifact: Path, capsys: pytest.CaptureFixture) -> None:
    assert check(artifact, capsys) == (
        0,
        f"{artifact}: litert-qnn, 3 files, golden outputs not run: as the manifest says\n",
    )
    assert sorted(artifacts.read_manifest(artifact).files) == ["code/run.py", "golden.safetensors", "weights"]
    np.testing.assert_array_equal(artifacts.read_golden(artifact)["x"], np.arange(6.0).reshape(2, 3).T)


def test_every_kind_of_damage_is_named(artifact: Path, capsys: pytest.CaptureFixture) -> None:
    data = bytearray((artifact / "weights").read_bytes())
    data[100] ^= 1
    (artifact / "weights").write_bytes(data)
    assert check(artifact, capsys)[0] == 1
    (artifact / "code" / "run.py").unlink()
    (artifact / "code" / "other.py").write_text("")
    status, said = check(artifact, capsys)
    assert status == 1
    for problem in (
        "code/run.py is missing",
        "code/other.py is not in the manifest",
        "weights has other content than when it was made",
    ):
        assert problem in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), "holds no manifest.json"),
        (lambda path: path.write_text("{"), "is damaged"),
        (lambda path: path.write_text("[]"), "is damaged"),
        (lambda path: path.write_text(json.dumps({"format_version": 1})), "is damaged"),
        (
            lambda path: path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9')),
            "has format 9, this code reads 1",
        ),
    ],
)
def test_a_manifest_that_cannot_be_read_is_one_sentence(artifact: Path, capsys, change, said: str) -> None:
    change(artifact / "manifest.json")
    status, message = check(artifact, capsys)
    assert status == 1
    assert message.startswith("error: ")
    assert said in message
    assert message.count("\n") == 1


def test_several_artifacts_are_checked_one_by_one(artifact: Path, tmp_path: Path, capsys) -> None:
    (artifact / "weights").write_bytes(b"")
    with artifacts.writing(tmp_path / "sound") as home:
        artifacts.write_manifest(home, EMPTY)
    status, said = check(tmp_path, capsys)
    assert status == 1
    assert "made: litert-qnn, 3 files, golden outputs not run: weights has other content" in said
    assert "sound: litert-qnn, 0 files, golden outputs not run: as the manifest says" in said


def test_an_artifact_that_was_deleted_whole_is_missed(tmp_path: Path, capsys) -> None:
    with artifacts.writing(tmp_path / "both") as home:
        for name in ("one", "two"):
            (home / name).mkdir()
            artifacts.write_manifest(home / name, EMPTY)
        artifacts.write_list(home, ("one", "two"))
    both = tmp_path / "both"
    assert check(both, capsys)[0] == 0
    shutil.rmtree(both / "two")
    assert check(both, capsys) == (1, f"error: {both} has lost two, which stand in its artifacts.json\n")
    (both / "artifacts.json").write_text("{")
    assert "artifacts.json is damaged" in check(both, capsys)[1]


def write_half(output: Path) -> None:
    with artifacts.writing(output) as home:
        (home / "part").write_text("half")
        raise ZeroDivisionError


def test_nothing_is_left_of_an_artifact_that_fails(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ArtifactError, match="is there already"), artifacts.writing(tmp_path / "taken"):
        raise AssertionError("the block must not run")
    (tmp_path / "empty").mkdir()
    for output in ("new", "empty"):
        with pytest.raises(ZeroDivisionError):
            write_half(tmp_path / output)
    with pytest.raises(ArtifactError, match="could not be written: No space left"), artifacts.writing(tmp_path / "new"):
        raise OSError(28, "No space left on device")
    with pytest.raises(ArtifactError, match="MB left; free space there"), artifacts.writing(tmp_path / "new", 1 << 60):
        raise AssertionError("the block must not run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "taken"]
    assert list((tmp_path / "empty").iterdir()) == []
