"""What an evaluation costs beside the network: counting, pictures and the index of class-uniform sampling.

    python -m tests.benchmarks.evaluation [--images 24] [--runs 3] [--against FOLDER]

Synthetic images of 2048×1024 with the noise of a sensor and 25 instances, the default pictures, and a predictor that
hands out the same probabilities of two heads at no cost. FOLDER is a checkout of another commit, which is measured in
turns with this one; then a column shows the ratio of both. On the CPU the threads also do what a GPU would count.

main thread         ms per image between two calls of the predictor: CPU time of that thread, as it waits for the others
counting + writing  images/s from the first image to the last picture
WorstImages         ms per image that is not kept, by the number of classes
ClassSampler        MB that 20,000 images of 19 classes with 16 pixels each add, and µs per sample
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZE = (1024, 2048)
CLASS_COUNTS = (19, 50, 150, 253)


class Items:
    """A data set of synthetic images, with labels and instances.

    Args:
        count: number of images.
    """

    def __init__(self, count):
        import cv2
        import numpy as np
        import torch

        from dataset.labels import ClassTable

        self.classes, self.names = ClassTable.read(), [f"image_{number:04}" for number in range(count)]
        rng = np.random.default_rng(0)
        regions = rng.integers(0, self.classes.num_classes, (16, 32)).astype(np.uint8)
        label = cv2.resize(regions, SIZE[::-1], interpolation=cv2.INTER_NEAREST)
        instances = self.classes.ids[label].astype(np.int32)
        boxes = rng.integers((0, 0), (SIZE[0] - 120, SIZE[1] - 120), (25, 2))
        for number, (top, left) in enumerate(boxes.tolist()):
            label[top:top + 120, left:left + 120] = self.classes.names.index("car")
            instances[top:top + 120, left:left + 120] = 26_000 + number
        image = rng.normal(self.classes.palette[label], 4).clip(0, 255).astype(np.uint8)
        self.label, self.instances = torch.from_numpy(label), torch.from_numpy(instances)
        self.image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return {"image": self.image, "label": self.label, "instances": self.instances, "index": index,
                "name": self.names[index]}


class FreePredictor:
    """Hands out probabilities whose classes are the true ones, moved by a few pixels, and measures who calls it.

    Attributes:
        seconds: CPU time of that thread between two calls, for each call but the first.
    """

    def __init__(self, label, num_classes):
        import torch

        self.device, self.seconds, self.last = torch.device("cpu"), [], None
        generator = torch.Generator().manual_seed(0)
        self.heads = {}
        for head, pixels in (("fine", 4), ("coarse", 8)):
            values = torch.rand(num_classes, *SIZE, generator=generator)
            values.scatter_(0, label.long().roll(pixels, 1)[None], 3.0)
            self.heads[head] = values / values.sum(0)

    def predict(self, image):
        now = time.thread_time()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = time.thread_time()
        return {"single_scale": dict(self.heads)}


def measure_evaluation(count):
    """{"main thread, ms": ..., "counting + writing, images/s": ...} of one pass over `count` images."""
    from utils.metrics.evaluation import Evaluation
    try:
        from utils.inference.pictures import Pictures
    except ImportError:         # where it was in earlier commits
        from utils.imaging.pictures import Pictures

    items = Items(count)
    predictor = FreePredictor(items.label, items.classes.num_classes)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Pictures(Path(folder), ("labels", "color", "overlay"), items.classes)
        evaluation = Evaluation(items, pictures)
        start = time.perf_counter()
        with pictures:
            evaluation.run(predictor, 0)
        seconds = time.perf_counter() - start
        assert sum(1 for _ in Path(folder).rglob("*.*")) == 3 * count
    return {"main thread, ms per image": 1e3 * statistics.median(predictor.seconds),
            "counting + writing, images/s": count / seconds}


def measure_worst(classes, count=40):
    """ms per image that `WorstImages` does not keep."""
    import numpy as np

    from utils.metrics.iou import ConfusionMatrix
    try:
        from utils.metrics.worst import WorstImages
    except ImportError:         # where it was in earlier commits
        from utils.metrics.report import WorstImages

    palette = np.zeros((256, 3), np.uint8)
    takes_palette = "palette" in inspect.signature(WorstImages).parameters      # else, earlier, a function
    worst = WorstImages([str(i) for i in range(classes)], palette if takes_palette else lambda labels: palette[labels])
    image = np.zeros((classes, 8, 3), np.uint8)
    truth = np.repeat(np.arange(classes, dtype=np.uint8)[:, None], 8, 1)
    seconds = []
    for number in range(12 + count):
        predicted = truth.copy()
        if number < 12:                  # the first ones are worse than all others, and are kept
            predicted[:, :4] = np.roll(predicted[:, :4], 1, axis=0)
        counts = ConfusionMatrix(classes)
        counts.update(predicted, truth)
        start = time.perf_counter()
        worst.add(f"{number:03}", image, truth, {"fine": predicted}, {"fine": counts})
        if number >= 12:
            seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def resident_mb():
    """MB of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_sampler(images=20_000, samples=2_000):
    """{"ClassSampler, MB": ..., "ClassSampler, µs per sample": ...}."""
    import numpy as np

    from dataset.sampling import ClassSampler

    index = np.empty((images, 19, 16, 4), np.int64)
    index[..., 0] = np.arange(images)[:, None, None]
    index[..., 1] = np.arange(19)[:, None]
    index[..., 2:] = np.random.default_rng(0).integers(0, 1024, index.shape[:3] + (2,))
    before = resident_mb()
    sampler = ClassSampler(index.reshape(-1, 4), 0, 0, samples)
    memory = resident_mb() - before
    start = time.perf_counter()
    for _ in sampler:
        pass
    return {"ClassSampler, MB": memory, "ClassSampler, µs per sample": 1e6 * (time.perf_counter() - start) / samples}


def measure(count):
    """All figures of the code in the current folder, as {name: number}."""
    import torch

    torch.set_num_threads(1)
    figures = measure_sampler()         # first, as later figures leave free memory behind
    figures |= measure_evaluation(count)
    return figures | {f"WorstImages, ms per image, {classes} classes": measure_worst(classes)
                      for classes in CLASS_COUNTS}


def run(folder, count):
    """The figures of the code in a folder, by a process of its own that runs the functions of this file."""
    # `-c` puts the current folder first on the path, so that the packages of `folder` are imported.
    code = Path(__file__).read_text(encoding="utf-8").partition("\nif __name__")[0]
    code += f"\nprint('figures:', json.dumps(measure({count})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)})
    lines = [line for line in done.stdout.splitlines() if line.startswith("figures: ")]
    if not lines:
        sys.exit(f"{folder}: expected figures, found:\n{done.stderr}")
    return json.loads(lines[0].removeprefix("figures: "))


def main():
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24, help="per run")
    parser.add_argument("--runs", type=int, default=3, help="of each code, in turns; the figures are medians")
    parser.add_argument("--against", type=Path, help="folder of a checkout of another commit")
    args = parser.parse_args()
    folders = {"here": Path(__file__).resolve().parents[2]} | ({"against": args.against} if args.against else {})
    runs = {name: [] for name in folders}
    for _ in range(args.runs):
        for name, folder in folders.items():
            runs[name].append(run(folder, args.images))
    print(f"{'':<44}" + "".join(f"{name:>12}" for name in [*folders, *["ratio"] * (len(folders) > 1)]))
    for figure in runs["here"][0]:
        values = [statistics.median(one[figure] for one in figures) for figures in runs.values()]
        ratio = [values[0] / values[1]] if len(values) > 1 else []
        print(f"{figure:<44}" + "".join(f"{value:>12.3g}" for value in values + ratio))


if __name__ == "__main__":
    main()
