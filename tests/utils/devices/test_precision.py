"""Mixed precision: bf16 against float32 on the streets, and the gradient scaler. Of apex: `test_apex`."""

import contextlib
import json
import sys
import types

import pytest
import torch

import train
from tests.conftest import shorten
from utils.common.errors import UserError
from utils.devices import precision
from utils.devices.precision import Precision, best_precision

CPU = torch.device("cpu")


def losses(streets, folder, amp, steps):
    train.main(["--data-dir", str(streets), "--snapshot-dir", str(folder), "--gpu", "cpu", "--backbone", "resnet18",
                "--model", "acfnet_resnet", "--input-size", "33,33", "--batch-size", "2", "--num-workers", "0",
                "--num-steps", str(steps), "--log-every", "1", "--learning-rate", "0.02", "--amp", amp])
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@shorten("resnet18")
def test_bf16_trains_like_float32(streets, tmp_path):
    """Over few steps of small crops: a CPU without instructions for bf16 takes many times as long for each."""
    exact, rough = (losses(streets, tmp_path / amp, amp, 8) for amp in ("off", "bf16"))
    assert min(exact) < 0.9 * exact[0] and exact != rough
    assert rough == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("instructions, seconds, expected, reason", [
    ({"avx512_bf16": True}, {"off": 0.002, "bf16": 0.001}, "bf16", "takes 2.0 ms with off, 1.0 ms with bf16"),
    ({"avx512_bf16": True}, {"off": 0.001, "bf16": 0.002}, "off", "takes 1.0 ms with off, 2.0 ms with bf16"),
    ({"bf16": True, "neon": True}, {"off": 0.002, "bf16": 0.001}, "bf16", "takes 2.0 ms"),
    ({"avx2": True}, {}, "off", "the CPU has no instructions for bf16"),
])
def test_a_cpu_computes_in_what_it_is_faster_in(instructions, seconds, expected, reason, monkeypatch):
    """A Xeon with avx512_bf16 and without AMX is slower in bf16, an EPYC with the same flag faster."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    monkeypatch.setattr(precision, "convolution_seconds", lambda: seconds)
    assert best_precision(CPU) == expected and reason in precision.describe_default(CPU)


def test_convolutions_are_timed_once_in_both_precisions(monkeypatch):
    """By a clock that says how many bytes a value has: so which one is timed as what."""
    clock, dtypes = [0.0], []
    convolution = torch.nn.functional.conv2d

    def timed(*arguments, **named):
        result = convolution(*arguments, **named)
        dtypes.append(result.dtype)
        clock[0] += result.element_size()
        return result

    monkeypatch.setattr(precision.F, "conv2d", timed)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    precision.convolution_seconds.cache_clear()
    state = torch.get_rng_state()
    try:
        with torch.inference_mode():
            assert precision.convolution_seconds() == precision.convolution_seconds() == {"off": 4.0, "bf16": 2.0}
    finally:
        precision.convolution_seconds.cache_clear()
    assert len(dtypes) == 8 and torch.get_rng_state().equal(state)


@pytest.mark.parametrize("able, expected", [(True, "bf16"), (False, "fp16")])
def test_a_gpu_computes_in_what_it_has_instructions_for(able, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert best_precision(torch.device("cuda", 0)) == expected


def test_a_run_that_goes_on_keeps_its_precision(monkeypatch, capsys):
    """However the CPU is timed at that moment; a GPU may be another one."""
    monkeypatch.setattr(train, "shared_precision", lambda devices, processes: "best")
    monkeypatch.setattr(train, "describe_default", lambda device: "timed")
    for before, device, able, expected, reason in (
            ("off", CPU, True, "off", "that of the snapshot"), ("fp16", CPU, True, "best", "timed"),
            ("bf16", CPU, True, "bf16", "that of the snapshot"), ("bf16", CPU, False, "best", "timed"),
            ("off", torch.device("cuda"), True, "best", "timed"), (None, CPU, True, "best", "timed")):
        monkeypatch.setattr(train, "cpu_computes_in_bf16", lambda able=able: able)
        snapshot = types.SimpleNamespace(config=types.SimpleNamespace(arguments={"amp": before}))
        assert train.default_precision([device], None, snapshot) == expected
        assert capsys.readouterr().out == f"--amp {expected}: {reason}\n"
    assert train.default_precision([CPU], None, None) == "best"
    monkeypatch.setattr(train, "gather_from_ranks", lambda processes, able: [able, False])       # another host cannot
    snapshot.config.arguments["amp"] = "bf16"
    monkeypatch.setattr(train, "cpu_computes_in_bf16", lambda: True)
    assert train.default_precision([CPU], None, snapshot) == "best"


def test_the_norm_of_gradients_is_that_of_unscaled_ones():
    for amp in ("off", "fp16"):
        scaling = Precision(amp, CPU)
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], 0.1)
        scaling.backward((weight * torch.tensor([3.0, 4.0])).sum(), optimizer)
        assert scaling.gradient_norm(optimizer).item() == pytest.approx(5)
        scaling.step(optimizer)
        torch.testing.assert_close(weight.data, torch.tensor([0.7, 0.6]))


def learn(scaling, loss, optimizer):
    optimizer.zero_grad()
    scaling.backward(loss, optimizer)
    scaling.step(optimizer)


def test_fp16_scales_losses_and_leaves_out_steps_that_overflow():
    scaling = Precision("fp16", CPU)
    assert scaling.autocast == torch.float16
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 0.1)
    learn(scaling, (weight * torch.tensor([1.0, 2.0])).sum(), optimizer)
    torch.testing.assert_close(weight.data, torch.tensor([0.9, 0.8]))
    scale = scaling.state_dict()["scale"]
    learn(scaling, (weight * float("inf")).sum(), optimizer)
    torch.testing.assert_close(weight.data, torch.tensor([0.9, 0.8]))
    assert scaling.state_dict()["scale"] == scale / 2
    other = Precision("fp16", CPU)
    other.load_state_dict(scaling.state_dict())
    assert other.state_dict() == scaling.state_dict()


def test_missing_apex_names_the_tag_that_has_it(monkeypatch):
    for actual in (None, types.ModuleType("apex")):      # not installed; and pip's package of that name, without amp
        monkeypatch.setitem(sys.modules, "apex", actual)
        with pytest.raises(UserError, match="removed after tag 25.05 .* build apex from its tag 25.04"):
            Precision("apex", CPU)
