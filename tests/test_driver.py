"""A GPU that is there but cannot be used, told from the files and values that are read."""

import pytest
import torch

from utils import distributed
from utils.cli import UserError
from utils.driver import unusable_gpu

# As the driver writes them, the second one since its kernel modules are open.
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Sep 12 19:41:22 UTC 2023\nGCC version:  gcc 11\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder)\nGCC version: 12\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia0").touch()
    return tmp_path


def ask(machine, text, cuda):
    (machine / "version").write_text(text)
    return unusable_gpu(machine, machine, cuda, "2.15.0")


@pytest.mark.parametrize("text, driver, cuda, said", [
    (CLOSED, "535.104.05", "13.0", "CUDA 13.0, which needs driver 580 or newer; install that, or a PyTorch built for "
     "CUDA 12"),
    (CLOSED, "470.223.02", "12.1", "needs driver 525 or newer; install that, or a PyTorch built for CUDA 11"),
    (CLOSED, "390.157", "12.1", "needs driver 525 or newer; install that"),
    (OPEN, "580.65.06", None, "built for the CPU alone; install a PyTorch built for CUDA 13"),
    (OPEN, "580.65.06", "13.0", "cannot use though the driver is new enough")])
def test_driver_and_build_are_named_with_what_to_install(machine, text, driver, cuda, said):
    found = ask(machine, text.format(driver), cuda)
    assert f"a GPU with driver {driver}" in found and said in found and "2.15.0" in found


def test_no_gpu_or_a_hidden_one_says_nothing(machine, monkeypatch):
    assert unusable_gpu(machine / "nothing", machine, "13.0") is None
    text = CLOSED.format("535.104.05")
    assert ask(machine, text, "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert ask(machine, text, "13.0") is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (machine / "nvidia0").unlink()      # a container that was given no GPU
    assert ask(machine, text, "13.0") is None


def test_the_cpu_is_taken_with_a_warning_or_by_name(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)      # NVML counts what cannot be used
    monkeypatch.setattr(distributed, "unusable_gpu", lambda: "a GPU with driver 1.2, and so on")
    assert [device.type for device in distributed.select_devices(None)] == ["cpu"]
    assert "found a GPU with driver 1.2, and so on" in capsys.readouterr().err
    assert [device.type for device in distributed.select_devices("cpu")] == ["cpu"]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--gpu 0: .*found a GPU with driver 1.2, and so on"):
        distributed.select_devices("0")
