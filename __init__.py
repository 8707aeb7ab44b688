"""Retemper: continued pretraining of open language models, from a laptop CPU to a cluster of GPUs."""

__version__ = "0.1.0"
