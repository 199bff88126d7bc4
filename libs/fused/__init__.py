"""Operators that Triton kernels compute in few passes over channels-last maps.

The modules of operators import Triton, which is missing in PyTorch's builds for CPUs, macOS and Windows. They are
therefore imported where they are used, after `libs.fused.launch.obstacle` has returned None.
"""
