"""Every flag changes something: what a run is made of, what it writes, or whether it is refused."""

import dataclasses
import functools
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from dataset.labels import CITYSCAPES
from dataset.streets import write_dataset
from networks import predictor
from tests.conftest import snapshot_content
from utils.common.errors import UserError
from utils.inference.sliding import SlidingPredictor
from utils.parallel import workers
from utils.reports import charts, report
from utils.runs import snapshots
from utils.runs.log import NoLog
from utils.training import resume

pytestmark = pytest.mark.usefixtures("short_networks")
SKIPPED = (torch.Generator, type(None))
# Flag → words that follow it; or a pair: the words before, with which alone it is compared, and its own.
TRAIN = {
    "acf": (["--model", "fcn"], ""), "ablations": "norms", "abn-backend": "torch",
    "accumulate": "2", "activation": (["--norm", "bn"], "relu"),
    "allow-partial": (["--restore-from", "part.pth"], ""), "amp": "bf16", "backbone": "resnet18", "batch-size": "4",
    "cache": "cache", "channels-last": "", "checkpoint": "full", "class-weights": "balanced", "classes": "classes.csv",
    "clip-gradient": "1", "compile": "", "cuda-graph": "on", "data-dir": "elsewhere", "data-list": "train.lst",
    "downsample": "average", "eca-kernels": "3,3,3,3", "ema": "0.9", "freeze": "stem", "gpu": "7",
    "head-lr-factor": "10", "images-dir": "i", "input-size": "49,49", "jitter": "0.1,0.1,0.1,0.1", "keep": "3",
    "kernels": "torch",
    "labels-dir": "l", "learning-rate": "0.1",
    "log-every": "3", "loss": "ce+dice", "loss-weights": "fine=1,coarse=1,aux=1", "model": "acfnet", "momentum": "0.5",
    "no-channels-last": (["--channels-last"], ""), "norm": "bn", "normalization": "bgr", "num-classes": "5",
    "num-steps": "9", "num-workers": "1", "ohem": "1",
    "ohem-keep": (["--ohem", "1"], "5"), "ohem-thres": (["--ohem", "1"], "0.5"), "optimizer": "adamw",
    "output-stride": "16", "panel-every": "3",
    "power": "0.5", "pretrained": "", "random-mirror": "",
    "random-scale": "0.7,1.5", "random-seed": "5", "recompute": "full",
    "restore-from": "part.pth", "resume": (["--snapshot-dir", "full"], ""),
    "sampling": "class", "save-pred-every": "3", "snapshot-dir": "there",
    "split": "val", "stem": "32-32-64", "val-every": "2", "val-list": (["--val-every", "2"], "train.lst"),
    "blur": "2", "layer-decay": "0.8", "like": "elsewhere", "patience": (["--val-every", "2"], "2"),
    "quarter-turns": "", "rotate": "20", "schedule": "cosine", "vertical-flip": "",
    "val-split": (["--val-every", "2"], "train"), "warmup-steps": "2", "weight-decay": "0.1"}
EVALUATE = {
    "amp": "bf16", "batch-size": (["--input-size", "33,33"], "2"), "benchmark": "", "boundary": "3",
    "classes": "classes.csv", "data-dir": "elsewhere", "data-list": "all.lst", "export": "network.onnx",
    "export-precision": (["--export", "network.onnx"], "fp16"), "export-size": (["--export", "network.onnx"], "64,64"),
    "flip": "", "gpu": "7", "help": "",
    "images": "image.png", "images-dir": "i", "input-size": "33,33", "kernels": "torch", "labels-dir": "l",
    "no-flip": (["--flip"], ""), "num-workers": "1",
    "output-dir": "there", "push": "hf:o/n", "overlap": (["--input-size", "33,33"], "0.7"),
    "overwrite": (["--output-dir", "earlier"], ""), "raw-weights": (["--restore-from", "averaged.pth"], ""),
    "restore-from": "averaged.pth", "save": "color", "scales": "0.5", "split": "train", "submission": "upload",
    "whole": ""}


def without_effect(flags, base, outcome):
    """The flags with which `outcome(words)` gives nothing else than without."""
    known, unchanged = {}, []
    for flag, words in flags.items():
        before, own = words if isinstance(words, tuple) else ([], words)
        if tuple(before) not in known:
            known[tuple(before)] = outcome([*base, *before])
        if outcome([*base, *before, f"--{flag}", *own.split()]) == known[tuple(before)]:
            unchanged.append(flag)
    return unchanged


def in_short(tensor):
    """Shape, sum and sum of squares."""
    tensor = tensor if tensor.is_floating_point() else tensor.double()
    return tuple(tensor.shape), *(float(values.sum(dtype=torch.float64)) for values in (tensor, tensor.square()))


def walk(value, seen, path=""):
    """(path, value) of everything plain below an object of ours, a container, or what they hold.

    seen: {id: object} of what was walked through, which keeps ids from being used again; of a tensor, it and its sums.
    """
    if isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.memory_format) or callable(
            value) and not hasattr(value, "__dict__"):
        yield path, str(value)
    elif isinstance(value, torch.Tensor | np.ndarray):
        if id(value) not in seen:
            seen[id(value)] = value, in_short(torch.as_tensor(value).detach())
        yield path, seen[id(value)][1]
    elif id(value) in seen or isinstance(value, SKIPPED):
        return
    elif isinstance(value, functools.partial):
        seen[id(value)] = value
        yield from walk([value.func, value.args, value.keywords], seen, path)
    elif isinstance(value, dict):
        seen[id(value)] = value
        for key, one in value.items():
            yield from walk(one, seen, f"{path}.{key if isinstance(key, str) else ''}")
    elif isinstance(value, list | tuple | set | frozenset):
        seen[id(value)] = value
        for number, one in enumerate(value):
            yield from walk(one, seen, f"{path}[{number}]")
    elif dataclasses.is_dataclass(value) or type(value).__module__.split(".")[0] in (
            "torch", "train", "utils", "dataset", "networks", "libs", "loss", "pathlib"):
        seen[id(value)] = value
        yield path, type(value).__name__
        if isinstance(value, torch.nn.Module):
            yield from walk({**dict(value.named_parameters()), **dict(value.named_buffers())}, seen, f"{path}.state")
        yield path, str(value) if isinstance(value, Path) else ""
        yield from walk({name: one for name, one in getattr(value, "__dict__", {}).items()
                         if name not in ("arguments", "started", "log")}, seen, path)


def outcome(words, monkeypatch):
    """What a command makes, without performing it, or how it is refused."""
    made = []
    monkeypatch.setattr(train, "perform", lambda run: made.append(run) or 0)
    monkeypatch.setattr(resume, "RunLog", lambda *_, **__: NoLog())
    torch.manual_seed(0)
    try:
        train.main(words)
    except (UserError, SystemExit) as error:
        return str(error)
    run, = made
    actual = sorted(map(str, walk(run, {})))
    network = run.engine.network
    return [*actual, network._compiled_call_impl is not None, network.head.fine.weight.stride(),
            run.engine.network.backbone.conv1.weight.stride() if hasattr(network.backbone.conv1, "weight") else "",
            [name for name, parameter in network.named_parameters() if parameter.requires_grad],
            {norm.backend for norm in network.modules() if hasattr(norm, "backend")}]


def test_every_flag_of_training_changes_something(streets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [(image, str(image).replace("leftImg8bit", "gtFine", 1).replace("leftImg8bit.png", "gtFine_labelIds.png"))
             for image in sorted((streets / "leftImg8bit/train").glob("*/*.png"))]
    (tmp_path / "train.lst").write_text("".join(f"{image} {label}\n" for image, label in pairs[:2]))
    (tmp_path / "classes.csv").write_text(open(CITYSCAPES).read().replace("bicycle", "pushbike"))
    content = {f"backbone.{name}": tensor for name, tensor in
               train.build_network("acfnet_resnet", 19, "eca_resnet18").backbone.state_dict().items()
               if not name.startswith("layer4") or "eca" in name or "bn" in name}      # less than half of the values
    torch.save(content, tmp_path / "part.pth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/CS_scenes_1.pth").write_bytes(b"")
    base = ["--data-dir", str(streets), "--gpu", "cpu", "--num-steps", "8", "--model", "acfnet_resnet", "--backbone",
            "eca_resnet18", "--input-size", "33,33", "--batch-size", "2", "--num-workers", "0", "--amp", "off",
            "--snapshot-dir", "run"]
    assert without_effect(TRAIN, base, lambda words: outcome(words, monkeypatch)) == []
    known = {name.removeprefix("--") for action in train.get_parser()._actions for name in action.option_strings}
    elsewhere = {"opt-level", "parallel", "log", "track"}    # tests of precision, of the launcher and of trackers
    assert elsewhere.union(TRAIN, ("help", "-h")) == known


def small_inputs(folder):
    """What evaluation reads, in a folder: two streets, two snapshots of a network, a class table, a list."""
    folder.mkdir()
    write_dataset(folder / "data", train=1, val=1, size=(64, 128), workers=1)
    images, labels = (sorted((folder / "data").glob(f"{name}/*/*/*{kind}.png"))
                      for name, kind in (("leftImg8bit", ""), ("gtFine", "_labelIds")))
    (folder / "image.png").write_bytes(images[0].read_bytes())
    (folder / "all.lst").write_text("".join(f"{one} {other}\n" for one, other in zip(images, labels, strict=True)))
    (folder / "classes.csv").write_text(open(CITYSCAPES).read().replace("bicycle", "pushbike"))
    content = snapshot_content()
    del content["optimizer"]
    snapshots.save(folder / "plain.pth", content)
    content["config"]["arguments"]["ema"] = 0.9
    snapshots.save(folder / "averaged.pth", content | {"average": {        # which takes every class for another
        name: tensor.flip(0) if name.startswith("head.fine") else tensor for name, tensor in content["model"].items()}})


def written(folder):
    """{name: content} of the files that a command wrote; scores without what only repeats its flags."""
    actual = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.suffix != ".html":
            name = path.relative_to(folder).as_posix()
            actual[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            if path.name == "result.json":
                content = json.loads(path.read_text())
                actual[name] = {key: content[key] for key in content if key not in ("checkpoint", "protocol")}
    return actual


def test_every_flag_of_evaluation_changes_something(tmp_path, monkeypatch):
    """The files it writes, or what it asks of the network and of workers; each command in a folder of its own."""
    small_inputs(tmp_path / "inputs")
    requested, numbers, forward = [], itertools.count(), SlidingPredictor._forward

    def noted(self, crops):
        requested.append((tuple(crops.shape), self.autocast))
        return forward(self, crops)

    def loader(items, **options):
        requested.append(options)
        return items

    def exported(path, target, **options):
        target.write_text(f"{path} {options}")
        return "exported"
    def prepared(network, device, kernels, prepare=predictor.prepare_for_evaluation):
        requested.append(kernels)
        return prepare(network, device, kernels)

    monkeypatch.setattr(predictor, "prepare_for_evaluation", prepared)
    monkeypatch.setattr(SlidingPredictor, "_forward", noted)
    monkeypatch.setattr(evaluate, "export_snapshot", exported)
    monkeypatch.setattr(evaluate, "push_snapshot", lambda path, name, **options: f"pushed {requested.append(name)}")
    monkeypatch.setattr(workers, "Loader", loader)
    for picture in ("confusion_picture", "iou_chart"):
        monkeypatch.setattr(charts, picture, lambda *args: None)
    monkeypatch.setattr(report, "reliability_chart", lambda *args: b"")

    def outcome(words):
        folder = tmp_path / str(next(numbers))
        (folder / "earlier").mkdir(parents=True)
        (folder / "earlier/result.json").write_text("{}")
        (folder / "earlier/written.json").write_text(json.dumps(["result.json"]))
        for path in (tmp_path / "inputs").iterdir():
            (folder / path.name).symlink_to(path)
        monkeypatch.chdir(folder)
        requested.clear()
        refused = None
        try:
            evaluate.main(words)
        except (UserError, SystemExit) as error:
            refused = str(error)
        return refused, written(folder), list(requested)

    base = ["--restore-from", "plain.pth", "--data-dir", "data", "--gpu", "cpu", "--num-workers", "0", "--amp", "off",
            "--scales", "1.0", "--no-flip", "--save", "labels", "--output-dir", "results"]
    first = outcome(base)
    assert first == outcome(base), "what changes by itself proves nothing of a flag"
    assert first[0] is None and "results/result.json" in first[1] and len(first[2]) > 1
    assert without_effect(EVALUATE, base, outcome) == []
    flags = {name.removeprefix("--") for action in evaluate.get_parser()._actions for name in action.option_strings}
    assert flags == EVALUATE.keys() | {"-h"}
