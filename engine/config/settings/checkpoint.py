"""Settings of checkpoints and exports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .marks import Switch


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    save_interval: int | Literal["epoch"] = 1000
    """Number of steps between checkpoints. epoch: save at the end of every epoch, see ``training.train_epochs``. One is
    always written at the end."""
    asynchronous: bool = True
    """Continue training while a checkpoint is written. Each rank first copies its part of weights and states to host
    memory, which stays reserved: 12 bytes per parameter for each copy of the model, with fp32 weights and states. Only
    the next update waits for these copies, and nothing waits for the disk. False: training waits, and needs no such
    memory."""
    max_failed_saves: int = 2
    """Maximum number of failed saves in a row; one more ends the run. A checkpoint that cannot be written, for example
    because the disk is full, leaves no files behind, and training continues. If the last checkpoint of a run fails, the
    run ends with an error."""
    keep_last: int = 3
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep checkpoints whose step is a multiple of this. 0: keep none for this reason."""
    keep_best: bool | Literal["improved"] = True
    """With validation sets: also keep the checkpoint with the lowest loss on the first set. true: the best among the
    checkpoints that are saved at a step with an evaluation; choose ``save_interval`` as a multiple of
    ``training.eval_interval``. improved: also save after every evaluation with a new lowest loss, which early in a run
    may be every evaluation. false: keep no checkpoint for its loss."""
    export_hf: bool = False
    """When the token budget is used up, also write the final checkpoint as a Hugging Face folder,
    ``{run_folder}/hf/step-...``, as checkpoint_convert/dcp_to_hf.py does."""
    export_ema: bool = False
    """Export the average of ``training.ema_decay`` instead of the weights."""
    model_folders: Annotated[Literal["auto", "on", "off"], Switch("on", "off")] = "auto"
    """When the token budget is used up, write the model to ``{run_folder}/final_model``, and with ``keep_best`` and
    validation sets the best checkpoint to ``best_model``: Hugging Face folders with the tokenizer. They are replaced
    when the run is continued. auto: for models of up to 10 billion parameters (20 GB each in bf16), and a folder that
    cannot be written is only reported."""
    export_best: bool = False
    """Write ``best_model`` whatever ``model_folders`` says."""
    push_to_hub: str | None = None
    """Upload that folder to this model repository (namespace/name). If the repository does not exist, it is created at
    the start. The token comes from HF_TOKEN or `hf auth login`; see docs/hugging_face.md."""
    hub_private: bool = True
    """Whether a new repository is private. One that exists keeps its visibility."""
    hub_message: str | None = None
    """Message of the upload's commit. Null: the name of the folder."""
