"""Sliding-window evaluation: its time beyond the network, and the network's own.

    python -m tests.benchmarks.inference [--runs 5]              beyond the network, against the earlier public code
    python -m tests.benchmarks.inference --network [--runs 3]    forward pass against torchvision's deeplabv3_resnet101,
                                                                 and what preparing it for evaluation brings
    python -m tests.benchmarks.inference --images                images per second at 1024×2048, for a GPU

Beyond the network: an image of 1024×2048, windows of 769×769, a stand-in that returns ready logits; from the uint8
image to labels. The earlier public code's way, written out below, upsamples every window's logits, adds them up and
divides. The variants take turns; medians.
"""

import time
from statistics import median

import torch
import torch.nn.functional as F
from torchvision.models.segmentation import deeplabv3_resnet101

from libs.convert import fold_norms
from networks.build import build_network
from utils.common import flags
from utils.devices.precision import AUTOCAST
from utils.devices.select import select_devices
from utils.inference.sliding import SlidingPredictor, window_starts
from utils.inference.timing import synchronize
from utils.ops.normalization import Normalization

SIZE, WINDOW, STRIDE_LOGITS = (1024, 2048), 769, 97


def earlier(image, logits):
    """Labels as the earlier public code finds them: logits upsampled, added, divided, argmax. No softmax."""
    pixels = Normalization()(image.permute(2, 0, 1)[None])
    total = torch.zeros(1, logits.shape[1], *SIZE)
    count = torch.zeros(1, 1, *SIZE)
    for top in window_starts(SIZE[0], WINDOW, 1 / 3):
        for left in window_starts(SIZE[1], WINDOW, 1 / 3):
            pixels[:, :, top:top + WINDOW, left:left + WINDOW].contiguous()
            up = F.interpolate(logits, size=(WINDOW, WINDOW), mode="bilinear", align_corners=True)
            total[:, :, top:top + WINDOW, left:left + WINDOW] += up
            count[:, :, top:top + WINDOW, left:left + WINDOW] += 1
    total /= count
    return total[0].argmax(0)


def take_turns(ways, runs, device):
    """{name: function} → {name: median seconds}; the first turn is not counted. Prints them as ratios to the first."""
    seconds = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            with torch.inference_mode():
                way()
            synchronize(device)
            if run:
                seconds[name].append(time.perf_counter() - start)
    base = median(next(iter(seconds.values())))
    for name, values in seconds.items():
        print(f"{name:<44}{median(values):8.3f} s (spread {max(values) - min(values):.3f})  ratio "
              f"{median(values) / base:.2f}", flush=True)
    return {name: median(values) for name, values in seconds.items()}


def beyond_the_network(runs, device):
    image = torch.randint(256, (*SIZE, 3), dtype=torch.uint8)
    logits = torch.randn(1, 19, STRIDE_LOGITS, STRIDE_LOGITS, device=device) * 4
    predictor = SlidingPredictor(lambda crops: {"fine": logits.expand(len(crops), -1, -1, -1)}, device=device)
    take_turns({"the earlier public code (averages logits)": lambda: earlier(image, logits),
                "ours (averages probabilities)": lambda: predictor.labels(image)}, runs, device)


def the_network(runs, device):
    """Forward passes of one 769×769 crop."""
    crop = torch.randn(1, 3, WINDOW, WINDOW, device=device)
    last = crop.contiguous(memory_format=torch.channels_last)
    network = build_network().to(device).eval()
    folded = fold_norms(network)
    folded_last = fold_norms(network).to(memory_format=torch.channels_last)
    other = deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=19).to(device).eval()

    def under(autocast, function, images):
        def way():
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                function(images)
        return way

    ways = {}
    for amp in ("off", "bf16"):
        dtype = AUTOCAST[amp]
        ways |= {f"torchvision deeplabv3_resnet101, {amp}": under(dtype, other, crop),
                 f"ours, {amp}": under(dtype, network, crop), f"ours folded, {amp}": under(dtype, folded, crop),
                 f"ours folded and channels-last, {amp}": under(dtype, folded_last, last)}
    take_turns(ways, runs, device)


def whole_images(runs, device):
    """Single- and multi-scale over an image of 1024×2048, with the pixels the network sees."""
    network = fold_norms(build_network()).to(device).eval()
    image = torch.randint(256, (*SIZE, 3), dtype=torch.uint8)
    scales = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    ways = {name: SlidingPredictor(network, scales=s, flip=flip, autocast=torch.bfloat16, batch_size=8)
            for name, s, flip in (("single-scale", (1.0,), False), ("multi-scale, mirrored", scales, True))}
    seconds = take_turns({name: lambda p=p: p.labels(image) for name, p in ways.items()}, runs, device)
    pixels = 2 * sum(scale ** 2 for scale in scales)
    single, multi = seconds.values()
    print(f"multi-scale costs {multi / single:.1f} times single-scale, for {pixels:.1f} times the pixels: "
          f"{multi / single / pixels:.2f}; {1 / single:.2f} and {1 / multi:.3f} images/s")


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--network", action="store_true")
    parser.add_argument("--images", action="store_true")
    parser.add_argument("--gpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    what = the_network if args.network else whole_images if args.images else beyond_the_network
    what(args.runs, select_devices(args.gpu)[0])


if __name__ == "__main__":
    main()
