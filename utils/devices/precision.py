"""Mixed precision: PyTorch's autocast, or apex.amp of NVIDIA's older apex versions."""

import functools
import math
import time

import torch
import torch.nn.functional as F

from ..common.compat import cpu_computes_in_bf16, total_norm
from ..common.errors import UserError
from ..common.messages import logger
from ..ops.autocast import apex_casting

CHOICES = ("off", "bf16", "fp16", "apex")
PRECISIONS = ("off", "fp16", "bf16")       # results of `best_precision`, the best one last
OPT_LEVELS = ("O0", "O1", "O2", "O3")      # of apex; `Precision` supports the first two
AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16, "apex": None}


class Precision:
    """Mixed precision of a training run: autocast, loss scaling and gradients.

    Args:
        amp: `off`; `bf16`, autocast; `fp16`, autocast with a gradient scaler; `apex`, NVIDIA's apex.amp.
        device: on which training runs.
        opt_level: of apex: `O0`, float32; `O1`, casts to float16 as autocast does, with a loss scale.

    Raises:
        UserError: if the device or the installed apex does not support this, and for other levels of apex.
    """

    def __init__(self, amp, device, opt_level="O1"):
        if amp == "apex" and opt_level not in ("O0", "O1"):
            reason = ("O2 keeps the statistics of norms in half precision and loses its float32 weights at --resume"
                      if opt_level == "O2" else "O3 trains in half precision without a loss scale")
            raise UserError(f"--opt-level {opt_level}: expected O0 or O1 with --amp apex; {reason}")
        self.autocast = AUTOCAST[amp]
        self.opt_level = opt_level
        self.apex = _import_apex() if amp == "apex" else None
        if amp == "apex" and device.type != "cuda":
            raise UserError("--amp apex: expected a GPU, found the CPU; --amp bf16 works there")
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def prepare(self, network, optimizer):
        """Prepare network and optimizer for apex; return them unchanged otherwise.

        Call this before the network is wrapped, as for several devices. With O1 apex patches functions of PyTorch for
        the whole process. Here these functions cast only in the forward passes of training (`apex_casts`), and not
        inside `without_autocast`, like PyTorch's own autocast.

        Returns:
            (network, optimizer).
        """
        if self.apex is None:
            return network, optimizer
        network, optimizer = self.apex.initialize(network, optimizer, opt_level=self.opt_level)
        if self.casts:
            handle = self.apex._amp_state.handle
            # apex has one switch for all threads, but replicas on several GPUs need one per thread.
            handle.is_active = lambda: apex_casting.active
            # apex's cache of cast weights fails with current autograd. Only CCNet uses a weight twice in a pass.
            handle._enable_caching = False
        else:
            # The `forward` that O0 sets casts to float32, which images and logits already are. Copies of the network,
            # such as replicas and the average of the weights, would call the `forward` of the original.
            del network.forward
        return network, optimizer

    @property
    def casts(self):
        """Whether apex casts the operations of a network to half precision; PyTorch's own casting is `autocast`."""
        return self.apex is not None and self.opt_level == "O1"

    def backward(self, loss, optimizer, last=True):
        """Add the scaled gradients of a loss to the existing gradients.

        Args:
            loss: scalar tensor.
            optimizer: whose parameters get the gradients.
            last: whether this is the last part of the batch. Before the last part apex must not unscale: it would put
                the gradients of the earlier parts aside, and `DistributedDataParallel` would sum those of the last
                part only.
        """
        if self.apex is not None:
            with self.apex.scale_loss(loss, optimizer, delay_unscale=not last) as scaled:
                scaled.backward()
        else:
            self.scaler.scale(loss).backward()

    @staticmethod
    def gradients(optimizer):
        """Return the scaled gradients that the next step will use: a list of tensors."""
        return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    def gradient_norm(self, optimizer):
        """Return the Euclidean norm of all gradients without the scale, a scalar tensor; gradients are not changed."""
        norm = total_norm(self.gradients(optimizer))
        return norm / self.scaler.scale(torch.ones_like(norm))

    def skips_overflow(self):
        """Whether `step` skips a step with gradients that are not finite, so that a smaller scale may help.

        Below a scale of 1 the overflow is not due to the scale.
        """
        if self.casts:      # apex has already halved the scale
            return self.apex.state_dict()["loss_scaler0"]["loss_scale"] >= 0.5
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def step(self, optimizer):
        """Take an optimizer step; with fp16 a step whose gradients overflow is skipped."""
        if self.apex is not None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def state_dict(self):
        """Return the state of the loss scale: plain values, empty without a scale."""
        return self.scaler.state_dict() if self.apex is None else self.apex.state_dict()

    def load_state_dict(self, state):
        """Load a state of `state_dict`; one of another kind of scaling is ignored, and the scale starts anew."""
        fixed_scale = {"loss_scaler0": {"loss_scale": 1.0, "unskipped": 0}}     # of O0, with the same names as of O1
        if self.apex is not None and (not self.casts or state == fixed_scale):
            return
        if state and state.keys() == self.state_dict().keys():
            (self.scaler if self.apex is None else self.apex).load_state_dict(state)


def best_precision(device):
    """Return the fastest precision that a device supports without harm: `bf16`, `fp16` on older GPUs, or `off`.

    A CPU with instructions for bf16 may be slower in bf16 than in float32, so it is timed, once per process.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type != "cpu" or not cpu_computes_in_bf16():
        return "off"
    seconds = convolution_seconds()
    return "bf16" if seconds["bf16"] < seconds["off"] else "off"


def describe_default(device):
    """Return the reason for the `best_precision` of a device, a phrase for a message."""
    if device.type == "cuda":
        return "the best precision that every GPU has instructions for"
    if not cpu_computes_in_bf16():
        return "the CPU has no instructions for bf16"
    times = ", ".join(f"{1000 * seconds:.1f} ms with {name}" for name, seconds in convolution_seconds().items())
    return f"a convolution on this CPU takes {times}"


@functools.cache
@torch.inference_mode(False)
@torch.enable_grad()
def convolution_seconds():
    """Time a convolution like those of a backbone on this CPU, forward and backward.

    Takes the shortest of three runs for each precision, after a warmup run; about 50 ms in total on two cores.

    Returns:
        {--amp: seconds}.
    """
    image, weight = (torch.ones(size, requires_grad=True) for size in ((1, 128, 33, 33), (128, 128, 3, 3)))
    seconds = {"off": math.inf, "bf16": math.inf}
    for turn in range(4):
        for amp in seconds:
            start = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp == "bf16"):
                total = F.conv2d(image, weight, padding=2, dilation=2).sum()
            torch.autograd.grad(total, (image, weight))
            if turn:
                seconds[amp] = min(seconds[amp], time.perf_counter() - start)
    return seconds


def exact_float32(amp, device):
    """With `--amp off`, turn off TF32 on a GPU, which PyTorch uses for convolutions by default, and log that."""
    if amp == "off" and device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        logger.info("--amp off: fp32, exactly; convolutions do not round to TF32, PyTorch's faster default")


def _import_apex():
    """Import apex.amp. Raises `UserError` if it is not installed."""
    try:
        from apex import amp
    except ImportError:
        amp = None
    if not hasattr(amp, "initialize"):
        raise UserError("--amp apex: expected NVIDIA's apex with apex.amp, found none: it was removed after tag 25.05 "
                        "(apex on PyPI is another package); build apex from its tag 25.04, or use --amp bf16")
    return amp
