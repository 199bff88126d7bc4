"""The comparison of models: what its table says, its queue of runs, and how it goes on."""

import csv
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from dataset.labels import ClassTable
from networks.build import build_network
from tests.benchmarks import compare, paper
from tests.conftest import fork
from tests.dataset.test_folders import make
from utils.common.command import Interrupted
from utils.common.errors import UserError
from utils.runs import snapshots
from utils.runs.log import read_lines

pytestmark = pytest.mark.usefixtures("short_networks")
STEPS, MODELS = 6, ("acfnet_resnet", "deeplabv3")
CPU = torch.device("cpu")
COLUMNS = ["model", "seeds", "steps", "mean_iou", "mean_iou_95", "coarse_mean_iou", "coarse_mean_iou_95", "difference",
           "difference_95", "difference_to", "images_per_second", "parameters", "macs", "macs_size",
           "kept_bytes_a_pixel", "evaluation_ms", "image_size", "device"]


def words(data, folder, *more, models=MODELS, seeds=2, steps=STEPS):
    return [str(data), "--models", ",".join(models), "--seeds", str(seeds), "--steps", str(steps), "--output-dir",
            str(folder), "--backbone", "eca_resnet18", "--input-size", "33,33", "--batch-size", "2", "--num-workers",
            "0", "--amp", "off", "--log-every", "1", "--whole", *more]


def fork_run(command, folder):
    """As `compare.start`, which other tests call, but seconds faster."""
    folder.mkdir(parents=True, exist_ok=True)
    return fork(*command, log=folder / "log.txt")


@pytest.fixture(scope="module")
def finished(streets, tmp_path_factory):
    """A comparison that was stopped in its first run, and went on with two runs at a time: its folder, how many steps
    were done when it was stopped, and the most runs at work at once."""
    folder = tmp_path_factory.mktemp("compared")
    metrics = folder / f"{MODELS[0]}_seed0/metrics.jsonl"
    runs, most = [], 0

    def start(*command):
        nonlocal most
        runs.append(fork_run(*command))
        most = max(most, sum(process.poll() is None for process in runs))
        return runs[-1]

    def stop():
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "start", start)
        patch.setattr(compare, "MAX_RUNS", 3)
        threading.Thread(target=stop).start()
        with pytest.raises(Interrupted) as caught:
            compare.main(words(streets, folder, "--gpu", "cpu"))
        assert caught.value.number == signal.SIGTERM and len(runs) == 1
        (stopped, _), = snapshots.list_snapshots(metrics.parent)
        patch.setattr(compare, "select_devices", lambda gpu: [CPU, CPU])
        compare.main(words(streets, folder))
    return folder, stopped, most


def results(folder, model):
    return [json.loads((folder / f"{model}_seed{seed}/result/result.json").read_text()) for seed in range(2)]


def test_the_table_says_what_the_runs_say(finished, streets):
    folder, _, _ = finished
    with open(folder / "table.csv", newline="") as file:
        reader = csv.DictReader(file)
        rows = {row["model"]: row for row in reader}
    assert reader.fieldnames == COLUMNS and list(rows) == list(MODELS)
    with_acf, base = ([result["mean_iou"] for result in results(folder, model)] for model in MODELS)
    coarse = [result["coarse"]["single_scale"]["mean_iou"] for result in results(folder, MODELS[0])]
    row = rows[MODELS[0]]
    for name, values in (("mean_iou", with_acf), ("coarse_mean_iou", coarse),
                         ("difference", np.subtract(with_acf, base))):
        assert float(row[name]) == pytest.approx(np.mean(values))
        # Student's t with one degree of freedom, 95 %: tan(0.475 π)
        half = np.tan(0.475 * np.pi) * np.std(values, ddof=1) / np.sqrt(2)
        assert float(row[f"{name}_95"]) == pytest.approx(half, rel=1e-4) and half > 0
    assert rows["deeplabv3"]["difference"] == rows["deeplabv3"]["coarse_mean_iou"] == ""
    assert row["difference_to"] == "deeplabv3"
    rates = [line["images_per_second"] for seed in range(2)
             for line in read_lines(folder / f"{MODELS[0]}_seed{seed}/metrics.jsonl")[1:]]
    assert float(row["images_per_second"]) == pytest.approx(median(rates)) and len(rates) == 2 * (STEPS - 1)
    network = build_network(MODELS[0], backbone="eca_resnet18").eval()
    parameters = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("aux"))
    assert int(row["parameters"]) == parameters and row["macs_size"] == row["image_size"] == "128x256"
    assert float(row["evaluation_ms"]) > 0 and float(row["kept_bytes_a_pixel"]) > 100
    shown = (folder / "table.txt").read_text()
    line, = (line for line in shown.splitlines() if line.startswith(MODELS[0]))
    numbers = [float(number) for number in re.findall(r"[\d.]+", line.replace("−", "-"))]
    assert numbers[:3] == [2, round(100 * np.mean(with_acf), 2), round(100 * float(row["mean_iou_95"]), 2)]
    assert f"mean IoU in per cent after {STEPS} steps" in shown and "fine − deeplabv3" in shown
    with Image.open(folder / "scores.png") as picture:
        assert picture.size == (960, 600) and len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_a_stopped_run_goes_on_and_two_devices_share_the_runs(finished):
    folder, stopped, most = finished
    assert 1 <= stopped < STEPS and most == 2
    log = (folder / f"{MODELS[0]}_seed0/log.txt").read_text()
    assert f"stopped after step {stopped}" in log and f"resumed {folder}/{MODELS[0]}_seed0/CS_scenes_{stopped}" in log
    for model in MODELS:
        for seed in range(2):
            steps = [line["step"] for line in read_lines(folder / f"{model}_seed{seed}/metrics.jsonl")]
            assert steps == list(range(1, STEPS + 1))
    assert all(result["num_images"] == 3 and result["protocol"]["window"] is None
               for result in results(folder, "deeplabv3"))


def test_what_is_finished_is_not_done_again(finished, streets, monkeypatch, capsys):
    folder, _, _ = finished
    monkeypatch.setattr(compare, "start", lambda *_: pytest.fail("a finished run was started again"))
    monkeypatch.setattr(compare, "cost", lambda *_: pytest.fail("a network was measured again"))
    before = (folder / "table.csv").read_bytes()
    compare.main(words(streets, folder, "--gpu", "cpu", "--log-every", "5"))      # that changes nothing
    assert (folder / "table.csv").read_bytes() == before
    compare.main(words(streets, folder, "--gpu", "cpu", models=["deeplabv3"], seeds=1))
    assert "±" not in capsys.readouterr().out.splitlines()[-2]
    for failed, status in (([2, 2], 2), ([2, -9], 1)):
        monkeypatch.setattr(compare, "run_all", lambda *_, failed=failed: failed)
        with pytest.raises(SystemExit) as caught:
            compare.main(words(streets, folder, "--gpu", "cpu"))
        assert caught.value.code == status and "MACs" in capsys.readouterr().out      # what there is is shown
    for more, name in ((("--learning-rate", "0.5"), "learning-rate"), (("--flip",), "protocol")):
        with pytest.raises(UserError, match=f"--output-dir .*same {name}, found .* there and .* here"):
            compare.main(words(streets, folder, "--gpu", "cpu", *more))
    with pytest.raises(UserError, match=f"same steps, found {STEPS} there and 5 here"):
        compare.main(words(streets, folder, "--gpu", "cpu", steps=5))


def test_a_seed_fixes_the_samples_of_all_models(streets, tmp_path, monkeypatch):
    """Batches as train.py's own assembly gives them: the same for each model of a seed, others for another seed."""
    monkeypatch.setattr(compare, "compare", lambda comparison, devices: made.append(comparison))
    made, seen = [], {}
    compare.main(words(streets, tmp_path, "--random-mirror", "--random-scale", "--gpu", "cpu", steps=6))
    compare.main(words(streets, tmp_path, "--gpu", "cpu", models=["fcn", "ccnet+acf"]))
    comparison, other = made
    assert (comparison.base, other.base) == ("deeplabv3", "fcn")
    assert other.variants[1].words == ("--model", "ccnet", "--acf")
    for variant in comparison.variants:
        for seed in range(2):
            monkeypatch.setattr(train, "perform", lambda run, key=(variant.name, seed): seen.__setitem__(
                key, [(batch["name"], batch["image"].clone()) for batch in run.batches]) or 0)
            train.main(comparison.training_words(variant, seed))
    first, other = (seen[MODELS[0], seed] for seed in range(2))
    assert len(first) == 6
    for (names, images), (others, other_images) in zip(first, seen[MODELS[1], 0], strict=True):
        assert names == others and torch.equal(images, other_images)
    assert [names for names, _ in first] != [names for names, _ in other]


def test_data_in_two_folders(tmp_path, monkeypatch, capsys):
    """Named by train.py's own flags, without a first word: trained, scored, and timed on an image of theirs."""
    def train_and_score(comparison, gpus):
        train.main(comparison.training_words(comparison.variants[0], 0))
        evaluate.main(comparison.scoring_words(comparison.variants[0], 0))

    monkeypatch.setattr(compare, "MAX_RUNS", 1)
    monkeypatch.setattr(compare, "run_all", train_and_score)
    images, labels = make(tmp_path, "train/a", "train/b", "val/c")
    data, *common = words("DATA", tmp_path / "r", "--gpu", "cpu", models=["fcn"], seeds=1, steps=1)
    compare.main([f"--images-dir={images}", "--labels-dir", labels, *common])
    result = json.loads((tmp_path / "r/fcn_seed0/result/result.json").read_text())
    assert result["num_images"] == 1 and "fcn" in capsys.readouterr().out.splitlines()[-2]
    other = make(tmp_path / "other", "train/a", "val/c")
    for more, sentence in (
            (["--images-dir", other[0], "--labels-dir", other[1]], f"same images-dir, found {images} there and"),
            (["--images-dir", f"{images}/train", "--labels-dir", f"{labels}/train"],
             "scoring: expected --val-list with --images-dir, found none"),
            (["--images-dir", images], "expected both"), ([], "--data-dir: expected the folder of the data set, or")):
        with pytest.raises(UserError, match=sentence):
            compare.main([*common, *more])
    with pytest.raises(UserError, match="expected both and no --data-dir"):
        compare.main([data, *common, "--images-dir", images, "--labels-dir", labels])


def stand_in(name, train_code, score="result = dict(mean_iou=0.5)"):
    """A variant whose training and scoring are a few lines of Python, with `folder` the run's."""
    folder = ("import json, os, signal, sys, time; from pathlib import Path\n"
              "folder = Path(sys.argv[sys.argv.index('{}') + 1])\n")
    scored = f"{score}\nfolder.mkdir(exist_ok=True); (folder / 'result.json').write_text(json.dumps(result))"
    return compare.Variant(name, (), ("-c", f"{folder.format('--snapshot-dir')}{train_code}"),
                           ("-c", f"{folder.format('--output-dir')}{scored}"))


def stand_ins(folder, *variants, seeds=1):
    return compare.Comparison(variants=variants, base=variants[0].name, seeds=seeds, steps=3,
                              words=("--data-dir", "x"), protocol=(), folder=folder)


DONE = "(folder / 'CS_scenes_3.pth').touch()"


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path, capsys):
    comparison = stand_ins(tmp_path, stand_in("wrong", "print('error: --x: expected y'); sys.exit(2)"),
                           stand_in("killed", "os.kill(os.getpid(), signal.SIGKILL)"),
                           stand_in("good", DONE), seeds=2)
    assert sorted(compare.run_all(comparison, ["cpu", "cpu"])) == [-9, -9, 2, 2]
    out, error = capsys.readouterr()
    assert "good, seed 1: mIoU 50.00 %" in out
    assert "wrong, seed 0: failed, --x: expected y; see" in error
    assert "killed, seed 1: failed, ended by SIGKILL" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_reaches_the_runs(tmp_path, number, capsys):
    """Those at work save and end, no other begins, and the exit status is the signal's."""
    saving = (f"signal.signal({int(number)}, lambda *_: ((folder / 'saved').touch(), sys.exit({128 + number})))\n"
              "(folder / 'begun').touch(); time.sleep(60)")
    comparison = stand_ins(tmp_path, *(stand_in(name, saving) for name in "abc"))

    def ask():
        while not all((tmp_path / f"{name}_seed0/begun").exists() for name in "ab"):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask).start()
    with pytest.raises(Interrupted) as caught:
        compare.run_all(comparison, ["cpu", "cpu"])
    assert caught.value.number == number and capsys.readouterr().out.endswith("stopped; the same command goes on\n")
    assert [(tmp_path / f"{name}_seed0/saved").exists() for name in "abc"] == [True, True, False]


@pytest.mark.parametrize("more, sentence", [
    (["--models", "base,nothing"], "--models: expected models of .*, found 'nothing'"),
    (["--models", "base,acfnet,base"], "--models: expected every model once, found base twice"),
    (["--models", "base+acf+acf"], "--models: expected models of .*, found"),
    (["--models", "danet+acf"], "--acf: expected a model whose head takes one feature map, found danet"),
    (["--models", ","], "--models: expected models, found none"),
    (["--steps", "0"], "--steps: expected a number above 0, found '0'"),
    (["--seeds", "31"], "--seeds: expected a number above 0 and at most 30"),
    (["--modles", "base"], "--modles: expected a flag of this command, perhaps --model, found"),
    (["--snapshot-dir", "x"], "--snapshot-dir: expected a flag of train.py .*itself, by --output-dir"),
    (["--snap=x"], "--snap: expected a flag of this command, perhaps --snapshot-dir, found"),
    (["--model", "acfnet"], "--model: .*itself, by --models"),
    (["--random-seed", "1234"], "--random-seed: .*itself, by --seeds"),
    (["--num-steps", "60000"], "--num-steps: .*itself, by --steps"),
    (["--resume"], "--resume: .*itself, always"),
    (["--data-list", "train.lst"], "scoring: expected --val-list with --data-list, found none"),
    (["--val-split", "nowhere"], "nowhere"),
    (["--ablations", "norms"], "--ablations norms: expected a --model with ACF, found deeplabv3"),
    (["--batch-size", "x"], "--batch-size: expected a whole number"),
    (["--overlap", "1"], "--overlap: expected a share below 1"),
    (["--window", "97,97", "--whole"], "--whole: expected no size of windows with it, found 97×97"),
], ids=lambda value: "" if isinstance(value, str) else " ".join(value))
def test_bad_input_is_one_sentence_before_anything_is_written(streets, tmp_path, more, sentence, monkeypatch):
    monkeypatch.setattr(compare, "start", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(UserError, match=sentence) as caught:
        compare.main(words(streets, tmp_path / "r", "--gpu", "cpu", *more))
    assert len(str(caught.value).strip().splitlines()) == 1
    assert not Path(tmp_path / "r").exists()


def test_no_data_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="leftImg8bit"):
        compare.main(words(tmp_path, tmp_path / "r", "--gpu", "cpu"))
    assert not (tmp_path / "r").exists()


def test_students_t():
    stats = pytest.importorskip("scipy.stats")
    for count, value in compare.T_95.items():
        assert value == pytest.approx(stats.t.ppf(0.975, count - 1), abs=5.1e-4)
    values = [0.3, 0.5, 0.1, 0.7]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    middle, half = compare.interval(values)
    assert (middle - half, middle + half) == pytest.approx((low, high), abs=1e-4)
    assert compare.interval([0.25]) == (0.25, None)


def test_the_papers_figures_stand_beside_those_here(streets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "start", fork_run)
    monkeypatch.setattr(compare, "MAX_RUNS", 1)
    small = ["--backbone", "eca_resnet18", "--input-size", "33,33", "--batch-size", "2", "--num-workers", "0", "--amp",
             "off", "--whole", "--scales", "0.5", "--gpu", "cpu", "--output-dir", str(tmp_path)]
    compare.main([str(streets), "--paper", "--steps", "2", *small])
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "acfnet_seed0/result/result.json").read_text())
    lines = (tmp_path / "paper.txt").read_text().splitlines()
    assert "\n".join(lines) in shown and (tmp_path / "table.txt").exists()
    cells = {line[:25].strip(): line[25:].split() for line in lines}
    assert cells["input size"] == ["769×769", "33×33"] and cells["learning rate"] == ["0.01", "0.01"]
    assert cells["num steps"] == ["60000", "2"] and cells["weight decay"] == ["0.0001"] * 2
    assert cells["mean IoU, %, val"] == ["81.46", f"{100 * result['mean_iou']:.2f}"]
    assert cells["mean IoU, %, test"] == ["81.85"] and cells["mirror"] == ["yes", "yes"]
    iou = result["multi_scale" if "multi_scale" in result else "single_scale"]["class_iou"]
    assert cells["road, test / val"] == ["98.7", f"{100 * iou['road']:.1f}"]
    assert set(paper.CLASSES) == set(ClassTable.read().names)
    # The published mean is that of the published classes.
    assert np.mean(list(paper.CLASSES.values())) == pytest.approx(paper.TEST, abs=0.005)
    train.get_parser().parse_args(paper.words())
    with pytest.raises(UserError, match="--models: expected with this command, unless --paper is given, found none"):
        compare.main([str(streets), "--steps", "2"])
