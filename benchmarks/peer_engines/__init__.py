"""Run the training step of each engine that benchmarks/peers.py compares."""
