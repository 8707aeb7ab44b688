"""Find and open the start of a run: random weights, a Hugging Face folder or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .config.budget import TRAIN, given_key
from .config.checks import with_known_budget
from .config.settings import DATA_FILES, ModelConfig, RunConfig, to_dict
from .data.catalog import Catalog, open_catalog
from .data.renamed_sources import keep_names
from .data.sample_order import SampleOrder
from .errors import UserError
from .guards.background import run_in_background
from .model.adapters import AdapterParameters, adapter_parameters
from .model.attention_choice import choose_attention
from .model.changed_config import with_settings
from .model.config_file import CONFIG_FILE, INLINE, hf_config_of, read_hf_config
from .model.generic.remote_code import register_remote_code
from .model.implementations import architecture_of_tensors, checked, meta_model, parse_architecture
from .model.wrappers import text_config_of
from .observe.waiting import Say, report_if_slow
from .offload_choice import with_offload
from .optim.groups import require_same_optimizer
from .parallel import adapter, build, trainable
from .parallel import compile as block_compile
from .parallel.memory_check import require_memory
from .parallel.precision import with_precision
from .parallel.process_group import Ranks
from .schedule import BatchPlan, Progress
from .start_kinds import AdapterStart, CheckpointStart, HuggingFaceStart, RandomStart, Start
from .weights.adapters.opening import open_parameters, require_base
from .weights.adapters.peft_config import PeftConfig
from .weights.adapters.peft_start import open_peft_start, require_values
from .weights.base_identity import BaseIdentity
from .weights.checkpoint.assets import ASSET_FOLDER, HfAssets, asset_folder, complete_assets
from .weights.checkpoint.manifest import Manifest
from .weights.checkpoint.resume_changes import require_allowed
from .weights.checkpoint.store import CheckpointStore
from .weights.checkpoint.tensors import open_tensors
from .weights.hugging_face.carried import Carried
from .weights.hugging_face.initial import INITIALIZE_FROM, local_weights, open_weights
from .weights.hugging_face.layout import Layout
from .weights.hugging_face.weight_dtypes import declared_dtype, dtypes_of, with_dtype


@dataclass(frozen=True)
class StartFolder:
    """The start of a run, found and not yet opened."""

    folder: str | None = None
    """A checkpoint or a Hugging Face folder; None: random weights."""
    manifest: Manifest | None = None
    """Of the checkpoint."""
    resumes: bool = False
    """True: the run continues from the checkpoint, with its optimizer states and progress. False: only the weights are
    used (``model.initialize_from``)."""
    remarks: tuple[str, ...] = ()
    """Lines for the log."""
    base: StartFolder | None = None
    """The base of the adapter that the run continues to train."""


class OpenedRun(NamedTuple):
    """What a run reads, opened and checked, before anything is built."""

    config: RunConfig
    """With everything decided that it leaves open."""
    start: Start
    choices: build.Choices
    catalog: Catalog
    order: SampleOrder
    progress: Progress
    """At the start."""
    remarks: tuple[str, ...]
    """Lines for the log."""


def open_run(config: RunConfig, plan: BatchPlan, ranks: Ranks, store: CheckpointStore, say: Say) -> OpenedRun:
    """Find and open the weights and the data of a run. All ranks must call this.

    Args:
        config: of the run.
        plan: batch sizes.
        ranks: all ranks.
        store: of the run's checkpoints.
        say: prints a line for people.

    Raises:
        UserError: on every rank, if anything is missing, damaged or does not fit.
    """
    with report_if_slow("finding and verifying what the run starts from", say):
        config, found = find_start(config, ranks, store)
    with report_if_slow("opening the weights and the data", say):
        opened = record_carried(ranks.fail_together(lambda: open_start(config, found.base or found)), ranks)
        start = ranks.fail_together(lambda: with_adapter(config, opened, found, ranks))
        config, start, choices = choose_implementation(config, start, plan, ranks, say)
        config, catalog, order, progress = ranks.fail_together(lambda: open_data(config, plan, start))
    return OpenedRun(config, start, choices, catalog, order, progress, found.remarks)


def find_start(config: RunConfig, ranks: Ranks, store: CheckpointStore) -> tuple[RunConfig, StartFolder]:
    """Find, download and verify the start of a run. All ranks must call this.

    Args:
        config: of the run.
        ranks: all ranks.
        store: of the run's checkpoints.

    Returns:
        the configuration, in which training sources have their names in the resumed checkpoint; and the start.

    Raises:
        UserError: on every rank, if the start is missing or damaged.
    """
    config, found = _find(config, ranks, store)
    _share_code(config.model, found, ranks)
    return config, found


def find_weights(model: ModelConfig, ranks: Ranks, store: CheckpointStore) -> StartFolder:
    """Find, download and verify the weights of ``model.initialize_from``. All ranks must call this.

    Raises:
        UserError: on every rank, if they are missing or damaged.
    """
    found = _find_weights(model, ranks, store)
    _share_code(model, found, ranks)
    return found


def _share_code(model: ModelConfig, found: StartFolder, ranks: Ranks) -> None:
    if model.trust_remote_code:
        # On one rank first: transformers copies the code to a folder that ranks share, and imports it there.
        ranks.run_on_rank0(lambda: _register_code(model, found.folder))


def _find(config: RunConfig, ranks: Ranks, store: CheckpointStore) -> tuple[RunConfig, StartFolder]:
    resume_from = store.resolve(config.resume)
    if resume_from is not None:
        folder, manifest = resume_from
        data, lines = ranks.fail_together(lambda: keep_names(config.data, manifest.datasets))
        ranks.fail_together(lambda: adapter.require_same(manifest.config, config.adapter, folder))
        base = _find_base(config.model, ranks, store) if config.adapter.kind is not None else None
        return replace(config, data=data), StartFolder(str(folder), manifest, True, tuple(lines), base)
    return config, _find_base(config.model, ranks, store)


def _find_base(model: ModelConfig, ranks: Ranks, store: CheckpointStore) -> StartFolder:
    return StartFolder() if model.initialize_from is None else _find_weights(model, ranks, store)


def _find_weights(model: ModelConfig, ranks: Ranks, store: CheckpointStore) -> StartFolder:
    kind, weights = local_weights(str(model.initialize_from), ranks, lambda folder: _check_model(folder, model))
    manifest = store.require_valid(weights, INITIALIZE_FROM) if kind == "checkpoint" else None
    if manifest is not None and manifest.base:
        run_in_background(ranks, (lambda: require_base(Path(weights))) if ranks.is_main else None)
    return StartFolder(weights, manifest)


def _check_model(folder: Path, model: ModelConfig) -> None:
    """Refuse the config in ``folder`` if the run could not train its model."""
    config, where = read_hf_config(folder), str(folder / CONFIG_FILE)
    if model.trust_remote_code:
        register_remote_code(config, folder)
    parse_architecture(with_settings(config, model, where), where, model.implementation)


def open_start(config: RunConfig, found: StartFolder) -> Start:
    """Open the start: the files of the model, its architecture, and the table of its tensors.

    Raises:
        UserError: they are unusable, or contradict each other or ``config``.
    """
    model, folder, weights = config.model, found.folder, None
    code = _register_code(model, folder) if model.trust_remote_code else None
    if folder is None:
        found_assets, where = HfAssets({}), model.architecture if isinstance(model.architecture, str) else INLINE
    elif found.manifest is None:
        found_assets, where = HfAssets.read(folder), str(Path(folder) / CONFIG_FILE)
        content = found_assets.files.get(CONFIG_FILE)
        if content is None:
            open_weights(folder)  # refuses the folder
        else:
            hf_config_of(content, Path(where))
    else:
        found_assets, where = HfAssets.of_checkpoint(folder), str(Path(folder) / ASSET_FOLDER / CONFIG_FILE)
    if code is not None:
        found_assets = found_assets.with_code(code)
    assets = complete_assets(model, found_assets, folder, found.resumes)
    if folder is not None and found.manifest is None:
        weights = open_weights(folder, assets.config, model.implementation)
        # declare the dtypes that are stored, as checkpoint_convert/hf_to_dcp.py does
        assets = with_dtype(assets, dtypes_of(weights.parameters.tensors, weights.architecture.float32_tensors))
    assert assets.config is not None
    keep = config.checkpoint
    asked = {"export_hf": keep.export_hf, "export_best": keep.export_best, "model_folders": keep.model_folders == "on"}
    for key in [name for name, value in asked.items() if value][:1]:
        _require_exportable(f"checkpoint.{key}", assets.config, assets, where)
    if weights is not None:
        return HuggingFaceStart(assets, weights.architecture, folder, weights=weights)
    if folder is None:
        architecture = parse_architecture(assets.config, where, model.implementation)
        return RandomStart(assets, architecture, seed=config.seed)
    assert found.manifest is not None
    parts = open_parameters(Path(folder), found.manifest, assets.config)
    resumed_from = found.manifest if found.resumes else None
    architecture = architecture_of_tensors(assets.config, where, parts.tensors, model.implementation)
    return CheckpointStart(assets, architecture, folder, resumed_from, parts=parts)


def with_adapter(config: RunConfig, start: Start, found: StartFolder, ranks: Ranks) -> Start:
    """Return ``start`` if there is no adapter; else the start with it, whose base is ``start``.

    Args:
        config: of the run.
        start: the base.
        found: the start of the run: the base for a new adapter, or the checkpoint of the adapter.
        ranks: all ranks. One of them begins to hash the base.

    Raises:
        UserError: the adapter does not fit the model, or the base is another model than that of the checkpoint.
    """
    if config.adapter.kind is None:
        return start
    parameters = adapter_parameters(start.architecture, config.adapter)
    _require_peft_form(config, start, parameters)
    opened = AdapterStart(
        start.assets,
        start.architecture,
        start.folder,
        base=start,
        parameters=parameters,
        seed=config.seed,
        identity=BaseIdentity(start.folder or "", start.content_hash, ranks),
    )
    if found.base is None:
        return _with_peft(config, opened, ranks)
    assert found.folder is not None
    assets = complete_assets(config.model, HfAssets.of_checkpoint(found.folder), found.folder, True)
    where = str(Path(found.folder) / ASSET_FOLDER / CONFIG_FILE)
    assert assets.config is not None
    there = parse_architecture(assets.config, where, config.model.implementation)
    if there.facts() != start.architecture.facts():
        raise UserError(
            f"{INITIALIZE_FROM}: {start.folder} is another model than the base in {where}; put that one back, or start "
            "a new run_folder"
        )
    parts = open_tensors(found.folder)
    return replace(opened, assets=assets, folder=found.folder, resumed_from=found.manifest, parts=parts)


def _with_peft(config: RunConfig, start: AdapterStart, ranks: Ranks) -> AdapterStart:
    """Return ``start``, which reads its adapter from ``adapter.initialize_from`` if that is set."""
    folder, model_config, base = config.adapter.initialize_from, start.base.assets.config, start.base.folder
    if folder is None:
        return start
    assert model_config is not None and base is not None
    names = PeftConfig(
        start.parameters, start.architecture, Layout.of(start.architecture, meta_model(start.architecture))
    )
    peft = open_peft_start(folder, names, model_config)
    if ranks.is_main:
        require_values(peft, names)
    recorded = peft.base_identity(start.identity, [base, str(config.model.initialize_from)], ranks)
    return replace(start, peft=peft, base_of_peft=recorded)


def _require_peft_form(config: RunConfig, base: Start, parameters: AdapterParameters) -> None:
    """Refuse now what the export as a folder of PEFT would refuse at the end of the run."""
    if not config.checkpoint.export_hf or config.adapter.export == "merged":
        return
    model_config, architecture = base.assets.config, base.architecture
    assert model_config is not None
    layout = Layout.of(architecture, meta_model(architecture))
    try:
        PeftConfig(parameters, architecture, layout).require_form(Path(base.folder or ""), model_config)
    except UserError as error:
        raise UserError(f"adapter.export is {config.adapter.export}: {error}") from None


def _require_exportable(key: str, config: dict[str, Any], assets: HfAssets, where: str) -> None:
    """Refuse now what the export at the end of the run, which the setting ``key`` asks for, would refuse."""
    declared_dtype(text_config_of(config)[0], where)  # in which it writes the weights
    carried = Carried.in_checkpoint(assets, Path(where).parent.parent)
    if carried is not None:
        try:
            carried.open()
        except UserError as error:
            raise UserError(f"{key}: {error}") from None


def _register_code(model: ModelConfig, folder: str | None) -> Path | None:
    """Register the code of the model, and return its folder; None if the config is inside the run's configuration."""
    if folder is not None:
        place = asset_folder(folder)
    elif isinstance(model.architecture, str):
        place = Path(model.architecture) if Path(model.architecture).is_dir() else Path(model.architecture).parent
    else:
        return None
    register_remote_code(read_hf_config(place), place)
    return place


def record_carried(start: Start, ranks: Ranks) -> Start:
    """Return ``start``, in whose assets the tensors are recorded that exports take from its folder.

    All ranks must call this. One of them hashes these tensors.
    """
    if not isinstance(start, HuggingFaceStart) or not start.weights.carried:
        return start
    weights = start.weights
    carried = ranks.broadcast(run_in_background(ranks, (lambda: Carried.of(weights)) if ranks.is_main else None))
    assert carried is not None
    return replace(start, assets=carried.added_to(start.assets))


def choose_implementation(
    config: RunConfig, start: Start, plan: BatchPlan, ranks: Ranks, say: Say
) -> tuple[RunConfig, Start, build.Choices]:
    """Decide what the configuration leaves open; refuse what the model makes impossible. All ranks must call this.

    Returns:
        the configuration with its precision and offload decided; the start, whose architecture says how documents are
        kept apart; and the other decisions.

    Raises:
        UserError: on all ranks, with both sides of the arithmetic.
    """
    config, precision = with_precision(config, ranks)
    config, offload_reason = with_offload(config, ranks, say)
    architecture = ranks.broadcast(ranks.run_on_rank0(lambda: checked(start.architecture)))

    def decide() -> build.Choices:
        attention = choose_attention(config, architecture, ranks.device)
        compiled = block_compile.enabled(config, ranks.device, attention.backend)
        choices = build.Choices(attention, compiled, plan.num_micro_batches, precision.reason, offload_reason)
        build.check(config, architecture, choices, ranks.device, ranks.world_size)
        require_memory(config, architecture, ranks.device, ranks.world_size)
        return choices

    return config, replace(start, architecture=architecture), ranks.fail_together(decide)


def open_data(config: RunConfig, plan: BatchPlan, start: Start) -> tuple[RunConfig, Catalog, SampleOrder, Progress]:
    """Open the datasets of a run; return its configuration with its budget in tokens, and its place in their order.

    Raises:
        UserError: the datasets are unusable, or do not fit the model or the checkpoint.
    """
    catalog = open_catalog(config.data, plan, start.architecture.vocab_size, start.assets.tokenizer, config.seed)
    config = with_known_budget(config, catalog.epoch_tokens)
    order, progress, manifest = catalog.sample_order(config.seed), Progress(), start.resumed_from
    if manifest is not None:
        folder = Path(str(start.folder))
        require_allowed(manifest, to_dict(config), config.allow_changes, folder)
        trainable.require_same(manifest.config, config.training, folder, start.architecture)
        require_same_optimizer(manifest.config, config.optimizer, folder)
        if DATA_FILES not in config.allow_changes:
            catalog.require_unchanged(manifest.datasets, str(folder))
        former_length = manifest.config.get("training", {}).get("sequence_length", plan.sequence_length)
        order = order.resumed(manifest.sample_order, manifest.consumed_samples, former_length)
        # The token count stays exact. The place in the data is rounded down to whole samples of the new length.
        samples = manifest.consumed_samples * former_length // plan.sequence_length
        progress = Progress(manifest.step, samples, manifest.consumed_tokens, manifest.best, manifest.early_stopping)
    begin = config.optimizer.schedule_start_tokens
    if begin > progress.tokens:
        raise UserError(
            f"optimizer.schedule_start_tokens is {begin:,}, but the run continues at {progress.tokens:,} tokens, "
            f"before its schedule begins; set it to {progress.tokens} at most"
        )
    steps = plan.steps_left(config.training.budget, progress.tokens)
    order.require(progress.samples + steps * plan.global_batch_size, given_key(config, TRAIN))
    return config, catalog, order, progress
