"""Memory: what a network keeps for its backward pass, counted; what a process has used; whether it ran out."""

import gc
import sys
from collections import defaultdict

import torch

try:
    import resource
except ImportError:     # not on Windows
    resource = None


def peak_bytes(device):
    """The most memory used so far: of a GPU what PyTorch allocated on it, on the CPU that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ran_out(error):
    """Whether the text of an error is PyTorch's for too little memory, on a GPU or a CPU."""
    return any(text in error for text in ("out of memory", "can't allocate memory", "not enough memory",
                                          "CUBLAS_STATUS_ALLOC_FAILED"))


def kept_bytes(network, images, autocast=None):
    """{part of the network: bytes}, from the tensors packed by autograd, each storage once; and, under
    "outside", what is alive beyond them (difference of live tensors before and after the forward pass)."""
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers(), images]}
    shapes = {tuple(p.shape) for p in network.parameters()}
    saved, where = {}, ["?"]

    def copy_of_weight(tensor):
        return tensor.dtype == autocast and tuple(tensor.shape) in shapes

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and not copy_of_weight(tensor):
            saved.setdefault(storage.data_ptr(), (where[0], storage.nbytes()))
        return tensor

    hooks = []
    for name, module in network.named_modules():
        part = ".".join(name.split(".")[:2])
        hooks.append(module.register_forward_pre_hook(lambda m, a, part=part: where.__setitem__(0, part)))
    before = _live(copy_of_weight)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), \
            torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        outputs = network(images)
    for hook in hooks:
        hook.remove()
    returned = {t.untyped_storage().data_ptr() for t in outputs.values()}
    parts = defaultdict(int)
    for pointer, (part, size) in saved.items():
        parts[part] += 0 if pointer in returned else size
    after = _live(copy_of_weight)
    parts["outside"] = sum(size for pointer, size in after.items()
                           if pointer not in before and pointer not in saved and pointer not in returned)
    return dict(parts), outputs


def _live(excluded):
    """{storage pointer: bytes} of every tensor Python knows, but for those that `excluded(tensor)` leaves out."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not excluded(thing):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found
