"""Training under apex.amp: by a stand-in everywhere, and by the real one of tag 25.04 where it can be imported."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from networks.build import MODELS
from tests import fake_apex
from tests.conftest import ROOT, in_processes
from utils.common.errors import UserError
from utils.devices.compilation import check_compile
from utils.devices.precision import Precision
from utils.parallel.processes import Processes
from utils.training.engine import NotFinite

pytestmark = pytest.mark.usefixtures("short_networks")
OPTIONS = ({}, {"parts": 2, "ohem": 1, "clip": 0.1, "ema": 0.9}, {"backbone": "eca_resnet18", "recompute": "full"},
           {"norm": "bn"}, {"replicas": 2})


@pytest.fixture
def apex(monkeypatch):
    fake_apex.install(monkeypatch)


def learn(level, model="acfnet_resnet", *, parts=1, **options):
    return fake_apex.learn(fake_apex.make(level, model, **options), parts)


@pytest.mark.parametrize("model, options", [*(("acfnet_resnet", options) for options in OPTIONS), ("ccnet", {})])
def test_steps_with_half_precision_are_near_those_without(model, options, apex):
    exact, _ = learn("O1", model, **options | {"amp": "off"})
    rough, scaler = learn("O1", model, **options)
    assert scaler == {"loss_scale": 65536, "unskipped": 2}
    for a, b in zip(exact, rough, strict=True):
        norm, other = a.pop("gradient_norm"), b.pop("gradient_norm")
        assert b == pytest.approx(a, rel=2e-3) and b != a and other == pytest.approx(norm, rel=0.05)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"replicas": 2}])
def test_o0_computes_in_float32(options, apex):
    for a, b in zip(learn("O0", **options)[0], learn("O0", **options, amp="off")[0], strict=True):
        assert a == pytest.approx(b, rel=1e-5 if "replicas" in options else 0)      # threads add up in any order


@pytest.mark.parametrize("level", ["O0", "O1"])
def test_the_average_of_the_weights_computes_with_its_own(level, apex):
    engine = fake_apex.make(level, ema=0.9)
    for weight in engine.average.parameters():
        weight.data.zero_()
    images, before = torch.rand(2, 3, 33, 33), engine.network.backbone.bn1.running_mean.clone()
    assert not engine.average.eval()(images)["fine"].any()
    assert engine.network.backbone.bn1.running_mean.equal(before)


@pytest.mark.parametrize("level, most", [("O0", 0), ("O1", 3)])
def test_gradients_that_are_never_finite_end_the_training(level, most, apex):
    """Skipped with the scales 4, 2 and 1; below, it is not the scale that makes gradients overflow."""
    engine = fake_apex.make(level)
    engine.precision.apex.scale = 4.0
    engine.network.backbone.layer1[0].conv1.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NotFinite, match="gradient"):
        for step in range(100):
            engine.step([fake_apex.batch(step)])
    assert engine.skipped == most


def test_only_the_forward_pass_of_training_is_cast(apex):
    engine = fake_apex.make("O1")
    engine.step([fake_apex.batch(0)])
    assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
    assert engine.network.eval()(torch.rand(1, 3, 33, 33))["fine"].dtype == torch.float32


def test_the_scale_goes_on(apex):
    engine = fake_apex.make("O1")
    engine.step([fake_apex.batch(0)])
    state = engine.precision.state_dict()
    other = Precision("apex", torch.device("cuda"))
    other.apex.scale = 1.0
    other.load_state_dict(state)
    assert other.state_dict() == state == {"loss_scaler0": {"loss_scale": 65536, "unskipped": 1}}


def test_the_fixed_scale_of_o0_is_not_taken_over(apex):
    fixed = {"loss_scaler0": {"loss_scale": 1.0, "unskipped": 0}}
    for level, before, expected in (("O1", fixed, 2.0 ** 16), ("O0", {"loss_scaler0": {"loss_scale": 2.0 ** 16,
                                                                                       "unskipped": 9}}, 1.0)):
        engine = fake_apex.make(level)
        engine.precision.load_state_dict(before)
        assert engine.precision.state_dict()["loss_scaler0"]["loss_scale"] == expected


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_other_levels_are_refused_with_the_reason(level, apex):
    with pytest.raises(UserError, match=f"--opt-level {level}: expected O0 or O1 with --amp apex; {level} "):
        Precision("apex", torch.device("cuda"), level)


def test_apex_on_a_cpu_is_refused(apex):
    with pytest.raises(UserError, match="--amp apex: expected a GPU, found the CPU"):
        Precision("apex", torch.device("cpu"))


def test_apex_is_not_compiled():
    with pytest.raises(UserError, match="--compile: expected --amp off, bf16 or fp16 with it, found apex"):
        check_compile(devices=[torch.device("cuda")], parallel="none", recompute="none", amp="apex")


def work(rank):
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_apex.install(monkeypatch)
        norms = {}
        for amp in ("off", "apex"):
            engine = fake_apex.make("O1", amp=amp, processes=Processes())
            terms, _ = fake_apex.learn(engine, parts=2, rank=rank, steps=1)
            norms[amp] = [step["gradient_norm"] for step in terms]
            weights = torch.cat([weight.detach().flatten() for weight in engine.network.parameters()])
            assert all(weights.equal(other) for other in Processes().gather(weights))
        assert norms["apex"] == pytest.approx(norms["off"], rel=0.05)


def test_processes_that_accumulate_stay_together():
    in_processes(work)


def real_apex():
    """Whether apex.amp can be imported; pip's package of that name has none."""
    try:
        return importlib.util.find_spec("apex.amp") is not None
    except ImportError:
        return False


@pytest.mark.skipif(not real_apex(), reason="apex.amp cannot be imported; the folder apex/ of NVIDIA/apex at tag 25.04 "
                    "on PYTHONPATH suffices")
@pytest.mark.parametrize("words", [
    *(f"{level} {model}" for level in ("O0", "O1") for model in MODELS),
    *(" ".join([level, "acfnet_resnet", *(f"{name}={value}" for name, value in options.items())])
      for level in ("O0", "O1") for options in (
          *OPTIONS[1:], {"backbone": "resnet50", "recompute": "light"}, {"optimizer": "adamw"}, {"ohem": 1},
          {"clip": 0.1}, {"ema": 0.9}, {"parts": 2}, {"recompute": "full"}, {"norm": "bn", "recompute": "full"},
          {"backbone": "timm:convnext_atto"}, {"backbone": "timm:vit_tiny_patch16_224"}))])
def test_the_stand_in_does_what_the_real_one_does(words):
    results = []
    for kind in ("real", "fake"):
        done = subprocess.run([sys.executable, "-m", "tests.fake_apex", kind, *words.split()], cwd=ROOT, text=True,
                              capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    (steps, scaler), (others, other_scaler) = results
    assert scaler == other_scaler
    for one, other in zip(steps, others, strict=True):
        assert (one["gradient_norm"] is None) == (other["gradient_norm"] is None)      # left out, as it overflowed
        one, other = ({name: value for name, value in terms.items() if value is not None} for terms in (one, other))
        assert one == pytest.approx(other, rel=1e-5 if "replicas" in words else 1e-6)
