"""A model beyond the memory of its ranks is refused before anything is allocated."""

import torch

CPU = torch.device("cpu")
