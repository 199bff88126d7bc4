"""Mixed precision: PyTorch's autocast, or NVIDIA apex where somebody still has it."""

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
PRECISIONS = ("off", "fp16", "bf16")       # what `best_precision` finds, the best one last
OPT_LEVELS = ("O0", "O1", "O2", "O3")      # of apex; `Precision` takes the first two
AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16, "apex": None}


class Precision:
    """How losses are scaled and gradients found.

    Args:
        amp: `off`; `bf16`, autocast; `fp16`, autocast with a gradient scaler; `apex`, NVIDIA's apex.amp.
        device: where training runs.
        opt_level: of apex: `O0`, float32; `O1`, casts like those of autocast to float16, with a loss scale.

    Raises `UserError` where the device or an installed apex does not do it, and for other levels of apex.
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
        """Network and optimizer, as apex wants them; unchanged otherwise. To be called before they are wrapped.

        With O1 apex patches functions of PyTorch for the whole process. Here they cast in the forward passes of
        training alone (`apex_casts`), and not inside `without_autocast`, as PyTorch's own autocast does it.
        """
        if self.apex is None:
            return network, optimizer
        network, optimizer = self.apex.initialize(network, optimizer, opt_level=self.opt_level)
        if self.casts:
            handle = self.apex._amp_state.handle
            # apex has one switch for all threads, of which replicas on several GPUs would turn it at the same time.
            handle.is_active = lambda: apex_casting.active
            # Looking up a cast weight fails with autograd graphs of today. Only CCNet uses one twice in a pass.
            handle._enable_caching = False
        else:
            # The `forward` of O0 casts to float32, which images and logits are, but a copy of the network, such as an
            # average of the weights or a replica, would call that of the original.
            del network.forward
        return network, optimizer

    @property
    def casts(self):
        """Whether apex casts the operations of a network to half precision; PyTorch's own casting is `autocast`."""
        return self.apex is not None and self.opt_level == "O1"

    def backward(self, loss, optimizer, last=True):
        """Add the gradients of a loss, times the scale, to those there are.

        last: whether `step` comes next. By itself apex would put aside the gradients of the parts before, and
        `DistributedDataParallel` would add up those of the last part alone.
        """
        if self.apex is not None:
            with self.apex.scale_loss(loss, optimizer, delay_unscale=not last) as scaled:
                scaled.backward()
        else:
            self.scaler.scale(loss).backward()

    @staticmethod
    def gradients(optimizer):
        """The gradients that a step will use, times the scale: a list of tensors."""
        return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    def gradient_norm(self, optimizer):
        """The Euclidean norm of all gradients, which stay as they are, without the scale: scalar tensor."""
        norm = total_norm(self.gradients(optimizer))
        return norm / self.scaler.scale(torch.ones_like(norm))

    def skips_overflow(self):
        """Whether `step` leaves out a step whose gradients are not finite, and the next one may do better.

        Not below a scale of 1: then it is not the scale that makes them overflow.
        """
        if self.casts:      # apex has halved the scale by now
            return self.apex.state_dict()["loss_scaler0"]["loss_scale"] >= 0.5
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def step(self, optimizer):
        """Take a step; with fp16 one whose gradients overflow is left out."""
        if self.apex is not None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def state_dict(self):
        """The state of the loss scale: plain values, empty where nothing is scaled."""
        return self.scaler.state_dict() if self.apex is None else self.apex.state_dict()

    def load_state_dict(self, state):
        """What `state_dict` gave; of another kind of scaling, nothing, so that the scale starts anew."""
        fixed = {"loss_scaler0": {"loss_scale": 1.0, "unskipped": 0}}      # of O0, which names it as O1 does
        if self.apex is not None and (not self.casts or state == fixed):
            return
        if state and state.keys() == self.state_dict().keys():
            (self.scaler if self.apex is None else self.apex).load_state_dict(state)


def best_precision(device):
    """What a device computes in fastest without harm: `bf16`, `fp16` on older GPUs, or `off`.

    A CPU with instructions for bf16 may be slower by them than in float32, so it is timed, once per process.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type != "cpu" or not cpu_computes_in_bf16():
        return "off"
    seconds = convolution_seconds()
    return "bf16" if seconds["bf16"] < seconds["off"] else "off"


def describe_default(device):
    """Why `best_precision` is what it is on a device: the end of a sentence."""
    if device.type == "cuda":
        return "the best that every GPU has instructions for"
    if not cpu_computes_in_bf16():
        return "the CPU has no instructions for bf16"
    times = ", ".join(f"{1000 * seconds:.1f} ms with {name}" for name, seconds in convolution_seconds().items())
    return f"a convolution on this CPU takes {times}"


@functools.cache
@torch.inference_mode(False)
@torch.enable_grad()
def convolution_seconds():
    """Seconds that a convolution like those of a backbone takes on this CPU, forward and backward: {--amp: seconds}.

    The shortest of three each, in turn, after one that prepares the kernels; some 50 ms in all on two cores.
    """
    image, weight = (torch.ones(size, requires_grad=True) for size in ((1, 128, 33, 33), (128, 128, 3, 3)))
    seconds = {"off": math.inf, "bf16": math.inf}
    for turn in range(4):
        for amp in seconds:
            began = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp == "bf16"):
                total = F.conv2d(image, weight, padding=2, dilation=2).sum()
            torch.autograd.grad(total, (image, weight))
            if turn:
                seconds[amp] = min(seconds[amp], time.perf_counter() - began)
    return seconds


def exact_float32(amp, device):
    """Let `--amp off` compute in fp32 on a GPU: PyTorch's convolutions would take TF32 there, and says so."""
    if amp == "off" and device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        logger.info("--amp off: fp32, exactly; convolutions do not round to TF32, which is PyTorch's default and "
                    "faster")


def _import_apex():
    """apex.amp, imported only when it is asked for."""
    try:
        from apex import amp
    except ImportError:
        amp = None
    if not hasattr(amp, "initialize"):
        raise UserError("--amp apex: expected NVIDIA's apex with apex.amp, found none: it was removed after tag 25.05 "
                        "(pip's package apex is another one); build apex from its tag 25.04, or use --amp bf16")
    return amp
