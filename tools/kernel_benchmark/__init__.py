"""Benchmark kernels of ``retemper.kernels`` and their peers, with error and memory: tools/benchmark_kernels.py."""
