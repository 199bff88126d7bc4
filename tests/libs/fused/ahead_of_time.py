"""Compile Triton's kernels for GPUs that are not there, and print a JSON line for each.

    python -m tests.libs.fused.ahead_of_time

The calls are those of a training step on maps of 256 channels and logits of 150 classes in bf16, on tensors without
values: all of them for compute capability 9.0, and those with maps for 8.0. In a process of its own, because
TRITON_INTERPRET must not be set when Triton is imported.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from libs.functions import Settings
from libs.fused import block_end, cross_entropy, launch, norm

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", torch.bool: "*i1"}
OPTIONS = ("num_warps", "num_stages")       # of the compiler, among the constants of a launch


def recorded_launches():
    """(kernel, arguments, constants) of forward and backward pass of each operator, as `launch.start` receives them."""
    calls = []
    launch.start = lambda kernel, grid, arguments, constants: calls.append((kernel, arguments, constants))
    meta = torch.device("meta")

    def make_map():
        x = torch.empty(2, 256, 97, 97, dtype=torch.bfloat16, device=meta).to(memory_format=torch.channels_last)
        return x.requires_grad_()

    weight, bias, mean, var = (torch.empty(256, device=meta, requires_grad=number < 2) for number in range(4))
    taps = torch.empty(1, 1, 5, device=meta, requires_grad=True)
    settings = Settings(1e-5, "leaky_relu", 0.01, training=True, absolute=True, keep_input=False)
    packed, sample_means = norm.statistics(make_map().detach(), 1e-5, mean, var, 0.1, by_sample=True)
    mean, invstd, count = norm.split_statistics(packed)
    y = norm.Normalize.apply(make_map() * 1, weight, bias, mean, invstd, count, settings, None)
    y.backward(torch.empty_like(y))
    output = block_end.EndBlock.apply(make_map(), make_map(), weight, bias, taps, mean, invstd, sample_means, count,
                                      settings._replace(keep_input=True), None)
    output.backward(torch.empty_like(output))
    logits = torch.empty(2, 150, 97, 97, dtype=torch.bfloat16, device=meta).to(memory_format=torch.channels_last)
    labels, counted = (torch.empty(2, 769, 769, dtype=dtype, device=meta) for dtype in (torch.uint8, torch.bool))
    cross_entropy.pixel_losses(logits, labels, 255)
    cross_entropy.sums(logits, labels, 255, torch.empty(150, device=meta), counted)
    return calls


def source_of(kernel, arguments, constants):
    """Source for Triton's compiler, with the types and the divisibility that a launch would find."""
    signature, constants, attributes = {}, {(kernel.arg_names.index(name),): value for name, value in constants.items()
                                            if name not in OPTIONS}, {}
    for number, name in enumerate(kernel.arg_names):
        value = arguments[number] if number < len(arguments) else None
        if value is None or isinstance(value, int) and value == 1:
            constants.setdefault((number,), value)
        if (number,) in constants:
            signature[name] = "constexpr"
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = TYPES[value.dtype] if is_tensor else "i32" if isinstance(value, int) else "fp32"
        if is_tensor or signature[name] == "i32" and value % 16 == 0:
            attributes[number,] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def is_map(value):
    """Whether an argument is a map, not statistics of some."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def describe(kernel, arguments, constants, capability):
    """Compile a kernel: its registers, bytes that do not fit into them, and sizes of its accesses to memory."""
    options = {name: constants[name] for name in OPTIONS if name in constants}
    compiled = triton.compile(source_of(kernel, arguments, constants), target=GPUTarget("cuda", capability, 32),
                              options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        report = subprocess.run([assembler, "-v", f"-arch={re.search(r'[.]target (sm_[0-9a-z]+)', ptx)[1]}", path, "-o",
                                 os.devnull], capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return {"kernel": kernel.fn.__name__, "capability": capability, "spilled": spilled,
            "registers": int(re.search(r"Used (\d+) registers", report)[1]),
            "maps": sum(map(is_map, arguments)),
            "vector_loads": len(re.findall(r"ld\.global\S*\.v4", ptx)),
            "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
            "vector_stores": len(re.findall(r"st\.global\S*\.v4", ptx))}


if __name__ == "__main__":
    for call in recorded_launches():
        for capability in (80, 90) if any(map(is_map, call[1])) else (90,):
            json.dump(describe(*call, capability), sys.stdout)
            print(flush=True)
