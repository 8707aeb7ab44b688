"""The steps of ``retemper evaluate``: tokenize, open each model, score each set, compare."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any

import numpy as np

from ...engine.data.catalog import open_validation_set
from ...engine.data.sidecar import Sidecar
from ...engine.errors import UserError
from ...engine.guards.stop_request import StopRequest
from ...engine.observe.waiting import Say
from ...engine.out_of_memory import in_one_line
from ...engine.parallel.mesh import Mesh
from ...engine.parallel.process_group import Ranks
from ...engine.prepare_data import prepare_data
from ...engine.run_folder import run_store
from ...engine.start import find_weights
from ..tokenizer.handle import TokenizerHandle, load_tokenizer
from ..tokenizer.token_bytes import TokenBytes, read_token_bytes
from .harness import run_harness
from .model import EvaluatedModel, longest_sequence, open_model
from .options import EvaluateOptions
from .plan import EvaluationPlan, named_options
from .report import describe_set
from .scores import DocumentScore, EvaluationResult, ModelScore, SetScore
from .scoring import DocumentSums, score
from .windows import WindowPlan, Windows, divide

_LESS_MEMORY = (
    "lower --batch-size or --sequence-length, set --training.weight_dtype bf16, or start more ranks with torchrun"
)
_LEAST_TARGETS = 16
"""Shorter documents are not shown as extremes, unless all are shorter: their losses say little."""
_CHARACTERS = 200
"""Length of the shown beginning of a document."""
_TOKENS_SHOWN = 128


def evaluate_models(plan: EvaluationPlan, ranks: Ranks, mesh: Mesh, say: Say) -> EvaluationResult:
    """Evaluate all sets with the model, and with the baseline. All ranks must call this.

    Raises:
        UserError: on every rank.
    """
    scores = {}
    for option, config in plan.configs.items():
        name = plan.options.model if option == "--model" else str(plan.options.baseline)
        with named_options(option, plan.options), in_one_line(_LESS_MEMORY):
            if not plan.options.data:
                found = find_weights(config.model, ranks, run_store(config, ranks))
                scores[option] = ModelScore(name, str(found.folder))
                continue
            # Never entered, so a signal ends the process: there is nothing to save.
            config = prepare_data(config, ranks, StopRequest(ranks), say)
            model = open_model(config, ranks, mesh, say)
            say(f"model       {name}", *(f"{key:<12}{value}" for key, value in model.facts.items()))
            scores[option] = _evaluate(name, model, plan.options, say)
            del model
            gc.collect()
    training, options = plan.config.training, plan.options
    settings = {
        "mode": options.mode,
        "sequence_length": training.sequence_length,
        "stride": options.stride_of(training.sequence_length),
        "max_tokens": options.max_tokens,
        "max_documents": options.max_documents,
        "attend_across_documents": plan.config.data.attend_across_documents,
    }
    return EvaluationResult(scores["--model"], scores.get("--baseline"), settings)


def _evaluate(name: str, model: EvaluatedModel, options: EvaluateOptions, say: Say) -> ModelScore:
    ranks, notes = model.ranks, list(model.notes)
    longest, length = longest_sequence(model.config), model.config.training.sequence_length
    if longest is not None and length > longest:
        notes.append(f"windows of {length:,} tokens are longer than the model's max_position_embeddings {longest:,}")
    texts, tokenizer = _read_tokenizer(model)
    if isinstance(texts, str):
        notes.append(f"bits per byte are not known: {texts}")
    sets = []
    for entry, source in zip(options.data, model.config.data.train, strict=False):
        windows, sidecar = _divide(model, options, source.identity, source.path)
        if sidecar is None:
            notes.append(f"{entry['path']} does not say which tokenizer made it: it is taken to be that of the model")
        table = None if isinstance(texts, str) else texts.without(ids_without_text(sidecar))
        sums = score(model, windows, table, say)
        sets.append(_set_score(entry["path"], windows, sums, options.extremes, tokenizer))
        say(describe_set(sets[-1]))
    fingerprint = ranks.broadcast(tokenizer.fingerprint if tokenizer is not None else "")
    return ModelScore(name, str(model.start.folder), model.facts, fingerprint, sets, notes=notes)


def with_tasks(plan: EvaluationPlan, result: EvaluationResult, say: Say) -> EvaluationResult:
    """Return ``result`` with the results of lm-evaluation-harness, if it was asked for. There is only one rank.

    Raises:
        UserError: the harness cannot run a task.
    """
    if plan.options.harness is None:
        return result
    harness, baseline = plan.options.harness, result.baseline
    model = run_harness(result.model, plan.config, harness, say)
    if baseline is not None:
        baseline = run_harness(baseline, plan.configs["--baseline"], harness, say)
    return replace(result, model=model, baseline=baseline)


def _read_tokenizer(model: EvaluatedModel) -> tuple[TokenBytes | str, TokenizerHandle | None]:
    """Return the bytes of every token on all ranks, or why they are unknown; and the tokenizer on the main rank."""
    opened: list[TokenizerHandle] = []

    def read() -> TokenBytes | str:
        file = model.tokenizer_file
        if file is None:
            return f"{model.start.folder} has no tokenizer"
        opened.append(load_tokenizer(file))
        return read_token_bytes(file, model.architecture.vocab_size)

    found = model.ranks.broadcast(model.ranks.run_on_rank0(read))
    return found, opened[0] if opened else None


def ids_without_text(sidecar: Sidecar | None) -> set[int]:
    """Return the ids around the documents of a dataset, which may look like text to the tokenizer."""
    if sidecar is None:
        return set()
    ends = [] if sidecar.eod_id is None else [sidecar.eod_id]
    return {*ends, *(sidecar.bos_ids or ()), *(sidecar.eos_ids or ())}


def _divide(model: EvaluatedModel, options: EvaluateOptions, name: str, path: str) -> tuple[Windows, Sidecar | None]:
    """Open a dataset, and divide it into windows; return it with its sidecar.

    Raises:
        UserError: on every rank: it cannot be used with this model.
    """
    config, vocab_size = model.config, model.architecture.vocab_size
    length = config.training.sequence_length
    plan = WindowPlan(model.batches, options.stride_of(length), options.max_tokens, config.data.attend_across_documents)

    def opened() -> tuple[Windows, Sidecar | None]:
        source, sidecar = open_validation_set(name, path, length, vocab_size, model.start.assets.tokenizer)
        source.dataset.finish_check()
        if options.max_documents is not None and options.max_documents < source.dataset.num_sequences:
            source = replace(source, stop=source.dataset.sequence_start(options.max_documents))
        return divide(source, plan, model.mesh.data_rank, vocab_size), sidecar

    return model.ranks.fail_together(opened)


def _set_score(
    path: str, windows: Windows, sums: DocumentSums, extremes: int, tokenizer: TokenizerHandle | None
) -> SetScore:
    targets = int(sums.targets.sum())
    if not targets:
        raise UserError(
            f"--data {path}: no token can be scored: its loss mask leaves out every one, or every document has one "
            "token; name other text"
        )
    text: dict[str, Any] = {}
    if sums.has_texts:
        text = {
            "text_targets": int(sums.text_targets.sum()),
            "text_nats": float(sums.text_nats.sum()),
            "text_bytes": int(sums.num_bytes.sum()),
        }
    highest, lowest = _extreme_documents(sums, extremes)
    return SetScore(
        windows.source.name,
        path,
        int(np.count_nonzero(sums.targets)),
        windows.num_tokens,
        targets,
        float(sums.nats.sum()),
        **text,
        highest=[_document(windows, sums, index, tokenizer) for index in highest],
        lowest=[_document(windows, sums, index, tokenizer) for index in lowest],
    )


def _extreme_documents(sums: DocumentSums, count: int) -> tuple[list[int], list[int]]:
    """Return the documents with the highest mean loss, and those with the lowest."""
    scored = np.flatnonzero(sums.targets >= _LEAST_TARGETS)
    if not len(scored):
        scored = np.flatnonzero(sums.targets)
    order = scored[np.argsort(sums.nats[scored] / sums.targets[scored], kind="stable")]
    count = min(count, len(order) // 2)  # no document is in both lists
    return order[::-1][:count].tolist(), order[:count].tolist()


def _document(windows: Windows, sums: DocumentSums, index: int, tokenizer: TokenizerHandle | None) -> DocumentScore:
    start, stop = (int(at) for at in windows.starts_D[index : index + 2])
    beginning = ""
    if tokenizer is not None:
        ids = windows.source.dataset.tokens(start, min(stop, start + _TOKENS_SHOWN))
        beginning = tokenizer.decode(ids, special_tokens=False)[:_CHARACTERS]
    num_bytes, nats = sums.num_bytes[index], sums.text_nats[index]
    return DocumentScore(
        index,
        stop - start,
        int(sums.targets[index]),
        float(sums.nats[index] / sums.targets[index]),
        float(nats / math.log(2) / num_bytes) if num_bytes else None,
        beginning,
    )
