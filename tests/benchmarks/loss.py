"""Time and memory of the training loss in strips against upsampled logits, and of upsampling, on the CPU.

    python -m tests.benchmarks.loss [--runs 9] [--threads 2]

Forward and backward pass of three heads: of the demonstration (four crops of 97×193, 7 classes, OHEM of the head
"fine"), and of two crops of 769×769 with 19 classes, without and with OHEM. The ways take turns, so that other work of
the machine affects all of them; medians. "kept" is what autograd keeps for the backward pass.
"""

import time
from statistics import median

import torch

from loss import strips
from loss.criterion import SegmentationCriterion
from utils.common import flags
from utils.ops.upsampling import upsample, upsample_by_matmul

# name: (crops, classes, height and width of the logits, arguments of the criterion)
SIZES = {"demonstration": (4, 7, (13, 25), {"ohem": True, "ohem_keep": 10000}), "769×769": (2, 19, (97, 97), {}),
         "769×769, OHEM": (2, 19, (97, 97), {"ohem": True})}


# How a term of the loss is computed from logits (B, N, h, w) and labels (B, H, W).
WAYS = {"strips": lambda term, logits, labels: term.upsampled_sums(logits, labels, strips),
        "upsampled": lambda term, logits, labels: term.sums(upsample(logits, labels.shape[1:]), labels)}


def make_inputs(crops, classes, size):
    """Logits of three heads and labels. Logits prefer the true class, as those of a network do."""
    labels = torch.randint(classes, (crops, *(8 * length - 7 for length in size)), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < 0.1] = 255
    true = labels[:, None, ::8, ::8] == torch.arange(classes)[:, None, None]
    return {name: torch.randn(crops, classes, *size) + 4 * true for name in ("fine", "coarse", "aux")}, labels


def step(way, criterion, outputs, labels):
    """(seconds of the forward and backward pass, bytes that are kept between them)."""
    outputs, kept = {name: logits.detach().requires_grad_() for name, logits in outputs.items()}, {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sums = {name: way(criterion.terms[name], logits, labels) for name, logits in outputs.items()}
        loss = criterion.total(criterion.combine(sums))
    loss.backward()
    return time.perf_counter() - start, sum(kept.values())


def upsampling_step(function, logits, size):
    """(seconds of the forward and backward pass of upsampling, 0)."""
    logits = logits.detach().requires_grad_()
    start = time.perf_counter()
    large = function(logits, size)
    large.backward(large.detach())
    return time.perf_counter() - start, 0


def compare(name, ways, runs, function, *args):
    """Print the medians of a function that returns (seconds, bytes), of some ways that take turns.

    Args:
        name: of the row.
        ways: {name: first argument of the function}.
        runs: number of timed calls of each way.
        function, args: what is called, and its further arguments.
    """
    results = {name: [] for name in ways}
    for _ in range(runs + 1):       # the first run is not counted
        for way, first in ways.items():
            results[way].append(function(first, *args))
    reference = None
    for way, result in results.items():
        seconds = [one for one, _ in result[1:]]
        reference = reference or median(seconds)
        print(f"{name:<26}{way:<16}{1e3 * median(seconds):8.1f} ms   spread {1e3 * (max(seconds) - min(seconds)):6.1f} "
              f"ms   ratio {median(seconds) / reference:5.2f}   kept {result[-1][1] / 1e6:7.1f} MB", flush=True)


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--runs", type=flags.positive(int), default=9)
    parser.add_argument("--threads", type=flags.positive(int), default=torch.get_num_threads())
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    for name, (*shape, options) in SIZES.items():
        outputs, labels = make_inputs(*shape)
        compare(f"loss, {name}", WAYS, args.runs, step, SegmentationCriterion(**options), outputs, labels)
        if "OHEM" not in name:
            compare(f"upsampling, {name}", {"interpolate": upsample, "matrix products": upsample_by_matmul}, args.runs,
                    upsampling_step, outputs["fine"], labels.shape[1:])


if __name__ == "__main__":
    main()
