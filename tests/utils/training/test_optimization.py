"""What learns, at which rate and with which weights: against PyTorch's own pieces and written-out formulas."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import train
from dataset.weights import balanced_weights, class_weights, read_weights
from loss.criterion import SegmentationCriterion
from networks.backbones.resnet import STAGES
from networks.build import build_network
from networks.weights.choice import NetworkChoice
from tests.test_train import run
from tests.utils.training.test_engine import make_batch
from utils.common import files
from utils.common.errors import UserError
from utils.devices.precision import Precision
from utils.ops.normalization import Normalization
from utils.runs import snapshots
from utils.training.optimization import SCHEDULES, Schedule, make_optimizer, prepare_for_fused_step, update_average

pytestmark = pytest.mark.usefixtures("short_networks")
CPU = torch.device("cpu")


def make_engine(kind="sgd", criterion=None, head_lr_factor=1.0, **options):
    torch.manual_seed(0)
    network = build_network("acfnet_resnet", 4, "resnet18")
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    optimizer = make_optimizer(network, kind=kind, learning_rate=0.01, head_lr_factor=head_lr_factor)
    engine = train.make_engine(network, criterion=criterion or SegmentationCriterion(), optimizer=optimizer,
                               normalization=Normalization(), precision=Precision("off", CPU), devices=[CPU], **options)
    engine.train_mode()
    return engine


def test_another_optimizer_is_not_silently_sgd():
    with pytest.raises(ValueError, match="kind of optimizer: expected one of sgd, adamw, found 'rmsprop'"):
        make_optimizer(build_network("acfnet_resnet", 3, "eca_resnet18"), kind="rmsprop")


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_optimizers_get_tensors_of_one_layout(kind):
    """The same step as without, from gradients and a state of other strides."""
    weights, options = [], {"momentum": 0.9} if kind is torch.optim.SGD else {}
    for hook in (None, prepare_for_fused_step):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
        optimizer = kind(network.to(memory_format=torch.channels_last).parameters(), 0.1, **options)
        if hook:
            optimizer.register_step_pre_hook(hook)
        for _ in range(3):
            for weight in network.parameters():
                weight.grad = torch.randn(weight.shape)
            optimizer.step()
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {
                number: {name: value.contiguous() for name, value in state.items()}
                for number, state in optimizer.state_dict()["state"].items()}})
        weights.append([weight.detach().clone() for weight in network.parameters()])
    prepare_for_fused_step(optimizer)
    for weight in network.parameters():
        tensors = [weight.grad, *(value for value in optimizer.state[weight].values() if value.shape == weight.shape)]
        assert len(tensors) > 1 and all(tensor.stride() == weight.stride() for tensor in tensors)
    assert all(map(torch.equal, *weights))


def test_a_fused_step_after_an_overflow_is_that_of_an_ordinary_optimizer():
    """With fp16 the first gradients often overflow; PyTorch's fused SGD alone then keeps undefined momentum."""
    weights = []
    for fused in (None, True):
        weight = torch.nn.Parameter(torch.ones(4))
        optimizer = torch.optim.SGD([weight], 0.1, 0.9, weight_decay=0.1, fused=fused)
        if fused:
            optimizer.register_step_pre_hook(prepare_for_fused_step)
            torch.full((4,), torch.nan)         # memory that the momentum might get
        scaler = torch.amp.GradScaler("cpu")
        for gradient in (torch.inf, 1.0, torch.inf, 2.0):
            weight.grad = torch.full((4,), gradient * scaler.scale(torch.ones(())).item())
            scaler.step(optimizer)
            scaler.update()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights)


def test_the_schedule_is_poly_with_a_linear_start():
    plain, warm = Schedule(100, 0.9), Schedule(100, 0.9, warmup_steps=10)
    for step in range(100):
        assert plain.factor(step) == (1 - step / 100) ** 0.9
        assert warm.factor(step) == pytest.approx(min(1, (step + 1) / 10) * (1 - step / 100) ** 0.9)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_pytorchs(kind, warmup):
    """With warm-up, as a factor of their own in the first steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 1.0)
    schedulers = torch.optim.lr_scheduler
    theirs = {"poly": lambda: schedulers.PolynomialLR(optimizer, 50, 0.9),
              "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, 50),
              "constant": lambda: schedulers.ConstantLR(optimizer, 1.0)}[kind]()
    schedule = Schedule(50, 0.9, warmup, kind)
    for step in range(50):
        factor = min(1, (step + 1) / warmup) if warmup else 1
        assert schedule.factor(step) == pytest.approx(factor * theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_a_run_goes_on_with_its_schedule_or_says_that_it_changes(streets, tmp_path, capsys):
    words = ("--schedule", "cosine", "--warmup-steps", "2", "--backbone", "resnet18")
    whole = run(streets, tmp_path / "s", *words, "--save-pred-every", "2", steps=4)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "s/metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.01 * min(1, (t + 1) / 2) * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)])
    (tmp_path / "s/CS_scenes_4.pth").unlink()
    resumed = run(streets, tmp_path / "s", *words, "--resume", steps=4)
    assert all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])
    assert "from here on" not in capsys.readouterr().out
    run(streets, tmp_path / "s", "--resume", "--backbone", "resnet18", steps=5)
    assert "--resume: from here on --schedule poly, before it was cosine" in capsys.readouterr().out
    for flag in ("--vertical-flip", "--quarter-turns"):
        with pytest.raises(UserError, match=f"--resume .*: expected a run with {flag} True, found False"):
            run(streets, tmp_path / "s", "--resume", "--backbone", "resnet18", flag, steps=6)
    with pytest.raises(UserError, match="--resume .*: expected a run with --rotate 10.0, found None"):
        run(streets, tmp_path / "s", "--resume", "--backbone", "resnet18", "--rotate", "10", steps=6)


def test_layer_decay_is_refused_where_no_layers_are_grouped(streets, tmp_path):
    with pytest.raises(UserError, match="--layer-decay: expected a network of timm, timm:NAME, found resnet18"):
        run(streets, tmp_path / "s", "--backbone", "resnet18", "--layer-decay", "0.8")
    with pytest.raises(UserError, match="--layer-decay: expected a network of timm, timm:NAME, found eca_resnet101"):
        NetworkChoice(layer_decay=0.8).resolve()
    assert not (tmp_path / "s").exists()


def test_each_group_has_its_own_rate():
    engine = make_engine(head_lr_factor=10.0)
    engine.step([make_batch()], 0.5)
    backbone, head = engine.optimizer.param_groups
    assert (backbone["lr"], head["lr"]) == (0.005, 0.05)
    assert [*backbone["params"], *head["params"]] == list(engine.network.parameters())
    assert {id(weight) for weight in backbone["params"]} == {id(weight) for weight in
                                                             engine.network.backbone.parameters()}


def test_adamw_is_pytorchs():
    """The same gradients into PyTorch's AdamW over one group."""
    engine = make_engine("adamw")
    weights = [weight.detach().clone() for weight in engine.network.parameters()]
    other = torch.optim.AdamW(weights, 0.01, (0.9, 0.999), weight_decay=1e-4)
    for seed in range(2):
        engine.step([make_batch(seed)])
        for copy, weight in zip(weights, engine.network.parameters(), strict=True):
            copy.grad = weight.grad.clone()
        other.step()
    for copy, weight in zip(weights, engine.network.parameters(), strict=True):
        torch.testing.assert_close(copy, weight.detach(), rtol=0, atol=0)


def test_frozen_stages_keep_weights_and_statistics():
    engine = make_engine(freeze=("stem", "1", "2"))
    before = {name: value.clone() for name, value in engine.network.backbone.state_dict().items()}
    engine.step([make_batch()])
    changed = {name.split(".")[0] for name, value in engine.network.backbone.state_dict().items()
               if not torch.equal(value, before[name])}
    assert changed == {"layer3", "layer4"}
    assert STAGES == ("stem", "1", "2", "3", "4")
    with pytest.raises(ValueError, match="expected the first of stem,1,2,3,4, found 2"):
        engine.network.backbone.first_stages(["2"])


def test_gradients_are_clipped_as_pytorch_does():
    plain, clipped = make_engine(), make_engine(clip_gradient=0.05)
    norm = plain.step([make_batch()])[0]["gradient_norm"]
    assert clipped.step([make_batch()])[0]["gradient_norm"] == norm > 0.05      # as it was before
    torch.nn.utils.clip_grad_norm_(plain.network.parameters(), 0.05)
    for a, b in zip(plain.network.parameters(), clipped.network.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("decay", [0.75, 0.15])
def test_the_average_of_the_weights_is_exponential(decay):
    """By the decay min(d, (1 + t) / (10 + t)), t from 0, so that the weights of the start soon count for nothing."""
    engine = make_engine(ema=decay)
    weights = [engine.network.head.fine.weight.detach().numpy().astype(np.float64)]
    for seed in range(3):
        engine.step([make_batch(seed)])
        weights.append(engine.network.head.fine.weight.detach().numpy().astype(np.float64))
    a, b, c = {0.75: (1 / 10, 2 / 11, 3 / 12), 0.15: (1 / 10, 0.15, 0.15)}[decay]
    shares = a * b * c, (1 - a) * b * c, (1 - b) * c, 1 - c
    expected = sum(share * weight for share, weight in zip(shares, weights, strict=True))
    assert np.abs(engine.scored_network.head.fine.weight.numpy() - expected).max() < 1e-7
    assert torch.equal(engine.scored_network.backbone.bn1.running_mean, engine.network.backbone.bn1.running_mean)


def test_the_decay_of_the_average_grows_to_its_limit():
    average, network = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(average.weight), torch.nn.init.zeros_(network.weight)
    left = 1.0      # of the start
    for t in range(60):
        update_average(average, network, 0.8, t)
        left *= (1 + t) / (10 + t) if t < 35 else 0.8       # 36 / 45 = 0.8
        assert average.weight.item() == pytest.approx(left, rel=1e-5)


@pytest.mark.parametrize("ohem", [False, True])
def test_class_weights_are_those_of_cross_entropy(ohem):
    weights = [0.5, 2.0, 1.0, 3.0]
    logits, labels = {"fine": torch.randn(2, 4, 9, 9)}, torch.randint(4, (2, 9, 9))
    labels[:, :2] = 255
    criterion = SegmentationCriterion({"fine": 1.0}, class_weights=weights, ohem=ohem, ohem_thres=0.0, ohem_keep=40)
    kept = labels.clone()
    if ohem:        # the 40 of the largest loss, without weights
        losses = F.cross_entropy(logits["fine"], labels, ignore_index=255, reduction="none").flatten()
        kept.view(-1)[losses.argsort()[:-40]] = 255
    expected = F.cross_entropy(logits["fine"], kept, torch.tensor(weights), ignore_index=255)
    torch.testing.assert_close(criterion(logits, labels)["fine"], expected)
    none = SegmentationCriterion({"fine": 1.0}, class_weights=weights)(logits, torch.full_like(labels, 255))
    assert none["fine"] == 0


def test_a_batch_in_parts_has_the_weighted_mean_of_the_whole():
    criterion = SegmentationCriterion({"fine": 0.7, "coarse": 0.6}, class_weights=[0.1, 1.0, 5.0, 0.3])
    parts = [make_batch(0), make_batch(1)]
    parts[1]["label"][:, 3:] = 255
    engine = make_engine(criterion=criterion)
    engine.network.eval()
    terms, _ = engine.step(parts, 0.0)
    with torch.no_grad():
        images, labels = (torch.cat([part[key] for part in parts]) for key in ("image", "label"))
        expected = criterion(engine.network(Normalization()(images)), labels)
    for name in ("fine", "coarse"):
        assert terms[name] == pytest.approx(float(expected[name]), rel=1e-4)


def test_balanced_weights_are_one_over_log():
    actual = balanced_weights([1000, 10, 0, 100000])
    raw = [1 / math.log(count) for count in (1000, 10, 100000)]
    assert actual[2] == 1.0
    assert [actual[0], actual[1], actual[3]] == pytest.approx([value / (sum(raw) / 3) for value in raw])


def test_tables_of_weights(streets, tmp_path):
    dataset = train.CityscapesDataset(streets)
    published = class_weights("cityscapes", dataset)
    assert len(published) == 19 and (published[0], published[-1]) == (0.8373, 1.0507)
    pixels = sum(np.bincount(dataset[index]["label"].flatten().numpy(), minlength=256)[:19]
                 for index in range(len(dataset)))
    assert class_weights("balanced", dataset) == balanced_weights(pixels)
    for text, message in (("name,weight\nroad,1\n", "expected a weight for each of the 2 classes, found none for car"),
                          ("name,weight\nroad,1\nroad,5\n", "line 3: expected every class once, found road again"),
                          ("name\nroad\n", "expected the columns name and weight, found name"),
                          ("name,weight\nroad,1\ncar,-2\n", "line 3: expected a weight from 1e-6 to 1e6, found '-2'")):
        (tmp_path / "w.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / "w.csv", ["road", "car"])
    with pytest.raises(UserError, match="--class-weights nope.csv: expected cityscapes, balanced or a CSV file"):
        class_weights("nope.csv", dataset)


def test_a_run_with_everything_resumes_to_the_bit(streets, tmp_path, capsys):
    """AdamW, average, frozen stem, warmup and clipping: two steps and two more are four; the average is scored."""
    words = ("--optimizer", "adamw", "--learning-rate", "1e-3", "--ema", "0.9", "--freeze", "stem", "--warmup-steps",
             "3", "--clip-gradient", "1", "--class-weights", "cityscapes", "--val-every", "4")
    whole = run(streets, tmp_path / "whole", *words, steps=4)
    run(streets, tmp_path / "parts", *words, "--save-pred-every", "2", steps=4)
    (tmp_path / "parts/CS_scenes_4.pth").unlink()
    parts = run(streets, tmp_path / "parts", *words, "--resume", steps=4)
    for kind in ("model", "average"):
        assert all(torch.equal(parts[kind][name], value) for name, value in whole[kind].items())
    assert not torch.equal(whole["model"]["head.fine.weight"], whole["average"]["head.fine.weight"])
    path = tmp_path / "whole/CS_scenes_4.pth"
    for raw, kind in ((False, "average"), (True, "model")):
        network, _ = evaluate.load_network(path, CPU, raw)
        assert torch.equal(network.head.fine.weight, whole[kind]["head.fine.weight"])
    assert "the moving average of the weights" in capsys.readouterr().out
    quick = json.loads((tmp_path / "whole/quick_validation.jsonl").read_text().splitlines()[-1])
    assert quick["step"] == 4
    best = files.load(tmp_path / "whole" / snapshots.BEST)
    assert best["average"].keys() == best["model"].keys()
    with pytest.raises(UserError, match="expected a run with --optimizer sgd, found adamw"):
        run(streets, tmp_path / "parts", "--resume", steps=9)
