"""`python -m tests.gpu`: what of it a CPU can run, and that what is wrong shows."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from libs import functions
from tests.conftest import ROOT, shorten
from tests.gpu import __main__ as command
from tests.gpu import norms, speed, steps
from tests.gpu.rows import Rows

CPU = torch.device("cpu")
FIGURES = {"loss": {"ms", "spread_ms"},
           "speed": {"ms", "spread_ms", "images_per_s", "of_matrix_products", "kernels", "convolution", "norm", "glue",
                     "loss", "update"},
           "inference": {"ms", "spread_ms", "images_per_s", "beyond_the_network", "peak_gb"},
           "pictures": {"ms", "spread_ms", "images_per_s", "beyond_the_network", "peak_gb"},
           "evaluation with pictures": {"ms", "images_per_s"},
           "counting a map of one class": {"ms", "spread_ms"},
           "loader": {"images_per_s", "slowest_batch_ms"}, "waits": {"waits", "where"}}


@pytest.fixture(autouse=True)
def settings_as_before():
    handler = signal.getsignal(signal.SIGTERM)
    before = [(module, name, getattr(module, name)) for module, name in (
        (torch.backends.cudnn, "allow_tf32"), (torch.backends.cudnn, "deterministic"),
        (torch.backends.cudnn, "benchmark"), (torch.backends.cuda.matmul, "allow_tf32"))]
    yield
    for module, name, value in before:
        setattr(module, name, value)
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("name", [name for name in command.SECTIONS
                                  if name not in ("compiled", "graph")])    # which builds for minutes, or needs a GPU
def test_every_section_goes_through(name):
    rows = []
    _, section, tiny = command.SECTIONS[name]
    if name == "fused":
        pytest.importorskip("triton", reason="Triton is not installed")
    with contextlib.nullcontext() if name == "processes" else shorten("eca_resnet18"):
        section(Rows(name, lambda row: rows.append(json.loads(json.dumps(row)))), CPU, **tiny)
    assert [row for row in rows if row.get("failed") or not row.get("ok", True)] == []
    assert all(command.line(row) for row in rows)
    kinds = {"check", "figure"} if name == "loss" else {"figure"} if name in FIGURES else {"check"}
    assert {row["kind"] for row in rows} - {"note", "goal"} == kinds
    actual = [row for row in rows if row["kind"] == "figure" and row["name"] != "matrix products, TFLOP/s"]
    assert all(row.keys() - {"section", "kind", "name"} == FIGURES.get(row["name"], FIGURES[name]) for row in actual)
    for row in actual if name == "speed" else ():
        assert sum(row[kind] for kind in (*dict(speed.KINDS), "glue")) == pytest.approx(1)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "tests.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "expected a GPU, found" in done.stderr


def failures(check, *args, **options):
    rows = []
    Rows("section", rows.append).check("name", check, *args, **options)
    return [row["found"] for row in rows if not row["ok"]]


def test_a_wrong_gradient_fails(monkeypatch):
    right = functions.parameter_gradients
    monkeypatch.setattr(functions, "parameter_gradients", lambda sums, *rest: right(1.1 * sums, *rest))
    actual = failures(norms.every_way, CPU, "in place", torch.bfloat16, "replicas", (4, 8, 9, 7))
    assert len(actual) == 1 and "dweight: expected a distance of at most" in actual[0]


@shorten("eca_resnet18")
def test_a_step_that_learns_another_thing_fails(monkeypatch):
    shape = {"backbone": "eca_resnet18", "size": 33, "steps": 1}
    for amp in ("off", "bf16"):
        assert not failures(steps.against_float64, CPU, amp, torch.contiguous_format, "inplace_abn", **shape)
    monkeypatch.setattr(steps, "RATE", 1.3e-3)
    for amp in ("off", "bf16"):
        actual = failures(steps.against_float64, CPU, amp, torch.contiguous_format, "inplace_abn", **shape)
        assert len(actual) == 1 and "change of the weights" in actual[0]


def test_a_section_that_fails_or_hangs_does_not_stop_the_next(monkeypatch, tmp_path, capsys):
    broken, late = command.examine("norms", 100, True, "nonsense"), command.examine("norms", 1, True, "cpu")
    assert "found 1: RuntimeError" in broken[-1]["found"] and "within 1 s, found none" in late[-1]["found"]
    assert not broken[-1]["ok"] and not late[-1]["ok"]
    note = {"section": "loader", "kind": "note", "name": "x", "found": "y"}
    actual = {"about": [], "norms": broken, "loader": [note]}
    monkeypatch.setattr(command, "examine", lambda name, *args: actual[name])
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--output", str(tmp_path / "found.json"), "--sections",
                                      "norms", "loader"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1 and "1 checks, 1 failed" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == broken + actual["loader"]


def test_a_section_does_not_outlive_the_command(monkeypatch, tmp_path):
    """As in `timeout 600 python -m tests.gpu`: ended by a signal, it still ends the section, by `run_apart`."""
    monkeypatch.setattr(command, "examine", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--output", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 128 + signal.SIGTERM


def test_after_ten_minutes_no_section_begins(monkeypatch, tmp_path, capsys):
    now, path = [0.0], str(tmp_path / "found.json")
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])

    def examine(name, limit, *args):
        now[0] += limit
        return []

    monkeypatch.setattr(command, "examine", examine)
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--output", path])
    with pytest.raises(SystemExit):
        command.main()
    left_out = [row["section"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]]
    assert left_out == ["fused", "loss", "inference", "pictures", "loader", "graph", "compiled"]
    assert "--sections loader" in capsys.readouterr().out
    now[0] = 0.0
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--output", path, "--sections", *command.SECTIONS])
    with pytest.raises(SystemExit):
        command.main()
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == []


@pytest.mark.parametrize("kernel, kind", [
    ("void at::native::batch_norm_backward_reduce_channels_last_kernel<4, c10::BFloat16>", "norm"),
    ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float>", "norm"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::leaky_relu_kernel(...)>", "norm"),
    ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32", "convolution"),
    ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized>", "convolution"),
    ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNN", "convolution"),
    ("partial_end_sums_kernel", "norm"), ("attention_kernel", "norm"), ("end_block_kernel", "norm"),
    ("void at::native::upsample_bilinear2d_backward_out_frame<float, float>", "loss"),
    ("void at::native::nll_loss2d_forward_kernel<float, float, long>", "loss"),
    ("void at::native::multi_tensor_apply_kernel<at::native::TensorListMetadata<3>>", "update"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>", "glue"),
    ("void at::native::unrolled_elementwise_kernel<convert_kernel>", "glue")])
def test_kernels_are_told_by_name(kernel, kind):
    assert speed.kind_of(kernel) == kind


def test_waits_are_found_with_their_place():
    with speed.waits(CPU) as actual:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another warning", stacklevel=1)
    assert len(actual) == 1 and actual[0].startswith("tests/gpu/test_command.py:")


@pytest.mark.parametrize("actual, met", [({"ms": 100.0, "of_matrix_products": 0.5, "peak_gb": 6.0}, [True, True, True]),
                                        ({"ms": 106.0, "of_matrix_products": 0.4, "peak_gb": 7.0}, [False] * 3),
                                        ({}, [])])
def test_goals_are_stated(actual, met):
    rows = []
    speed.state_goals(Rows("speed", rows.append), {
        speed.IN_PLACE: actual, "bn, bf16": {"ms": 100.0, "peak_gb": 10.0}})
    assert [row["met"] for row in rows] == met
