"""A GPU that is there but cannot be used, told from the files and values that are read."""

import platform

import pytest
import torch

import train
from networks import predictor
from networks.predictor import load
from utils.common.errors import UserError
from utils.devices import select
from utils.devices.driver import missing_kernels, unusable_gpu

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


@pytest.mark.parametrize("text, driver, cuda, output", [
    (CLOSED, "535.104.05", "13.0", "CUDA 13.0, which needs driver 580 or newer; install that, or a PyTorch built for "
     "CUDA 12"),
    (CLOSED, "470.223.02", "12.1", "needs driver 525 or newer; install that, or a PyTorch built for CUDA 11"),
    (CLOSED, "390.157", "12.1", "needs driver 525 or newer; install that"),
    (OPEN, "580.65.06", None, "built for the CPU only; install a PyTorch built for CUDA 13"),
    (CLOSED, "390.157", None, "install driver 450 or newer and a PyTorch built for CUDA"),
    (OPEN, "580.65.06", "14.0", "for the driver that CUDA 14.0 needs see NVIDIA's list, or install a PyTorch "
     "built for CUDA 13"),
    (OPEN, "580.65.06", "13.0", "cannot use although the driver is new enough")])
def test_driver_and_build_are_named_with_what_to_install(machine, text, driver, cuda, output):
    actual = ask(machine, text.format(driver), cuda)
    assert f"a GPU with driver {driver}" in actual and output in actual and "2.15.0" in actual


def test_a_version_file_of_other_bytes_is_read(machine):
    (machine / "version").write_bytes(CLOSED.format("535.104.05").encode() + b"GCC version: \xff\n")
    assert "driver 535.104.05" in unusable_gpu(machine, machine, "13.0", "2.15.0")


CUDA13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]     # of PyTorch 2.9's wheels


@pytest.mark.parametrize("capability, archs, instead", [
    ((6, 1), CUDA13, "built for CUDA 12.6"), ((7, 0), CUDA13, "built for CUDA 12.6"), ((3, 5), CUDA13, "have none"),
    ((7, 5), CUDA13, None), ((8, 9), CUDA13, None), ((12, 1), CUDA13, None), ((13, 0), CUDA13, None),
    ((11, 0), CUDA13, "install a newer PyTorch"), ((12, 0), ["sm_80", "sm_90"], "install a newer PyTorch"),
    ((8, 0), ["sm_86"], "from source"), ((9, 0), ["sm_90a"], None),
    ((12, 0), ["compute_90a"], "newer"), ((12, 0), ["compute_90"], None), ((10, 3), ["sm_100f"], None),
    ((7, 0), [], None), ((9, 0), ["gfx90a", "gfx942"], None)])
def test_a_gpu_without_kernels_is_told_from_what_was_built(capability, archs, instead, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")      # for others the wheels were built for less
    actual = missing_kernels("Tesla X", capability, archs, "2.14.1", "13.0")
    if instead is None:
        assert actual is None
    else:
        assert actual.startswith("Tesla X of compute capability ") and instead in actual


def test_a_gpu_without_kernels_is_refused_by_the_process_that_computes_on_it(monkeypatch):
    """Several are not asked by the process that starts one for each: that would make CUDA contexts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA13)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((9, 0), (7, 0))[device.index])
    devices = select.select_devices("0,1")
    assert select.select_devices("0") == devices[:1]
    select.check_kernels(torch.device("cpu"))      # needs none
    with pytest.raises(UserError, match="--gpu 1"):
        train.parse_and_check(["--gpu", "0,1", "--parallel", "dp", "--data-dir", "x"])
    with pytest.raises(UserError, match="--gpu 1: expected a GPU that can be used, found GPU 1 of compute capab"):
        select.select_devices("1")
    assert select.own_device(devices) == devices[0] == predictor._device(None)
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_PORT": 1,
                        "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="--gpu 1: .*found GPU 1"):
        select.own_device(devices)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(UserError, match="--gpu 0: .*found GPU 0"):
        load("a.pth")


def test_the_only_gpu_without_kernels_is_a_warning_where_none_was_asked_for(monkeypatch, capsys):
    for name, value in {"is_available": True, "device_count": 1, "get_arch_list": CUDA13, "get_device_name": "GTX",
                        "get_device_capability": (6, 1)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    assert select.select_devices(None) == [torch.device("cpu")]
    assert "warning: computing on the CPU, many times slower: expected a GPU, found GTX" in capsys.readouterr().err
    with pytest.raises(UserError, match="--gpu 0"):
        select.select_devices("0")


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
    monkeypatch.setattr(select, "unusable_gpu", lambda: "a GPU with driver 1.2, and so on")
    assert [device.type for device in select.select_devices(None)] == ["cpu"]
    assert "found a GPU with driver 1.2, and so on" in capsys.readouterr().err
    assert [device.type for device in select.select_devices("cpu")] == ["cpu"]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--gpu 0: .*found a GPU with driver 1.2, and so on"):
        select.select_devices("0")
