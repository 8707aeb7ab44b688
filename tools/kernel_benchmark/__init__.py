"""Kernels of ``retemper.kernels`` beside their peers, with error and memory: tools/benchmark_kernels.py."""
