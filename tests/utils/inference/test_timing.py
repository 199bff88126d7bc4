"""How long predictions take, and --benchmark."""

import re
import time

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from tests.test_evaluate import snapshot  # noqa: F401, a fixture
from tests.utils.imaging.test_video import drawn_frames, write
from utils.common.errors import UserError
from utils.inference import timing
from utils.inference.sliding import SlidingPredictor

pytestmark = pytest.mark.usefixtures("short_networks")
CPU = torch.device("cpu")
LINE = re.compile(r"(\S+) images/s, (\S+) ms per image \(median; spread \S+\), (\S+)% of it beyond the network; "
                  r"peak memory (\S+) GB\n$")


def test_calls_are_counted_and_the_first_is_not():
    called = []
    assert len(timing.time_calls(lambda: called.append(0), CPU, 5)) == 5 and len(called) == 6
    assert len(timing.time_calls(lambda: time.sleep(0.02), CPU, 100, 0.05)) < 5
    assert len(timing.time_calls(lambda: time.sleep(0.02), CPU, 100, 0.0)) == 1
    actual = timing.median_ms(lambda: time.sleep(0.02), 3, CPU)
    assert 20 <= actual["ms"] < 200 and actual["spread_ms"] >= 0


def test_the_share_beyond_a_network_whose_time_is_known():
    """Two windows of 0.1 s each an image; what is left takes milliseconds. Sizes of crops differ."""
    def network(crops):
        time.sleep(0.1 * len(crops))
        return {"fine": torch.randn(len(crops), 19, 3, 3)}

    images = [np.zeros((17, 30, 3), np.uint8), np.zeros((30, 17, 3), np.uint8)]
    predictor = SlidingPredictor(network, (17, 17), scales=(1.0,), batch_size=1, overlap=0)
    actual = timing.time_prediction(predictor, images, 3)
    assert 200 <= actual["ms"] < 1000 and actual["images_per_s"] == pytest.approx(1e3 / actual["ms"])
    assert actual["beyond_the_network"] < 0.5 and actual["peak_gb"] > 0
    assert predictor.network is network


@pytest.mark.parametrize("kind", ["images", "video", "data"])
def test_a_benchmark_of_the_protocol_at_hand(kind, streets, snapshot, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(timing, "MAX_RUNS", 2)
    Image.fromarray(drawn_frames(1)[0]).save(tmp_path / "a.png")
    write(tmp_path / "a.mp4", drawn_frames())
    before = sorted(tmp_path.iterdir()), sorted(snapshot.parent.iterdir())
    data = {"images": ["--images", str(tmp_path / "a.png")], "video": ["--images", str(tmp_path / "a.mp4")],
            "data": ["--data-dir", str(streets)]}[kind]
    words = ["--restore-from", str(snapshot), *data, "--gpu", "cpu", "--benchmark"]
    evaluate.main([*words, "--whole", "--scales", "0.5", "1", "--batch-size", "3", "--amp", "off"])
    shown = capsys.readouterr().out
    size, images = "128×256" if kind == "data" else "48×64", "1 image" if kind == "images" else "2 images"
    assert f"--amp off: {images} of {size}; whole, 3 at a time, scales 0.5 1, also mirrored\n" in shown
    rate, ms, share, peak = map(float, LINE.search(shown).groups())
    assert rate == pytest.approx(1e3 / ms, rel=0.01) and share > 0 and 0.1 < peak < 20
    assert before == (sorted(tmp_path.iterdir()), sorted(snapshot.parent.iterdir()))
    with pytest.raises(UserError, match="--benchmark: expected .* of which nothing is written, found --save"):
        evaluate.main([*words, "--save", "color"])
