"""The command lines, frozen; and the README's own lines through the parsers."""

import re
import shlex
import subprocess
import sys

import pytest
import torch.distributed.run as torchrun

import evaluate
import train
from networks.backbones.choose import choose_backbone
from tests.conftest import ROOT, finish, fork
from utils.common import errors
from utils.common.errors import UserError
from utils.common.flags import size
from utils.devices.select import select_devices
from utils.runs import recipes

TRAIN = """
ablations abn-backend accumulate acf activation allow-partial amp backbone batch-size cache channels-last checkpoint
class-weights classes clip-gradient compile cuda-graph data-dir data-list downsample eca-kernels ema freeze gpu
head-lr-factor help
images-dir input-size jitter keep kernels labels-dir learning-rate log log-every loss loss-weights
model momentum no-channels-last norm normalization num-classes num-steps num-workers ohem ohem-keep ohem-thres opt-level
optimizer output-stride
panel-every
parallel power pretrained random-mirror random-scale random-seed recompute restore-from resume sampling save-pred-every
snapshot-dir split
blur layer-decay like patience quarter-turns rotate schedule vertical-flip
stem track val-every val-list val-split warmup-steps weight-decay
"""
EVALUATE = """amp batch-size benchmark boundary classes data-dir data-list export export-precision export-size flip
gpu help images images-dir input-size kernels labels-dir no-flip num-workers output-dir overlap overwrite push
raw-weights restore-from save scales split submission whole"""


def test_numbers_of_things():
    assert [errors.plural(number, thing) for number, thing in (
        (0, "file"), (1, "class"), (2, "class"), (2, "pair"))] == ["0 files", "1 class", "2 classes", "2 pairs"]


def flags(parser):
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")}


@pytest.mark.parametrize("script, names", [(train, TRAIN), (evaluate, EVALUATE)], ids=["train", "evaluate"])
def test_flags_are_these(script, names):
    assert flags(script.get_parser()) == {f"--{name}" for name in names.split()}


@pytest.mark.parametrize("script", [train, evaluate], ids=["train", "evaluate"])
def test_torchrun_leaves_every_flag_to_the_script(script):
    """argparse, before Python 3.12.4, also looks behind the script for what might abbreviate a flag of torchrun."""
    for flag in flags(script.get_parser()) - {"--log"}:     # which is --track there
        actual = torchrun.get_args_parser().parse_args(["--nproc_per_node", "4", "x.py", flag, "1"])
        assert actual.training_script_args == [flag, "1"]


@pytest.mark.parametrize("script", [train, evaluate], ids=["train", "evaluate"])
def test_every_flag_is_documented(script):
    assert all(action.help for action in script.get_parser()._actions)


def test_defaults_are_the_published_numbers():
    args = train.get_parser().parse_args(["--data-dir", "x"])
    assert (args.learning_rate, args.weight_decay, args.momentum, args.power) == (1e-2, 1e-4, 0.9, 0.9)
    assert (args.input_size, args.batch_size, args.num_steps) == ((769, 769), 8, 60000)
    assert (args.ohem, args.ohem_thres, args.ohem_keep) == (0, 0.7, 100000)
    assert (args.random_scale, args.random_mirror) == (None, False)
    for words, expected in (([], (0.5, 2.0)), (["0.7,1.4"], (0.7, 1.4))):
        assert train.get_parser().parse_args(["--data-dir", "x", "--random-scale", *words]).random_scale == expected
    assert (args.model, args.norm) == ("acfnet", "inplace_abn")
    assert args.backbone is None and choose_backbone()["backbone"] == "eca_resnet101"
    args = evaluate.get_parser().parse_args(["--data-dir", "x", "--restore-from", "y"])
    assert tuple(args.scales) == (0.75, 1.0, 1.25, 1.5, 1.75, 2.0) and args.flip and args.overlap == 1 / 3


SEED = """
python train.py --data-dir ${YOUR_CS_PATH} --random-mirror --random-scale --restore-from ./dataset/***.pth \
  --gpu 0,1,2,3 --learning-rate 1e-2 --input-size 769,769 --weight-decay 1e-4 --batch-size 8 --num-steps 60000
python train.py --data-dir ${YOUR_CS_PATH} --random-mirror --random-scale --restore-from ./dataset/***.pth \
  --gpu 0,1,2,3 --learning-rate 1e-2 --input-size 769,769 --weight-decay 1e-4 --batch-size 8 --num-steps 60000 \
  --ohem 1 --ohem-thres 0.7 --ohem-keep 100000
python evaluate.py --data-dir ${YOUR_CS_PATH} --restore-from snapshots/CS_scenes_60000.pth --gpu 0
"""


def commands(text):
    """Lines "python train.py ..." and "python evaluate.py ..." of a text, continuation lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return re.findall(r"^\s*python (train|evaluate)\.py (.+)$", joined, re.M)


@pytest.mark.parametrize("source", ["seed", "README.md", "train.py", "evaluate.py", "tests/README.md",
                                    *(f"dataset/recipes/{name}.txt" for name in ("cityscapes", "camvid", "finetune"))])
def test_documented_commands_parse(source, monkeypatch):
    monkeypatch.chdir(ROOT)     # for @dataset/recipes/...
    text = SEED if source == "seed" else re.sub("^#", "", (ROOT / source).read_text(), flags=re.M)
    actual = commands(text)
    assert len(actual) >= (1 if source.endswith(".txt") else 2)
    for script, line in actual:
        parser = {"train": train, "evaluate": evaluate}[script].get_parser()
        words = [re.sub(r"\$\{?\w+\}?", "/data", word) for word in shlex.split(line, comments=True)]
        recipes.parse_args(parser, words)


def test_the_papers_recipe_is_the_readmes_command(monkeypatch):
    monkeypatch.chdir(ROOT)
    (script, line), *_ = commands((ROOT / "README.md").read_text())
    own = ["--data-dir", "${YOUR_CS_PATH}", "--restore-from", "dataset/WEIGHTS.pth", "--gpu", "0,1,2,3"]
    parser = train.get_parser()
    assert script == "train" and recipes.parse_args(parser, ["@dataset/recipes/cityscapes.txt", *own]) == \
        parser.parse_args(shlex.split(line))


@pytest.mark.parametrize("script, words, output", [
    (train, ["--lerning-rate", "1"], "--lerning-rate: expected a flag of this command, perhaps --learning-rate, found"),
    (train, ["--snapshot=x"], "--snapshot: expected a flag of this command, perhaps --snapshot-dir, found an unknown"),
    (train, ["--val", "x"], "perhaps --val-every or --val-split or --val-list, found"),
    (train, ["-gpu", "0"], "-gpu: expected a flag of this command, perhaps --gpu, found"),
    (train, ["--teacher"], "--teacher: expected a flag of this command, found an unknown one"),
    (evaluate, ["--restore", "x"], "--restore: expected a flag of this command, perhaps --restore-from, found")])
def test_an_unknown_flag_is_told_with_those_like_it(script, words, output):
    """Also what is the beginning of one: run_local.sh would not know it, and torchrun takes some for its own."""
    with pytest.raises(UserError) as caught:
        script.get_parser().parse_args(words)
    (error,) = str(caught.value).splitlines()
    assert error.startswith("-") and output in error


def test_a_stray_word_is_named():
    with pytest.raises(UserError, match="expected flags and their values, found 'streets', which belongs to no flag"):
        train.get_parser().parse_args(["--data-dir", "x", "streets", "--acf"])


NO_SPLITS = ("", ".", "..", "/", "val/", "../val", "a/b", "a\0b", "x" * 256, "ü" * 128)


@pytest.mark.parametrize("words, message", [
    (["--input-size", "0,5"], "expected HEIGHT,WIDTH"),
    (["--input-size", "a"], "expected HEIGHT,WIDTH"),
    (["--batch-size", "0"], "expected a number above 0"),
    (["--batch-size", "2.5"], "expected a whole number"),
    (["--learning-rate", "nan"], "expected a number above 0"),
    (["--ohem-thres", "1.5"], "expected a number from 0 to 1"),
    (["--num-workers", "-1"], "expected a number of at least 0"),
    (["--backbone", "vgg"], "or timm:NAME, found 'vgg'"),
    (["--random-scale", "2,1"], "expected LO,HI from 0.01 to 100"),
    (["--jitter", "1,2"], "expected BRIGHTNESS,CONTRAST,SATURATION,HUE"),
    (["--batch-size", "5000000000"], "above 0 and at most 65536"),
    (["--batch-size", "9" * 5000], "found '999"),
    (["--num-workers", "5000000000"], "of at least 0 and at most 1024"),
    (["--random-seed", str(2 ** 64)], "at most 4294967295"),
    (["--input-size", "100000000"], "at most 16384"),
    (["--input-size", "97,100000000000"], "at most 16384"),
    (["--random-scale", "1,1e300"], "from 0.01 to 100"),
    (["--random-scale", "1e-300,1"], "from 0.01 to 100"),
    (["--learning-rate", "1e308"], "at most 1e+30"),
    (["--weight-decay", "1e308"], "at most 1e+30"),
    (["--momentum", "1e308"], "from 0 to 1"),
    (["--num-steps", "1e3"], "expected a whole number"),
    (["--num-steps", str(10 ** 30)], "at most 2147483647"),
    (["--rotate", "181"], "above 0 and at most 180"),
    (["--blur", "0"], "expected a number above 0"),
    (["--layer-decay", "1.5"], "above 0 and at most 1"),
    (["--patience", "-1"], "expected a number of at least 0"),
    (["--schedule", "step"], "invalid choice: 'step'"),
    (["--eca-kernels", "3,3,5,1e9"], "expected four odd numbers below 100"),
    (["--snapshot-dir", ""], "expected a path, found an empty one"),
    (["--snapshot-dir", "x" * 256], "expected names of at most 255 bytes"),
    (["--snapshot-dir", "ü" * 128], "expected names of at most 255 bytes"),
    (["--snapshot-dir", "x/" * 2000], "paths of at most 3800"),
    *(([flag, name], "expected the name of a split") for flag in ("--split", "--val-split") for name in NO_SPLITS),
])
def test_bad_values_name_the_flag(words, message):
    with pytest.raises(UserError) as caught:
        train.get_parser().parse_args(["--data-dir", "x", *words])
    (error,) = str(caught.value).splitlines()
    assert caught.value.status == 2 and words[0] in error and message in error


def takes_a_path(action):
    return action.metavar in ("FILE", "DIR", "PATH", "FOLDER") or action.dest.endswith("_dir") or (
        action.dest in ("classes", "restore_from", "resume"))


@pytest.mark.parametrize("script", [train, evaluate], ids=["train", "evaluate"])
def test_no_path_may_be_empty(script):
    actual = [action for action in script.get_parser()._actions if takes_a_path(action)]
    assert len(actual) >= 7
    for action in actual:
        with pytest.raises(UserError, match=f"argument {action.option_strings[0]}: expected a path, found an empty"):
            script.get_parser().parse_args([action.option_strings[0], ""])


@pytest.mark.parametrize("words, message", [
    (["--scales", "1e9"], "above 0 and at most 100"), (["--input-size", "1e9"], "expected HEIGHT,WIDTH"),
    (["--batch-size", "1000000"], "at most 65536"), (["--num-workers", "100000"], "at most 1024"),
    (["--boundary", "0"], "a number above 0"), (["--boundary", "-3"], "a number above 0"),
    (["--boundary", "nan"], "a number above 0"), (["--boundary", "1e9"], "at most 1000"),
    (["--boundary", "three"], "expected a number, found 'three'"),
    *((["--split", name], "expected the name of a split") for name in NO_SPLITS),
])
def test_bad_values_of_evaluation(words, message):
    with pytest.raises(UserError) as caught:
        evaluate.get_parser().parse_args(["--restore-from", "x", *words])
    (error,) = str(caught.value).splitlines()
    assert words[0] in error and message in error


@pytest.mark.parametrize("words", [
    ["dataset.check", ""], ["dataset.check", "x", "--num-workers", "5000000000"],
    ["dataset.convert", "x", ""], ["dataset.streets", ""], ["dataset.streets", "x", "--size", "100000000"],
    ["dataset.streets", "x", "--train", "5000000000"], ["dataset.streets", "x", "--seed", str(2 ** 64)],
], ids=" ".join)
def test_bad_values_of_the_tools(words, tmp_path):
    status, _, error = finish(fork("-m", *words, cwd=tmp_path))
    assert status == 2 and error.startswith("error: argument ") and "expected" in error
    assert len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_tilde_after_an_equals_sign_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = train.get_parser().parse_args(["--data-dir=~/data", "--restore-from", "~/w.pth", "--images-dir", "a~/~b"])
    assert (args.data_dir, args.restore_from, args.images_dir) == ("/home/me/data", ["/home/me/w.pth"], "a~/~b")


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_scripts_find_their_packages_without_the_path_of_the_script(script, tmp_path):
    done = subprocess.run([sys.executable, "-P", ROOT / script, "--help"] if sys.version_info >= (3, 11) else
                          [sys.executable, ROOT / script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--restore-from" in done.stdout, done.stderr


def test_warnings_about_data_are_sentences_and_those_of_others_keep_their_place(tmp_path):
    (tmp_path / "other.py").write_text("import warnings\nwarnings.warn('of others')\n")
    (tmp_path / "l.txt").write_text("a\\b.png c.png\n")
    for name in ("a/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    code = ("import sys; from utils.common import command; from dataset.cityscapes import all_label_maps\n"
            "def main():\n    all_label_maps('.', ['l.txt']); sys.path.append('.'); import other\ncommand.run(main)")
    status, _, error = finish(fork("-c", code, cwd=tmp_path))
    assert status == 0 and error.splitlines() == [
        "warning: l.txt: backslashes in its paths are read as slashes",
        f"{tmp_path / 'other.py'}:2: UserWarning: of others", "  warnings.warn('of others')"]


def test_one_number_is_both_sides():
    assert size("769") == (769, 769) == size("769,769") and size("256x512") == (256, 512)


@pytest.mark.parametrize("gpu", ["99", "0,0", "x", "-1"])
def test_gpus_that_do_not_exist(gpu):
    with pytest.raises(UserError, match="--gpu"):
        select_devices(gpu)


def test_no_gpu_is_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert [d.type for d in select_devices(None)] == ["cpu"] == [d.type for d in select_devices("cpu")]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [d.index for d in select_devices(None)] == [0, 1, 2] and [d.index for d in select_devices("2,0")] == [2, 0]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_user_errors_are_one_line_without_a_traceback(script, tmp_path):
    words = ["--data-dir", str(tmp_path / "nowhere"), "--gpu", "cpu", "--restore-from", "a.pth"]
    words += ["--snapshot-dir", str(tmp_path / "s")] if script == "train.py" else []
    done = subprocess.run([sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    assert "expected" in done.stderr and "found" in done.stderr
    assert not (tmp_path / "s").exists()
