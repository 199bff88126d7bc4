"""Images without truth, submissions, and the exported network."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from dataset.cityscapes import CityscapesDataset
from dataset.images import ImageFiles, find_images, images_of_split, write_submission
from dataset.labels import ClassTable
from tests.test_evaluate import snapshot  # noqa: F401, a fixture
from utils.common.errors import UserError
from utils.inference.sliding import SlidingPredictor

pytestmark = pytest.mark.usefixtures("short_networks")
QUICK = ["--gpu", "cpu", "--num-workers", "0", "--scales", "1.0", "--no-flip", "--amp", "off"]


def picture(height=40, width=70):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def zoo(tmp_path):
    """Images of all kinds, and two broken files."""
    folder = tmp_path / "zoo"
    (folder / "inner folder").mkdir(parents=True)
    rgb = Image.fromarray(picture())
    rgb.save(folder / "plain.png")
    rgb.convert("L").save(folder / "gray.png")
    rgb.convert("RGBA").save(folder / "transparent.png")
    rgb.quantize(16).save(folder / "palette.png")
    rgb.save(folder / "inner folder" / "plain.png")
    rgb.save(folder / "ünïcode.webp", lossless=True)
    Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6        # to be turned by 90 degrees
    rgb.save(folder / "turned.jpg", exif=exif, quality=95)
    (folder / "broken.png").write_bytes((folder / "plain.png").read_bytes()[:300])
    (folder / "text.jpg").write_text("<html>")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_any_images_are_predicted_and_broken_ones_are_named(zoo, snapshot, tmp_path, capsys):  # noqa: F811
    with pytest.raises(UserError, match="expected images that can be read, found 2 that are skipped") as caught:
        evaluate.main(["--restore-from", str(snapshot), "--images", str(zoo), "--output-dir", str(tmp_path / "r"),
                       *QUICK, "--save", "labels", "overlay"])
    assert caught.value.status == 1
    shown = capsys.readouterr()
    assert "8 images predicted, 2 skipped" in shown.out
    for name in ("broken.png", "text.jpg"):
        assert sum(name in line for line in shown.err.splitlines() if line.startswith("skipped: ")) == 1
    written = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "r/labelIds").iterdir()}
    plain = next(name for name in written if name.endswith("plain") and "inner" not in name)
    assert {name.split("_")[-1] for name in written} == {"plain", "gray", "transparent", "palette", "deep", "turned",
                                                         "ünïcode"}
    assert len(written) == 8 and set(np.unique(written[plain])) <= set(ClassTable.read().ids)
    turned = next(values for name, values in written.items() if name.endswith("turned"))
    assert turned.shape == (70, 40) and written[plain].shape == (40, 70)
    same = [values for name, values in written.items() if name.split("_")[-1] in ("plain", "transparent", "ünïcode")]
    assert len(same) == 4 and all(np.array_equal(values, same[0]) for values in same)
    gray, deep = (next(v for n, v in written.items() if n.endswith(kind)) for kind in ("gray", "deep"))
    assert np.array_equal(gray, deep)
    assert len(list((tmp_path / "r/overlay").iterdir())) == 8 and not (tmp_path / "r/color").exists()


def test_files_folders_and_patterns(zoo):
    assert find_images([zoo / "plain.png"]) == {zoo / "plain.png": Path("plain.png")}
    assert {path.name for path in find_images([f"{zoo}/*.jpg", zoo / "turned.jpg"])} == {"turned.jpg", "text.jpg"}
    assert len(find_images([zoo])) == 10
    (zoo / "empty").mkdir()
    with pytest.raises(UserError, match="empty: expected images .* in it, found none"):
        find_images([zoo / "empty"])


def test_a_submission_is_checked_and_packed_flat(streets, snapshot, tmp_path, capsys):  # noqa: F811
    words = ["--data-dir", str(streets), "--restore-from", str(snapshot), "--split", "val", "--submission",
             str(tmp_path / "s"), *QUICK]
    evaluate.main(words)
    assert "3 label maps checked (the official test split has 1525)" in capsys.readouterr().out
    stems = sorted(path.stem for path in streets.glob("leftImg8bit/val/*/*.png"))
    with zipfile.ZipFile(tmp_path / "s/submission.zip") as archive:
        assert sorted(archive.namelist()) == [f"{stem}.png" for stem in stems] and archive.testzip() is None
        for name in archive.namelist():
            labels = np.asarray(Image.open(archive.open(name)))
            assert labels.shape == (128, 256) and labels.dtype == np.uint8
            assert set(np.unique(labels)) <= set(ClassTable.read().ids)
    with pytest.raises(UserError, match="--submission .*: expected a folder without results"):
        evaluate.main(words)


def test_a_submission_with_a_wrong_file_is_refused(streets, tmp_path):
    dataset, classes = ImageFiles(images_of_split(streets, "val")), ClassTable.read()
    (tmp_path / "labelIds").mkdir()
    for name in dataset.names:
        Image.fromarray(np.full((128, 256), 7, np.uint8)).save(tmp_path / f"labelIds/{name}.png")
    write_submission(tmp_path / "labelIds", dataset, classes)
    (tmp_path / "submission.zip").unlink()
    victim = tmp_path / f"labelIds/{dataset.names[2]}.png"
    for values, message in ((np.full((128, 256), 3), r"values \[3\]"), (np.full((64, 256), 7), "256×64")):
        Image.fromarray(values.astype(np.uint8)).save(victim)
        with pytest.raises(UserError, match=f"{victim.name}: expected 8-bit label ids of 256×128 pixels, .*{message}"):
            write_submission(tmp_path / "labelIds", dataset, classes)
    victim.unlink()
    with pytest.raises(UserError, match="expected the prediction for"):
        write_submission(tmp_path / "labelIds", dataset, classes)
    assert not (tmp_path / "submission.zip").exists()


def test_a_submission_fits_images_as_they_are_seen(tmp_path):
    """Upright by EXIF; and whatever stands in place of an image or a prediction is said, not waited for."""
    exif = Image.Exif()
    exif[0x0112] = 6        # to be turned by 90 degrees
    Image.fromarray(picture(40, 70)).save(tmp_path / "a.png", exif=exif)
    dataset, labels = ImageFiles([tmp_path / "a.png"]), tmp_path / "labelIds/a.png"
    labels.parent.mkdir()
    Image.fromarray(np.full((70, 40), 7, np.uint8)).save(labels)
    write_submission(labels.parent, dataset, ClassTable.read())
    Image.fromarray(np.full((40, 70), 7, np.uint8)).save(labels)
    with pytest.raises(UserError, match="a.png: expected 8-bit label ids of 40×70 pixels, found mode L, 70×40"):
        write_submission(labels.parent, dataset, ClassTable.read())
    for file, what in ((labels, "the prediction for .*a.png"), (tmp_path / "a.png", "an image")):
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(UserError, match=f"a.png: expected {what}, found a pipe"):
            write_submission(labels.parent, dataset, ClassTable.read())


def test_the_exported_network_gives_the_labels_of_the_whole_image(snapshot, tmp_path, capsys):  # noqa: F811
    """At any size: logits equal those under the labels of --whole, and so do labels but where two classes tie."""
    onnxruntime = pytest.importorskip("onnxruntime")
    target = tmp_path / "acfnet.onnx"
    evaluate.main(["--restore-from", str(snapshot), "--export", str(target)])
    assert "fine, coarse logits" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    network, config = evaluate.load_network(snapshot, torch.device("cpu"))
    predictor = SlidingPredictor(network, None, normalization=config.normalization)
    for height, width in ((64, 64), (65, 97), (71, 40), (33, 200), (3, 50), (1, 1)):
        images = np.stack([picture(height, width), picture(height, width)[::-1, ::-1]])
        outputs = session.run(None, {"images": images.transpose(0, 3, 1, 2).astype(np.float32)})
        for number, image in enumerate(images):
            for head, actual in zip(("fine", "coarse"), outputs, strict=True):
                probabilities = predictor.predict(image.copy())["single_scale"][head]
                logits = torch.from_numpy(actual[number])
                torch.testing.assert_close(logits.log_softmax(0), probabilities.log(), rtol=0, atol=1e-4)
                best = logits.topk(2, 0).values
                differ = logits.argmax(0) != probabilities.argmax(0)
                assert not (differ & (best[0] - best[1] > 1e-5)).any() and differ.float().mean() < 1e-3


def test_export_without_its_packages_is_a_sentence(snapshot, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match="expected the packages onnx and onnxscript, found no onnx"):
        evaluate.main(["--restore-from", str(snapshot), "--export", str(tmp_path / "x.onnx")])
    assert not Path(tmp_path / "x.onnx").exists()


def predicted_names(*places):
    return ImageFiles(find_images(places)).names


def test_names_of_predictions_are_unique_and_never_hidden(tmp_path, monkeypatch):
    """Relative to what was named, whichever way: as it is, absolute, or through '..'."""
    folder = tmp_path / "pictures"
    for name in ("x.JPG", "x.png", "b/c.png", "b_c.png", "a/c.png", "a/deep/y.png", ".hidden.png", ".hidden/z.png",
                 ".x.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    expected = ["a_c", "y", "b_c.png", "b_c", "x.JPG", "x.png"]
    monkeypatch.chdir(folder / "a")
    for place in (folder, "..", "../../pictures", "../a/.."):
        assert predicted_names(place) == expected, place
    assert predicted_names("../x.png") == ["x"] and predicted_names("../.x.png") == ["x"]
    assert predicted_names("../x.png", "../.x.png") == ["x.png", "x.png_2"]
    assert sorted(predicted_names("../*.png", "c.png")) == ["b_c", "c", "x"]
    assert predicted_names("../a", "../b") == ["a_c", "y", "b_c"]
    assert len(set(predicted_names("..", ".", "../b/c.png", "../x.*"))) == 6


def test_links_to_folders_are_followed_without_circles(tmp_path):
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for name in (folder / "real/a.png", elsewhere / "b.png"):
        name.parent.mkdir(parents=True)
        name.write_bytes(b"")
    (folder / "again").symlink_to("real")
    (folder / "real/up").symlink_to("..")
    (folder / "real/self").symlink_to("self")
    (folder / "out").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert list(find_images([folder])) == [folder / "out/b.png", folder / "real/a.png"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda p: p.symlink_to("gone")])
def test_only_regular_files_are_images(tmp_path, make):
    make(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png: expected a regular file, a folder or a pattern, found none"):
        find_images([tmp_path / "a.png"])
    dead = not os.path.exists(tmp_path / "a.png")
    for place in (tmp_path, f"{tmp_path}/*.png", "x" * 300, tmp_path / "a.png/b.png"):
        inside = dead and str(place).startswith(f"{tmp_path}") and not str(place).endswith("b.png")
        with pytest.raises(UserError, match="expected a file, found a link to gone, which does not exist" if inside else
                           "--images .*: expected .*, found none"):
            find_images([place])


def test_every_image_of_a_list_has_a_name_of_its_own(tmp_path):
    """Of a data set with images inside and outside of its root."""
    for name in ("root/x.jpg", "root/x.png", "other/x.png", "label.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "root/list.txt").write_text("x.jpg ../label.png\nx.png ../label.png\n../other/x.png ../label.png\n"
                                            f"{tmp_path}/root/x.png ../label.png\n")
    dataset = CityscapesDataset(tmp_path / "root", data_list=tmp_path / "root/list.txt")
    assert dataset.names == ["root_x.jpg", "root_x.png", "other_x", "root_x.png_2"]


def test_names_as_long_as_the_file_system_takes(snapshot, tmp_path):  # noqa: F811
    """One that just fits is written; where stems meet and the folder comes before, it is said before anything is."""
    (tmp_path / "a").mkdir()
    Image.fromarray(picture()).save(tmp_path / "a" / f"{'x' * 251}.png")
    words = ["--restore-from", str(snapshot), "--output-dir", str(tmp_path / "r"), *QUICK, "--images"]
    evaluate.main([*words, str(tmp_path / "a"), "--save", "labels"])
    assert [path.stem for path in (tmp_path / "r/labelIds").iterdir()] == ["x" * 251]
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="--output-dir .*: expected names of at most 255 bytes, found ._xxx.* 257$"):
        evaluate.main([*words, *(str(path) for path in (tmp_path / "a", tmp_path / "b")), "--overwrite"])
    assert [path.stem for path in (tmp_path / "r/labelIds").iterdir()] == ["x" * 251]


def test_as_many_files_are_written_as_are_said(zoo, snapshot, tmp_path, capsys):  # noqa: F811
    for name in ("plain.JPG", "inner folder_plain.png"):
        Image.fromarray(picture()).save(zoo / name)
    evaluate.main(["--restore-from", str(snapshot), "--images", *map(str, zoo.glob("**/*plain*")), "--output-dir",
                   str(tmp_path / "r"), *QUICK, "--save", "labels"])
    assert "4 images predicted, 0 skipped" in capsys.readouterr().out
    assert len(list((tmp_path / "r/labelIds").iterdir())) == 4
    evaluate.main(["--restore-from", str(snapshot), "--images", str(zoo / "plain.JPG"), "--output-dir",
                   str(tmp_path / "n"), *QUICK, "--save", "none"])
    assert f"1 image predicted, 0 skipped; results in {tmp_path / 'n'}\n" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["r", "."])
def test_results_among_the_images_are_not_predicted(snapshot, tmp_path, capsys, place):  # noqa: F811
    """Also where they lie beside the images, and a file of another program has the name of our record."""
    own = tmp_path / "own/a.png"
    (tmp_path / "own").mkdir()
    Image.fromarray(picture()).save(own)
    (tmp_path / "written.json").write_text("{}")
    words = ["--restore-from", str(snapshot), "--images", str(own.parent), "--output-dir", str(own.parent / place)]
    for more in ([], ["--overwrite"]):
        evaluate.main([*words, *QUICK, *more])
        assert "1 image predicted, 0 skipped" in capsys.readouterr().out
    assert list(find_images([tmp_path])) == [own]
    assert len(find_images([own.parent / place / "color"])) == 1        # who asks for them gets them
