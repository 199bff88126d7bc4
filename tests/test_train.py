"""Training runs, small but whole."""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import evaluate
import train
from dataset.labels import ClassTable
from libs import backend
from loss.criterion import SegmentationCriterion
from networks.backbones.names import build_backbone
from networks.build import build_network
from tests.conftest import SMALL, finish, finish_all, fork, fork_ranks, read_until, start
from utils.common import command, compat, files
from utils.common.errors import UserError
from utils.inference.sliding import SlidingPredictor
from utils.ops.normalization import Normalization
from utils.runs import snapshots
from utils.training import validation
from utils.training.engine import Engine, NetworkWithLoss, NotFinite

pytestmark = pytest.mark.usefixtures("short_networks")


def run(streets, folder, *words, steps=3):
    train.main(["--data-dir", str(streets), "--snapshot-dir", str(folder), "--gpu", "cpu", "--backbone", "eca_resnet18",
                "--model", "acfnet_resnet", "--input-size", "49,65", "--batch-size", "2", "--num-workers", "0",
                "--num-steps", str(steps), "--log-every", "1", "--random-mirror", "--random-scale", "--amp", "off",
                *words])
    return files.load(f"{folder}/CS_scenes_{steps}.pth")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_snapshot_metrics_and_pictures(streets, tmp_path, capsys):
    content = run(streets, tmp_path / "s", "--save-pred-every", "2", "--panel-every", "2", "--ohem-keep", "5")
    assert [step for step, _ in snapshots.list_snapshots(tmp_path / "s")] == [2, 3]
    assert set(content) == {"model", "optimizer", "scaler", "step", "rng", "config"} and content["step"] == 3
    assert content["config"]["network"]["backbone"] == "eca_resnet18"
    build_network(**content["config"]["network"]).load_state_dict(content["model"])
    assert ClassTable(content["config"]["classes"]).names == ClassTable.read().names
    logged = lines(tmp_path / "s")
    assert [line["step"] for line in logged] == [1, 2, 3]
    expected = {"step", "lr", "loss", "loss_fine", "loss_coarse", "loss_aux", "gradient_norm", "images_per_second",
                "seconds_data", "memory_bytes"}
    assert all(set(line) == expected for line in logged)
    for line in logged:
        total = 0.7 * line["loss_fine"] + 0.6 * line["loss_coarse"] + 0.4 * line["loss_aux"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert [line["lr"] for line in logged] == pytest.approx([1e-2 * (1 - k / 3) ** 0.9 for k in range(3)])
    events = list((tmp_path / "s/tensorboard").iterdir())
    text = events[0].read_bytes()
    assert b"loss_fine" in text and b"image_truth_coarse_fine_difference" in text and b"\x89PNG" in text
    shown = capsys.readouterr().out
    assert "the network starts from random weights" in shown and "step 3/3" in shown
    assert "--ohem-keep has no effect: no loss uses OHEM (--ohem 1)" in shown


def test_the_base_model_trains_without_a_coarse_term(streets, tmp_path):
    run(streets, tmp_path / "s", "--model", "base", steps=1)
    (line,) = lines(tmp_path / "s")
    assert "loss_coarse" not in line
    assert line["loss"] == pytest.approx(1.3 * line["loss_fine"] + 0.4 * line["loss_aux"], rel=1e-5)


def test_a_seed_gives_the_same_run_twice(streets, tmp_path):
    a, b, c = (run(streets, tmp_path / name, "--random-seed", seed, "--num-workers", workers)
               for name, seed, workers in (("a", "5", "0"), ("b", "5", "2"), ("c", "6", "0")))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert not torch.equal(a["model"]["head.fine.weight"], c["model"]["head.fine.weight"])


def test_crops_off_the_grid_are_rounded_up_and_said(streets, tmp_path, capsys):
    """By the rule of evaluation's windows; also where a run goes on that an earlier version began without it."""
    content = run(streets, tmp_path / "s", "--input-size", "48,60", steps=1)
    assert content["config"]["input_size"] == [49, 65] == content["config"]["arguments"]["input_size"]
    assert "crops of 48×60 are rounded up to 49×65" in capsys.readouterr().out
    run(streets, tmp_path / "s", "--input-size", "48,60", "--resume", steps=2)
    assert "before they were" not in capsys.readouterr().out
    content["config"]["arguments"]["input_size"] = content["config"]["input_size"] = [48, 60]
    (tmp_path / "old").mkdir()
    snapshots.save(tmp_path / "old/CS_scenes_1.pth", content)
    assert run(streets, tmp_path / "old", "--input-size", "48,60", "--resume", steps=2)["step"] == 2
    assert "from here on crops are [49, 65], before they were [48, 60]" in capsys.readouterr().out
    with pytest.raises(UserError, match="expected a run with --input-size .57, 65., found .49, 65."):
        run(streets, tmp_path / "old", "--input-size", "56,60", "--resume", steps=3)


def test_resume_goes_on_where_the_run_was(streets, tmp_path, capsys):
    whole = run(streets, tmp_path / "whole", "--save-pred-every", "2", steps=4)
    part = tmp_path / "part"
    part.mkdir()
    (part / "CS_scenes_2.pth").write_bytes((tmp_path / "whole/CS_scenes_2.pth").read_bytes())
    resumed = run(streets, part, "--resume", steps=4)
    assert "2 steps done" in capsys.readouterr().out
    assert all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])
    assert [line["step"] for line in lines(part)] == [3, 4]


def test_resume_passes_over_a_damaged_snapshot_and_repeats_no_step_in_the_log(streets, tmp_path, capsys):
    folder = tmp_path / "s"
    whole = run(streets, folder, "--save-pred-every", "2", steps=4)
    log, last = folder / "metrics.jsonl", folder / "CS_scenes_4.pth"
    expected = [(line["step"], line["loss"]) for line in lines(folder)]
    last.write_bytes(last.read_bytes()[:-1000])
    log.write_text(log.read_text() + '{"step": 5, "lo')
    resumed = run(streets, folder, "--resume", steps=4)
    shown = capsys.readouterr().out
    assert "CS_scenes_4.pth: expected a file of tensors" in shown and "taking the snapshot before it" in shown
    assert [(line["step"], line["loss"]) for line in lines(folder)] == expected
    assert all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])


def test_resume_needs_no_weights_but_the_snapshot(streets, tmp_path, capsys):
    """The file a run started from may be gone; what it said of the network and its input is in the snapshot."""
    backbone = build_backbone("resnet18", "bn", "relu", average_downsample=True)
    torch.save(backbone.state_dict(), tmp_path / "w.pth")
    words = ["--restore-from", str(tmp_path / "w.pth"), "--normalization", "bgr"]
    run(streets, tmp_path / "s", *words, steps=1)
    (tmp_path / "w.pth").unlink()
    capsys.readouterr()
    resumed = run(streets, tmp_path / "s", "--resume", *words[:2], steps=2)
    shown = capsys.readouterr().out
    assert "average downsampling, output stride 8; input BGR" in shown and "--restore-from is not read" in shown
    assert resumed["config"]["network"]["average_downsample"] and resumed["step"] == 2
    for more, message in ((["--normalization", "rgb"], "--resume .*: expected an input normalized by .*RGB"),
                          (["--downsample", "strided"], "--downsample strided: expected the value of .*CS_scenes_2")):
        with pytest.raises(UserError, match=message):
            run(streets, tmp_path / "s", "--resume", *more, steps=3)


def test_resume_in_an_empty_folder_starts_and_says_so(streets, tmp_path, capsys):
    run(streets, tmp_path / "s", "--resume", steps=1)
    assert "starts from the beginning" in capsys.readouterr().out


def test_a_run_never_touches_the_snapshots_of_another(streets, tmp_path):
    run(streets, tmp_path / "s", steps=1)
    before = (tmp_path / "s/CS_scenes_1.pth").read_bytes()
    with pytest.raises(UserError, match="--snapshot-dir .*: expected a folder without snapshots, or --resume"):
        run(streets, tmp_path / "s", steps=1)
    with pytest.raises(UserError, match="--resume .*: expected a run with --model base, found acfnet_resnet"):
        run(streets, tmp_path / "s", "--resume", "--model", "base", steps=2)
    assert (tmp_path / "s/CS_scenes_1.pth").read_bytes() == before


@pytest.mark.parametrize("words, message", [
    (["--restore-from", "a.pth", "b.pth"], "--restore-from: expected one file, found 2 .did the shell expand"),
    (["--restore-from", "dataset/***.pth"], r"dataset/\*\*\*.pth: expected a file of weights, found no such file"),
    (["--num-classes", "20"], "--num-classes 20: expected the 19 classes of"),
    (["--activation", "relu"], "--activation relu: expected --norm bn with it, found --norm inplace_abn"),
    (["--split", "nowhere"], "nowhere: expected <city>"),
])
def test_bad_input_is_one_sentence_and_nothing_is_written(streets, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(streets, tmp_path / "s", *words)
    assert not (tmp_path / "s").exists()


def test_a_batch_the_devices_cannot_share_is_an_error(streets, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "select_devices", lambda gpu: [torch.device("cpu")] * 3)
    with pytest.raises(UserError, match=r"--batch-size 2: expected a multiple of 3 \(3 devices\)"):
        run(streets, tmp_path / "s")


def test_weights_go_from_one_run_into_another(streets, tmp_path, capsys):
    first = run(streets, tmp_path / "a", steps=1)
    second = run(streets, tmp_path / "b", "--restore-from", str(tmp_path / "a/CS_scenes_1.pth"),
                 "--learning-rate", "1e-30", "--random-seed", "9", steps=1)
    key = "backbone.layer3.0.conv1.weight"
    assert torch.equal(first["model"][key], second["model"][key])
    shown = capsys.readouterr().out
    assert "ours: loaded" in shown and "(100.0% of the backbone's values)" in shown and "initialized" not in shown
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: expected weights of a residual network, found 1 tensors"):
        run(streets, tmp_path / "c", "--restore-from", str(tmp_path / "other.pth"))


def test_a_file_that_would_run_code_is_refused(streets, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save({"model": Attack(), "config": {}, "step": 0}, tmp_path / "attack.pth")
    for words in (["--restore-from", str(tmp_path / "attack.pth")], ["--resume", str(tmp_path / "attack.pth")]):
        with pytest.raises(UserError, match="attack.pth: expected a file of tensors"):
            run(streets, tmp_path / "s", *words)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("number, times, group", [
    (signal.SIGINT, 1, True),       # as a terminal sends it: to the worker processes too
    (signal.SIGTERM, 1, False),     # as `kill` and supervisors send it
    (signal.SIGHUP, 2, True),       # kernel and shell
])
def test_a_signal_ends_the_run_after_the_step_with_a_snapshot(streets, tmp_path, number, times, group):
    words = ["train.py", "--data-dir", streets, "--snapshot-dir", tmp_path / "s", *SMALL, "--batch-size", "2",
             "--num-workers", "1", "--num-steps", "100000"]
    process = start(*words, start_new_session=True) if number == signal.SIGINT else fork(*words)
    read_until(process, "step 2/")
    for _ in range(times):
        (os.killpg if group else os.kill)(process.pid, number)
    status, rest, error = finish(process, 60)
    assert status == 128 + number, error
    (step, path), = snapshots.list_snapshots(tmp_path / "s")
    assert f"stopped after step {step}; the same command with --resume goes on" in rest
    assert files.load(path)["step"] == step == lines(tmp_path / "s")[-1]["step"]


def test_loss_falls(streets, tmp_path):
    run(streets, tmp_path / "s", "--learning-rate", "0.03", "--batch-size", "4", steps=40)
    losses = [line["loss"] for line in lines(tmp_path / "s")]
    assert sum(losses[-10:]) / 10 < 0.75 * losses[0]


def test_quick_validation_is_the_evaluation_of_whole_images_and_the_best_is_kept(streets, tmp_path, capsys):
    folder = tmp_path / "s"
    run(streets, folder, "--val-every", "2", "--learning-rate", "0.03", steps=4)
    lines = [json.loads(line) for line in (folder / "quick_validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    best = max(lines, key=lambda line: line["quick_mean_iou_fine"])
    content = files.load(folder / "best_quick.pth")
    assert content["step"] == best["step"] and content["quick_mean_iou"] == best["quick_mean_iou_fine"]
    evaluate.main(["--data-dir", str(streets), "--restore-from", str(folder / "best_quick.pth"), "--gpu", "cpu",
                   "--whole", "--scales", "1.0", "--no-flip", "--save", "none", "--num-workers", "0", "--amp", "off",
                   "--output-dir", str(tmp_path / "r")])
    result = json.loads((tmp_path / "r/result.json").read_text())
    # Nearly: evaluate.py folds norms into convolutions, and a pixel between two classes may then fall to the other.
    assert result["mean_iou"] == pytest.approx(best["quick_mean_iou_fine"], abs=2e-3)
    assert result["coarse"]["single_scale"]["mean_iou"] == pytest.approx(best["quick_mean_iou_coarse"], abs=2e-3)
    shown = capsys.readouterr().out
    assert "not the official protocol): mIoU fine" in shown
    assert all("quick" in line for line in shown.splitlines() if "mIoU" in line)
    # Resumed from before the best, the same numbers come again and the file stays as it is.
    (folder / "CS_scenes_4.pth").unlink(missing_ok=True)
    (folder / "CS_scenes_2.pth").write_bytes((folder / "best_quick.pth").read_bytes())
    if best["step"] == 2:
        run(streets, folder, "--val-every", "2", "--learning-rate", "0.03", "--resume", steps=4)
        assert [json.loads(line) for line in (folder / "quick_validation.jsonl").read_text().splitlines()] == lines
        assert files.load(folder / "best_quick.pth")["step"] == 2


def test_the_best_of_an_earlier_run_is_not_the_record_to_beat(streets, tmp_path, capsys):
    """It is kept under another name; a resumed run goes on with its own record."""
    folder, words = tmp_path / "s", ("--val-every", "1", "--backbone", "resnet18")
    folder.mkdir()
    torch.save({"model": {}, "config": {}, "step": 7, "quick_mean_iou": 0.99}, folder / "best_quick.pth")
    run(streets, folder, *words, steps=1)
    assert "best_quick.pth is of an earlier run, kept as" in capsys.readouterr().out
    assert files.load(folder / "best_quick.pth")["step"] == 1
    assert files.load(folder / "best_quick_earlier_1.pth")["quick_mean_iou"] == 0.99
    content = files.load(folder / "best_quick.pth") | {"quick_mean_iou": 0.99}
    snapshots.save(folder / "best_quick.pth", content)
    run(streets, folder, *words, "--resume", steps=2)
    assert files.load(folder / "best_quick.pth")["step"] == 1


def test_patience_ends_the_run_and_survives_a_resume(streets, tmp_path, monkeypatch, capsys):
    """By the scores 20, 30, 10, 30 %: the second after the best ends the run. Also if it was killed before."""
    scores, folder = [0.2, 0.3, 0.1, 0.3, 0.9, 0.1], tmp_path / "s"
    words = ("--val-every", "1", "--backbone", "resnet18", "--save-pred-every", "1")

    def validated(*more, start=0, steps=6):
        left = iter(scores[start:])
        monkeypatch.setattr(validation, "sum_of_matrices", lambda matrices: {"single_scale": {"fine": SimpleNamespace(
            scores=lambda *_: {"mean_iou": next(left), "class_iou": {}})}})
        monkeypatch.setattr(validation, "score", lambda *_: ())
        with contextlib.suppress(UserError):        # of the helper, for the snapshot of the last step
            run(streets, folder, *words, *more, steps=steps)
        assert files.load(folder / "best_quick.pth")["step"] == 2 or "--patience" not in more
        return [step for step, _ in snapshots.list_snapshots(folder)], capsys.readouterr().out

    steps, shown = validated("--patience", "2")
    assert steps == [1, 2, 3, 4]
    assert (f"ended after step 4, --patience 2: no quick validation since step 2 was better than its mIoU of 30.00 %; "
            f"the best snapshot is {folder}/best_quick.pth") in shown
    whole = files.load(folder / "CS_scenes_4.pth")
    for step in (2, 3, 4):      # the best snapshot stays, of a later step than the one to go on from
        (folder / f"CS_scenes_{step}.pth").unlink()
    steps, shown = validated("--patience", "2", "--resume", start=1)
    assert steps == [1, 2, 3, 4] and "ended after step 4" in shown
    resumed = files.load(folder / "CS_scenes_4.pth")
    assert all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])
    steps, shown = validated("--patience", "2", "--resume", start=4)
    assert steps == [1, 2, 3, 4] and "nothing is left to do: 4 steps done; --patience 2: no quick" in shown
    steps, shown = validated("--resume", start=4, steps=5)
    assert steps == [1, 2, 3, 4, 5] and files.load(folder / "best_quick.pth")["step"] == 5
    # The best snapshot may be of later steps than those that a resume went back to.
    earlier = SimpleNamespace(scores=[(1, 0.3), (2, 0.1)], highest=0.5, folder="run")
    assert validation.QuickValidation.lost_patience(earlier, 1).endswith(
        "than its mIoU of 30.00 %; the best snapshot is run/best_quick.pth, which has 50.00 %")
    with pytest.raises(UserError, match="--patience 2: expected --val-every with it, found none"):
        run(streets, tmp_path / "t", "--patience", "2")


@pytest.mark.parametrize("steps", [2, 4])
def test_a_stop_does_not_wait_for_the_quick_validation(streets, tmp_path, monkeypatch, capsys, steps):
    """On a CPU that may take many minutes, and supervisors give a job half a minute. It is made up for on resume."""
    scored = []

    def signalled(self, *image, predict=SlidingPredictor.predict):
        scored.append(image)
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, *image)

    monkeypatch.setattr(SlidingPredictor, "predict", signalled)
    with pytest.raises(command.Interrupted) as caught:
        run(streets, tmp_path / "s", "--val-every", "2", "--backbone", "resnet18", steps=steps)
    assert caught.value.number == signal.SIGTERM and len(scored) == 1
    assert snapshots.list_snapshots(tmp_path / "s")[-1][0] == 2
    assert "the quick validation of step 2 is left out until --resume" in capsys.readouterr().out
    assert not (tmp_path / "s/best_quick.pth").exists() and not (tmp_path / "s/quick_validation.jsonl").read_text()
    with pytest.raises(command.Interrupted):        # stopped again before it can be made up for
        run(streets, tmp_path / "s", "--val-every", "2", "--backbone", "resnet18", "--resume", steps=steps)
    assert snapshots.list_snapshots(tmp_path / "s")[-1][0] == 2 and "stopped after step 2" in capsys.readouterr().out
    monkeypatch.undo()
    for _ in range(2):      # the second time there is nothing to do
        run(streets, tmp_path / "s", "--val-every", "2", "--backbone", "resnet18", "--resume", steps=steps)
        scored = [json.loads(line)["step"] for line in (tmp_path / "s/quick_validation.jsonl").read_text().splitlines()]
        assert scored == [*range(2, steps + 1, 2)] and (tmp_path / "s/best_quick.pth").exists()
    assert capsys.readouterr().out.count("quick validation after step 2 ") == 1


def test_light_recomputation_is_refused_where_it_does_nothing(streets, tmp_path):
    for backbone in ("resnet18", "eca_resnet34"):
        with pytest.raises(UserError, match=f"--recompute light: expected a backbone of at least 50 layers, found "
                                            f"{backbone}, .* use --recompute full"):
            run(streets, tmp_path / "s", "--backbone", backbone, "--recompute", "light")
        with pytest.raises(ValueError, match="recompute light: expected a backbone of bottlenecks"):
            build_backbone(backbone, recompute="light")
    assert not (tmp_path / "s").exists()


def test_processes_share_the_quick_validation(streets, tmp_path):
    """Beginning with weights of ordinary norms, which are converted in each process."""
    torch.save(build_backbone("resnet18", "bn", "relu").state_dict(), tmp_path / "resnet18.pth")
    words = ["--data-dir", str(streets), *SMALL, "--batch-size", "2", "--val-every", "2",
             "--learning-rate", "1e-9", "--restore-from", str(tmp_path / "resnet18.pth"), "--snapshot-dir"]
    train.main([*words, str(tmp_path / "one"), "--num-steps", "2"])
    out = finish_all(fork_ranks("train.py", *words, tmp_path / "two", "--num-steps", "40", "--patience", "1"))
    (one, *_), (two, *others) = ([json.loads(line) for line in open(tmp_path / name / "quick_validation.jsonl")]
                                 for name in ("one", "two"))
    # They also stop together: after the first score that is not better.
    scores = [line["quick_mean_iou_fine"] for line in (two, *others)]
    assert scores[-1] <= scores[-2] and scores[:-1] == sorted({*scores[:-1]})
    assert f"ended after step {others[-1]['step']}, --patience 1: no quick validation since step" in out
    assert [step for step, _ in snapshots.list_snapshots(tmp_path / "two")] == [others[-1]["step"]]
    for scores in ("quick_class_iou_fine", "quick_class_iou_coarse"):
        assert one[scores] == pytest.approx(two[scores], abs=1e-3)      # half of the images: more than 1e-2
    assert (tmp_path / "two/best_quick.pth").exists()


def test_quick_validation_of_a_list_needs_another_list(streets, tmp_path):
    with pytest.raises(UserError, match="--val-every: expected --val-list with --data-list"):
        run(streets, tmp_path / "s", "--val-every", "2", "--data-list", "x.lst")


@pytest.mark.parametrize("words", [("--amp", "bf16"), ("--amp", "off", "--recompute", "full")])
def test_norms_of_the_package_are_refused_before_anything_is_written(streets, tmp_path, monkeypatch, words):
    monkeypatch.setattr(backend, "package", lambda: print)
    with pytest.raises(UserError, match=f"--kernels package: expected --amp off .*, found {' '.join(words[-2:])};"):
        run(streets, tmp_path / "s", "--abn-backend", "package", *words)
    assert not (tmp_path / "s").exists()


def test_no_reading_process_outlives_the_training(streets, tmp_path):
    """At the end of Python they would be waited for, half a minute after they are told to end."""
    gc.disable()
    try:
        run(streets, tmp_path, "--num-workers", "2", steps=1)
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_channels_last_and_compile_train_alike(streets, tmp_path):
    ways = [("--channels-last",)]
    if compat.torch_version() < compat.COMPILER:
        with pytest.raises(UserError, match="--compile: expected PyTorch 2.9 or newer, found "):
            run(streets, tmp_path / "s", "--compile")
    else:
        ways.append(("--compile",))
    plain, *others = (run(streets, tmp_path / str(number), *words, "--backbone", "resnet18", steps=2)
                      for number, words in enumerate([(), *ways]))
    for key, value in plain["model"].items():
        for other in others:
            assert other["model"].keys() == plain["model"].keys()
            torch.testing.assert_close(other["model"][key], value, rtol=1e-3, atol=2e-4)


def test_labels_that_do_not_fit_the_classes_are_found_before_the_first_step(streets, tmp_path):
    table = tmp_path / "classes.csv"
    table.write_text("name,id,train_id,red,green,blue\nroad,7,0,0,0,0\ncar,26,1,0,0,0\n")
    with pytest.raises(UserError, match="labelIds.png: expected ids that .*classes.csv knows, found"):
        run(streets, tmp_path / "s", "--classes", str(table), "--num-classes", "2")
    ignored = "".join(f"old{number},{number},255,0,0,0\n" for number in range(34))
    table.write_text(f"name,id,train_id,red,green,blue\n{ignored}cat,60,0,0,0,0\ndog,61,1,0,0,0\n")
    with pytest.raises(UserError, match="expected pixels of the 2 classes of .*classes.csv, found only ignored ones"):
        run(streets, tmp_path / "s", "--classes", str(table))
    assert not (tmp_path / "s").exists()


def test_weights_that_a_step_has_ruined_are_not_called_the_state_before(streets, tmp_path):
    """The step before had a normal loss and wrote weights of 1e28, which a regular snapshot holds."""
    with pytest.raises(UserError, match=r"step 2: expected a finite loss, found .*'fine': nan.* learning rate .*"
                                        r"images: drawn_00.*, drawn_00.*; training had already diverged, and no "
                                        r"snapshot of this start was followed by a normal loss: a lower "
                                        r"--learning-rate from the beginning and another --snapshot-dir may help"):
        run(streets, tmp_path / "a", "--learning-rate", "1e30", "--save-pred-every", "1", steps=9)
    assert [step for step, _ in snapshots.list_snapshots(tmp_path / "a")] == [1]
    with pytest.raises(UserError, match="training had already diverged, so this state is not saved, and no"):
        run(streets, tmp_path / "b", "--learning-rate", "1e30", steps=9)
    assert not snapshots.list_snapshots(tmp_path / "b")


def finite_losses_then(monkeypatch, losses, last):
    """Let the engine report these losses instead of its own, one per step, and then raise."""
    step, given = Engine.step, iter(losses)

    def reporting(self, *args, **named):
        loss = next(given, None)
        if loss is None:
            raise NotFinite(dict.fromkeys(self.criterion.weights, last) | {"gradient_norm": float("inf")})
        terms, stop = step(self, *args, **named)
        return dict.fromkeys(terms, loss), stop

    monkeypatch.setattr(Engine, "step", reporting)


@pytest.mark.parametrize("losses, last, keep, kept, advice", [
    # A batch, or a gradient, at fault: the state before is sound, becomes the newest, and pushes nothing out.
    ([3, 3, 3, 3, 3], float("nan"), "2", [2, 4, 5], "the state before this step is the snapshot of step 5: a lower"),
    ([3, 3, 3, 3, 3], 3.0, "1", [2, 4, 5], "the state before this step is the snapshot of step 5: a lower"),
    ([3, 3, 3, 3], float("nan"), "1", [2, 4], "the state before this step is the snapshot of step 4: a lower"),
    # Training diverges after the third step, long before its numbers overflow.
    ([3, 2, 2, 50, 1e3, 1e9, 1e20], float("nan"), "1", [2, 6], "so this state is not saved; the newest snapshot that "
     "was followed by a normal loss is CS_scenes_2.pth: --resume with that file and another --snapshot-dir and a "
     "lower"),
    ([3, 2, 2, 50, 1e3, 1e9, 1e20, 1e20], 1e20, "2", [2, 6, 8], "diverged; the newest snapshot that was followed by a "
     "normal loss is CS_scenes_2.pth"),
    ([3, 9, 9, 9, 9], 1e5, "1", [2, 4], "the newest snapshot that was followed by a normal loss is CS_scenes_4.pth: "
     "--resume with that file and a lower")])
def test_a_divergence_keeps_and_names_the_newest_sound_snapshot(streets, tmp_path, monkeypatch, losses, last, keep,
                                                                 kept, advice):
    folder = tmp_path / "s"
    finite_losses_then(monkeypatch, losses, last)
    with pytest.raises(UserError, match=advice):
        run(streets, folder, "--backbone", "resnet18", "--save-pred-every", "2", "--keep", keep, steps=20)
    assert [step for step, _ in snapshots.list_snapshots(folder)] == kept
    assert os.readlink(folder / "latest.pth") == f"CS_scenes_{kept[-1]}.pth"


def test_pruning_leaves_what_was_written_last(tmp_path):
    """A damaged snapshot of a higher step, which --resume has passed over, does not count."""
    for step in (1, 2, 9, 3):
        snapshots.save_step(tmp_path, step, {}, keep=1)
    assert [step for step, _ in snapshots.list_snapshots(tmp_path)] == [3, 9]
    assert os.readlink(tmp_path / "latest.pth") == "CS_scenes_3.pth"


def test_what_devices_hand_out_adds_up_to_the_whole_batch():
    """The module that nn.DataParallel replicates, applied to parts: sums of the batch."""
    network = build_network("acfnet_resnet", 5, "resnet18").eval()
    module = NetworkWithLoss(network, SegmentationCriterion(), Normalization(), None)
    images = torch.randint(256, (4, 3, 33, 33), dtype=torch.uint8)
    labels = torch.randint(5, (4, 33, 33), dtype=torch.uint8)
    labels[0, :20] = 255
    with torch.no_grad():
        sums = module(images, labels)
        parts = [module(images[i:i + 2], labels[i:i + 2]) for i in (0, 2)]
    for name, row in sums.items():
        assert row.shape == (1, 2)
        torch.testing.assert_close(torch.cat([part[name] for part in parts]).sum(0, keepdim=True), row)


def test_snapshots_are_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "CS_scenes_1.pth"
    snapshots.save(target, {"a": torch.ones(3)})

    def fail(file):
        file.write(b"half")
        raise OSError("No space left on device")

    with pytest.raises(UserError, match="CS_scenes_1.pth: expected to write a file there, found: No space left"):
        files.write_atomically(target, fail)
    assert torch.equal(files.load(target)["a"], torch.ones(3)) and len(list(tmp_path.iterdir())) == 1
