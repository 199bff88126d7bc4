"""The pass over a data set: what overlaps, and that threads and devices change no score."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.labels import ClassTable
from tests.fake_cuda import GPU, fake_gpu
from utils.common.compat import torch_version
from utils.inference.pictures import Pictures
from utils.metrics.evaluation import Evaluation, HostImage, ScoredImage

SIZE = (24, 40)


class Items:
    """Six random images of 19 classes, with instances."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.classes, self.names = ClassTable.read(), [f"image {number}" for number in range(6)]
        self.items = []
        for number, name in enumerate(self.names):
            label = rng.choice([*range(19), 255], (6, 10)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
            instances = np.where(label == 13, 26_001 + number, 7).astype(np.int32)
            self.items.append({"image": torch.from_numpy(rng.integers(0, 256, (3, *SIZE), dtype=np.uint8)),
                               "label": torch.from_numpy(label), "instances": torch.from_numpy(instances),
                               "index": number, "name": name})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Predictor:
    """Random probabilities of each image, and an event for each call."""

    device = torch.device("cpu")

    def __init__(self):
        self.called, self.count = [threading.Event() for _ in range(7)], 0

    def predict(self, image):
        self.called[self.count].set()
        generator = torch.Generator().manual_seed(self.count)
        self.count += 1
        return {name: {head: torch.rand(19, *SIZE, generator=generator).softmax(0) for head in ("fine", "coarse")}
                for name in ("single_scale", "multi_scale")}


def result(folder, threads, write=None):
    predictor, items = Predictor(), Items()
    pictures = Pictures(folder, ("labels",), items.classes)
    if write:
        pictures.write = lambda name, *rest: write(predictor, items.names.index(name))
    passed = Evaluation(items, pictures, 2.0)
    passed.run(predictor, 0, threads=threads)
    return passed.result("snapshot.pth", {}), passed.worst.entries()


def test_the_next_image_is_predicted_while_one_is_counted(tmp_path):
    def write(predictor, number):
        assert number == 5 or predictor.called[number + 1].wait(30), "the next image waits for this one"
    result(tmp_path, 1, write)


def test_scores_do_not_depend_on_the_order_of_threads(tmp_path):
    """Each image waits for the one after it, as far as threads allow."""
    done = [threading.Event() for _ in range(7)]

    def write(predictor, number):
        if number % 2 == 0:
            assert done[number + 1].wait(30)
        done[number].set()
    assert result(tmp_path, 3, write) == result(tmp_path, 1)
    assert len([*tmp_path.glob("labelIds/*.png")]) == 6


def test_an_error_in_a_thread_reaches_the_caller(tmp_path):
    (tmp_path / "labelIds").write_text("not a folder")
    with pytest.raises(Exception, match="image 0.png: expected to write a file there"):
        result(tmp_path, 2)


@pytest.mark.skipif(torch_version() < (2, 9), reason="older fake tensors know other operators")
def test_nothing_of_an_image_is_waited_for_on_a_gpu(monkeypatch):
    """Everything is queued, then an event that the threads wait for; and the probabilities can be freed."""
    events = []
    stream = SimpleNamespace()
    pictures = Pictures(None, ("confidence",), None)
    with fake_gpu(monkeypatch) as gpu:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: SimpleNamespace(
            record=lambda where: events.append(where), synchronize=lambda: events.append("waited")))
        predicted = {"multi_scale": {head: torch.zeros(19, *SIZE, device=GPU) for head in ("fine", "coarse")}}
        item = {"image": torch.zeros(3, *SIZE, dtype=torch.uint8), "label": torch.zeros(SIZE, dtype=torch.uint8)}
        gpu.clear()
        image = HostImage.of(ScoredImage(item, predicted, 19), pictures)
        assert gpu.waits == [] and events == [stream]
        arrived = [*image.labels.values(), image.gray, *image.attention(), *(counts._counts for counts in (
            *image.matrices["multi_scale"].values(), *image.calibration.values()))]
        assert len(arrived) == 9 and all(tensor.is_cpu for tensor in arrived)
    image.wait()
    assert events == [stream, "waited"]
