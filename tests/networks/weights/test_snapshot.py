"""Snapshots that are damaged, senseless or of another run: a sentence, or the sound one before. Never belief."""

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
from dataset.cityscapes import CityscapesDataset
from dataset.labels import ClassTable
from networks.build import build_network, meta_network
from networks.weights import start
from networks.weights.loading import load_weights
from networks.weights.snapshot import Config, parse
from networks.weights.start import read_snapshot, read_weights
from tests.conftest import snapshot_content
from utils.common import files as files_on_disk
from utils.common.errors import UserError, user_message
from utils.common.files import load
from utils.devices.precision import Precision
from utils.runs import snapshots
from utils.training import resume

NAN, WEIGHT = float("nan"), "backbone.layer1.0.conv1.weight"
KERNEL = "backbone.layer1.0.eca.conv.weight"


@pytest.fixture(scope="module")
def sound():
    return snapshot_content(7, ClassTable([row for row in ClassTable.read().rows if row["train_id"] < 3]))


class Delete:
    def __repr__(self):         # stands in names of tests, which must be the same in every process
        return "left out"


DELETE = Delete()


def change(content, place, value):
    """A copy with another value at a place, "config.step" or a tuple; `DELETE` leaves it out, a function is applied."""
    *path, last = place.split(".") if isinstance(place, str) else place
    top = inner = copy.copy(content)
    for key in path:
        inner[key] = copy.copy(inner[key])
        inner = inner[key]
    if value is DELETE:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value
    return top


def filled(number):
    def fill(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = number
        return tensor
    return fill


def quantized(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def first_row(**values):
    return lambda rows: [{**rows[0], **values}, *rows[1:]]


MODEL, OPTIMIZER, RNG = ("model",), ("optimizer",), ("rng", 0)
STATE = ("optimizer", "state", 0, "momentum_buffer")
WRONG = {       # place, value → what the sentence says; first those that even an evaluation needs
    **{f"without {name}": (name, DELETE, f"found a file without {name}") for name in ("model", "config", "step")},
    **{f"config {value!r}": ("config", value, "expected a dict as config, found") for value in ([], None, "x")},
    "config empty": ("config", {}, "as config"),
    **{f"{name} {value!r}": (f"config.network.{name}", value, f"config.network.{name}") for name, values in {
        "backbone": ("resnet19", None, 3, ["resnet18"]), "model": ("acfnot", None, {}), "norm": ("group", 1, DELETE),
        "activation": ("gelu", DELETE), "stem": ("5x5", 7, None), "eca_kernels": ([3, 5, 7], [2, 4, 6, 8], "3577",
                                                                                 [-1, 5, 7, 7]),
        "average_downsample": ("no", 1), "ablations": ("norms", ["norm"], ("Fusion",), 3),
        "num_classes": (-1, 2.0, "3", 10 ** 9, 4, True, NAN, None)}.items() for value in values},
    "huge kernels": ("config.network.eca_kernels", [10 ** 9 + 1, 5, 7, 7], f"{KERNEL}, found"),
    "unknown argument": ("config.network.layers", 3, "config.network"),
    "another depth": ("config.network.backbone", "eca_resnet34", "as model, found no tensor named backbone.layer"),
    "another attention": ("config.network.backbone", "resnet18", "config.network.eca_kernels: expected no value"),
    "network a list": ("config.network", [1], "expected a dict as config.network"),
    **{f"normalization {value!r}": ("config.normalization", value, "config.normalization") for value in (
        None, {}, [1, 2], {"order": "RGB", "mean": [1, 2], "std": [1, 1, 1]}, {"order": "RGB", "mean": [1, 2, 3]},
        {"order": "GRB", "mean": [1, 2, 3], "std": [1, 1, 1]}, {"order": "RGB", "mean": ["a"] * 3, "std": [1] * 3},
        {"order": "RGB", "mean": [1, 2, 3], "std": [1, 0, 1]}, {"order": "RGB", "mean": [1, NAN, 3], "std": [1] * 3},
        {"order": "RGB", "mean": "123", "std": [1] * 3}, {"order": "RGB", "mean": [1, 2, 3], "std": [1, -1, 1]})},
    **{f"classes {value!r:.30}": ("config.classes", value, "config.(classes|network.num_classes)") for value in (
        None, [], {}, "road", [1, 2, 3], [{}])},
    "class without a name": ("config.classes", lambda rows: [{k: v for k, v in row.items() if k != "name"}
                                                             for row in rows], r"text as config.classes.0.name"),
    "class id": ("config.classes", first_row(id=10 ** 6), r"config.classes.0.id, found 1000000"),
    "class color": ("config.classes", first_row(red=-3), "config.classes.0.red, found -3"),
    "class train id": ("config.classes", first_row(train_id=NAN), "config.classes.0.train_id, found nan"),
    "class missing": ("config.classes", lambda rows: [row for row in rows if row["train_id"] != 2], "num_classes"),
    "classes of one name": ("config.classes", lambda rows: [row | {"name": "road"} for row in rows], "different name"),
    **{f"input_size {value!r}": ("config.input_size", value, "config.input_size") for value in (
        None, NAN, -9, 100000, [65], [65, NAN], [65, -9], [100000, 100000], ["65", "97"], [65.0, 97.0], [])},
    **{f"step {value!r}": ("step", value, "as step, found") for value in (-5, NAN, "7", True, 7.0, None, [7])},
    "another step than its name": ("step", 8, "expected 7, as in the file's name, as step, found 8"),
    "a step beyond the run": ("config.arguments.num_steps", 3, "expected at most the --num-steps of its run as step"),
    **{f"model {value!r:.20}": ("model", value, "as model, found") for value in ([1, 2], None, {}, "x", {1: 2})},
    "tensor missing": ((*MODEL, "head.fine.weight"), DELETE, "as model, found no tensor named head.fine.weight"),
    "tensor too many": ((*MODEL, "more"), torch.ones(1), "as model, found another tensor named more"),
    "tensor of another shape": ((*MODEL, "head.fine.weight"), lambda t: t[:2],
                                "as model.head.fine.weight, found a tensor"),
    "tensor transposed": ((*MODEL, WEIGHT), lambda t: t.flatten(), "expected a tensor of float32"),
    "tensor whole": ((*MODEL, WEIGHT), lambda t: t.long(), "expected a tensor of float32"),
    "tensor complex": ((*MODEL, WEIGHT), lambda t: t.to(torch.complex64), "expected a tensor of real numbers"),
    "tensor sparse": ((*MODEL, WEIGHT), lambda t: t.to_sparse(), "expected a dense tensor .* sparse"),
    "tensor quantized": ((*MODEL, WEIGHT), quantized, "expected a dense tensor .* quantized"),
    "tensor without values": ((*MODEL, WEIGHT), lambda t: t.to("meta"), "expected a dense tensor .* without values"),
    "tensor a number": ((*MODEL, WEIGHT), 3.0, "expected a tensor as model"),
    "tensor of one value": ((*MODEL, WEIGHT), lambda t: torch.zeros(1, 1, 1, 1).expand_as(t), "share their storage"),
    "weight NaN": ((*MODEL, WEIGHT), filled(NAN), "expected finite values as model.backbone.layer1.0.conv1.weight"),
    "weight infinite": ((*MODEL, WEIGHT), filled(-math.inf), "expected finite values"),
    "variance negative": ((*MODEL, "backbone.bn1.running_var"), filled(-1.0), "expected no value below 0"),
    "count negative": ((*MODEL, "backbone.bn1.num_batches_tracked"), filled(-1), "expected no value below 0"),
    "kernel empty": ((*MODEL, KERNEL), torch.zeros(1, 1, 0), f"as model.{KERNEL}, found"),
    "kernel scalar": ((*MODEL, KERNEL), torch.tensor(1.0), f"as model.{KERNEL}, found"),
    "kernel even": ((*MODEL, KERNEL), torch.zeros(1, 1, 4), f"as model.{KERNEL}, found"),
    "quick result": ("quick_mean_iou", "good", "as quick_mean_iou, found"),
    **{f"average_updates {value!r}": ("average_updates", value, "as average_updates, found")
       for value in (-1, 8, 2.0, "x", None)},
    "samples": ("config.samples", {"count": 0}, "as config.samples.count"),
    "arguments": ("config.arguments", [1], "expected a dict as config.arguments"),
    "argument a tensor": ("config.arguments.batch_size", torch.ones(2), "a plain value as config.arguments.batch_size"),
    "optimizer a list": ("optimizer", [1], "expected a dict as optimizer"),
    "optimizer empty": ("optimizer", {}, "as optimizer.param_groups"),
    "no groups": ((*OPTIMIZER, "param_groups"), [], "expected groups of the network's"),
    "two groups": ((*OPTIMIZER, "param_groups"), lambda groups: groups * 2, "expected groups of the network's"),
    "group of fewer": ((*OPTIMIZER, "param_groups", 0, "params"), [0, 1], "found 1 groups of 2 parameters"),
    "group of tensors": ((*OPTIMIZER, "param_groups", 0, "params"), [torch.ones(3)], "param_groups.0.params.0"),
    "state a list": ((*OPTIMIZER, "state"), [1], "expected a dict as optimizer.state"),
    "state of some": ((*OPTIMIZER, "state", 0), DELETE, "the state of every parameter that learns, or of none"),
    "momentum of another shape": (STATE, lambda t: t[:1], "expected a tensor of float32 .* as optimizer.state.0"),
    "momentum NaN": (STATE, filled(NAN), "expected finite values as optimizer.state.0.momentum_buffer"),
    "momentum a number": (STATE, 0.9, "expected a tensor as optimizer.state.0"),
    "momentum sparse": (STATE, lambda t: t.to_sparse(), "expected a dense tensor as optimizer.state.0"),
    **{f"scaler {value!r:.30}": ("scaler", value, "as scaler") for value in (
        None, [], {"scale": 2.0}, {"a": 1}, {"scale": 0.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                                             "growth_interval": 2000, "_growth_tracker": 0})},
    **{f"rng {value!r:.20}": ("rng", value, "as rng") for value in (None, [], {}, "x", [None], [{}], [{"torch": 1}])},
    "torch's generator short": ((*RNG, "torch"), lambda t: t[:100], "expected the state of a generator of torch"),
    "torch's generator floats": ((*RNG, "torch"), torch.ones(5056), "expected the state of a generator of torch"),
    "Python's generator": ((*RNG, "python"), (3, (1, 2), None), "expected the state of a generator of python"),
    "Python's generator text": ((*RNG, "python"), "x", "expected the state of a generator of python"),
    "NumPy's generator": ((*RNG, "numpy"), lambda s: ["PCG64", *s[1:]], "expected one of MT19937"),
    "NumPy's position": ((*RNG, "numpy", 2), -10 ** 9, "as rng.0.numpy.2, found -1000000000"),
    "NumPy's keys": ((*RNG, "numpy", 1), lambda t: t[:5], "as rng.0.numpy.1, found a tensor"),
    "CUDA's generator": ((*RNG, "cuda"), [torch.ones(3)], "expected 16 bytes"),
}
FOR_RESUMING = {        # an evaluation does not miss them
    "without optimizer": ("optimizer", DELETE, "found a file without optimizer"),
    "without rng": ("rng", DELETE, "found a file without rng"),
    "without arguments": ("config.arguments", DELETE, "expected a dict as config.arguments, found nothing"),
}


@pytest.fixture
def files(monkeypatch):
    """Contents of files by name, in place of the disk: reading the bytes is tested by itself."""
    contents = {}
    monkeypatch.setattr(files_on_disk, "load", lambda path: contents[str(path).rpartition("/")[2]])
    monkeypatch.setattr(snapshots, "list_snapshots", lambda folder: sorted((snapshots.step_of(n), n) for n in contents))
    return contents


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_snapshot_is_one_sentence(sound, files, what):
    place, value, message = WRONG[what]
    files["CS_scenes_7.pth"] = change(sound, place, value)
    with pytest.raises(UserError, match=f"^CS_scenes_7.pth: .*{message}") as caught:
        evaluate.load_network("CS_scenes_7.pth", torch.device("cpu"))
    assert "\n" not in user_message(caught.value) and len(user_message(caught.value)) < 400


def test_a_variance_that_rounding_left_below_0_is_read(sound, files):
    """1 / sqrt(0 + 1e-5) in float32 and back, as CUDA's kernel for several processes does it, may give -1.8e-12."""
    files["CS_scenes_7.pth"] = change(sound, (*MODEL, "backbone.bn1.running_var"), filled(-1.8e-12))
    network, _ = evaluate.load_network("CS_scenes_7.pth", torch.device("cpu"))
    assert all(weight.isfinite().all() for weight in network.parameters())


@pytest.mark.parametrize("what", [*list(WRONG)[::12], "another step than its name", "weight NaN",
                                  "classes of one name"])
def test_resume_passes_over_a_wrong_snapshot_and_says_so(sound, files, capsys, what):
    place, value, message = WRONG[what]
    files["CS_scenes_7.pth"] = change(sound, place, value)
    with pytest.raises(UserError, match=message):
        start.find_snapshot("newest", "folder")
    files["CS_scenes_6.pth"] = sound | {"step": 6}
    assert start.find_snapshot("newest", "folder").step == 6
    output = capsys.readouterr().out
    assert output.startswith("CS_scenes_7.pth: ") and output.endswith("; taking the snapshot before it\n")


@pytest.mark.parametrize("what", FOR_RESUMING)
def test_what_only_a_resumed_run_misses(sound, files, what):
    place, value, message = FOR_RESUMING[what]
    files["CS_scenes_7.pth"] = change(sound, place, value)
    assert read_snapshot("CS_scenes_7.pth").step == 7
    with pytest.raises(UserError, match=message):
        start.find_snapshot("CS_scenes_7.pth", "folder")
    files["CS_scenes_6.pth"] = sound | {"step": 6}
    assert start.find_snapshot("newest", "folder").step == 6


def test_a_snapshot_of_the_old_layout_loads(sound, tmp_path):
    """For evaluation, resuming, and transfer to another number of classes, through the file."""
    path = tmp_path / "CS_scenes_7.pth"
    snapshots.save(path, sound)
    network, config = evaluate.load_network(path, torch.device("cpu"))
    assert config.input_size == (65, 97) and config.normalization.std == (58.395, 57.12, 57.375)
    assert config.samples is None and ClassTable(config.classes).num_classes == 3
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 65, 65))["fine"].shape == (1, 3, 9, 9)
    actual = start.find_snapshot(path, tmp_path)
    assert set(resumed(actual, build_network(**actual.config.network))) == {"momentum_buffer"}
    account = load_weights(build_network("acfnet_resnet", 5, "eca_resnet18"), read_weights(path))
    assert account.share == 1 and account.family == "ours"


def test_a_snapshot_from_before_there_was_a_head_loads(sound, tmp_path):
    """Until November 2026 classifiers and module stood beside the backbone, in another order: so did the momenta."""
    modules = ("backbone", "context", "head.fine", "aux", "head.coarse", "head.acf")        # in the order of then
    names = [name for name, _ in meta_network(**sound["config"]["network"]).named_parameters()]
    order = sorted(names, key=lambda name: next(n for n, module in enumerate(modules) if name.startswith(module)))
    state = sorted(sound["model"].items(), key=lambda item: next(
        n for n, module in enumerate(modules) if item[0].startswith(module)))
    momenta = sound["optimizer"]["state"]
    old = sound | {"model": {name.removeprefix("head."): value for name, value in state},
                   "optimizer": sound["optimizer"] | {"state": {
                       number: momenta[names.index(name)] for number, name in enumerate(order)}}}
    assert order != names and "coarse.weight" in old["model"]
    path = tmp_path / "CS_scenes_7.pth"
    snapshots.save(path, old)
    actual = read_snapshot(path, resuming=True)
    assert actual.model.keys() == sound["model"].keys()
    assert all(torch.equal(value, sound["model"][name]) for name, value in actual.model.items())
    for number in range(len(names)):
        assert torch.equal(actual.optimizer[number]["momentum_buffer"], momenta[number]["momentum_buffer"])
    account = load_weights(build_network("acfnet_resnet", 3, "eca_resnet18"), read_weights(path))
    assert account.share == 1 and not account.ignored and not account.initialized


def test_the_average_goes_on_by_its_updates_or_by_the_steps_of_an_older_snapshot(sound, tmp_path, capsys):
    content = change(sound, "config.arguments.ema", 0.9) | {"average": sound["model"], "average_updates": 5}
    for updates, expected in ((5, 5), (DELETE, 7)):
        path = tmp_path / "CS_scenes_7.pth"
        snapshots.save(path, change(content, "average_updates", updates))
        actual = read_snapshot(path, resuming=True)
        network = build_network(**actual.config.network)
        engine = SimpleNamespace(network=network, optimizer=torch.optim.SGD(network.parameters(), 0.02, 0.5),
                                 precision=Precision("off", torch.device("cpu")), devices=[torch.device("cpu")],
                                 processes=None, average=copy.deepcopy(network))
        resume.restore(actual, engine)
        assert engine.average_updates == expected
        assert ("it continues as after 7 updates" in capsys.readouterr().out) == (updates is DELETE)


def resumed(actual, network):
    """`resume.restore` into a network and a new optimizer; returns the state of its first parameter."""
    optimizer = torch.optim.SGD(network.parameters(), 0.02, 0.5)
    engine = SimpleNamespace(network=network, optimizer=optimizer, precision=Precision("off", torch.device("cpu")),
                             devices=[torch.device("cpu")], processes=None, average=None)
    random.seed(1), np.random.seed(1)
    resume.restore(actual, engine)
    return optimizer.state_dict()["state"].get(0, {})


def test_momentum_and_decay_of_a_resumed_run_are_those_of_its_flags(sound, files):
    """The weights' momenta come from the snapshot, the factors from the command line, as the message says."""
    files["CS_scenes_7.pth"] = sound
    actual = read_snapshot("CS_scenes_7.pth", resuming=True)
    network = build_network(**actual.config.network)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, 0.5, weight_decay=0.25)
    resume.restore(actual, SimpleNamespace(network=network, optimizer=optimizer, processes=None, devices=[],
                                          average=None, precision=Precision("off", torch.device("cpu"))))
    group, = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.25)
    for number, parameter in enumerate(network.parameters()):
        expected = sound["optimizer"]["state"][number]["momentum_buffer"]
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], expected)


def test_flipped_bits_are_seen_wherever_they_are(sound, tmp_path):
    path = tmp_path / "CS_scenes_7.pth"
    snapshots.save(path, sound)
    whole = path.read_bytes()
    tensor = sound["model"]["backbone.layer4.1.conv2.weight"]
    inside = whole.index(tensor.numpy().tobytes()[:64]) + 2       # of the mantissa: the number stays plausible
    for place in (inside, inside + 4 * tensor.numel() - 80, *np.random.default_rng(0).integers(len(whole), size=6)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            actual = read_snapshot(path)
        except UserError as error:
            assert "CS_scenes_7.pth: expected a file of tensors written by torch.save" in str(error)
        else:       # a bit between the entries, that nothing is read from
            assert all(torch.equal(actual.model[key], value) for key, value in sound["model"].items())
            assert place not in (inside, inside + 4 * tensor.numel() - 80)


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="this PyTorch always writes them")
def test_files_whose_writer_left_out_the_sums_load(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load(tmp_path / "a.pth")["a"], torch.ones(3))


@pytest.mark.parametrize("key, value, message", [
    ("layer1.0.conv1.weight", lambda t: t.to_sparse(), "expected a dense tensor"),
    ("layer1.0.conv1.weight", quantized, "expected a dense tensor"),
    ("layer1.0.conv1.weight", filled(NAN), "expected finite values as layer1.0.conv1.weight"),
    ("bn1.running_var", filled(-1.0), "expected no value below 0 as bn1.running_var"),
    ("layer1.0.eca.conv.weight", lambda t: t[..., :0], "expected kernels of odd sizes"),
    ("layer1.0.eca.conv.weight", lambda t: t.sum(), "expected kernels of odd sizes"),
    ("layer1.0.eca.conv.weight", lambda t: torch.zeros(1, 1, 4), "expected kernels of odd sizes"),
    ("conv1.weight", lambda t: t[0, 0, 0, 0], None), ("bn1.running_var", lambda t: t[:3], None),
])
def test_weights_of_others_are_looked_at_too(sound, files, key, value, message):
    state = {name.removeprefix("backbone."): tensor for name, tensor in sound["model"].items() if "backbone" in name}
    files["w.pth"] = change(state, (key,), value)
    if message is None:     # a tensor that does not fit is left out, and told
        account = load_weights(build_network("base", 3, "eca_resnet18"), files["w.pth"], "w.pth")
        assert f"backbone.{key}" in account.ignored
    else:
        with pytest.raises(UserError, match=f"w.pth: {message}"):
            load_weights(build_network("base", 3, "eca_resnet18"), files["w.pth"], "w.pth")


def test_weights_by_name_without_torchvision(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(UserError, match="Nope_Weights.X: expected torchvision, .* found none that can be imported"):
        read_weights("Nope_Weights.X")


def test_a_list_that_was_moved_is_the_same_and_a_shorter_one_is_not(streets, tmp_path):
    images = sorted(path.relative_to(streets) for path in streets.glob("leftImg8bit/train/*/*.png"))
    lines = [f"{path} {str(path).replace('leftImg8bit', 'gtFine', 1)[:-15]}gtFine_labelIds.png\n" for path in images]
    (tmp_path / "data").symlink_to(streets)
    (tmp_path / "a").mkdir()
    names = {"all.txt": lines, "a/moved.txt": lines, "short.txt": lines[1:], "turned.txt": lines[::-1],
             "absolute.txt": [f"{streets / one} {streets / two}" for one, two in map(str.split, lines)]}
    for name, some in names.items():
        (tmp_path / name).write_text("\n".join(some))

    def of(root, name):
        return CityscapesDataset(root, data_list=tmp_path / name).fingerprint()

    first = of(streets, "all.txt")
    assert first["count"] == len(lines)
    assert first == of(streets, "a/moved.txt") == of(tmp_path / "data", "all.txt") == of(streets, "absolute.txt")
    assert first["sha256"] not in {of(streets, name)["sha256"] for name in ("short.txt", "turned.txt")}


def test_resume_notices_a_changed_list_and_takes_a_moved_one(sound, files):
    def config(count, sha256, **arguments):
        names = (*resume.SAME_RUN, *resume.MAY_CHANGE, "data_list")
        arguments = dict.fromkeys(names) | {"loss_weights": "fine=0.7"} | arguments
        return Config({}, None, [], (), arguments, {"count": count, "sha256": sha256})

    resume.check_same_run("x.pth", config(9, "a", data_list=["old.txt"]), config(9, "a", data_list=["new.txt"]))
    with pytest.raises(UserError, match="x.pth: expected a run on the 8 pairs .* of --data-list, found one on 9"):
        resume.check_same_run("x.pth", config(9, "a", data_list=["l"]), config(8, "b", data_list=["l"]))
    old = config(9, "a", data_list=["old.txt"])
    old.samples = None      # as snapshots of before have it: names are all there is to compare
    with pytest.raises(UserError, match=r"expected a run with --data-list \['new.txt'\], found \['old.txt'\]"):
        resume.check_same_run("x.pth", old, config(9, "a", data_list=["new.txt"]))


def test_classes_of_one_name_are_refused():
    rows = ClassTable.read().rows
    rows = [row | {"name": "road"} if row["name"] == "sidewalk" else row for row in rows]
    with pytest.raises(UserError, match="table: expected a different name for every class, found road several times"):
        ClassTable(rows, "table")


def places(value, before=()):
    """Every place in a snapshot, tensors of the network beyond a few left out."""
    yield from [before] * bool(before)
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, inner) in enumerate(entries):
        if number < 6 or before[:1] not in (("model",), ("optimizer",)):
            yield from places(inner, (*before, key))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 9), st.floats(), st.text(max_size=5), st.binary(),
    st.lists(st.integers(-2, 9) | st.floats(width=16) | st.text(max_size=2), max_size=5).map(
        lambda values: values if len(values) % 2 else tuple(values)),
    st.dictionaries(st.text(max_size=3) | st.integers(0, 3), st.integers(0, 3) | st.none(), max_size=3),
    st.sampled_from([torch.ones(()), torch.ones(0), torch.ones(3).to_sparse(), torch.ones(2, dtype=torch.complex64),
                     quantized(torch.ones(3)), torch.ones(3, device="meta"), torch.zeros(1).expand(10 ** 9), DELETE,
                     torch.full((64,), NAN), torch.ones(64, dtype=torch.float16), torch.ones(64, dtype=torch.bool),
                     torch.ones(64, requires_grad=True), torch.Size([3]), 10 ** 30, "RGB", [65, 65], 1e300]))


@pytest.fixture(scope="module")
def network(sound):
    return build_network(**sound["config"]["network"])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(data=st.data())
def test_any_field_replaced_by_any_value_works_or_is_a_sentence(sound, network, data):
    known = sorted(places(sound), key=str)
    place, other = data.draw(st.sampled_from(known)), data.draw(st.one_of(VALUES, st.sampled_from(known)))
    content = sound
    if isinstance(other, tuple) and other in known:        # what stands elsewhere
        for key in other:
            content = content[key]
        other, content = content, sound
    content = change(content, place, (lambda before: other) if callable(other) else other)
    for resuming in (False, True):
        try:
            actual = parse("CS_scenes_7.pth", content, resuming)
        except UserError as error:
            assert str(error).startswith("CS_scenes_7.pth: ") and "\n" not in str(error) and len(str(error)) < 400
            continue
        try:
            ClassTable(actual.config.classes)
        except UserError:
            continue
        if resuming:
            resumed(actual, network)
