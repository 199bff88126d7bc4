"""Forward time of OHEM cross-entropy against plain cross-entropy, as a ratio, on this machine.

    python -m tests.benchmarks.ohem [--runs 9]

Two crops of 769×769 with 19 classes, threshold 0.7, 100,000 pixels kept. Two cases: logits at random, where
most pixels are hard, and logits of a trained network (95 % sure), where the k-th smallest decides.
"""

import time
from statistics import median

import torch
import torch.nn.functional as F

from loss.ohem import OhemCrossEntropy
from utils.common import flags


def seconds(function, *args, runs):
    function(*args)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - start)
    return median(times), max(times) - min(times)


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    labels = torch.randint(19, (2, 769, 769))
    at_random = torch.randn(2, 19, 769, 769)
    sure = at_random + 8 * F.one_hot(labels, 19).permute(0, 3, 1, 2)
    ohem = OhemCrossEntropy(0.7, 100000)
    with torch.no_grad():
        for name, logits in (("random", at_random), ("sure", sure)):
            plain, spread = seconds(F.cross_entropy, logits, labels, runs=args.runs)
            hard, hard_spread = seconds(ohem, logits, labels, runs=args.runs)
            print(f"{name:<8} cross-entropy {plain * 1e3:.1f} ms (spread {spread * 1e3:.1f})   "
                  f"OHEM {hard * 1e3:.1f} ms (spread {hard_spread * 1e3:.1f})   ratio {hard / plain:.2f}")


if __name__ == "__main__":
    main()
