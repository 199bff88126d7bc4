"""Backbones from timm: trained, scored, exported; any size or a sentence; timm's own features as the oracle."""

import builtins
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from libs.convert import fold_norms
from networks.backbones.choose import choose_backbone
from networks.backbones.names import build_backbone
from networks.backbones.timm import _find_plan, find_layers, find_plan, input_normalization, synchronize_norms
from networks.build import build_network, meta_network
from networks.weights.loading import load_weights
from networks.weights.start import read_snapshot, read_weights
from tests.conftest import randomize
from utils.common import files
from utils.common.compat import torch_version
from utils.common.errors import UserError
from utils.devices.memory import measure_forward_pass
from utils.inference.sliding import SlidingPredictor
from utils.ops.normalization import Normalization
from utils.ops.upsampling import round_size
from utils.training.optimization import make_optimizer

timm = pytest.importorskip("timm", reason="needs timm")
# Stride of the logits, and the sides that fit: a multiple of the first, plus the second.
FAMILIES = {"mobilenetv3_small_050": (8, (8, 1)), "resnet10t": (8, (8, 1)), "convnext_atto": (8, (8, 0)),
            "hrnet_w18_small": (4, (32, 1)), "vit_tiny_patch16_224": (16, (16, 0)),
            "swin_tiny_patch4_window7_224": (32, (32, 0)), "vit_small_patch16_dinov3": (16, (16, 0))}


@pytest.fixture(scope="module")
def pair(streets, tmp_path_factory):
    """A list of one image and its labels, of 128×96."""
    image = sorted((streets / "leftImg8bit/val").glob("*/*.png"))[0]
    label = str(image).replace("leftImg8bit", "gtFine", 1).replace("leftImg8bit.png", "gtFine_labelIds.png")
    path = tmp_path_factory.mktemp("list") / "one.lst"
    for source in (image, label):
        Image.open(source).crop((64, 16, 192, 112)).save(path.with_name(Path(source).name))
    path.write_text(f"{Path(image).name} {Path(label).name}\n")
    return path


def start(pair, folder, *words, steps=1):
    train.main(["--data-dir", str(pair.parent), "--data-list", str(pair), "--snapshot-dir", str(folder), "--gpu", "cpu",
                "--model", "acfnet_resnet", "--input-size", "65,65", "--batch-size", "2", "--num-workers", "0", "--amp",
                "off", "--num-steps", str(steps), "--log-every", "1", "--panel-every", "1000", *words])
    return folder / f"CS_scenes_{steps}.pth"


def available(name):
    if name not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {name} yet")
    return f"timm:{name}"


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"resnet10t", "vit_tiny_patch16_224"}))
def test_a_family_is_trained_scored_and_exported(name, pair, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    stride, grid = FAMILIES[name]
    snapshot = start(pair, tmp_path / "run", "--backbone", available(name), steps=2)
    output = capsys.readouterr().out
    assert f"timm:{name}, output stride {stride}{', the only one it has' * (stride != 8)};" in output
    size = round_size((65, 65), grid)
    assert (f"rounded up to {size[0]}×{size[1]}" in output) == (size != (65, 65))
    losses = [json.loads(line)["loss"] for line in open(tmp_path / "run/metrics.jsonl")]
    assert len(losses) == 2 and all(np.isfinite(losses))
    with torch.device("meta"):
        before = build_backbone(f"timm:{name}")
    assert read_snapshot(snapshot, resuming=True).config.network["backbone_arguments"] == before.arguments

    evaluate.main(["--data-dir", str(pair.parent), "--data-list", str(pair), "--restore-from", str(snapshot), "--gpu",
                   "cpu", "--num-workers", "0", "--scales", "1.0", "--no-flip", "--amp", "off", "--save", "none",
                   "--output-dir", str(tmp_path / "scores")])
    result = json.loads((tmp_path / "scores/result.json").read_text())
    assert result["num_images"] == 1 and result["protocol"]["window"] == list(size)

    if name.startswith("swin") and torch_version() < (2, 9):
        for size in ([], ["--export-size", "75,101"]):      # the exporter stumbles over its windows
            with pytest.raises(UserError, match="--export"):
                evaluate.main(["--restore-from", str(snapshot), "--export", str(tmp_path / "network.onnx"), *size])
        return
    evaluate.main(["--restore-from", str(snapshot), "--export", str(tmp_path / "network.onnx")])
    session = onnxruntime.InferenceSession(str(tmp_path / "network.onnx"), providers=["CPUExecutionProvider"])
    network, config = evaluate.load_network(snapshot, torch.device("cpu"))
    predictor = SlidingPredictor(network, None, normalization=config.normalization)
    for height, width in ((75, 101), (96, 50)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        logits = session.run(None, {"images": image.transpose(2, 0, 1)[None].astype(np.float32)})[0][0]
        assert logits.shape == (19, height, width)
        assert np.abs(torch.from_numpy(logits).softmax(0).numpy() - predictor(image).numpy()).max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_are_those_of_timm_at_any_size(name):
    stride, _ = FAMILIES[name]
    backbone = build_backbone(available(name)).eval()
    plan = backbone.plan
    height, width = 2 * max(plan.reductions) + 3, 3 * max(plan.reductions) + 1
    images = torch.randn(2, 3, height, width)
    maps = backbone(images)
    assert [one.shape[1] for one in maps] == backbone.channels
    assert maps[-1].shape[-2:] == (-(-height // stride), -(-width // stride)) and backbone.stride == stride
    assert backbone(images[..., :1, :1])[-1].shape[-2:] == (1, 1)
    # Of sides that timm takes as they are, the same numbers.
    sides = round_size((height, width), (max(plan.reductions), 0))
    images = torch.randn(2, 3, *sides)
    theirs = [one.permute(0, 3, 1, 2) if plan.channels_last else one
              for one in backbone.body(images)[-len(plan.reductions):]]
    maps = backbone(images)
    if plan.joined:
        assert torch.equal(maps[-1][:, :theirs[0].shape[1]], theirs[0])
    else:
        assert all(torch.equal(one, other) for one, other in zip(maps, theirs, strict=True))


@pytest.mark.parametrize("size", [(1, 1), (7, 350), (65, 33)])
def test_images_smaller_than_the_part_a_pixel_attends_to_are_padded(size):
    """PVT's attention takes parts of 32×32 pixels of the image together."""
    assert find_plan("timm:pvt_v2_b0").multiple == 32
    with torch.device("meta"):
        maps = build_backbone("timm:pvt_v2_b0")(torch.zeros(2, 3, *size))
    assert [tuple(one.shape[2:]) for one in maps] == [tuple(-(-side // r) for side in size) for r in (16, 32)]


def test_maps_that_a_network_would_stretch_are_padded():
    """MobileViTv2 resizes maps of odd sides to even ones, and leaves them so."""
    assert find_plan("timm:mobilevitv2_050").multiple == 2 * 8


def test_stages_for_the_auxiliary_head_lie_two_thirds_up_a_plain_transformer():
    backbone = build_backbone("timm:vit_tiny_patch16_224").eval()
    seen = []
    for index in (7, 11):
        backbone.body.model.blocks[index].register_forward_hook(lambda module, args, output: seen.append(output))
    third, fourth = backbone(torch.randn(1, 3, 32, 48))
    for tokens, one in zip(seen, (third, fourth), strict=True):
        assert torch.equal(tokens[0, 1:].T.reshape(192, 2, 3), one[0])


def test_logits_of_a_grid_lie_on_the_pixels_whatever_is_padded():
    """HRNet needs multiples of 32: what is padded below and on the right is cut off its maps again."""
    backbone = build_backbone("timm:hrnet_w18_small").eval()
    maps = backbone(torch.randn(1, 3, 65, 97))
    assert maps[-1].shape == (1, 16 + 32 + 64 + 128, 17, 25)


@pytest.mark.parametrize("name, message", [
    ("convnext_tinny", "found none of this name"), ("convnext_tinny", "convnext_tiny"),
    ("hf-hub:timm/resnet18.a1_in1k", "found none of this name"), ("local-dir:/tmp", "found none of this name"),
    ("convnext_tiny.nobody", "found none of this name"), ("", "found none of this name"),
    ("mixer_s32_224", "takes images of any size"), ("maxvit_rmlp_pico_rw_256", "takes images of any size"),
    ("crossvit_tiny_240", "takes images of any size"),      # it would squeeze them all into one
    ("mvitv2_tiny", "tables of relative positions are for 224×224")])
def test_what_cannot_be_a_backbone_is_a_sentence(name, message, pair, tmp_path):
    with pytest.raises(UserError, match="--backbone timm:.*expected.*found") as error:
        start(pair, tmp_path / "run", "--backbone", f"timm:{name}")
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("words, message", [
    (["--stem", "7x7"], "--stem: expected no such flag"), (["--downsample", "strided"], "--downsample: expected no"),
    (["--eca-kernels", "3,3,3,3"], "--eca-kernels: expected no"), (["--freeze", "stem"], "--freeze stem: expected a"),
    (["--recompute", "full"], "--recompute full: expected a"),
    (["--pretrained", "--restore-from", "x"], "--pretrained: expected.*found --restore-from"),
    (["--pretrained", "--backbone", "resnet18"], "--pretrained: expected.*found resnet18")])
def test_what_only_our_networks_can_do_is_refused(words, message, pair, tmp_path):
    with pytest.raises(UserError, match=message):
        start(pair, tmp_path / "run", "--backbone", "timm:resnet10t", *words)


@pytest.mark.parametrize("arguments", [
    {"pretrained": True}, {"checkpoint_path": "x"}, {"output_stride": "8"}, {"output_stride": 4}, [],
    {"out_indices": [0.5]}, {"dynamic_img_size": 1}, {"pretrained_cfg": {"file": "x"}}], ids=str)
def test_arguments_from_a_file_are_only_those_we_write(arguments):
    with pytest.raises(ValueError, match="backbone_arguments: expected"):
        meta_network(model="acfnet_resnet", backbone="timm:resnet10t", backbone_arguments=arguments)


def test_our_own_networks_take_no_arguments_and_timm_none_of_ours():
    for options in ({"backbone": "resnet18", "backbone_arguments": {}},
                    {"backbone": "timm:resnet10t", "stem": "64-64-128"},
                    {"backbone": "timm:resnet10t", "recompute": "full"}):
        with pytest.raises(ValueError, match="expected"):
            build_network("acfnet_resnet", **options)


def test_without_timm_it_is_a_sentence(pair, tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args):
        if name.split(".")[0] == "timm":
            raise ImportError(name)
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="--backbone timm:resnet10t: expected the package timm.*pip install timm"):
        start(pair, tmp_path, "--backbone", "timm:resnet10t")
    with pytest.raises(ValueError, match="the package timm"):
        build_network("acfnet_resnet", backbone="timm:resnet10t")


FILES = ("resnet10t", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "hrnet_w18_small")


@pytest.mark.parametrize("name", FILES)
def test_files_of_timm_load_as_timm_loads_them(name, tmp_path):
    kind = ".safetensors" if name in ("resnet10t", "vit_tiny_patch16_224") else ".pth"
    whole = timm.create_model(name)
    randomize(whole)
    path = tmp_path / f"weights{kind}"
    if kind == ".pth":
        torch.save(whole.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch", reason="needs safetensors").save_file(
            {key: value.contiguous() for key, value in whole.state_dict().items()}, path)
    network = build_network("acfnet_resnet", 5, f"timm:{name}")
    account = load_weights(network, read_weights(path, f"timm:{name}"))
    assert account.share == 1 and not any(key.startswith("backbone.") for key in account.initialized)
    assert account.ignored and account.notes == []          # the classifier
    file = {"file": str(path), "custom_load": False}        # not by what reads the .npz of some families
    theirs = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay=file,
                               **network.backbone.arguments).eval()
    images = torch.randn(1, 3, 64, 96)
    ours = network.backbone.eval().body(images)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs(images), strict=True))
    assert ours[-1].any()


def test_a_file_without_some_tensors_says_so(tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    absent = [key for key in state if key.startswith("layer1.0.conv1")]
    torch.save({key: value for key, value in state.items() if key not in absent}, tmp_path / "part.pth")
    account = load_weights(build_network("acfnet_resnet", 5, "timm:resnet10t"),
                           read_weights(tmp_path / "part.pth", "timm:resnet10t"))
    assert [f"backbone.body.{key}" for key in absent] == [key for key in account.initialized if "backbone" in key]
    assert set(account.ignored) == {"backbone.fc.weight", "backbone.fc.bias"}


@pytest.mark.parametrize("kind", ["nothing", "another"])
def test_a_file_of_another_network_is_a_sentence(kind, pair, tmp_path):
    torch.save({"a": torch.ones(3)} if kind == "nothing" else timm.create_model("resnet10t").state_dict(),
               tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: expected weights of.*found"):
        start(pair, tmp_path / "run", "--backbone", "timm:convnext_atto", "--restore-from", str(tmp_path / "other.pth"))


def test_snapshots_go_round_without_flags(pair, tmp_path, capsys):
    first = start(pair, tmp_path / "first", "--backbone", "timm:convnext_atto")
    actual = read_snapshot(first, resuming=True)
    assert actual.config.network == {
        "model": "acfnet_resnet", "num_classes": 19, "norm": "inplace_abn", "activation": "leaky_relu", "ablations": [],
        "backbone": "timm:convnext_atto", "backbone_arguments": {"output_stride": 8}}
    start(pair, tmp_path / "first", "--resume", steps=2)
    assert "resumed" in capsys.readouterr().out
    second = start(pair, tmp_path / "second", "--restore-from", str(first), "--learning-rate", "1e-20",
                   "--weight-decay", "0", "--norm", "bn")
    output = capsys.readouterr().out
    assert "100.0% of the backbone's values" in output and "timm:convnext_atto" in output
    kept = read_snapshot(second).model
    assert all(torch.equal(kept[key], value) for key, value in actual.model.items() if key.startswith("backbone."))
    with pytest.raises(UserError, match="--backbone resnet18: expected.*found timm:convnext_atto"):
        start(pair, tmp_path / "third", "--restore-from", str(first), "--backbone", "resnet18")
    with pytest.raises(UserError, match="--backbone timm:resnet10t: expected.*found timm:convnext_atto"):
        start(pair, tmp_path / "third", "--restore-from", str(first), "--backbone", "timm:resnet10t")


def test_the_input_is_normalized_as_timm_did_unless_said(pair, tmp_path):
    assert input_normalization("timm:vit_tiny_patch16_224") == Normalization("RGB", (127.5,) * 3,
                                                                                         (127.5,) * 3)
    assert input_normalization("timm:resnet10t") == Normalization()
    one = start(pair, tmp_path / "one", "--backbone", "timm:vit_tiny_patch16_224")
    assert read_snapshot(one).config.normalization.mean == (127.5, 127.5, 127.5)
    two = start(pair, tmp_path / "two", "--backbone", "timm:vit_tiny_patch16_224", "--normalization", "bgr")
    assert read_snapshot(two).config.normalization.order == "BGR"


def test_pretrained_weights_come_through_timm_or_it_is_a_sentence(pair, tmp_path, monkeypatch, capsys):
    source = timm.create_model("resnet10t").state_dict()

    def fetch(*args, **options):
        if not source:
            raise OSError("no route to host\nand more")
        return dict(source)

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", fetch)
    words = ["--backbone", "timm:resnet10t", "--pretrained", "--learning-rate", "1e-20", "--weight-decay", "0"]
    actual = read_snapshot(start(pair, tmp_path / "run", *words)).model
    assert torch.equal(actual["backbone.body.layer4.0.conv2.weight"], source["layer4.0.conv2.weight"])
    assert "100.0% of the backbone's values" in capsys.readouterr().out
    source.clear()
    with pytest.raises(UserError, match="--pretrained: expected weights of .*cache.*found: no route to host") as one:
        start(pair, tmp_path / "other", *words)
    assert "\n" not in str(one.value)


def test_every_parameter_that_learns_has_a_gradient():
    """DistributedDataParallel waits for the gradient of each."""
    for name in ("resnet10t", "hrnet_w18_small", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        network = build_network("acfnet_resnet", 5, f"timm:{name}")
        outputs = network(torch.randn(2, 3, 65, 65))
        sum(logits.sum() for logits in outputs.values()).backward()
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in network.parameters()), name


def test_random_weights_do_not_depend_on_what_was_tried_before():
    _find_plan.cache_clear()
    torch.manual_seed(1)
    first = build_backbone("timm:resnet10t").state_dict()
    torch.manual_seed(1)
    second = build_backbone("timm:resnet10t").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_folding_norms_leaves_timm_alone_and_memory_is_probed_at_its_stride():
    network = build_network("acfnet_resnet", 5, "timm:swin_tiny_patch4_window7_224", "bn").eval()
    images = torch.randn(1, 3, 64, 96)
    folded = fold_norms(network)
    assert torch.allclose(folded(images)["fine"], network(images)["fine"], atol=1e-5)
    a_pixel, maps = measure_forward_pass(folded, torch.device("cpu"))
    assert 12 < a_pixel < 10000 and maps == 10


def test_norms_are_synchronized_on_gpus_and_else_it_is_said(capsys):
    network = build_network("acfnet_resnet", 5, "timm:mobilenetv3_small_050", "bn")
    names, count = list(network.state_dict()), len(list(network.parameters()))
    synchronize_norms(network, [torch.device("cpu")], None)
    assert not capsys.readouterr().out
    synchronize_norms(network, [torch.device("cpu")], object())
    assert "batch norms of the backbone compute statistics for each device separately" in capsys.readouterr().out
    synchronize_norms(network, [torch.device("cuda", 0)], object())
    kinds = {type(module) for module in network.backbone.modules()
             if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)}
    assert kinds and all(issubclass(kind, torch.nn.SyncBatchNorm) for kind in kinds)
    assert list(network.state_dict()) == names and len(list(network.parameters())) == count


def test_flags_choose_as_the_file_says():
    assert choose_backbone(None, "timm:resnet10t") == {"backbone": "timm:resnet10t",
                                                       "backbone_arguments": {"output_stride": 8}}


@pytest.mark.parametrize("name, stride, expected", [
    ("resnet10t", 16, {"output_stride": 16}),
    ("vit_tiny_patch16_224", 16, None),     # its only one
])
def test_the_output_stride_is_chosen_by_a_flag(name, stride, expected):
    chosen = choose_backbone(None, f"timm:{name}", output_stride=stride)["backbone_arguments"]
    assert chosen == (expected or choose_backbone(None, f"timm:{name}")["backbone_arguments"])
    logits = build_network("acfnet_resnet", 5, f"timm:{name}", "bn", backbone_arguments=chosen).eval()(
        torch.zeros(1, 3, 65, 97))["fine"]
    assert logits.shape[2:] == (5, 7)


@pytest.mark.parametrize("name, own", [("vit_tiny_patch16_224", 16), ("swin_tiny_patch4_window7_224", 32)])
def test_a_network_without_the_output_stride_is_refused(name, own):
    with pytest.raises(UserError, match=f"--output-stride 8: expected a network that can have it, found timm:{name} "
                                        f"with output stride {own} only"):
        choose_backbone(None, f"timm:{name}", output_stride=8)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224",
                                  "vit_small_patch16_dinov3"])
def test_layer_decay_gives_each_parameter_the_rate_of_timm(name):
    """Those of timm's own groups of the whole network with a classifier; the head has its own factor."""
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        network = build_network("acfnet_resnet", 3, available(name))
        whole = timm.create_model(name, num_classes=3)
    expected = {}
    for group in param_groups_layer_decay(whole, layer_decay=0.7):
        expected |= {id(weight): group["lr_scale"] for weight in group["params"]}
    expected = {key: expected[id(weight)] for key, weight in whole.named_parameters()}
    optimizer = make_optimizer(network, learning_rate=0.5, head_lr_factor=3.0, layer_decay=0.7)
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    # Wrapped by features_only as model.*, or with names such as stages_0 and layers_1.
    known = {key: rates[id(weight)] for key, weight in network.backbone.body.named_parameters()}
    matched = {re.sub(r"^(stages|stem|layers)_(\d+)", r"\1.\2", key.removeprefix("model.")): rate
               for key, rate in known.items()}
    assert matched == {key: pytest.approx(0.5 * expected[key]) for key in matched}
    assert len({*matched.values()}) > 5 and any(rate == pytest.approx(0.35) for rate in matched.values())
    assert {rates[id(weight)] for key, weight in network.named_parameters() if not key.startswith("backbone.")} == {1.5}
    assert [weight for group in optimizer.param_groups for weight in group["params"]] == list(network.parameters())


def test_layer_decay_without_groups_of_timm_is_a_sentence():
    with pytest.raises(UserError, match="--layer-decay: expected a network whose layers timm groups, found timm:pit"):
        find_layers("timm:pit_ti_224")


def test_a_run_with_layer_decay_resumes_to_the_bit(pair, tmp_path, capsys):
    """And logs the rate of the last layer before its decay, that of --learning-rate."""
    words = ["--backbone", available("convnext_atto"), "--layer-decay", "0.6", "--optimizer", "adamw",
             "--learning-rate", "1e-3", "--schedule", "constant"]
    whole = files.load(start(pair, tmp_path / "run", *words, "--save-pred-every", "1", steps=2))
    lowest, = {group["lr"] for group in whole["optimizer"]["param_groups"][:1]}
    assert f"learning rates of the backbone from {lowest:.1e} to 6.0e-04" in capsys.readouterr().out and lowest < 1e-4
    rates = [json.loads(line)["lr"] for line in open(tmp_path / "run/metrics.jsonl")]
    assert rates == [1e-3, 1e-3] and len(whole["optimizer"]["param_groups"]) > 5
    (tmp_path / "run/CS_scenes_2.pth").unlink()
    resumed = files.load(start(pair, tmp_path / "run", *words, "--resume", steps=2))
    assert all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])
