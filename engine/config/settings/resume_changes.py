"""Settings that must not change when a run resumes, unless the user allows it."""

from __future__ import annotations

ORDER_KEYS = {
    "seed": None,
    "training.sequence_length": None,
    "data.validation_fraction": None,
    "data.shuffle": "windows",
    "data.packing": "concat",
}
"""Settings that determine the n-th sample of a source, and the behaviour of runs from before each setting existed."""
DATA_FILES = "data_files"
"""Name of the change that a dataset has other tokens or masks under the same name."""
ALLOWABLE_CHANGES = (*ORDER_KEYS, DATA_FILES)
