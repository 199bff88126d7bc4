"""One training step of a batch, which devices may share and which may be processed in parts."""

import math
import re
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..common.compat import total_norm
from ..common.errors import UserError
from ..devices.capture import CapturedFunction
from ..devices.compilation import compile_network
from ..devices.precision import Precision
from ..ops.autocast import apex_casts
from ..ops.jitter import apply_jitter
from ..ops.normalization import Normalization
from ..parallel.processes import Processes, share_batches
from .optimization import average_of_weights, buffers_by_dtype, update_average
from .seeds import random_state, set_random_state

# Error message of the norms, PyTorch's and ours, for an input without variance.
ONE_VALUE = re.compile("more than (1|one) value (per|a) channel")


class NetworkWithLoss(nn.Module):
    """The part of a step that runs on every device: from uint8 images and labels to the sums of the loss terms.

    Its outputs are a row per device, so that `nn.DataParallel` gathers a few numbers and no logits.

    Args:
        network: nn.Module.
        criterion: of `loss.criterion`.
        normalization: `Normalization` of the input.
        autocast: dtype of PyTorch's autocast, or None.
        apex: whether apex casts instead.
    """

    def __init__(self, network, criterion, normalization, autocast, apex=False):
        super().__init__()
        self.network, self.criterion = network, criterion
        self.normalization, self.autocast, self.apex = normalization, autocast, apex

    def forward(self, images, labels):
        """images (B, 3, H, W) uint8, labels (B, H, W) → {name: sums (1, K)} of the loss terms."""
        with (apex_casts() if self.apex else
              torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None)):
            outputs = self.network(self.normalization(images))
        return {name: sums[None] for name, sums in self.criterion.sums(outputs, labels).items()}


def step_loss(module, criterion, images, labels, processes=None, divisors=None, parts=1):
    """Run the module on this process's images and labels.

    Args:
        module: `NetworkWithLoss`, perhaps wrapped. The criterion has terms for all heads, and no others.
        criterion: of `loss.criterion`.
        images, labels: of this process, those of one part of the batch.
        processes: `Processes` that share the batch, or None.
        divisors: with several parts, those of all labels of the batch, in all processes, as in `criterion.combine`.
        parts: number of parts in which the batch goes through, one after the other.

    Returns:
        (loss, terms): the loss to differentiate, and each term of the loss, (T,), over all processes; of several parts
        they add up to those of the batch.
    """
    sums = {name: rows.sum(0) for name, rows in module(images, labels).items()}     # (K,) each
    if processes is None:
        terms = criterion.combine(sums, divisors, parts)
        return criterion.total(terms), torch.stack([terms[name].detach() for name in criterion.weights])
    totals = processes.all_reduce(torch.cat([values.detach() for values in sums.values()]))
    totals = dict(zip(sums, totals.split([len(values) for values in sums.values()]), strict=True))
    terms = criterion.combine(totals, divisors, parts)
    # The value of the total, with the gradient of this process's part. An infinite sum makes it NaN, unlike `terms`.
    sums = {name: values - values.detach() + totals[name] for name, values in sums.items()}
    # DistributedDataParallel averages gradients where their sum is meant, hence the factor.
    loss = criterion.total(criterion.combine(sums, divisors, parts)) * processes.size
    return loss, torch.stack([terms[name] for name in criterion.weights])


@contextmanager
def _enough_values(images):
    """Raise a `UserError` in place of the error that norms raise for one value per channel. images: (B, 3, H, W)."""
    try:
        yield
    except (ValueError, RuntimeError) as error:         # the latter of a compiled network
        if not ONE_VALUE.search(str(error)):
            raise
        count, _, height, width = images.shape
        raise UserError("--batch-size, --input-size: expected more or larger crops per forward pass, because one value "
                        f"per channel at a norm has no variance, found {count} of {height}×{width}") from None


class NotFinite(ArithmeticError):
    """A loss term or the gradient is infinite or NaN; the weights were not updated.

    Attributes:
        what: "loss" or "gradient".
        terms: {name: float} of the losses and `gradient_norm`.
    """

    def __init__(self, terms):
        finite = all(math.isfinite(value) for name, value in terms.items() if name != "gradient_norm")
        self.what, self.terms = "gradient" if finite else "loss", terms
        super().__init__(f"{self.what}: {terms}")


class Engine:
    """Carries out training steps.

    Args:
        module: `NetworkWithLoss`, possibly wrapped in `DataParallel` or `DistributedDataParallel`.
        network: the network in it, on its device and in its dtype.
        criterion: of `loss.criterion`.
        optimizer: from `Precision.prepare`.
        precision: `Precision`.
        devices: of this process; batches are moved to the first one.
        processes: `Processes` that share each batch, or None.
        memory_format: of images.
        frozen: modules of the network that are not trained, and whose norms keep their statistics.
        clip_gradient: maximum norm of the gradient, or None.
        ema: maximum decay of a moving average of the weights (`optimization.update_average`), or None.
        cuda_graph: whether the forward and backward pass become a CUDA graph: `off`, `auto` (if possible) or `on`.

    Attributes:
        skipped: number of steps skipped because gradients overflowed in half precision.
        average: network with the moving average of the weights, or None.
        average_updates: number of updates of the moving average since the run began.
    """

    def __init__(self, module, network, criterion, optimizer, precision, devices, *, processes=None,
                 memory_format=torch.contiguous_format, frozen=(), clip_gradient=None, ema=None,
                 cuda_graph="off"):
        self.module, self.network, self.criterion = module, network, criterion
        self.optimizer, self.precision = optimizer, precision
        self.devices, self.processes = devices, processes
        self.memory_format = memory_format
        self.frozen, self.clip_gradient, self.ema = frozen, clip_gradient, ema
        self.average = None if ema is None else average_of_weights(network)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])     # PyTorch's name for the base rate of a schedule
        self.skipped = self.average_updates = 0
        self._deciding_layers = defaultdict(list)     # {function: layers that decide together by calling it}
        for layer in network.modules():
            if (precision.autocast is not None or precision.casts) and hasattr(layer, "decide_kept_inputs"):
                self._deciding_layers[layer.decide_kept_inputs].append(layer)
        self._captured = None
        if cuda_graph != "off":
            self._captured = CapturedFunction(self._pass_with_gradients, required=cuda_graph == "on",
                                              processes=processes)
        self._statistics = [(buffers, [buffer.clone() for buffer in buffers]) for buffers in buffers_by_dtype(network)]

    def train_mode(self):
        """Set the network to training mode, except for frozen modules."""
        self.network.train()
        for module in self.frozen:
            module.eval()

    @property
    def scored_network(self):
        """The network to evaluate: with the moving average of the weights if there is one."""
        return self.network if self.average is None else self.average

    def step(self, batches, factor=1.0, stop=False):
        """Train on one batch. The host waits for the device once, when everything but the update is queued.

        Args:
            batches: parts of the batch, each {"image": (B, 3, H, W) uint8, "label": (B, H, W)[, "jitter": (B, 4)]} of
                this process.
            factor: multiplies the learning rate of each parameter group.
            stop: whether a stop of this process was requested.

        Returns:
            ({name: float} of the terms and `gradient_norm`, which is None if it overflowed in half precision; whether a
            stop of any process was requested).

        Raises:
            NotFinite: in all processes, with the state as it was before the step.
            UserError: a norm has one value per channel.
        """
        for decide, layers in self._deciding_layers.items():      # in one call, because the host waits in each
            decide(layers, len(batches) * len(self.devices))
        for buffers, kept in self._statistics:
            torch._foreach_copy_(kept, buffers)
        generators = random_state(self.devices)
        parts = [self._place(batch) for batch in batches]
        divisors = self._divisors([labels for _, labels in parts]) if len(parts) > 1 else None
        self.optimizer.zero_grad()
        terms = 0.0
        for number, (images, labels) in enumerate(parts, 1):
            last = number == len(parts)
            with self._exchange_gradients(last), _enough_values(images):
                if self._captured is not None:
                    added = self._replay_pass(images, labels)
                else:
                    added = self._pass(images, labels, divisors=divisors, parts=len(parts), last=last)
            terms = terms + added
        terms, stop = self._read(terms, stop)
        if not all(map(math.isfinite, terms.values())):
            error = NotFinite(terms)
            if error.what == "loss" or not self.precision.skips_overflow():
                self._put_back(generators)
                raise error
            self.skipped += 1
            terms["gradient_norm"] = None
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]
        if self.clip_gradient is not None and (terms["gradient_norm"] or 0) > self.clip_gradient:
            torch._foreach_mul_(self.precision.gradients(self.optimizer), self.clip_gradient / terms["gradient_norm"])
        self.precision.step(self.optimizer)
        if self.average is not None and terms["gradient_norm"] is not None:
            update_average(self.average, self.network, self.ema, self.average_updates)
            self.average_updates += 1
        return terms, stop

    def _pass(self, images, labels, divisors=None, parts=1, last=True):
        """Forward and backward pass of a part of the batch, as in `step_loss`: its terms (T,)."""
        loss, terms = step_loss(self.module, self.criterion, images, labels, processes=self.processes,
                                divisors=divisors, parts=parts)
        self.precision.backward(loss, self.optimizer, last)
        return terms

    def _pass_with_gradients(self, images, labels):
        """The terms (T,) of a whole batch, and the gradients of this process's part of it."""
        self.optimizer.zero_grad()      # a capture that failed leaves gradients without values
        terms = self._pass(images, labels)
        return terms, [weight.grad for weight in self._trained_weights()]

    def _trained_weights(self):
        return [weight for weight in self.network.parameters() if weight.requires_grad]

    def _replay_pass(self, images, labels):
        """`_pass` of a whole batch by `CapturedFunction`."""
        layers = [layer for layers in self._deciding_layers.values() for layer in layers]
        (terms, gradients), replayed = self._captured(images, labels, key=tuple(layer.keeps_input for layer in layers))
        if self.processes is not None:
            self.processes.average(gradients)
        if replayed:
            for weight, gradient in zip(self._trained_weights(), gradients, strict=True):
                weight.grad = gradient
            for layer in layers:
                layer.count_pass()
        return terms

    def release(self):
        """Free the CUDA graph if there is one. NCCL waits for this when processes leave their group."""
        if self._captured is not None:
            self._captured.release()

    def weight_norm(self):
        """The Euclidean norm of all weights: float."""
        return float(total_norm([weight.detach() for weight in self.network.parameters()]))

    def _read(self, terms, stop):
        """Read what the host needs of a step, over all processes, with one exchange and one copy.

        Args:
            terms: (T,), equal in all processes.
            stop: as in `step`.

        Returns:
            ({name: float} with `gradient_norm`, whether a stop of any process was requested).
        """
        norm = self.precision.gradient_norm(self.optimizer)
        values = torch.cat([terms.double(), norm.double()[None], torch.full_like(norm[None], stop).double()])
        world = 1
        if self.processes is not None:
            values, world = self.processes.all_reduce(values), self.processes.size
        *terms, norm, stop = values.tolist()
        # Terms and norm are the same in all processes; their sum is not finite if it is not finite in one of them.
        named = dict(zip([*self.criterion.weights, "gradient_norm"], [*terms, norm], strict=True))
        return {name: value / world for name, value in named.items()}, stop > 0

    def _place(self, batch):
        """Move the images and labels of a batch to the first device."""
        images = batch["image"].to(self.devices[0], non_blocking=True)
        if "jitter" in batch:
            images = apply_jitter(images, batch["jitter"])
        return (images.contiguous(memory_format=self.memory_format),
                batch["label"].to(self.devices[0], non_blocking=True))

    def _divisors(self, parts):
        """`criterion.divisors` of the labels of all parts and processes."""
        each = [self.criterion.divisors(labels) for labels in parts]
        divisors = {name: None if value is None else sum(part[name] for part in each)
                    for name, value in each[0].items()}
        known = [name for name, value in divisors.items() if value is not None]
        if self.processes is None or not known:
            return divisors
        totals = self.processes.all_reduce(torch.stack([divisors[name] for name in known]))
        return divisors | dict(zip(known, totals, strict=True))

    def _exchange_gradients(self, last):
        """A context in which processes add up their gradients, in the last part of a batch only."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    @torch.no_grad()
    def _put_back(self, generators):
        for buffers, kept in self._statistics:
            torch._foreach_copy_(buffers, kept)
        set_random_state(generators, self.devices)
        self.optimizer.zero_grad()


def make_engine(network: nn.Module, *, criterion: nn.Module, optimizer: torch.optim.Optimizer,
                normalization: Normalization, precision: Precision, devices: list[torch.device],
                processes: Processes | None = None, memory_format: torch.memory_format = torch.contiguous_format,
                freeze: tuple[str, ...] = (), clip_gradient: float | None = None, ema: float | None = None,
                compiled: bool = False, cuda_graph: str = "off") -> Engine:
    """Make the `Engine` of a network.

    Args:
        network: on the first device.
        freeze: names of the stages to freeze.
        compiled: whether to compile the network.
        others: as in `Engine` and `NetworkWithLoss`.
    """
    frozen = network.backbone.first_stages(freeze)
    for module in frozen:
        module.requires_grad_(False)
    network, optimizer = precision.prepare(network, optimizer)
    if compiled:
        compile_network(network)
    module = NetworkWithLoss(network, criterion.to(devices[0]), normalization=normalization,
                             autocast=precision.autocast, apex=precision.casts)
    module = share_batches(module, devices, processes, captured=cuda_graph != "off")
    return Engine(module, network, criterion=criterion, optimizer=optimizer,
                  precision=precision, devices=devices, processes=processes, memory_format=memory_format, frozen=frozen,
                  clip_gradient=clip_gradient, ema=ema, cuda_graph=cuda_graph)
