"""Flags from files and from earlier runs."""

import json

import pytest
import torch
import torchvision

import evaluate
import train
from tests.conftest import ROOT
from utils.common import files
from utils.common.errors import UserError
from utils.runs import recipes

MACHINE = ["--gpu", "cpu", "--amp", "off", "--num-workers", "0"]
TINY = ["--input-size", "33,33", "--batch-size", "2", "--num-steps", "2", "--warmup-steps", "1", "--log-every", "1"]


def parse(*words, script=train):
    return recipes.parse_args(script.get_parser(), list(map(str, words)))


def test_a_file_stands_for_the_flags_in_it(tmp_path):
    """Comments, quotes, several flags in a line, a file within a file, a byte order mark; the last flag counts."""
    (tmp_path / "inner.txt").write_bytes("\ufeff--power 0.5\r\n".encode())
    (tmp_path / "flags.txt").write_text(
        f"# The user's own\n\n--batch-size \\\n    4   # four\n--data-dir 'a b'\n--random-mirror --random-scale\n"
        f"@{tmp_path}/inner.txt\n--split \"train\" --snapshot-dir run#2 # don't\n--val-list 'it # is' # a name\n")
    args = parse("--batch-size", 6, f"@{tmp_path}/flags.txt", "--split", "val")
    assert (args.batch_size, args.data_dir, args.random_mirror, args.random_scale) == (4, "a b", True, (0.5, 2.0))
    assert (args.power, args.split, args.snapshot_dir, args.val_list) == (0.5, "val", "run#2", "it # is")
    (tmp_path / "e.txt").write_text("--restore-from a.pth b.pth\n--no-flip --scales 1.0 1.5\n")
    args = parse(f"@{tmp_path}/e.txt", "--whole", script=evaluate)
    assert (args.restore_from, args.flip, args.scales, args.whole) == (["a.pth", "b.pth"], False, [1.0, 1.5], True)


@pytest.mark.parametrize("content, message", [
    (None, "@.*x.txt: expected a text file of flags and their values, found: No such file or directory"),
    (b"--data-dir 'a", "@.*x.txt: expected a text file of flags .*, found: No closing quotation"),
    (b"\xff\xfe\0", "@.*x.txt: expected a text file of flags .*, found: 'utf-8' codec can't decode"),
    (b"@x.txt", "@x.txt: expected a text file of flags .*, found: a file that names itself")])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    for script in (train, evaluate):
        with pytest.raises(UserError, match=message):
            script.main([f"@{tmp_path}/x.txt"])
    with pytest.raises(UserError, match="@: expected a text file of flags and their values, found: Is a directory"):
        parse("@")


def test_an_unknown_flag_in_a_file_is_named(tmp_path):
    (tmp_path / "x.txt").write_text("--random-miror\n")
    with pytest.raises(UserError, match="--random-miror: expected a flag of this command, perhaps --random-mirror"):
        parse(f"@{tmp_path}/x.txt")


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "dataset/recipes").iterdir()))
def test_a_recipe_trains(streets, tmp_path, name):
    """With flags after it that make it small."""
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "w.pth")
    train.main([f"@{ROOT}/dataset/recipes/{name}", "--data-dir", str(streets), "--restore-from",
                str(tmp_path / "w.pth"), "--snapshot-dir", str(tmp_path / "s"), *MACHINE, *TINY])
    content = files.load(tmp_path / "s/CS_scenes_2.pth")
    arguments = content["config"]["arguments"]
    assert arguments["random_mirror"] and arguments["input_size"] == [33, 33] and arguments["num_steps"] == 2
    assert content["config"]["network"]["backbone"] == "resnet18" or name == "cityscapes.txt"
    assert (tmp_path / "s/best_quick.pth").exists() == (name == "finetune.txt")


def test_a_run_like_another_has_the_same_weights(streets, tmp_path):
    """To the bit, from its folder alone; a flag of the command line replaces that of the run, wherever it stands."""
    words = ["--backbone", "resnet18", "--model", "acfnet_resnet", *TINY, "--random-mirror", "--random-scale",
             "0.7,1.5", "--rotate", "20", "--quarter-turns", "--optimizer", "adamw", "--learning-rate", "3e-4",
             "--freeze", "stem,1", "--loss-weights", "fine=1,coarse=0.5,aux=0.25", "--schedule", "cosine"]
    train.main([*words, "--data-dir", str(streets), "--snapshot-dir", str(tmp_path / "a"), *MACHINE])
    like = ["--like", str(tmp_path / "a")]
    train.main([*like, "--snapshot-dir", str(tmp_path / "b"), *MACHINE])
    first, second = (files.load(tmp_path / name / "CS_scenes_2.pth") for name in "ab")
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
    args = parse("--batch-size", 6, *like)
    assert (args.batch_size, args.optimizer, args.random_scale, args.resume) == (6, "adamw", (0.7, 1.5), None)
    # What would contradict the command line is left out.
    assert parse(*like, "--model", "base").loss_weights is None
    assert parse(*like, "--images-dir", "x", "--labels-dir", "y").data_dir is None


def test_a_run_gives_all_flags_but_those_of_the_machine_and_the_results(tmp_path):
    parser = train.get_parser()
    groups = {action.dest: group.title for group in parser._action_groups for action in group._group_actions}
    left_out = {name for name, title in groups.items() if title in ("machine", "results")}
    assert recipes.NOT_TAKEN == left_out | {"num_workers", "cache", "kernels", "like"}
    arguments = {"snapshot_dir": "there", "gpu": "3", "no_such_flag": 1, "data_list": ["a.lst", "b.lst"], "acf": True,
                 "ablations": [], "eca_kernels": [3, 3, 5, 7], "ohem": 1, "ohem_thres": 0.0, "class_weights": None}
    (tmp_path / "runs.json").write_text(json.dumps([{"arguments": {"ohem": 0}}, {"arguments": arguments}]))
    args = parse("--like", tmp_path)
    expected = vars(parser.parse_args([])) | {"data_list": ["a.lst", "b.lst"], "acf": True, "eca_kernels": (3, 3, 5, 7),
                                              "ohem": 1, "ohem_thres": 0.0, "like": str(tmp_path)}
    assert vars(args) == expected


@pytest.mark.parametrize("content", [None, "[]", "[1]", "[{}]", '[{"arguments": []}]'])
def test_a_folder_without_flags_is_one_sentence(tmp_path, content):
    if content:
        (tmp_path / "runs.json").write_text(content)
    with pytest.raises(UserError, match="--like .*: expected the folder of a run, whose flags are in runs.json, found"):
        parse("--like", tmp_path)
    (tmp_path / "runs.json").write_text("{")
    with pytest.raises(UserError, match="runs.json: expected the list of this folder's runs, found something else"):
        parse("--like", tmp_path)
