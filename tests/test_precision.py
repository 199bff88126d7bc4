"""Mixed precision: bf16 against float32 on the streets, the gradient scaler, and the call path of apex."""

import contextlib
import json
import sys
import types

import pytest
import torch

import train
from utils.cli import UserError
from utils.precision import Precision, best_precision

CPU = torch.device("cpu")


def losses(streets, folder, amp, steps):
    train.main(["--data-dir", str(streets), "--snapshot-dir", str(folder), "--gpu", "cpu", "--backbone", "eca_resnet18",
                "--model", "acfnet_resnet", "--input-size", "65,65", "--batch-size", "4", "--num-workers", "0",
                "--num-steps", str(steps), "--log-every", "1", "--learning-rate", "0.02", "--amp", amp])
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_bf16_trains_like_float32(streets, tmp_path):
    """Over fewer steps on a CPU that has no instructions for bf16, where they take four times as long."""
    steps, falls = (200, 0.5) if best_precision(CPU) == "bf16" else (48, 0.8)
    exact, rough = (losses(streets, tmp_path / amp, amp, steps) for amp in ("off", "bf16"))
    mean, other = (sum(values[-steps // 4:]) / (steps // 4) for values in (exact, rough))
    assert mean < falls * exact[0] and exact != rough
    assert abs(other - mean) < 0.05 * mean


def test_the_default_is_what_the_device_has_instructions_for(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    for capabilities, expected in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"),
                                   ({"bf16": True, "neon": True}, "bf16"), ({"avx2": True}, "off")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert best_precision(CPU) == expected
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for able, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        assert best_precision(torch.device("cuda", 0)) == expected


def test_the_norm_of_gradients_is_that_of_unscaled_ones():
    for amp in ("off", "fp16"):
        precision = Precision(amp, CPU)
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], 0.1)
        precision.backward((weight * torch.tensor([3.0, 4.0])).sum(), optimizer)
        assert precision.gradient_norm(optimizer).item() == pytest.approx(5)
        precision.step(optimizer)
        torch.testing.assert_close(weight.data, torch.tensor([0.7, 0.6]))


def learn(precision, loss, optimizer):
    optimizer.zero_grad()
    precision.backward(loss, optimizer)
    precision.step(optimizer)


def test_fp16_scales_losses_and_leaves_out_steps_that_overflow():
    precision = Precision("fp16", CPU)
    assert precision.autocast == torch.float16
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 0.1)
    learn(precision, (weight * torch.tensor([1.0, 2.0])).sum(), optimizer)
    torch.testing.assert_close(weight.data, torch.tensor([0.9, 0.8]))
    scale = precision.state_dict()["scale"]
    learn(precision, (weight * float("inf")).sum(), optimizer)
    torch.testing.assert_close(weight.data, torch.tensor([0.9, 0.8]))
    assert precision.state_dict()["scale"] == scale / 2
    other = Precision("fp16", CPU)
    other.load_state_dict(precision.state_dict())
    assert other.state_dict() == precision.state_dict()


def test_missing_apex_names_the_tag_that_has_it(monkeypatch):
    for found in (None, types.ModuleType("apex")):      # not installed; and pip's package of that name, without amp
        monkeypatch.setitem(sys.modules, "apex", found)
        with pytest.raises(UserError, match="removed after tag 25.05 .* build apex from its tag 25.04"):
            Precision("apex", CPU)


def test_the_calls_of_apex(monkeypatch):
    """apex itself cannot be had here: its two documented calls, in their order, with their arguments."""
    calls = []

    @contextlib.contextmanager
    def scale_loss(loss, optimizer):
        calls.append("scale_loss")
        yield loss * 1

    amp = types.SimpleNamespace(initialize=lambda *args, **named: calls.append(named) or args, scale_loss=scale_loss,
                                state_dict=lambda: {"loss_scaler0": {"loss_scale": 2.0}})
    apex = types.ModuleType("apex")
    apex.amp = amp
    monkeypatch.setitem(sys.modules, "apex", apex)
    with pytest.raises(UserError, match="--amp apex: expected a GPU, found the CPU"):
        Precision("apex", CPU)
    precision = Precision("apex", torch.device("cuda"), "O2")
    network = torch.nn.Linear(1, 1)
    network, optimizer = precision.prepare(network, torch.optim.SGD(network.parameters(), 1.0))
    before = network.bias.detach().clone()
    learn(precision, network(torch.ones(1, 1)).sum(), optimizer)
    assert calls == [{"opt_level": "O2"}, "scale_loss"]
    torch.testing.assert_close(network.bias.detach(), before - 1)
    assert precision.state_dict() == {"loss_scaler0": {"loss_scale": 2.0}}
