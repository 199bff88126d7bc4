"""run_local.sh, in a copy of the project: which weights it takes, and the whole way on a small data set."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import evaluate as evaluate_script
import train as train_script
from dataset.streets import write_dataset
from tests.conftest import ROOT, finish, fork
from utils.common.errors import UserError
from utils.demo import local
from utils.runs import recipes


@pytest.fixture
def project(tmp_path):
    for name in ("networks", "dataset", "utils", "loss", "libs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.pth*"))
    for name in ("train.py", "evaluate.py", "run_local.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(project, *words):
    """run_local.sh with this Python first on the PATH: exit status, standard output, standard error."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", str(project / "run_local.sh"), *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, "PATH": path}, cwd=project.parent)
    return done.returncode, done.stdout, done.stderr


def run_program(project, *words):
    """The program behind run_local.sh, as if it lay in a folder."""
    return finish(fork("-c", (
        "import sys; from pathlib import Path; from utils.common import command; from utils.demo import local\n"
        "local.PROJECT = Path(sys.argv[1]).parent\nsys.argv[1] = str(local.PROJECT.parent)\ncommand.run(local.main)\n"),
        project / "run_local.sh", *words))


@pytest.mark.parametrize("names, actual", [
    ((), "found 0;"), (("a.pth", "b.pth.tar"), "found 2: dataset/a.pth dataset/b.pth.tar;")])
def test_none_or_several_weights_are_one_sentence(project, streets, names, actual):
    for name in names:
        torch.save({}, project / "dataset" / name)
    status, _, error = run_program(project, streets)
    assert status == 2
    assert len(error.strip().splitlines()) == 1
    assert "dataset/: expected one file of backbone weights" in error and actual in error
    assert not (project / "snapshots").exists()


def test_a_missing_data_set_is_one_sentence(project):
    status, _, error = run(project, "nowhere", "--from-scratch")
    assert status == 2 and "expected a folder, found nothing there" in error
    assert len(error.strip().splitlines()) == 1


def test_data_goes_all_the_way_to_a_score(project, tmp_path):
    write_dataset(tmp_path / "few", train=4, val=2, size=(64, 128), seed=3, workers=1)
    status, out, error = run(
        project, tmp_path / "few", "--from-scratch", "--backbone", "resnet18", "--model", "acfnet_resnet",
        "--input-size", "65,129", "--batch-size", "2", "--num-steps", "2", "--num-workers", "0", "--gpu", "cpu")
    assert status == 0, error
    assert "train: 4 images, 19 classes" in out and "val: 2 images" in out
    result = json.loads((project / "snapshots/CS_scenes_2_val/result.json").read_text())
    assert result["protocol"]["scales"] == [0.75, 1.0, 1.25, 1.5, 1.75, 2.0] and result["protocol"]["flip"]
    assert {"single_scale", "multi_scale"} <= set(result) and result["num_images"] == 2


def words_of(project, monkeypatch, *words):
    """What `utils.demo.local` would start from another folder: [words], without starting any of it. Scenes are drawn,
    and the score is 50 %."""
    started = []
    (project / "demo/streets").mkdir(parents=True, exist_ok=True)

    def call(*words, folder=None, watch=None):
        words = [str(word) for word in words]
        started.append(words)
        if "--restore-from" in words:
            results = Path(words[words.index("--restore-from") + 1]).with_suffix("")
            results = results.with_name(f"{results.name}_val")
            results.mkdir(parents=True, exist_ok=True)
            (results / "result.json").write_text('{"mean_iou": 0.5}')

    monkeypatch.setattr(local, "PROJECT", project)
    monkeypatch.setattr(local, "call", call)
    monkeypatch.setattr(local, "newest_snapshot", lambda folder: Path(folder) / "CS_scenes_1.pth")
    monkeypatch.setattr(local.subprocess, "run", lambda words, **_: started.append(words) or Namespace(returncode=0))
    monkeypatch.setattr(sys, "argv", ["local", str(project.parent), *words])
    monkeypatch.chdir(project)
    local.main()
    return started


def test_words_reach_all_that_they_concern(project, monkeypatch):
    check, train, evaluate = words_of(
        project, monkeypatch, "data", "--from-scratch", "--gpu=cpu", "--data-list", "a.lst", "b.lst",
        "--classes=c.csv", "--amp", "off", "--num-steps", "7", "--keep=2")
    assert [Path(word) for word in check[3:] if not word.startswith("--")] == [
        project.parent.resolve() / name for name in ("data", "a.lst", "b.lst", "c.csv")]
    for words, script in ((train, train_script), (evaluate, evaluate_script)):
        args = recipes.parse_args(script.get_parser(), words[1:])
        assert (args.gpu, args.amp) == ("cpu", "off") and len(args.data_list) == 2 and args.classes.endswith("c.csv")
        if words is train:
            assert (args.num_steps, args.keep, args.resume) == (7, 2, "newest")
            assert args.snapshot_dir == str(project / "snapshots")


def test_the_name_of_a_table_stays_a_name(project, monkeypatch):
    """Unless the user's folder has such a file: the check runs in another folder."""
    for made in (False, True):
        check, train, evaluate = words_of(project, monkeypatch, "data", "--from-scratch", "--classes", "kitti")
        assert check[-1] == (str(project.parent.resolve() / "kitti") if made else "kitti")
        assert "kitti" in train and "kitti" in evaluate
        (project.parent / "kitti").touch()


def test_evaluation_is_not_told_of_apex(project, monkeypatch):
    for data in ((), ("data", "--from-scratch")):
        *_, train, evaluate = words_of(project, monkeypatch, *data, "--amp", "apex", "--gpu", "0")
        assert recipes.parse_args(train_script.get_parser(), train[1:]).amp == "apex"
        args = evaluate_script.get_parser().parse_args(evaluate[1:])
        assert args.amp is None and args.gpu == "0"


@pytest.mark.parametrize("words, actual", [
    (("--data-list", "a.lst"), "none"), (("--data-dir", "x"), "none"), (("--images-dir=x",), "none"),
    (("--labels-dir", "x"), "none"), (("data", "--from-scratch", "--data-dir", "x"), "this flag beside data")])
def test_data_are_named_by_the_first_word_alone(project, monkeypatch, words, actual):
    flag = next(word for word in words if "-d" in word or "-l" in word).split("=")[0]
    with pytest.raises(UserError, match=f"{flag}: expected the data's folder as the first argument, found {actual}"):
        words_of(project, monkeypatch, *words)


def test_resume_takes_the_newest_run_with_a_snapshot(project, monkeypatch):
    with pytest.raises(UserError, match="--resume: expected a run with a snapshot in .*demo, found none"):
        words_of(project, monkeypatch, "--resume")
    for run in ("run_1", "run_2", "run_3"):
        (project / "demo" / run).mkdir(parents=True)
    for run in ("run_1", "run_2"):
        (project / "demo" / run / "CS_scenes_1.pth").touch()
    for words, run in ((("--resume",), "demo/run_2"), (("--resume", "--snapshot-dir", "own"), "../own")):
        *_, train, evaluate = words_of(project, monkeypatch, *words)
        args = train_script.get_parser().parse_args(train[1:])
        assert args.resume == "newest" and Path(args.snapshot_dir).resolve() == (project / run).resolve()
        assert f"{args.snapshot_dir}/CS_scenes_1.pth" in evaluate


def test_the_range_is_that_of_the_training_as_it_is(project, monkeypatch, capsys):
    for words in ((), ("--gpu", "cpu", "--from-scratch")):
        words_of(project, monkeypatch, *words)
        assert f"fine 50.0 % ({local.EXPECTED})" in capsys.readouterr().out
    for words in (("--num-steps", "3"), ("--classes", "c.csv"), ("--power", "1"), ("--amp", "bf16")):
        words_of(project, monkeypatch, *words)
        assert "fine 50.0 %\n" in capsys.readouterr().out


@pytest.mark.parametrize("words, output", [
    (("--gpu", "7", "--snapshot-dir", "project/a/b"), "--gpu 7: expected different ids of GPUs that exist"),
    (("--snapshot-dir", "project/train.py"), "train.py/.writable: expected to write a file there")])
def test_wrong_words_end_before_anything_is_drawn(project, words, output):
    words = [word.replace("project", project.name) for word in words]
    status, _, error = run_program(project, *words)
    assert status == 2 and output in error and len(error.strip().splitlines()) == 1
    assert not (project / "demo").exists() and not (project / "a").exists()


def test_an_unwritable_folder_ends_at_once(project):
    (project / "demo").write_text("a file")
    status, out, error = run_program(project)
    assert status == 2 and "demo/.writable: expected to write a file there, found" in error
    assert len(error.strip().splitlines()) == 1 and "drawing" not in out


def test_a_full_disk_ends_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Namespace(free=1e6))
    with pytest.raises(UserError, match="expected 200 MB free for scenes, snapshots and pictures, found 1 MB"):
        local.check_writable(tmp_path / "demo")


@pytest.mark.parametrize("code, status", [("import sys; sys.exit(130)", 130), ("import sys; sys.exit(2)", 2),
                                          ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143)])
def test_what_ends_early_ends_all(code, status):
    with pytest.raises(SystemExit) as caught:
        local.call("-c", code)
    assert caught.value.code == status


def test_the_end_is_announced_from_the_measured_rate(tmp_path, capsys):
    watch = local.time_left_reporter(tmp_path, local.time.monotonic() - 60, "1050", "4")
    watch()
    rates = ((25, 1.0), (50, 10.0), (75, 99.0))
    lines = [json.dumps({"step": step, "images_per_second": rate}) for step, rate in rates]
    for count in (1, 2, 3):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:count]) + "\n" + '{"step": 7' * (count == 1))
        watch()
    output, = capsys.readouterr().out.splitlines()
    assert output == "at 10.0 images/s training and scoring take 7 minutes more, 8 in all"   # 1000 · 4 / 10 s, and 12 %


def test_a_run_that_goes_on_is_measured_anew(tmp_path, capsys):
    """Its log drops the lines of steps that will be done again."""
    lines = [json.dumps({"step": step, "images_per_second": rate})
             for step, rate in ((10, 1.0), (20, 1.0), (30, 1.0), (20, 10.0), (30, 20.0))]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(lines[:3]) + "\n")
    watch = local.time_left_reporter(tmp_path, local.time.monotonic(), 530, 4)
    for kept in (lines[:1], [lines[0], lines[3]]):
        metrics.write_text("\n".join(kept) + "\n")
        watch()
        assert capsys.readouterr().out == ""
    metrics.write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    watch()
    assert "at 20.0 images/s training and scoring take 2 minutes more" in capsys.readouterr().out
