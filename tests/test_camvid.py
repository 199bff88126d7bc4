"""Real photographs: a short training run and its score."""

import json

import pytest
import torch
import torchvision
from PIL import Image

import evaluate
import train
from networks import build_network
from tests.benchmarks import camvid as comparison
from tests.benchmarks import contribution
from tests.conftest import randomise
from utils.cli import UserError


def test_a_network_learns_from_real_photographs(camvid, tmp_path):
    """Sixty steps from random weights. Guessing one class everywhere gives under 4 % mIoU."""
    data = ["--data-dir", str(camvid), "--gpu", "cpu", "--classes", str(camvid / "classes.csv")]
    train.main([*data, "--data-list", str(camvid / "train.lst"), "--snapshot-dir", str(tmp_path), "--random-mirror",
                "--backbone", "eca_resnet18", "--input-size", "129,129", "--batch-size", "6", "--num-steps", "60",
                "--learning-rate", "4e-2"])
    few = (camvid / "val.lst").read_text().splitlines()[::12]
    (tmp_path / "few.lst").write_text("\n".join(few))
    evaluate.main([*data, "--data-list", str(tmp_path / "few.lst"), "--output-dir", str(tmp_path / "r"), "--whole",
                   "--restore-from", str(tmp_path / "CS_scenes_60.pth"), "--scales", "1.0", "--no-flip"])
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert result["num_images"] == len(few) and set(result["single_scale"]["class_iou"]) >= {"sky", "road", "car"}
    assert result["mean_iou"] > 0.12
    assert result["single_scale"]["class_iou"]["road"] > 0.3


def test_the_comparison_goes_through_and_goes_on(camvid, tmp_path, capsys):
    """Every variant, one step: the commands behind the README's findings."""
    for name in ("images", "labels", "classes.csv"):
        (tmp_path / name).symlink_to(camvid / name)
    for name, count in (("train.lst", 9), ("val.lst", 2)):
        (tmp_path / name).write_text("\n".join((camvid / name).read_text().splitlines()[:count]))
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    words = [str(tmp_path), str(tmp_path / "w.pth"), "--steps", "1", "--size", "209,209", "--batch-size", "2",
             "--output-dir", str(tmp_path / "r"), "--gpu", "cpu"]
    comparison.main([*words, "--seeds", "1"])
    lines = [json.loads(line) for line in (tmp_path / "r/results.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == list(comparison.VARIANTS)
    assert all(0 <= line["fine"] <= 1 for line in lines) and (tmp_path / "r/curves.png").stat().st_size > 10_000
    comparison.main([*words, "--seeds", "2", "--variants", "acfnet_resnet"])
    assert len((tmp_path / "r/results.jsonl").read_text().splitlines()) == len(lines) + 1
    assert "acfnet_resnet                     2 seeds   fine " in (tmp_path / "r/table.txt").read_text()
    capsys.readouterr()
    contribution.main([str(tmp_path), str(tmp_path / "r"), "--gpu", "cpu"])
    shown = capsys.readouterr().out
    assert "acfnet_resnet, 2 networks" in shown and "another photograph's centers" in shown


def test_a_file_of_something_else_is_a_sentence(tmp_path):
    classes = tmp_path / "classes.csv"
    classes.write_text("name,id,train_id,red,green,blue\nroad,0,0,0,0,0\n")
    for name in ("train", "val"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
        Image.new("L", (9, 9)).save(tmp_path / f"{name}_label.png")
        (tmp_path / f"{name}.lst").write_text(f"{name}.png {name}_label.png\n")
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: expected a network of .*camvid, found a file without variant"):
        contribution.main([str(tmp_path), str(tmp_path), "--gpu", "cpu"])


def test_the_term_by_its_matrix_is_the_networks():
    network = build_network("acfnet_resnet", 11, "resnet18", norm="bn", activation="relu").eval()
    randomise(network)
    images = torch.randint(0, 256, (2, 3, 33, 41), dtype=torch.uint8)
    _, coarse, alone, matrix = contribution.look(network, images, torch.device("cpu"), None)
    with torch.inference_mode():
        outputs = network(contribution.Normalization()(images))
    torch.testing.assert_close(alone + contribution.mix(matrix(), coarse), outputs["fine"], rtol=1e-3, atol=1e-3)
    assert (alone - outputs["fine"]).abs().max() > 0.1
