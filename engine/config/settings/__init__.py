"""The settings of a run, each defined once: typed, documented, and checked.

One YAML file describes a run; its keys are the fields below. The command line can override every key
(``--optimizer.learning_rate 3e-5``). :mod:`retemper.engine.config.parser` reads files and options.
:mod:`retemper.engine.config.checks` refuses values that no machine could run. :mod:`retemper.engine.schedule` and
:mod:`retemper.engine.parallel.mesh` check what depends on the number of ranks. :mod:`retemper.engine.config.effects`
finds values without effect; every new setting needs an entry there.
"""

from .adapter import AdapterConfig
from .checkpoint import CheckpointConfig
from .data import DataConfig, SourceConfig, StageConfig, ValidationConfig
from .logging import LoggingConfig
from .marks import PATH_MARK, URL_MARK, DataPath, FilePath, Switch
from .model import ModelConfig, RopeConfig
from .optimizer import OPTIMIZERS, LionConfig, MuonConfig, OptimizerConfig, ParameterGroupConfig
from .parallel import ParallelConfig
from .resume_changes import ALLOWABLE_CHANGES, DATA_FILES, ORDER_KEYS
from .run import RunConfig, to_dict, to_yaml
from .training import EarlyStoppingConfig, TrainingConfig

__all__ = [
    "ALLOWABLE_CHANGES",
    "DATA_FILES",
    "OPTIMIZERS",
    "ORDER_KEYS",
    "PATH_MARK",
    "URL_MARK",
    "AdapterConfig",
    "CheckpointConfig",
    "DataConfig",
    "DataPath",
    "EarlyStoppingConfig",
    "FilePath",
    "LionConfig",
    "LoggingConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterGroupConfig",
    "RopeConfig",
    "RunConfig",
    "SourceConfig",
    "StageConfig",
    "Switch",
    "TrainingConfig",
    "ValidationConfig",
    "to_dict",
    "to_yaml",
]
