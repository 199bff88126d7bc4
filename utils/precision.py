"""Mixed precision: PyTorch's autocast, or NVIDIA apex where somebody still has it."""

from contextlib import nullcontext

import torch

from .cli import UserError
from .versions import cpu_computes_in_bf16, total_norm

CHOICES = ("off", "bf16", "fp16", "apex")
PRECISIONS = ("off", "fp16", "bf16")       # what `best_precision` finds, the best one last
OPT_LEVELS = ("O0", "O1", "O2", "O3")
AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16, "apex": None}


class Precision:
    """How losses are scaled and gradients found.

    Args:
        amp: `off`; `bf16`, autocast; `fp16`, autocast with a gradient scaler; `apex`, NVIDIA's apex.amp.
        device: where training runs.
        opt_level: of apex, `O0` to `O3`.

    Raises `UserError` where the device or an installed apex does not do it.
    """

    def __init__(self, amp, device, opt_level="O1"):
        self.autocast = AUTOCAST[amp]
        self.opt_level = opt_level
        self.apex = _import_apex() if amp == "apex" else None
        if amp == "apex" and device.type != "cuda":
            raise UserError("--amp apex: expected a GPU, found the CPU; --amp bf16 works there")
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def prepare(self, network, optimizer):
        """Network and optimiser, as apex wants them; unchanged otherwise. To be called before they are wrapped."""
        if self.apex is None:
            return network, optimizer
        return self.apex.initialize(network, optimizer, opt_level=self.opt_level)

    def backward(self, loss, optimizer):
        """Add the gradients of a loss, times the scale, to those there are."""
        if self.apex is not None:
            with self.apex.scale_loss(loss, optimizer) as scaled:
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
        if self.apex is not None:
            return self.opt_level in ("O1", "O2")       # the others have a fixed scale
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
        if state and state.keys() == self.state_dict().keys():
            (self.scaler if self.apex is None else self.apex).load_state_dict(state)


def best_precision(device):
    """What a device computes in fastest without harm: `bf16` where it has it, `fp16` on older GPUs, else `off`."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_computes_in_bf16() else "off"


def exact_float32(amp, device):
    """Let `--amp off` compute in fp32 on a GPU: PyTorch's convolutions would take TF32 there, and says so."""
    if amp == "off" and device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        print("--amp off: fp32, exactly; convolutions do not round to TF32, which is PyTorch's default and faster")


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


def at_least_float32(x):
    """x, raised to float32 if it is of half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_autocast(x):
    """A context in which operations on the device of `x` keep their dtype."""
    kind = x.device.type        # the device "meta" has no autocast
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
