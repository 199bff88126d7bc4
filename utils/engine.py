"""One training step, however many devices and parts its batch is shared by."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import random_state, set_random_state


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
        (loss, terms): the loss to differentiate, and {name: scalar} over all processes.
    """
    sums, counts = (rows.sum(0) for rows in module(images, labels))                 # (T,), (T,)
    world = 1
    if processes is not None:
        counts, world = processes.total(counts), processes.size
    if parts > 1:
        picked = torch.tensor([criterion.picks(name) for name in criterion.weights], device=counts.device)
        counts = torch.where(picked, counts * parts, labelled)
    terms = sums / counts.clamp(min=1)
    # DistributedDataParallel averages gradients where their sum is meant, hence the factor.
    loss = criterion.total(dict(zip(criterion.weights, terms, strict=True))) * world
    shown = terms.detach() if processes is None else processes.total(terms.detach())
    return loss, dict(zip(criterion.weights, shown, strict=True))


def apply_jitter(images, factors):
    """Change brightness, contrast, saturation and hue of each image, on its device.

    images (B, 3, H, W) uint8, factors (B, 4) as `dataset.cityscapes.draw_jitter` draws them → images of that shape.
    """
    from torchvision.transforms.v2 import functional

    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation,
               functional.adjust_hue)
    changed = []
    for image, values in zip(images, factors.tolist(), strict=True):
        for change, value in zip(changes, values, strict=True):
            image = change(image, value)
        changed.append(image)
    return torch.stack(changed)


class NotFinite(ArithmeticError):
    """A loss is infinite or not a number; nothing was learnt from it. `terms`: {name: float}."""

    def __init__(self, terms):
        super().__init__(f"{terms}")
        self.terms = terms


class Engine:
    """Takes optimisation steps.

    Args:
        module: `NetworkWithLoss` as it is called: alone, in `DataParallel` or `DistributedDataParallel`.
        network: the one inside.
        criterion: of `loss.criterion`.
        optimizer, precision: as `Precision.prepare` gave them.
        devices: those this process uses; the first one takes the batches.
        processes: `Processes` that share each batch, or None.
        memory_format: of images.
    """

    def __init__(self, module, network, criterion, optimizer, precision, devices, processes=None,
                 memory_format=torch.contiguous_format):
        self.module, self.network, self.criterion = module, network, criterion
        self.optimizer, self.precision = optimizer, precision
        self.devices, self.processes = devices, processes
        self.memory_format = memory_format

    def step(self, batches, rate, measure=False, asked=False):
        """Learn from one batch.

        Args:
            batches: its parts, each {"image": (B, 3, H, W) uint8, "label": (B, H, W)[, "jitter": (B, 4)]} of this
                process.
            rate: learning rate.
            measure: find the norm of the gradients.
            asked: whether this process was asked to stop.

        Returns:
            ({name: float} of the terms, and `gradient_norm` if measured, None if it overflowed; whether any
            process was asked to stop). Raises `NotFinite`, in all processes alike, with the state as it was
            before the step.
        """
        statistics = [buffer.clone() for buffer in self.network.buffers()]
        generators = random_state(self.devices)
        parts = [self._place(batch) for batch in batches]
        labelled = self._labelled([labels for _, labels in parts]) if len(parts) > 1 else None
        self.optimizer.zero_grad(set_to_none=True)
        terms = dict.fromkeys(self.criterion.weights, 0.0)
        for number, (images, labels) in enumerate(parts, 1):
            with self._exchange_gradients(number == len(parts)):
                loss, found = step_loss(self.module, self.criterion, images, labels, self.processes, labelled,
                                        len(parts))
                # Looked at before the backward pass is queued, so that a GPU stays busy.
                found = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
                if not all(abs(value) < float("inf") for value in found.values()):
                    self._put_back(statistics, generators)
                    raise NotFinite(found)
                self.precision.backward(loss, self.optimizer)
            terms = {name: terms[name] + value for name, value in found.items()}
        if self.processes is not None:
            asked = bool(self.processes.total(torch.tensor(int(asked), device=self.devices[0])))
        if measure:
            norm = self.precision.gradient_norm(self.optimizer).item()
            terms["gradient_norm"] = norm if norm < float("inf") else None      # the scaler leaves this step out
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.precision.step(self.optimizer)
        return terms, asked

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
    def _put_back(self, statistics, generators):
        for buffer, before in zip(self.network.buffers(), statistics, strict=True):
            buffer.copy_(before)
        set_random_state(generators, self.devices)
        self.optimizer.zero_grad(set_to_none=True)
