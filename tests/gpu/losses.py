"""The loss by Triton's kernels on a device: against float64, and its time and memory beside upsampled logits."""

import torch
import torch.nn.functional as F

from libs.fused.launch import interpreted
from loss.criterion import WEIGHTS, SegmentationCriterion
from utils.inference.timing import median_ms

from .rows import near

# Of the sum and the gradient, which are computed in float32 from logits of any dtype.
TOLERANCE = 1e-5


def make_inputs(device, images, classes, side, dtype):
    """Channels-last logits (images, classes, side, side) at stride 8 and labels, a tenth of them ignored."""
    generator = torch.Generator().manual_seed(0)
    pixels = 8 * (side - 1) + 1
    logits = 3 * torch.randn(images, classes, side, side, generator=generator)
    labels = torch.randint(classes, (images, pixels, pixels), dtype=torch.uint8, generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return logits.to(device, dtype, memory_format=torch.channels_last), labels.to(device)


def agreement(device, images, classes, side, dtype):
    """Raise AssertionError where sum, number of pixels or gradient is far from float64's. Returns the distances."""
    from libs.fused import cross_entropy

    logits, labels = make_inputs(device, images, classes, side, dtype)
    class_weights = torch.linspace(0, 2, classes)
    sums, gradient = cross_entropy.sums(logits, labels, 255, class_weights.to(device))
    expected = logits.cpu().double().contiguous().requires_grad_()
    labels = labels.cpu().long()
    total = F.cross_entropy(F.interpolate(expected, labels.shape[1:], mode="bilinear", align_corners=True), labels,
                            class_weights.double(), ignore_index=255, reduction="sum")
    total.backward()
    count = class_weights.double()[labels[labels != 255]].sum()
    distances = [near(sums.cpu(), torch.stack([total.detach(), count]), TOLERANCE, "sums"),
                 near(gradient.cpu(), expected.grad, TOLERANCE, "gradient")]
    again = cross_entropy.sums(logits, labels.to(device), 255, class_weights.to(device))
    assert torch.equal(again[0], sums) and torch.equal(again[1], gradient), "expected the same in each run"
    return "sums {:.1e}, gradient {:.1e}".format(*distances)


def terms_agreement(device, side):
    """As `agreement` in float64, of the terms that are computed from upsampled logits and their gradients."""
    logits, labels = make_inputs(device, 2, 19, side, torch.float64)
    distances = []
    for loss in ("focal", "dice", "lovasz"):
        results = []
        for x in (logits.detach().clone(), logits.cpu().contiguous()):
            value = SegmentationCriterion({"fine": 1.0}, loss=loss)({"fine": x.requires_grad_()}, labels.to(x.device))
            value["fine"].backward()
            results.append((value["fine"].detach().cpu(), x.grad.cpu()))
        distances += [near(*pair, 1e-9, loss) for pair in zip(*results, strict=True)]
    return f"{max(distances):.1e}"


def time_and_memory(device, kernels, ohem, runs, images, classes, side):
    """{"ms", "spread_ms"} of forward and backward pass of three heads in bfloat16, and "peak_gb" on a GPU."""
    logits, labels = make_inputs(device, images, classes, side, torch.bfloat16)
    outputs = {name: logits.clone().requires_grad_() for name in WEIGHTS}
    criterion = SegmentationCriterion(ohem=ohem, kernels=kernels)

    def step():
        criterion.total(criterion(outputs, labels)).backward()

    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    result = median_ms(step, runs, device)
    if device.type == "cuda":
        result["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return result


def section(rows, device, images=8, side=97, runs=10, classes=(19, 150)):
    """Agreement of small maps, then a step of `images` crops with and without kernels, beside what was predicted."""
    rows.check("focal, Dice and Lovász loss", terms_agreement, device, min(side, 17))
    if device.type != "cuda" and not interpreted():
        rows.note("kernels of the loss", "not run: they need a GPU, or TRITON_INTERPRET=1")
        return
    for number in classes:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            rows.check(f"{number} classes, {str(dtype).removeprefix('torch.')}", agreement, device, min(images, 2),
                       number, min(side, 17), dtype)
    for ohem in (False, True):
        before, after = (rows.figure(f"{kernels}{', OHEM' * ohem}", time_and_memory, device, kernels, ohem, runs,
                                     images, classes[0], side) for kernels in ("torch", "triton"))
        if before and after and not ohem and device.type == "cuda":
            saved = before["ms"] - after["ms"]
            rows.goal("time of the loss", "estimated: 7 ms less on an H100, 6 on an H200", f"{saved:.1f} ms less",
                      saved >= 6)
            saved = before["peak_gb"] - after["peak_gb"]
            rows.goal("memory of the loss", "estimated: 1.1 GB less", f"{saved:.1f} GB less", saved >= 1.1)
