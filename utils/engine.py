"""One training step, however many devices and parts its batch is shared by."""

import math
import statistics
from collections import defaultdict, deque
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import random_state, set_random_state
from .jitter import apply_jitter
from .versions import total_norm

# Of what the compiler would keep for the backward pass if it computed nothing again, the share it may keep.
COMPILED_BUDGET = 0.8


def compile_network(network, **options):
    """Compile a network in place, as `nn.Module.compile` with these options does; dropout draws what it would draw
    without.

    By itself the compiler keeps the input and the output of a norm, half as much again as in-place norms do. Given a
    budget (`activation_memory_budget`, PyTorch 2.4 and newer), it computes norms and activations again, but no
    convolution, and keeps less than they do.
    """
    import torch._functorch.config  # imported here: it takes seconds
    import torch._inductor.config

    torch._functorch.config.activation_memory_budget = COMPILED_BUDGET
    torch._inductor.config.fallback_random = True
    network.compile(**options)


class NetworkWithLoss(nn.Module):
    """The part of a step that runs on every device: uint8 images and labels in, sums and counts out.

    Its outputs are a row a device, so `nn.DataParallel` gathers scalars and no logits.
    """

    def __init__(self, network, criterion, normalization, autocast):
        super().__init__()
        self.network, self.criterion = network, criterion
        self.normalization, self.autocast = normalization, autocast

    def forward(self, images, labels):
        """images (B, 3, H, W) uint8, labels (B, H, W) → sums (1, T) float, counts (1, T) int64 of T terms."""
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            # Only the ablation with centers from the truth looks at the labels.
            truth = (labels,) if getattr(self.network, "true_centers", False) else ()
            outputs = self.network(self.normalization(images), *truth)
        sums = self.criterion.sums(outputs, labels)
        return (torch.stack([total for total, _ in sums.values()])[None],
                torch.stack([count for _, count in sums.values()])[None])


def step_loss(module, criterion, images, labels, processes=None, labelled=None, parts=1):
    """Run the module on this process's images and labels.

    Each term is divided by the pixels of the whole batch. If that goes through in several parts, one after the
    other, this is the share of one of them: the terms of all parts add up to those of the batch. Which pixels OHEM
    picks elsewhere is not known yet, so its term is then the mean over the parts.

    Args:
        module: `NetworkWithLoss`, perhaps wrapped. The criterion has a weight for each head, and no other.
        processes: those that share the batch, or None.
        labelled: labelled pixels of the whole batch, all parts and processes; needed with several parts.
        parts: their number.

    Returns:
        (loss, shares): the loss to differentiate, and what this process adds to each term, (T,).
    """
    sums, counts = (rows.sum(0) for rows in module(images, labels))                 # (T,), (T,)
    world = 1
    if processes is not None:
        counts, world = processes.total(counts), processes.size
    if parts > 1:
        counts = torch.stack([count * parts if criterion.picks(name) else labelled
                              for name, count in zip(criterion.weights, counts, strict=True)])
    terms = sums / counts.clamp(min=1)
    # DistributedDataParallel averages gradients where their sum is meant, hence the factor.
    loss = criterion.total(dict(zip(criterion.weights, terms, strict=True))) * world
    return loss, terms.detach()


class NotFinite(ArithmeticError):
    """A loss term or the gradient is infinite or not a number; nothing was learnt from it.

    what: "loss" or "gradient"; terms: {name: float} of the losses and `gradient_norm`.
    """

    def __init__(self, terms):
        finite = all(math.isfinite(value) for name, value in terms.items() if name != "gradient_norm")
        self.what, self.terms = "gradient" if finite else "loss", terms
        super().__init__(f"{self.what}: {terms}")


class Course:
    """Whether training goes on normally, told by its losses.

    A loss is normal up to three times the median of the last 200 normal ones: crops differ by less, and a run that
    diverges passes that long before its numbers overflow. What is not normal does not move the median.
    """

    def __init__(self):
        self.losses = deque(maxlen=200)
        self.normal = False     # whether the last one was

    def add(self, loss):
        """The loss of a step, which judges the weights that the step before it made. Returns whether it is normal."""
        self.normal = math.isfinite(loss) and (not self.losses or loss <= 3 * statistics.median(self.losses))
        if self.normal:
            self.losses.append(loss)
        return self.normal


class Engine:
    """Takes optimisation steps.

    Args:
        module: `NetworkWithLoss` as it is called: alone, in `DataParallel` or `DistributedDataParallel`.
        network: the one inside, on its device and in its dtype.
        criterion: of `loss.criterion`.
        optimizer, precision: as `Precision.prepare` gave them.
        devices: those this process uses; the first one takes the batches.
        processes: `Processes` that share each batch, or None.
        memory_format: of images.

    `skipped` counts the steps that were left out because gradients overflowed in half precision.
    """

    def __init__(self, module, network, criterion, optimizer, precision, devices, processes=None,
                 memory_format=torch.contiguous_format):
        self.module, self.network, self.criterion = module, network, criterion
        self.optimizer, self.precision = optimizer, precision
        self.devices, self.processes = devices, processes
        self.memory_format = memory_format
        self.skipped = 0
        self._looking_ahead = defaultdict(list)     # layers by the function with which they decide together
        for layer in network.modules():
            if precision.autocast is not None and hasattr(layer, "look_ahead"):
                self._looking_ahead[layer.look_ahead].append(layer)
        kinds = defaultdict(list)       # of one dtype each, which are copied by one kernel
        for buffer in network.buffers():
            kinds[buffer.dtype].append(buffer)
        self._statistics = [(buffers, [buffer.clone() for buffer in buffers]) for buffers in kinds.values()]

    def step(self, batches, rate, asked=False):
        """Learn from one batch. The host waits for the device once, when everything but the update is queued.

        Args:
            batches: its parts, each {"image": (B, 3, H, W) uint8, "label": (B, H, W)[, "jitter": (B, 4)]} of this
                process.
            rate: learning rate.
            asked: whether this process was asked to stop.

        Returns:
            ({name: float} of the terms and `gradient_norm`, None if it overflowed in half precision; whether any
            process was asked to stop). Raises `NotFinite`, in all processes alike, with the state as it was
            before the step.
        """
        for decide, layers in self._looking_ahead.items():      # each alone would make the host wait
            decide(layers, len(batches) * len(self.devices))
        for buffers, kept in self._statistics:
            torch._foreach_copy_(kept, buffers)
        generators = random_state(self.devices)
        parts = [self._place(batch) for batch in batches]
        labelled = self._labelled([labels for _, labels in parts]) if len(parts) > 1 else None
        self.optimizer.zero_grad(set_to_none=True)
        shares = 0.0
        for number, (images, labels) in enumerate(parts, 1):
            with self._exchange_gradients(number == len(parts)):
                loss, share = step_loss(self.module, self.criterion, images, labels, self.processes, labelled,
                                        len(parts))
                self.precision.backward(loss, self.optimizer)
            shares = shares + share
        terms, asked = self._read(shares, asked)
        if not all(map(math.isfinite, terms.values())):
            error = NotFinite(terms)
            if error.what == "loss" or not self.precision.skips_overflow():
                self._put_back(generators)
                raise error
            self.skipped += 1
            terms["gradient_norm"] = None
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.precision.step(self.optimizer)
        return terms, asked

    def weight_norm(self):
        """The Euclidean norm of all weights: float."""
        return float(total_norm([weight.detach() for weight in self.network.parameters()]))

    def _read(self, shares, asked):
        """Everything the host wants to know of a step, over all processes, in one exchange and one copy.

        shares (T,) of the terms → ({name: float} with `gradient_norm`, whether any process was asked to stop).
        """
        norm = self.precision.gradient_norm(self.optimizer)
        values = torch.cat([shares.double(), norm.double()[None], torch.full_like(norm[None], asked).double()])
        world = 1
        if self.processes is not None:
            values, world = self.processes.total(values), self.processes.size
        *terms, norm, asked = values.tolist()
        # The gradients, and so their norm, are the same in all processes; the sum keeps what is not finite anywhere.
        return dict(zip(self.criterion.weights, terms, strict=True)) | {"gradient_norm": norm / world}, asked > 0

    def _place(self, batch):
        """A batch's images and labels, on the first device."""
        images = batch["image"].to(self.devices[0], non_blocking=True)
        if "jitter" in batch:
            images = apply_jitter(images, batch["jitter"])
        return (images.contiguous(memory_format=self.memory_format),
                batch["label"].to(self.devices[0], non_blocking=True))

    def _labelled(self, labels):
        """Labelled pixels of all parts, and processes: scalar tensor."""
        count = sum((part != self.criterion.ignore_index).sum() for part in labels)
        return count if self.processes is None else self.processes.total(count)

    def _exchange_gradients(self, last):
        """Processes add up their gradients in the last part only."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    @torch.no_grad()
    def _put_back(self, generators):
        for buffers, kept in self._statistics:
            torch._foreach_copy_(buffers, kept)
        set_random_state(generators, self.devices)
        self.optimizer.zero_grad(set_to_none=True)
