"""What the ACF term does in networks that `tests.benchmarks.camvid` trained.

    python -m tests.benchmarks.contribution CAMVID FOLDER [--every 1] [--size 209,209]

The module is linear once P is known, so all it can do is add P[:, j] · M to the logits of pixel j, with one N×N matrix
M an image: M[i] is what the classifier makes of the convolved center of class i. So M can be exchanged in a trained
network: for the mean over training photographs, for that of one of them, for one whose centers come from the truth,
for zero. What the mean cannot do is what an image's own centers are worth. Windows of --size, side by side.
"""

from pathlib import Path

import torch
from torch.nn import functional as F

from dataset.cityscapes import CityscapesDataset
from dataset.labels import ClassTable
from networks.predictor import load_network
from tests.benchmarks.altered import true_logits
from tests.benchmarks.compare import interval
from utils.common import command, flags
from utils.common.errors import UserError
from utils.common.progress import progress
from utils.devices.precision import AUTOCAST, best_precision
from utils.devices.select import select_devices
from utils.imaging.classes import IGNORE_INDEX
from utils.inference.sliding import window_starts
from utils.metrics.iou import ConfusionMatrix
from utils.ops.probabilities import most_probable
from utils.ops.upsampling import upsample
from utils.runs import snapshots


def mix(vectors, coarse_logits):
    """Per-class vectors (B, N, K), coarse_logits (B, N, H, W) → their mixture by P (B, K, H, W)."""
    return torch.einsum("bnk,bnhw->bkhw", vectors, coarse_logits.softmax(dim=1))


def windows(item, size):
    """Windows of an item, side by side: images (B, 3, h, w), labels (B, h, w)."""
    image, label = item["image"], item["label"]
    cut = [(..., slice(top, top + size[0]), slice(left, left + size[1]))
           for top in window_starts(label.shape[0], size[0], 0) for left in window_starts(label.shape[1], size[1], 0)]
    return torch.stack([image[c] for c in cut]), torch.stack([label[c] for c in cut])


@torch.inference_mode()
def look(network, images, autocast):
    """F (B, C, h, w), coarse logits (B, N, h, w), what the fine classifier makes of F alone (B, N, h, w), and M as a
    function; images (B, 3, H, W) are normalized."""
    pixels = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
        features = network.context(network.backbone(pixels)[-1])
        coarse = network.head.coarse(features)
    features, coarse = features.float(), coarse.float()
    acf, fine = network.head.acf, network.head.fine
    of_centers, of_features = fine.weight.split([acf.cab.conv.out_channels, features.shape[1]], dim=1)

    @torch.inference_mode()
    def matrix(center_logits=None):
        """M (B, N centers, N logits)."""
        centers = acf.class_centers(features, coarse if center_logits is None else center_logits)   # (B, N, C')
        convolved = acf.cab.conv(centers.transpose(1, 2)[..., None])                                # (B, C', N, 1)
        return (of_centers[:, :, 0, 0] @ convolved[..., 0]).transpose(1, 2)

    return features, coarse, F.conv2d(features, of_features, fine.bias), matrix


@torch.inference_mode()
def measure(network, normalization, data, val, every, size, device, autocast):
    """Mean IoU by matrix, sizes of the parts of the logits, shares of pixels: three dicts of numbers."""
    items = [windows(data[index], size)[0] for index in range(0, len(data), 8)]
    trained = torch.cat([look(network, normalization(images.to(device)), autocast)[3]()
                         for images in items])                                                 # (windows, N, N)
    mean = trained.mean(0, keepdim=True)
    matrices, squares, pixels = {}, {}, {"decide differently": 0, "coarse right": 0, "fine right": 0, "all": 0}
    for index in range(0, len(val), every):
        images, labels = windows(val[index], size)
        labels = labels.to(device)
        features, coarse, alone, matrix = look(network, normalization(images.to(device)), autocast)
        own = matrix()
        truth = matrix(true_logits(labels, coarse.shape[1], coarse.shape[2:]))
        terms = {name: mix(m.expand(len(images), -1, -1), coarse) for name, m in (
            ("own centers", own), ("mean of training photographs", mean),
            ("another photograph's centers", trained[index % len(trained)][None]), ("centers from the truth", truth))}
        logits = {name: alone + term for name, term in terms.items()} | {"without the term": alone, "coarse": coarse}
        chosen = {name: most_probable(upsample(value, size).transpose(0, 1))[1] for name, value in logits.items()}
        for name, prediction in chosen.items():
            matrices.setdefault(name, ConfusionMatrix(coarse.shape[1], IGNORE_INDEX)).update(prediction, labels)
        for name, part in (("the term", terms["own centers"]), ("from F", alone),
                           ("the term beyond its mean matrix",
                            terms["own centers"] - terms["mean of training photographs"])):
            part = part - part.mean(1, keepdim=True)        # what all classes share decides nothing
            squares.setdefault(f"logits: {name}", []).append(part.square().mean())
        for name, part in (("F", features), ("F'_a", network.head.acf(features, coarse))):
            squares.setdefault(name, []).append(part.square().mean())
        known = labels != IGNORE_INDEX
        differ = known & (chosen["coarse"] != chosen["own centers"])
        for name, which in (("all", known), ("decide differently", differ),
                            ("coarse right", differ & (chosen["coarse"] == labels)),
                            ("fine right", differ & (chosen["own centers"] == labels))):
            pixels[name] += int(which.sum())
    scores = {name: 100 * actual.mean_iou() for name, actual in matrices.items()}
    own = scores.pop("own centers")
    scores = {"own centers": own} | {f"own centers - {name}": own - score for name, score in scores.items()}
    sizes = {name: float(torch.stack(actual).mean().sqrt()) for name, actual in squares.items()}
    return scores, sizes, {name: 100 * count / pixels["all"] for name, count in pixels.items() if name != "all"}


def main(argv=None):
    parser = flags.Parser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path, help="--output-dir of tests.benchmarks.camvid")
    parser.add_argument("--every", type=int, default=1, help="take every so many of the validation photographs")
    parser.add_argument("--size", type=flags.size, default=(209, 209))
    parser.add_argument("--gpu")
    args = parser.parse_args(argv)
    device = select_devices(args.gpu)[0]
    autocast = AUTOCAST[best_precision(device)]
    classes = ClassTable.read(args.data / "classes.csv")
    data, val = (CityscapesDataset(args.data, data_list=args.data / f"{name}.lst", classes=classes)
                 for name in ("train", "val"))
    runs = {model: [path for run in sorted(args.folder.glob(f"{model}_seed*"))
                    for _, path in snapshots.list_snapshots(run)[-1:]] for model in ("acfnet", "acfnet_resnet")}
    paths = [(model, path) for model, actual in runs.items() for path in actual]
    if not paths:
        raise UserError(f"{args.folder}: expected networks with ACF of tests.benchmarks.camvid, found none")
    actual = {}
    for model, path in progress(paths, "networks", "network", every=60):
        network, config = load_network(path, device)
        actual.setdefault(model, []).append(measure(network, config.normalization, data, val, args.every, args.size,
                                                    device, autocast))
    titles = "mean IoU, %, with M from", "root mean square of", "pixels, %, where coarse and fine"
    for model, runs in actual.items():
        print(f"{model}, {len(runs)} networks, mean ± 95 %")
        for title, parts in zip(titles, zip(*runs, strict=True), strict=True):
            print(f"  {title}")
            for name in parts[0]:
                mean, half = interval([part[name] for part in parts])
                print(f"    {name:<44}{mean:7.2f}" + (f" ± {half:.2f}" if half is not None else ""))


if __name__ == "__main__":
    command.run(main)
