"""Scoring runs, against the official script on the written files."""

import json
import os
import subprocess
import sys

import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as official
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from dataset.labels import ClassTable
from networks.build import build_network
from tests.conftest import ROOT, finish, finish_all, fork_ranks, shorten, snapshot_content, start
from tests.conftest import SMALL as TRAIN
from utils.common import files
from utils.common.errors import UserError
from utils.devices import memory
from utils.runs import snapshots

pytestmark = pytest.mark.usefixtures("short_networks")


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory):
    """A network that knows nothing but predicts several classes; for tests that use `short_networks`."""
    torch.manual_seed(2)
    with shorten("eca_resnet18"):
        content = snapshot_content()
        network = build_network(**content["config"]["network"])
    torch.nn.init.normal_(network.head.fine.weight, std=0.3)
    torch.nn.init.normal_(network.head.coarse.weight, std=0.3)
    path = tmp_path_factory.mktemp("snapshots") / "CS_scenes_7.pth"
    snapshots.save(path, content | {"model": network.state_dict()})
    return path


def run(streets, snapshot, folder, *words):
    evaluate.main(["--data-dir", str(streets), "--restore-from", str(snapshot), "--gpu", "cpu", "--num-workers", "0",
                   "--amp", "off", "--output-dir", str(folder), *words])
    return json.loads((folder / "result.json").read_text())


def official_result(truths, predictions, monkeypatch):
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)     # the script calls a name that NumPy removed
    monkeypatch.setattr(official.args, "JSONOutput", False)
    monkeypatch.setattr(official.args, "quiet", True)
    monkeypatch.setattr(official.args, "evalInstLevelScore", True)
    return official.evaluateImgLists([str(p) for p in predictions], [str(t) for t in truths], official.args)


def same(actual, expected):
    return actual == expected or (actual is None and np.isnan(expected))


def test_scores_equal_the_official_script_on_the_written_files(streets, snapshot, tmp_path, monkeypatch, capsys):
    result = run(streets, snapshot, tmp_path / "r", "--scales", "1.0", "--no-flip")
    predictions = sorted((tmp_path / "r/labelIds").iterdir())
    truths = sorted(streets.glob("gtFine/val/*/*_labelIds.png"))
    assert [p.stem for p in predictions] == [t.name.replace("gtFine_labelIds.png", "leftImg8bit") for t in truths]
    expected = official_result(truths, predictions, monkeypatch)
    scores = result["single_scale"]
    assert all(same(value, expected["classInstScores"][name]) for name, value in scores["class_iiou"].items())
    assert all(same(value, expected["categoryInstScores"][name]) for name, value in scores["category_iiou"].items())
    assert scores["mean_iiou"] == expected["averageScoreInstClasses"]
    assert scores["mean_category_iiou"] == expected["averageScoreInstCategories"]
    assert all(same(scores["class_iou"][name], expected["classScores"][name]) for name in ClassTable.read().names)
    assert all(same(value, expected["categoryScores"][name]) for name, value in scores["category_iou"].items())
    assert scores["mean_iou"] == expected["averageScoreClasses"] == result["mean_iou"]
    assert scores["mean_category_iou"] == expected["averageScoreCategories"]
    predicted = np.unique([np.unique(np.asarray(Image.open(p))) for p in predictions][0])
    assert len(predicted) > 1 and set(predicted) <= set(ClassTable.read().ids)
    assert result["num_images"] == 3 and result["protocol"]["scales"] == [1.0] and "multi_scale" not in result
    assert set(result["coarse"]) == {"single_scale"}
    shown = capsys.readouterr().out
    assert "single coarse" in shown and "mean IoU" in shown and f"{100 * scores['mean_iou']:.2f}" in shown


def test_absent_classes_and_void_predictions(streets, tmp_path, monkeypatch):
    """Maps made by hand through the scoring part alone: absent from truth, from prediction, from both; void."""
    classes = ClassTable.read()
    truths = sorted(streets.glob("gtFine/val/*/*_labelIds.png"))[:2]
    predictions, images = [], []
    rng = np.random.default_rng(0)
    for number, path in enumerate(truths):
        truth = np.asarray(Image.open(path))
        predicted = np.where(rng.uniform(size=truth.shape) < 0.7, truth, 31)       # train in the prediction
        predicted = np.where(rng.uniform(size=truth.shape) < 0.1, 0, predicted)    # void
        predicted[predicted == 26] = 7                                             # no car in the prediction
        file = tmp_path / f"{number}.png"
        Image.fromarray(predicted.astype(np.uint8)).save(file)
        predictions.append(file)
        images.append((classes.encode(np.where(np.isin(predicted, classes.ids), predicted, 0)), classes.encode(truth)))
    from utils.metrics.iou import ConfusionMatrix

    matrix = ConfusionMatrix(19)
    for predicted, truth in images:
        matrix.update(predicted, truth)
    assert matrix.matrix[:, 19].sum() > 0
    expected = official_result(truths, predictions, monkeypatch)
    scores = matrix.scores(classes.names, classes.categories)
    assert all(same(scores["class_iou"][name], expected["classScores"][name]) for name in classes.names)
    assert scores["class_iou"]["car"] == 0 and scores["mean_iou"] == expected["averageScoreClasses"]


def test_one_run_reports_single_and_multi_scale(streets, snapshot, tmp_path):
    both = run(streets, snapshot, tmp_path / "both", "--scales", "1.0", "1.25", "--save", "none")
    single = run(streets, snapshot, tmp_path / "one", "--scales", "1.0", "--no-flip", "--save", "none")
    assert both["single_scale"].items() <= single["single_scale"].items()       # iIoU is the headline's
    assert "mean_iiou" in both["multi_scale"] and "mean_iiou" in single["single_scale"]
    assert both["coarse"]["single_scale"] == single["coarse"]["single_scale"]
    assert both["mean_iou"] == both["multi_scale"]["mean_iou"] != single["mean_iou"]
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"result.json", "iou.png", "confusion.png", "report.html",
                                                              "written.json"}


def test_pictures_have_the_size_and_the_colors(streets, snapshot, tmp_path):
    run(streets, snapshot, tmp_path / "r", "--scales", "0.5", "--no-flip", "--whole")
    classes = ClassTable.read()
    for path in (tmp_path / "r/labelIds").iterdir():
        ids = np.asarray(Image.open(path))
        color = np.asarray(Image.open(tmp_path / "r/color" / path.name).convert("RGB"))
        assert ids.shape == (128, 256) and np.array_equal(color, classes.palette[classes.encode(ids)])
        image = np.asarray(Image.open(next(streets.glob(f"leftImg8bit/val/*/{path.name}"))).convert("RGB"))
        overlay = np.asarray(Image.open(tmp_path / "r/overlay" / f"{path.stem}.jpg")).astype(float)
        assert overlay.shape == (128, 256, 3) and np.abs(overlay - (image / 2 + color / 2)).mean() < 4


def test_results_are_not_replaced_unasked(streets, snapshot, tmp_path):
    words = ("--scales", "1.0", "--no-flip", "--save", "labels")
    run(streets, snapshot, tmp_path / "r", *words)
    before = (tmp_path / "r/result.json").read_bytes()
    with pytest.raises(UserError, match="--output-dir .*expected a folder without results .or --overwrite., found"):
        run(streets, snapshot, tmp_path / "r", *words)
    assert (tmp_path / "r/result.json").read_bytes() == before
    (tmp_path / "r/labelIds/mine.png").write_bytes(b"")
    image = next(streets.glob("leftImg8bit/val/*/*.png"))
    label = str(image).replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit.png", "_gtFine_labelIds.png")
    (tmp_path / "one.lst").write_text(f"{image} {label}\n")
    run(streets, snapshot, tmp_path / "r", *words, "--overwrite", "--data-list", str(tmp_path / "one.lst"))
    assert sorted(path.name for path in (tmp_path / "r/labelIds").iterdir()) == sorted([image.name, "mine.png"])


SMALL = ("--scales", "1.0", "--no-flip", "--whole", "--save", "labels", "color")


def test_own_pictures_beside_the_results_stay(streets, snapshot, tmp_path, capsys):
    (tmp_path / "color").mkdir()
    (tmp_path / "color/holiday.png").write_bytes(b"mine")
    run(streets, snapshot, tmp_path, *SMALL, "--overwrite")
    run(streets, snapshot, tmp_path, *SMALL, "--overwrite")
    assert (tmp_path / "color/holiday.png").read_bytes() == b"mine" and len(list((tmp_path / "color").iterdir())) == 4
    assert "1 file left there, which no run has recorded, such as color/holi" in capsys.readouterr().out


def full(monkeypatch, when):
    """A disk that is full from the files on whose names `when` accepts."""
    write = files.write_atomically

    def failing(path, content):
        def fill(file):
            content(file)
            if when(str(path)):
                raise OSError(28, "No space left on device")
        write(path, fill)
    monkeypatch.setattr(files, "write_atomically", failing)


def test_a_full_disk_is_a_sentence_and_what_was_written_stays(streets, snapshot, tmp_path, monkeypatch):
    run(streets, snapshot, tmp_path / "r", *SMALL)
    pictures = sorted(path.name for path in (tmp_path / "r/labelIds").iterdir())
    with monkeypatch.context() as patch:
        full(patch, lambda path: path.endswith(f"color/{pictures[-1]}"))
        with pytest.raises(UserError, match=f"color/{pictures[-1]}: expected to write a file there, found: .*No space"):
            run(streets, snapshot, tmp_path / "r", *SMALL, "--overwrite")
    assert sorted(path.name for path in (tmp_path / "r/color").iterdir()) == pictures[:-1]
    assert not (tmp_path / "r/result.json").exists()        # the earlier one would pass for this run's
    for path in (tmp_path / "r/color").iterdir():
        Image.open(path).load()
    run(streets, snapshot, tmp_path / "r", *SMALL, "--overwrite")
    with monkeypatch.context() as patch:
        full(patch, lambda path: path.endswith("confusion.png"))
        with pytest.raises(UserError, match="confusion.png: expected to write a file there, found: .*No space"):
            run(streets, snapshot, tmp_path / "r", *SMALL, "--overwrite")
    assert json.loads((tmp_path / "r/result.json").read_text())["num_images"] == 3
    assert not (tmp_path / "r/confusion.png").exists()


def test_a_process_that_cannot_write_pictures_leaves_no_result(streets, snapshot, tmp_path):
    """The second of two processes fails over its last picture, after the scores were gathered."""
    script = tmp_path / "fails.py"
    script.write_text("""
import os, sys, time
sys.path.insert(0, os.getcwd())
import evaluate
from utils.common import command, errors
from utils.inference import pictures
def fail(path, array):
    time.sleep(3)
    raise errors.UserError(f"{path}: expected to write a file there, found a full disk")
if os.environ["RANK"] == "1":
    pictures.save_png = fail
command.run(evaluate.main)
""")
    first, second = map(finish, fork_ranks(
        script, "--data-dir", streets, "--restore-from", snapshot, "--gpu", "cpu", "--num-workers", "0", "--amp", "off",
        "--output-dir", tmp_path / "r", *SMALL))
    assert first[0] and second[0] and "found a full disk" in second[2] and "results in" not in first[1] + second[1]
    assert not (tmp_path / "r/result.json").exists()


@pytest.mark.parametrize("words, flags", [
    (("--scales", "100"), "a --batch-size below 4, a smaller --input-size, --scales below 100, fewer --num-workers"),
    (("--scales", "2", "100", "--whole", "--batch-size", "1"), "windows, by --input-size, instead of --whole, --sc"),
    (("--input-size", "16384", "--scales", "100"), "a --batch-size below 4, a smaller --input-size")])
def test_memory_that_a_protocol_would_need_is_computed(streets, snapshot, tmp_path, monkeypatch, words, flags):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10e9)
    with pytest.raises(UserError, match="out of memory: expected room for the passes .* found: an image of 256×128 "
                       r"needs at least \d+\.\d GB, but only 10.0 GB are free; what helps: " + flags):
        run(streets, snapshot, tmp_path / "r", *words)


def test_too_little_memory_in_one_process_is_a_sentence(streets, snapshot, tmp_path):
    """What torch raises on a GPU, in the second of two processes while the first waits for it."""
    script = tmp_path / "fails.py"
    script.write_text("""
import os, sys
sys.path.insert(0, os.getcwd())
import evaluate, torch
from tests.conftest import shorten
from utils.common import command
from utils.inference import SlidingPredictor
shorten("eca_resnet18").start()
def fail(self, crops):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\\nand more")
if os.environ.get("RANK") == "1":
    SlidingPredictor._forward = fail
command.run(evaluate.main)
""")
    code = ("import sys; from utils.common import command; from utils.parallel.launch import start_processes; "
            f"sys.argv[0] = {str(script)!r}; command.run(lambda: start_processes(2, sys.argv[1:]))")
    status, _, error = finish(start("-c", code, "--data-dir", streets, "--restore-from", snapshot, "--gpu", "cpu",
                                    "--num-workers", "0", "--amp", "off", "--output-dir", tmp_path / "r", *SMALL))
    (output,) = [line for line in error.splitlines() if "error: " in line]
    assert status == 2 and output.startswith("[process 1] error: out of memory: expected room for")
    assert "found: CUDA out of memory. Tried to allocate 9 GiB; what helps: a --batch-size below 4, wi" in output
    assert "Traceback" not in error


def test_snapshots_of_one_name_need_folders_of_their_own(streets, snapshot, tmp_path):
    for words, folder in ((("a/latest.pth", "b/latest.pth", "--output-dir", "r"), "r/latest"),
                          (("a/latest.pth", "a/latest.pth"), "a/latest_val")):
        with pytest.raises(UserError, match=f"a results folder for each file, found {folder} for 2 of them"):
            evaluate.main(["--data-dir", str(streets), "--restore-from", *words])
    assert [str(evaluate.results_folder(name, "val")) for name in ("a/b.pth", "a/b.onnx", "a/b.safetensors")] == [
        "a/b_val", "a/b_onnx_val", "a/b_safetensors_val"]
    (tmp_path / "r/b").mkdir(parents=True)
    (tmp_path / "r/b/result.json").write_text("{}")
    with pytest.raises(UserError, match="r/b: expected a folder without results .or --overwrite., found result.json"):
        run(streets, snapshot, tmp_path / "r", "--restore-from", str(snapshot), "b.pth")
    assert not (tmp_path / "r" / snapshot.stem).exists()


def test_the_first_windows_are_a_sign_of_life(streets, snapshot, tmp_path, capsys):
    """Before the first image is done, which may take minutes, and not again after it."""
    run(streets, snapshot, tmp_path / "r", "--scales", "1.0", "0.5", "--no-flip", "--whole", "--save", "none",
        "--batch-size", "1")
    shown = capsys.readouterr().out.splitlines()
    (line,) = [line for line in shown if line.startswith("first image: ")]
    assert line.startswith("first image: 1/2 windows; at this rate 0:") and line.endswith("for 3")
    assert shown.index(line) < next(i for i, text in enumerate(shown) if text.startswith("evaluating: "))


def test_relative_paths_are_where_the_user_stands(streets, tmp_path):
    """Both scripts, called from another folder, with a process that reads samples."""
    (tmp_path / "data").symlink_to(streets)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in (["train.py", *TRAIN, "--num-workers", "1", "--num-steps", "1", "--batch-size", "2"],
                  ["evaluate.py", "--restore-from", "snapshots/CS_scenes_1.pth", "--gpu", "cpu", "--num-workers", "1",
                   "--output-dir", "r", "--scales", "1.0", "--no-flip"]):
        script = os.path.relpath(ROOT / words[0], tmp_path)
        done = subprocess.run([sys.executable, script, *words[1:], "--data-dir", "data"], cwd=tmp_path, text=True,
                              capture_output=True, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "r/result.json").is_file() and len(list((tmp_path / "r/labelIds").iterdir())) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"data", "snapshots", "r"}


def test_window_sizes_off_the_grid_are_said(streets, snapshot, tmp_path, capsys):
    run(streets, snapshot, tmp_path / "r", "--scales", "1.0", "--no-flip", "--input-size", "64,100", "--save", "none")
    assert "windows of 64×100 are rounded up to 65×105" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    (["--split", "nowhere"], "expected <city>"),
    (["--overlap", "1"], "--overlap: expected a share below 1"),
    (["--restore-from", "a.pth", "b.pth", "--images", "x"], "expected one snapshot with --images, found 2"),
    (["--images", "nowhere/*.jpg"], r"--images nowhere/\*.jpg: expected an image, a video, a folder"),
    (["--images", "x", "--submission", "y"], "expected one task at a time, found --images and --submission"),
    (["--images", "x", "--boundary", "3"], "--boundary: expected a data set to score, which has truth, found --images"),
    (["--submission", "y", "--data-list", "z"], "expected a Cityscapes folder"),
    (["--export", "a.onnx", "--input-size", "64,64"], "and --export-size for a fixed size, found --input-size"),
    (["--export", "a.safetensors", "--classes", "mine.csv"], "--export: expected the snapshot's .*, found --classes"),
    (["--whole", "--input-size", "64,64"], "--whole: expected no size of windows with it, found 64×64"),
    (["--classes", "CAMVID"], "expected the 19 classes of .*, found 2"),
    (["--restore-from", "none.pth"], "none.pth: expected a file of weights, found no such file"),
])
def test_bad_input_is_one_sentence(streets, snapshot, tmp_path, words, message):
    table = tmp_path / "classes.csv"
    table.write_text("name,id,train_id,red,green,blue\nroad,0,0,0,0,0\ncar,1,1,0,0,0\n")
    words = [str(table) if word == "CAMVID" else word for word in words]
    with pytest.raises(UserError, match=message):
        run(streets, snapshot, tmp_path / "r", *words)


def test_files_that_are_no_snapshots(streets, snapshot, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "plain.pth")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    for name, message in (("plain.pth", "expected a snapshot that train.py wrote, found a file without config, model, "
                           "step"),
                          ("text.pth", "expected a file of tensors written by torch.save")):
        with pytest.raises(UserError, match=message):
            run(streets, tmp_path / name, tmp_path / "r")
    content = files.load(snapshot)
    del content["model"]["head.fine.weight"]
    snapshots.save(tmp_path / "short.pth", content)
    with pytest.raises(UserError, match="the tensors .* its config describes as model, found no tensor named head"):
        run(streets, tmp_path / "short.pth", tmp_path / "r")


def test_processes_share_the_images_and_count_each_once(streets, snapshot, tmp_path):
    """Five images over two processes, with pictures; and one, which leaves the second process without any."""
    image = next(streets.glob("leftImg8bit/val/*/*.png"))
    label = str(image).replace("leftImg8bit/", "gtFine/").replace("_leftImg8bit.png", "_gtFine_labelIds.png")
    (tmp_path / "one.lst").write_text(f"{image} {label}\n")
    for name, words in (("all", []), ("one", ["--data-list", tmp_path / "one.lst"])):
        words = ["--scales", "0.5", "--no-flip", "--save", "labels", "--boundary", "2", *map(str, words)]
        alone = run(streets, snapshot, tmp_path / "alone" / name, *words)
        assert alone["protocol"]["split"] == {"all": "val", "one": "one.lst"}[name]
        out = finish_all(fork_ranks(
            "evaluate.py", "--data-dir", streets, "--restore-from", snapshot, "--gpu", "cpu", "--num-workers", "0",
            "--amp", "off", "--output-dir", tmp_path / name, *words))
        assert json.loads((tmp_path / name / "result.json").read_text()) == alone
        assert out.count("results in") == 1
        for path in (tmp_path / "alone" / name / "labelIds").iterdir():
            assert (tmp_path / name / "labelIds" / path.name).read_bytes() == path.read_bytes()


def test_several_snapshots_make_one_table(streets, snapshot, tmp_path, capsys):
    content = files.load(snapshot) | {"step": 9}
    content["model"]["head.fine.weight"] = content["model"]["head.fine.weight"].flip(0)
    snapshots.save(tmp_path / "CS_scenes_9.pth", content)
    evaluate.main(["--data-dir", str(streets), "--restore-from", str(snapshot), str(tmp_path / "CS_scenes_9.pth"),
                   "--gpu", "cpu", "--num-workers", "0", "--scales", "1.0", "--no-flip", "--save", "none",
                   "--output-dir", str(tmp_path / "r")])
    results = [json.loads((tmp_path / f"r/CS_scenes_{step}/result.json").read_text()) for step in (7, 9)]
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].split()[-2:] == ["single", "fine"]
    for line, result in zip(lines[1:], results, strict=True):
        assert line.startswith(result["checkpoint"]) and line.endswith(f"{100 * result['mean_iou']:.2f}")
    assert results[0]["mean_iou"] != results[1]["mean_iou"]


def test_a_split_without_truth_is_a_sentence(streets, snapshot, tmp_path):
    for path in streets.glob("gtFine/val/*/*_labelIds.png"):
        target = tmp_path / path.relative_to(streets)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((128, 256), np.uint8)).save(target)
    (tmp_path / "leftImg8bit").symlink_to(streets / "leftImg8bit")
    with pytest.raises(UserError, match="labelIds.png and 2 other label maps: expected labeled pixels.* --submission"):
        run(tmp_path, snapshot, tmp_path / "r", "--scales", "1.0", "--no-flip")


def test_scores_do_not_depend_on_workers_or_the_batch_of_windows(streets, snapshot, tmp_path):
    words = ("--save", "none", "--no-flip", "--scales", "0.5", "0.75")
    one, other, again = (
        run(streets, snapshot, tmp_path / str(number), *words, "--num-workers", workers, "--batch-size", batch)
        for number, (workers, batch) in enumerate((("0", "1"), ("2", "7"), ("2", "1"))))
    assert one["mean_iou"] == pytest.approx(other["mean_iou"], abs=1e-4)
    assert again == one
