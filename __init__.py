"""Retemper: continued pretraining of open language models, from a laptop CPU to a cluster of GPUs."""

import sys

if sys.platform == "win32":  # before an import of what Windows lacks fails
    sys.exit("error: Retemper runs on Linux, macOS and WSL (Windows Subsystem for Linux); this is Windows itself")

__version__ = "0.1.0"
