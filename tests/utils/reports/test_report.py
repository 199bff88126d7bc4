"""`report.html`, opened in a browser."""

import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from tests.test_evaluate import run, snapshot  # noqa: F401, a fixture
from utils.metrics.iou import ConfusionMatrix
from utils.metrics.worst import WORST_OVERALL, WORST_PER_CLASS, WorstImages, attention_of

pytestmark = pytest.mark.usefixtures("short_networks")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def add(worst, name, truth, probabilities):
    counts = ConfusionMatrix(3)
    counts.update(probabilities.argmax(0), truth)
    worst.add(name, np.zeros((8, 9, 3), np.uint8), truth, {"fine": probabilities.argmax(0).astype(np.uint8)},
              {"fine": counts}, lambda: attention_of(torch.from_numpy(probabilities)))


def test_the_worst_images_of_all_and_of_each_class_are_kept():
    """Whatever the order, what stays is what sorting everything would give; memory does not grow with the images."""
    rng = np.random.default_rng(0)
    names = ["a", "b", "c"]
    scenes = []
    for number in range(60):
        truth = rng.choice([0, 1, 255] if number % 4 else [0, 1, 2, 255], (8, 9)).astype(np.uint8)
        wrong = rng.uniform(size=truth.shape) < rng.uniform()
        predicted = np.where(wrong, rng.integers(0, 3, truth.shape), np.minimum(truth, 2))
        scenes.append((f"{number:02}", truth, np.eye(3, dtype=np.float32)[predicted].transpose(2, 0, 1)))

    def iou(truth, p, index):
        predicted = p.argmax(0)
        counted = truth != 255
        union = (((predicted == index) | (truth == index)) & counted).sum()
        return ((predicted == index) & (truth == index)).sum() / union if union else np.nan

    means = {name: np.nanmean([iou(truth, p, i) for i in range(3)]) for name, truth, p in scenes}
    expected = set(sorted(means, key=means.get)[:WORST_OVERALL])
    for index in range(3):
        having = [(iou(truth, p, index), name) for name, truth, p in scenes if (truth == index).any()]
        expected |= {name for _, name in sorted(having)[:WORST_PER_CLASS]}
    for order in (range(60), reversed(range(60))):
        worst = WorstImages(names, np.zeros((256, 3), np.uint8))
        for number in order:
            name, truth, p = scenes[number]
            add(worst, name, truth, p)
        assert set(worst.kept) == expected
        assert all("pictures" in entry for entry in worst.entries())
        assert [entry["name"] for entry in worst.entries()][:3] == sorted(means, key=means.get)[:3]
    halves = [WorstImages(names, np.zeros((256, 3), np.uint8)) for _ in range(2)]
    for number, (name, truth, p) in enumerate(scenes):
        add(halves[number % 2], name, truth, p)
    merged = WorstImages(names, None)
    merged.merge([half.kept for half in halves])
    assert set(merged.kept) == expected


def browse(page, *words):
    return subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                           "--virtual-time-budget=4000", *words, page.as_uri()], capture_output=True, text=True,
                          timeout=120)


def test_names_of_files_may_be_any_bytes(streets, snapshot, tmp_path):  # noqa: F811
    odd = shutil.copy(snapshot, tmp_path / os.fsdecode(b"\xff.pth"))
    run(streets, odd, tmp_path / "r", "--scales", "1.0", "--no-flip", "--save", "none")
    assert "\\udcff.pth" in (tmp_path / "r/report.html").read_text()


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_the_report_opens_in_a_browser(streets, snapshot, tmp_path):  # noqa: F811
    result = run(streets, snapshot, tmp_path / "r", "--scales", "1.0", "--no-flip", "--save", "none")
    page = tmp_path / "r/report.html"
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", text), "the page must need nothing else"
    script = ("<script>addEventListener('load', () => { const f = document.getElementById('filter'); f.value = '0';"
              "f.dispatchEvent(new Event('change')); document.title = JSON.stringify({"
              "shown: [...document.querySelectorAll('article')].filter(a => !a.hidden).map(a => "
              "JSON.parse(a.dataset.iou)[0]), broken: [...document.images].filter(i => i.complete && "
              "!i.naturalWidth).length, images: document.images.length, wide: document.documentElement.scrollWidth"
              " > innerWidth}); });</script></body>")
    probe = tmp_path / "probe.html"
    probe.write_text(text.replace("</body>", script))
    title = re.search(r"<title>(.*?)</title>", browse(probe, "--dump-dom", "--window-size=400,800").stdout)[1]
    seen = json.loads(html.unescape(title))
    assert seen["images"] > 3 * 6 and seen["broken"] == 0 and not seen["wide"]
    assert len(seen["shown"]) == 3 and seen["shown"] == sorted(seen["shown"])
    assert f"{100 * result['mean_iou']:.2f} % mean IoU" in text
    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}", "--window-size=1000,1400")
    assert picture.stat().st_size > 20_000
