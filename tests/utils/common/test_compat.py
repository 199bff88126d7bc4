"""What replaces newer PyTorch in older ones, against arithmetic; and the whole way in one version and across two.

The latter with the Python of another environment in OTHER_PYTHON, which tests/oldest.sh names.
"""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from utils.common import compat


@pytest.mark.parametrize("own", [True, False])
def test_the_norm_of_several_tensors(monkeypatch, own):
    if not own:
        monkeypatch.delattr(torch.nn.utils, "get_total_norm", raising=False)
    tensors = [torch.tensor([[3.0, 4.0]]), torch.tensor(12.0), torch.zeros(0)]
    assert compat.total_norm(tensors).item() == pytest.approx(13)


@pytest.mark.parametrize("line, expected", [
    ("flags\t\t: fpu avx512f avx512_bf16 sha_ni", True), ("flags\t\t: fpu amx_bf16", True),
    ("flags\t\t: fpu avx2 avx512f", False), ("Features\t: fp asimd bf16 i8mm", True), ("model name\t: bf16", False)])
def test_instructions_are_read_where_pytorch_does_not_tell(monkeypatch, tmp_path, line, expected):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\nbugs\t\t:\n")
    assert compat.cpu_computes_in_bf16(tmp_path / "cpuinfo") is expected
    assert not compat.cpu_computes_in_bf16(tmp_path / "absent")


@pytest.mark.parametrize("isa, expected", [("AVX2", False), ("avx512_core", False), ("AVX512_CORE_BF16", True),
                                           ("ALL", True), ("", True)])
def test_instructions_that_onednn_may_not_use_do_not_count(monkeypatch, isa, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert compat.cpu_computes_in_bf16() is expected


@pytest.mark.parametrize("size, padding, dilation, taken", [(2, 0, 1, False), (3, 0, 1, True), (3, 1, 2, True),
                                                           (2, 1, 2, False)])
def test_what_has_no_values_is_no_smaller_than_a_kernel_either(size, padding, dilation, taken):
    expected = contextlib.nullcontext() if taken else pytest.raises((ValueError, RuntimeError), match="than|small")
    with torch.device("meta"), compat.CheckedConvolutions(), expected:
        torch.nn.Conv2d(3, 4, 3, 2, padding, dilation)(torch.zeros(1, 3, 9, size))


HERE, OTHER = sys.executable, os.environ.get("OTHER_PYTHON")


def call(python, script, *words):
    done = subprocess.run([python, script, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(python, streets, folder, steps, *words):
    return call(python, "train.py", "--data-dir", streets, "--snapshot-dir", folder, "--backbone", "eca_resnet18",
                "--input-size", "65,129", "--batch-size", 2, "--num-workers", 1, "--num-steps", steps, "--gpu", "cpu",
                "--save-pred-every", 1, *words)


@pytest.mark.skipif(OTHER is None, reason="needs a second environment: tests/oldest.sh --short")
@pytest.mark.parametrize("first, second", [(HERE, OTHER), (OTHER, HERE)], ids=["here_first", "other_first"])
def test_the_whole_way_across_two_versions(streets, tmp_path, first, second):
    """Train and score with one, go on, score, predict and export with the other."""
    train(first, streets, tmp_path, 1)
    assert "1 step done" in train(second, streets, tmp_path, 2, "--resume")
    scores = {}
    for python in (first, second):
        folder = tmp_path / f"{len(scores)}"
        call(python, "evaluate.py", "--data-dir", streets, "--restore-from", tmp_path / "CS_scenes_2.pth",
             "--gpu", "cpu", "--scales", 1, "--no-flip", "--amp", "off", "--output-dir", folder)
        scores[len(scores)] = json.loads((folder / "result.json").read_text())["single_scale"]["pixel_accuracy"]
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)      # another version adds in another order
    image = next((streets / "leftImg8bit/val").rglob("*.png"))
    call(second, "evaluate.py", "--restore-from", tmp_path / "CS_scenes_1.pth", "--images", image, "--gpu", "cpu",
         "--scales", 1, "--no-flip", "--output-dir", tmp_path / "pictures")
    assert (tmp_path / f"pictures/labelIds/{image.stem}.png").is_file()
    call(second, "evaluate.py", "--restore-from", tmp_path / "CS_scenes_1.pth", "--export", tmp_path / "acfnet.onnx")
    assert (tmp_path / "acfnet.onnx").stat().st_size > 1e6
