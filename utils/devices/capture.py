"""CUDA graphs: the GPU work of a function, captured once and afterward launched as a whole."""

import torch

from ..common.errors import UserError, first_line
from ..common.messages import logger
from .memory import is_out_of_memory

CHOICES = ("auto", "on", "off")
WARMUP = 3      # calls before the capture, in which libraries choose and load their kernels, as PyTorch advises


def resolve(choice, *, devices, parallel, accumulate, amp, recompute):
    """Resolve --cuda-graph, and log it if it was `auto` and steps cannot be captured.

    Args:
        choice: value of the flag.
        devices: of this process.
        parallel, accumulate, amp, recompute: values of other flags.

    Returns:
        The choice, or `off`.

    Raises:
        UserError: if the choice is `on`, and steps cannot be captured.
    """
    obstacles = ", ".join(
        ["the CPU"] * (devices[0].type != "cuda")
        + ["several GPUs with --parallel dp"] * (parallel == "dp" and len(devices) > 1)
        + [f"--accumulate {accumulate}"] * (accumulate > 1) + ["--amp apex"] * (amp == "apex")
        + [f"--recompute {recompute}"] * (recompute != "none"))
    if choice == "on" and obstacles:
        raise UserError("--cuda-graph on: expected one GPU per process, no --accumulate, --recompute or --amp "
                        f"apex, found {obstacles}; use --cuda-graph off")
    if choice == "auto" and obstacles:
        logger.info(f"--cuda-graph off: not possible with {obstacles}")
    return "off" if obstacles else choice


class CapturedFunction:
    """A function of tensors whose GPU work is captured in a CUDA graph after some calls, and replayed from then on.

    A replay launches all kernels with one call. It reads inputs from, and writes results to, the same memory each time,
    and changes tensors in place as the function did. Random numbers are those that the function would have drawn.

    Args:
        function: maps tensors to a nested tuple of tensors. It must not make the host wait for the device.
        required: whether to raise an error if the function cannot be captured. False: it is called as ever, which is
            logged once.
        processes: `Processes` that capture and replay together, or None.
    """

    def __init__(self, function, required, processes=None):
        self.function, self.required, self.processes = function, required, processes
        self.calls = 0          # since the start, or since the last capture that `key` made invalid
        self.key = self.graph = self.inputs = self.results = self.stream = None
        self.failed = False

    def __call__(self, *inputs, key=()):
        """Call the function or replay it.

        Args:
            *inputs: tensors on one GPU.
            key: what else the work depends on, comparable and hashable. If it or the layout of an input changes, the
                function is called once as ever, and then captured again.

        Returns:
            (results of the function, whether Python did not run it in this call). The next call may overwrite the
            results.
        """
        key = (key, *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
        if key != self.key and self.graph is not None:
            self.release()
            self.calls = WARMUP - 1
        self.key = key
        if self.calls < WARMUP:
            self.calls += 1
            return self._call_on_another_stream(inputs), False
        known = self.graph is not None
        if self.failed or not known and not self._capture(inputs):
            return self.function(*inputs), False
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value)
        self.graph.replay()
        return self.results, known

    def release(self):
        """Free the graph, and the memory of its inputs and results."""
        self.graph = self.inputs = self.results = None

    def _call_on_another_stream(self, inputs):
        """Call the function on a stream that is not the default one, as capturing will."""
        if self.stream is None:
            self.stream = torch.cuda.Stream(inputs[0].device)
        current = torch.cuda.current_stream(inputs[0].device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self.function(*inputs)
        current.wait_stream(self.stream)
        return results

    def _capture(self, inputs):
        """Capture the function, which does not run it. Returns whether that was possible."""
        torch.cuda.empty_cache()        # a graph has memory of its own, as much as the calls before
        self.inputs, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        stream, error = torch.cuda.current_stream(inputs[0].device), None
        try:
            # Other threads, which read samples, may allocate memory meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.results = self.function(*self.inputs)
        except RuntimeError as raised:
            error = raised
            torch.cuda.set_stream(stream)       # not restored if the end of the capture fails
        failed = error is not None
        if self.processes is not None:
            failed = any(self.processes.gather_objects(failed))
        if failed:
            self.release()
            if self.required and error is not None and is_out_of_memory(error):
                raise error
            reason = f"the step cannot be captured: {first_line(error) if error else 'it failed in another process'}"
            if self.required:
                raise UserError(f"--cuda-graph on: expected a step that can be captured, found that {reason}; use "
                                "--cuda-graph off") from error
            logger.warning(f"warning: --cuda-graph: {reason}; each operation is launched by itself, which takes the "
                           "host more time")
            self.failed = True
            return False
        self.graph = graph
        return True
