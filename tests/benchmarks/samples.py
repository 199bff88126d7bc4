"""Time of a training sample of 2048×1024 (scale, 769×769 crop, mirror, label ids, tensors) on one core.

    python -m tests.benchmarks.samples [--images 8] [--runs 5]

Streets are drawn at full size first, with the noise of a sensor over them: it compresses as badly as a photograph's,
to 2 bytes per pixel and more, and decoding takes as long. Compared, in turns: decoding the two files by OpenCV alone,
and by Pillow; as the data set does, with all checks; the sample; the sample from --cache; the plain order (scale
everything, map all labels, then crop), as the earlier public code has it. Medians over all images and runs; ratios to
OpenCV alone. Also the sizes of cached arrays, plain and compressed, and what reading compressed ones takes.
"""

import tempfile
import time
import zlib
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from PIL import Image

from dataset.cityscapes import CityscapesDataset
from dataset.labels import ClassTable
from dataset.streets import write_dataset
from dataset.transforms import train_transform
from utils.common import flags
from utils.imaging.decode import read_ids, read_image
from utils.parallel.workers import disable_opencv_threads

SIZE = (769, 769)


def plain_order(path, label_path, classes, rng):
    """Scale the whole image and label, normalize, then crop and mirror."""
    image, label = read_image(path), classes.encode(read_ids(label_path))
    scale = rng.uniform(0.5, 2.0)
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    image = (image.astype(np.float32) - 120) / 58
    bottom, right = max(0, SIZE[0] - label.shape[0]), max(0, SIZE[1] - label.shape[1])
    image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    label = cv2.copyMakeBorder(label, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=255)
    top, left = rng.integers(label.shape[0] - SIZE[0] + 1), rng.integers(label.shape[1] - SIZE[1] + 1)
    image, label = (a[top:top + SIZE[0], left:left + SIZE[1]] for a in (image, label))
    return (torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)[:, :, ::-1])),
            torch.from_numpy(np.ascontiguousarray(label[:, ::-1])))


def add_noise(path, deviation, seed):
    """Write an image again with noise of that standard deviation over it. Returns bytes of the file a pixel."""
    image = np.asarray(Image.open(path))
    noise = np.random.default_rng(seed).normal(0, deviation, image.shape)
    Image.fromarray(np.clip(image + noise, 0, 255).astype(np.uint8)).save(path)
    return path.stat().st_size / image[..., 0].size


def by_opencv(path, label_path):
    return cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.imread(str(label_path), cv2.IMREAD_UNCHANGED)


def by_pillow(path, label_path):
    return np.asarray(Image.open(path).convert("RGB")), np.asarray(Image.open(label_path))


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--noise", type=float, default=2.0, help="its deviation, of 255, beside the scenes' own")
    args = parser.parse_args()
    disable_opencv_threads()
    torch.set_num_threads(1)
    classes, transform = ClassTable.read(), train_transform(SIZE)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), train=args.images, val=1, size=(1024, 2048), seed=0, workers=2)
        dataset = CityscapesDataset(folder, classes=classes, transform=transform)
        sizes = [add_noise(path, args.noise, seed) for seed, (path, _) in enumerate(dataset.pairs)]
        print(f"{len(sizes)} images of {median(sizes):.2f} bytes per pixel")
        cached = CityscapesDataset(folder, classes=classes, transform=transform, cache=Path(folder) / "cache")
        cached.fill_cache(2)
        ways = {"OpenCV alone": lambda i, entry: by_opencv(*dataset.pairs[i]),
                "Pillow alone": lambda i, entry: by_pillow(*dataset.pairs[i]),
                "decoding, checked": lambda i, entry: [decode(p) for p, decode in zip(dataset.pairs[i], (
                    read_image, read_ids), strict=True)],
                "a sample": lambda i, entry: dataset[i, entry], "a sample from the cache": lambda i, entry:
                cached[i, entry], "the plain order": lambda i, entry: plain_order(
                    *dataset.pairs[i], classes, np.random.default_rng(entry))}
        seconds = {name: [] for name in ways}
        for run in range(args.runs):
            for index in range(len(dataset)):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way(index, run * len(dataset) + index)
                    seconds[name].append(time.perf_counter() - start)
        base = median(seconds["OpenCV alone"])
        for name, values in seconds.items():
            low, high = np.percentile(values, (10, 90))
            print(f"{name:<26}{1000 * median(values):7.1f} ms (10 to 90 % of them {1000 * low:.1f} to "
                  f"{1000 * high:.1f})  ratio {median(values) / base:.2f}")
        arrays = [np.load(path) for path in sorted((Path(folder) / "cache").glob("*.npy"))[:8]]
        plain = sum(array.nbytes for array in arrays)
        packed = [zlib.compress(array.tobytes(), 1) for array in arrays]
        start = time.perf_counter()
        for one in packed:
            zlib.decompress(one)
        print(f"cached arrays: compressed (zlib 1) to {sum(map(len, packed)) / plain:.0%} of their size; a pair then "
              f"takes {2000 * (time.perf_counter() - start) / len(packed):.0f} ms to read")


if __name__ == "__main__":
    main()
