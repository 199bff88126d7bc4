"""run_local.sh, in a copy of the project: which weights it takes, and the whole way on a small data set."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path):
    for name in ("networks", "dataset", "utils", "loss", "libs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.pth*"))
    for name in ("train.py", "evaluate.py", "run_local.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(project, *words):
    """run_local.sh with this Python first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", str(project / "run_local.sh"), *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, "PATH": path}, cwd=project.parent)


@pytest.mark.parametrize("names, found", [
    ((), "found 0;"), (("a.pth", "b.pth.tar"), "found 2: dataset/a.pth dataset/b.pth.tar;")])
def test_none_or_several_weights_are_one_sentence(project, streets, names, found):
    for name in names:
        torch.save({}, project / "dataset" / name)
    done = run(project, streets)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "dataset/: expected one file of backbone weights" in done.stderr and found in done.stderr
    assert not (project / "snapshots").exists()


def test_a_missing_data_set_is_one_sentence(project):
    done = run(project, "nowhere", "--from-scratch")
    assert done.returncode == 2 and "expected a folder, found nothing there" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_data_goes_all_the_way_to_a_score(project, streets):
    done = run(project, streets, "--from-scratch", "--backbone", "resnet18", "--model", "acfnet_resnet", "--input-size",
               "65,129", "--batch-size", "2", "--num-steps", "2", "--num-workers", "0", "--gpu", "cpu")
    assert done.returncode == 0, done.stderr
    assert "train: 9 images, 19 classes" in done.stdout and "val: 5 images" in done.stdout
    result = json.loads((project / "snapshots/CS_scenes_2_val/result.json").read_text())
    assert result["protocol"]["scales"] == [0.75, 1.0, 1.25, 1.5, 1.75, 2.0] and result["protocol"]["flip"]
    assert {"single_scale", "multi_scale"} <= set(result) and result["num_images"] == 5
