"""Training steps on a device: against a second computation in float64, and what must hold when one goes wrong."""

import copy
import functools
import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dataset.labels import ClassTable
from loss.criterion import WEIGHTS, SegmentationCriterion
from loss.ohem import OhemCrossEntropy
from networks.backbones.names import BACKBONES
from networks.backbones.resnet import RECOMPUTE
from networks.build import build_network, find_model
from networks.weights.snapshot import Config
from networks.weights.start import read_snapshot
from tests.crash import same
from utils.devices import memory
from utils.devices.precision import Precision
from utils.ops.normalization import Normalization
from utils.runs import snapshots
from utils.training import resume, seeds
from utils.training.engine import NotFinite
from utils.training.engine import make_engine as engine_of
from utils.training.optimization import make_optimizer

from .rows import near

SHAPE = {"model": "acfnet_resnet", "num_classes": 19, "backbone": "eca_resnet50"}
RATE = 1e-3


def make_engine(device, amp="off", layout=torch.channels_last, dropout=False, devices=None, processes=None,
                ohem=False, class_weights=None, optimizer=None, options=None, **shape):
    """An engine on a device, as train.py makes it for a GPU; without `dropout`, whose draws differ by device.

    optimizer, options: further arguments of `make_optimizer` and of the engine.
    """
    torch.manual_seed(0)
    network = build_network(**SHAPE | shape)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout2d) and not dropout:
            module.p = 0.0
    network.to(device, memory_format=layout).train()
    return engine_of(
        network, criterion=SegmentationCriterion(find_model((SHAPE | shape)["model"]).loss_weights, ohem=ohem,
                                                 ohem_keep=500, class_weights=class_weights),
        optimizer=make_optimizer(network, learning_rate=RATE, **optimizer or {}), normalization=Normalization(),
        precision=Precision(amp, device), devices=devices or [device], processes=processes, memory_format=layout,
        **options or {})


def make_batch(size, seed=0, images=4, classes=19):
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(256, (images, 3, size, size), dtype=torch.uint8, generator=generator),
            "label": torch.randint(classes, (images, size, size), dtype=torch.uint8, generator=generator)}


@functools.cache
def in_float64(size, steps, **shape):
    """The losses of SGD steps (steps, terms), written out in float64 on the CPU, and the weights after them."""
    network = make_engine(torch.device("cpu"), **shape).network.double()
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None]
                 for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    losses = []
    for batch in (make_batch(size, seed) for seed in range(steps)):
        outputs = network((batch["image"].double() - mean) / std)
        labels = batch["label"].long()
        terms = {head: F.cross_entropy(F.interpolate(outputs[head], size=labels.shape[-2:], mode="bilinear",
                                                     align_corners=True), labels) for head in WEIGHTS}
        optimizer.zero_grad()
        sum(WEIGHTS[head] * term for head, term in terms.items()).backward()
        optimizer.step()
        losses.append([term.item() for term in terms.values()])
    return torch.tensor(losses), {name: weight.detach() for name, weight in network.named_parameters()}


def against_float64(device, amp, layout, norm, size=97, steps=3, **shape):
    """Losses and the change of the weights, of some steps."""
    expected, weights = in_float64(size, steps, norm=norm, **shape)
    engine = make_engine(device, amp, layout, norm=norm, **shape)
    # Rounding to half precision changes the gradients of a fresh network's lower layers beyond recognition, whatever
    # the norm: there the classifiers' alone can be compared.
    names = [name for name in weights if amp == "off" or name in ("head.fine.weight", "head.coarse.weight")]
    now = dict(engine.network.named_parameters())
    before = {name: now[name].detach().cpu().double() for name in names}
    actual = [engine.step([make_batch(size, seed)])[0] for seed in range(steps)]
    loss = near(torch.tensor([[terms[head] for head in WEIGHTS] for terms in actual]), expected,
                1e-4 if amp == "off" else 2e-2, "losses")
    changes = [torch.cat([(after[name].detach().cpu().double() - before[name]).flatten() for name in names])
               for after in (now, weights)]
    change = near(*changes, 0.1, "change of the weights")
    return f"losses {loss:.1e}, change of the weights {change:.1e}"


def recomputation(device, amp, recompute, size=97, **shape):
    """Losses, gradients and statistics with recomputation against those without."""
    actual = []
    for kind in ("none", recompute):
        engine = make_engine(device, amp, dropout=True, recompute=kind, **shape)
        terms, _ = engine.step([make_batch(size)])
        values = {**{f"gradient of {name}": p.grad for name, p in engine.network.named_parameters()},
                  **dict(engine.network.named_buffers())}
        actual.append((list(terms.values()), values))
    (terms, plain), (again, recomputed) = actual
    assert terms[:-1] == again[:-1], f"losses: expected {terms[:-1]}, found {again[:-1]}"
    # What is added up by atomics comes in any order on a GPU; elsewhere all is equal to the bit.
    joined = [torch.cat([values[name].double().flatten() for name in plain]) for values in (plain, recomputed)]
    error = near(joined[1], joined[0], {"cpu": 0}.get(device.type, 1e-5 if amp == "off" else 2e-2), "all values")
    return f"losses equal, gradients and statistics {error:.1e}"


# What train.py offers beside plain SGD, as arguments of `make_engine`.
WAYS_TO_LEARN = {
    "adamw, averaged, clipped": {"optimizer": {"kind": "adamw"}, "options": {"ema": 0.9, "clip_gradient": 0.5}},
    "frozen stages, another rate for the heads": {"optimizer": {"head_lr_factor": 10.0},
                                                  "options": {"freeze": ("stem", "1")}},
    "weighed classes": {"class_weights": torch.linspace(0.5, 1.5, 19)},
}
# With attention by kernels that no other check calls: those of `F.scaled_dot_product_attention`, and of einsum.
ATTENTIVE = ("ccnet", "danet", "ocnet_asp", "ocrnet")


def learns(device, way, size, steps=3, **shape):
    """The losses of steps on a device (steps, terms), the change of all weights, and their average or None."""
    engine = make_engine(device, **way, **shape)
    with torch.no_grad():
        for weight in engine.network.parameters():
            if not weight.any():        # would hide what it multiplies, such as attention
                weight.add_(0.1)
    before = all_weights(engine.network)
    losses = [list(engine.step([make_batch(size, seed)])[0].values())[:-1] for seed in range(steps)]
    return (torch.tensor(losses), all_weights(engine.network) - before,
            None if engine.average is None else all_weights(engine.average))


def all_weights(network):
    return torch.cat([weight.detach().cpu().flatten() for weight in network.parameters()])


def as_on_the_cpu(device, way, size, amp="off", steps=3, **shape):
    """Losses, the change of the weights and their average after some steps; there in fp32, so with any other `amp` the
    losses alone."""
    losses, change, average = learns(device, way | {"amp": amp}, size, steps, **shape)
    expected, as_there, of_there = learns(torch.device("cpu"), way, size, steps, **shape)
    words = f"losses {near(losses, expected, 1e-4 if amp == 'off' else 2e-2, 'losses'):.1e}"
    if amp != "off":
        return words
    words += f", change of the weights {near(change, as_there, 0.1, 'change of the weights'):.1e}"
    return words if average is None else f"{words}, average {near(average, of_there, 1e-3, 'average'):.1e}"


def ohem_against_a_sort(device, size=385, keep=20000):
    """Value and gradient of the loss against a sort in float64."""
    torch.manual_seed(0)
    labels = torch.randint(19, (2, size, size))
    labels[torch.rand(labels.shape) < 0.1] = 255
    worst = 0.0
    for sure in (0, 8):         # hard pixels are most, or so few that the k-th smallest decides
        logits = torch.randn(2, 19, size, size) + sure * F.one_hot(labels.where(labels != 255, 0), 19).permute(
            0, 3, 1, 2)
        losses = F.cross_entropy(logits.double(), labels, ignore_index=255, reduction="none")[labels != 255]
        ordered = np.sort(losses.numpy())[::-1]
        kept = max(keep, int((ordered >= -math.log(0.7)).sum()))
        total, count = OhemCrossEntropy(0.7, keep).sums(logits.to(device), labels.to(device))
        assert abs(int(count) - kept) <= 2, f"expected {kept} pixels, found {int(count)}"     # ties in float32
        worst = max(worst, near(total / count, torch.tensor(ordered[:kept].mean()), 1e-5, "OHEM"))
    return f"mean of the hardest {worst:.1e}"


def spoil(engine, what):
    """Make the next losses infinite, or the next gradients with a finite loss; returns what ends it."""
    if what == "gradient":
        weight = engine.network.backbone.layer2[0].conv1.weight
        return weight.register_hook(lambda gradient: gradient * torch.inf)
    return engine.network.head.coarse.register_forward_hook(lambda module, args, logits: logits * torch.inf)


def state(engine):
    return copy.deepcopy({"model": engine.network.state_dict(), "optimizer": engine.optimizer.state_dict(),
                          "scaler": engine.precision.state_dict(), "rng": seeds.random_state(engine.devices)})


def not_finite(device, what, size, **shape):
    """A step that is not finite raises, changes nothing, and the next one learns."""
    engine, batch = make_engine(device, dropout=True, **shape), make_batch(size)
    engine.step([batch])
    before, hook = state(engine), spoil(engine, what)
    try:
        engine.step([batch])
        raise AssertionError("expected NotFinite, found a step that went through")
    except NotFinite as error:
        assert error.what == what, f"expected {what}, found {error.what}"
    assert same(before, state(engine)), "expected the state before the step, found another"
    hook.remove()
    engine.step([batch])
    assert not same(before["model"], state(engine)["model"]), "expected the next step to learn, found the same weights"
    return "state equal to the bit, the next step learns"


def fp16_overflow(device, size, **shape):
    """fp16 leaves out a step whose gradients overflow, and halves the scale."""
    engine, batch = make_engine(device, "fp16", **shape), make_batch(size)
    for _ in range(20):         # until the first scale, 65536, fits
        terms, _ = engine.step([batch])
        if terms["gradient_norm"] is not None:
            break
    before, scale = state(engine), engine.precision.state_dict()["scale"]
    skipped, hook = engine.skipped, spoil(engine, "gradient")
    terms, _ = engine.step([batch])
    hook.remove()
    assert terms["gradient_norm"] is None and engine.skipped == skipped + 1, f"expected a step left out, found {terms}"
    assert engine.precision.state_dict()["scale"] == scale / 2
    assert all(torch.equal(before["model"][name], weight) for name, weight in engine.network.named_parameters())
    return f"left out, scale from {scale:.0f} to {scale / 2:.0f}"


def exact_resume(device, amp, size, **shape):
    """What a snapshot restores equals, to the bit, what was saved, and the next step's losses those that followed."""
    engine = make_engine(device, amp, dropout=True, **shape)
    batches = [make_batch(size, seed) for seed in range(3)]
    for batch in batches[:2]:
        engine.step([batch])
    network = SHAPE | {"norm": "inplace_abn", "activation": "leaky_relu", "ablations": [], "stem": "7x7",
                       "average_downsample": False} | shape
    network["eca_kernels"] = list(BACKBONES[network["backbone"]].eca_kernels)
    config = Config(network, Normalization(), ClassTable.read().rows, (size, size), {
        "model": network["model"], "norm": network["norm"], "activation": "leaky_relu", "data_list": None, "split":
        "train", "input_size": [size, size], "batch_size": 4, "random_seed": 0, "random_mirror": False, "random_scale":
        None, "sampling": "uniform", "jitter": None, "learning_rate": RATE, "num_steps": 3}, {"count": 1, "sha256": ""})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, snapshots.NAME.format(step=2))
        snapshots.save(path, resume.content(engine, 2, config))
        before = state(engine)
        expected, _ = engine.step([batches[2]])
        again = make_engine(device, amp, dropout=True, **shape)
        resume.restore(read_snapshot(path, resuming=True), again)
    actual = state(again)
    actual["optimizer"]["param_groups"] = before["optimizer"]["param_groups"]       # of this run's flags
    assert same(before, actual), "expected the state that was saved, found another"
    terms, _ = again.step([batches[2]])
    assert list(terms.values())[:-1] == list(expected.values())[:-1], f"expected {expected}, found {terms}"
    return "state and the next losses equal to the bit"


def out_of_memory(device):
    """PyTorch's own words for too little memory are recognized, and become a sentence that says what helps."""
    try:
        torch.empty(2 ** 50, device=device)
        raise AssertionError("expected too little memory for a petabyte, found enough")
    except RuntimeError as error:
        words = str(error)
    assert memory.is_out_of_memory(words), f"expected it to be recognized, found {words[:200]}"
    sentence = str(memory.out_of_memory_error(
        words, crops=8, input_size=(769, 769), accumulate=1, recompute="none", recompute_choices=RECOMPUTE,
        amp="bf16"))
    assert sentence.startswith("out of memory: expected room for 8 crops of 769×769") and "--recompute" in sentence
    return sentence[:60]


def section(rows, device, size=97, attentive=ATTENTIVE, **shape):
    """Everything above; on CUDA without TF32 and with algorithms that give the same result each time."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    small = min(size, 33)
    rows.check("OHEM against a sort", ohem_against_a_sort, device)
    rows.check("the sentence for too little memory", out_of_memory, device)
    for what in ("loss", "gradient"):
        rows.check(f"a {what} that is not finite", not_finite, device, what, small, **shape)
    rows.check("fp16 leaves out an overflow", fp16_overflow, device, small, **shape)
    amps = ("off", "bf16", "fp16") if device.type == "cuda" else ("off", "bf16")
    for amp in amps:
        rows.check(f"resume, {amp}", exact_resume, device, amp, small, **shape)
    for name, way in WAYS_TO_LEARN.items():
        rows.check(f"as on the CPU: {name}", as_on_the_cpu, device, way, small, **shape)
    for model, amp in itertools.product(attentive, amps[:2]):
        rows.check(f"as on the CPU: {model}, {amp}", as_on_the_cpu, device, {}, small, amp, steps=1,
                   **shape | {"model": model, "backbone": "eca_resnet18"})
    for recompute in BACKBONES[(SHAPE | shape)["backbone"]].recompute_choices()[1:]:
        for amp in amps[:2]:
            rows.check(f"recomputation {recompute}, {amp}", recomputation, device, amp, recompute, size, **shape)
    for norm in ("inplace_abn", "bn"):
        for amp, layout in itertools.product(amps, (torch.contiguous_format, torch.channels_last)):
            if device.type == "cuda" or (amp, layout) != ("bf16", torch.contiguous_format):     # minutes on some CPUs
                name = f"three steps against float64: {norm}, {amp}, {str(layout).removeprefix('torch.')}"
                rows.check(name, against_float64, device, amp, layout, norm, size, **shape)
