"""Continue ``logging.sample_prompts`` with the model in training, greedily, at every evaluation.

All prompts are documents of one micro-batch, or of several if they are long, whose shape is always the same, so that
compiled blocks are not compiled again. The forward pass is that of an evaluation and changes nothing of the training.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..kernels.linear_cross_entropy import IGNORE_INDEX
from .batch import Batch
from .config.settings import RunConfig
from .data.catalog import Catalog
from .errors import UserError
from .model.config_file import hf_config_of
from .observe.observer import Sample
from .observe.waiting import ProgressBar, Say
from .parallel.forward_backward import ForwardBackward, ModelParts
from .parallel.next_tokens import next_tokens
from .parallel.process_group import Ranks
from .schedule import BatchPlan
from .start import Start
from .tokenizer.prompts import PromptTokenizer

GENERATION_CONFIG = "generation_config.json"


class PromptSamples:
    """The prompts of a run. All ranks must create it.

    Args:
        config: of the run.
        start: of the run, with the tokenizer.
        catalog: says how documents begin.
        plan: shape of a micro-batch.
        ranks: of the run.

    Raises:
        UserError: on every rank: a prompt cannot be used, or there is no tokenizer.
    """

    def __init__(self, config: RunConfig, start: Start, catalog: Catalog, plan: BatchPlan, ranks: Ranks):
        self._ranks, self._texts, self._most = ranks, config.logging.sample_prompts, config.logging.sample_tokens
        self._length, self._shape = plan.sequence_length, plan.micro_batch_size * plan.sequence_length
        self._tokenizer: PromptTokenizer | None = None
        """On the main rank only."""
        self._prompts: list[list[int]] = []
        self._stop_ids: set[int] = set()
        if self._texts:
            vocab_size = start.architecture.vocab_size
            ranks.run_on_rank0(lambda: self._open(start, catalog, vocab_size))
            self._prompts, self._stop_ids = ranks.broadcast((self._prompts, self._stop_ids))

    def __bool__(self) -> bool:
        return bool(self._texts)

    def generate(
        self,
        model: ModelParts,
        forward_backward: ForwardBackward,
        step: int,
        should_stop: Callable[[], bool],
        say: Say,
    ) -> list[Sample]:
        """Return the prompts with their continuations, on the main rank. All ranks must call this.

        Args:
            model: this rank's part.
            forward_backward: its passes.
            step: number of steps made, for the log.
            should_stop: called before every token; returns the same on all ranks. After True nothing is returned.
            say: prints a line for people.
        """
        sequences = [list(ids) for ids in self._prompts]
        growing = list(range(len(sequences)))
        with ProgressBar(f"samples at step {step}, tokens", self._most, say, self._ranks.is_main) as bar:
            for _ in range(self._most if growing else 0):
                if should_stop():
                    say("  samples interrupted by the request to stop")
                    return []
                computed = next_tokens(model, forward_backward, list(self._batches(sequences, growing)))
                chosen: dict[int, int] = {}
                for of_rank in reversed(self._ranks.all_gather(computed)):
                    chosen |= of_rank  # the same on all ranks: that of the first one that has it
                for number in growing:
                    sequences[number].append(chosen[number])
                growing = [number for number in growing if self._continues(sequences[number])]
                bar.update(1)
                if not growing:
                    break
        return [self._sample(number, ids) for number, ids in enumerate(sequences)] if self._ranks.is_main else []

    def _continues(self, ids: list[int]) -> bool:
        return ids[-1] not in self._stop_ids and len(ids) < self._length

    def _sample(self, number: int, ids: list[int]) -> Sample:
        assert self._tokenizer is not None
        prompt_ids = self._prompts[number]
        new_ids = ids[len(prompt_ids) :]
        visible = new_ids[:-1] if new_ids[-1] in self._stop_ids else new_ids
        return Sample(self._texts[number], self._tokenizer.continuation(prompt_ids, visible))

    def _batches(self, sequences: list[list[int]], growing: list[int]) -> Iterator[Batch]:
        """Yield micro-batches for :func:`next_tokens`: all sequences, whose last tokens count if they are growing."""
        for numbers in self._numbers_by_batch():
            lengths = [len(sequences[number]) for number in numbers]
            rest = self._shape - sum(lengths)
            tokens, targets = torch.zeros(self._shape, dtype=torch.int64), torch.full([self._shape], IGNORE_INDEX)
            tokens[: sum(lengths)] = torch.tensor([token for number in numbers for token in sequences[number]])
            last = -1
            for number, length in zip(numbers, lengths, strict=True):
                last += length
                if number in growing:
                    targets[last] = number
            # No document, not even of padding, may be longer than those that the model was made for.
            padding = [self._length] * (rest // self._length) + [rest % self._length] * (rest % self._length > 0)
            yield Batch.of_documents(tokens, [*lengths, *padding], targets)

    def _numbers_by_batch(self) -> Iterator[list[int]]:
        """Yield the numbers of the prompts of each micro-batch, which have room for all their tokens."""
        numbers: list[int] = []
        room = self._shape
        for number, ids in enumerate(self._prompts):
            needed = min(len(ids) + self._most, self._length)
            if needed > room:
                yield numbers
                numbers, room = [], self._shape
            numbers.append(number)
            room -= needed
        yield numbers

    def _open(self, start: Start, catalog: Catalog, vocab_size: int) -> None:
        if start.assets.tokenizer is None:
            raise UserError(
                "logging.sample_prompts needs the tokenizer of the model, but the run has none; set model.tokenizer, "
                "or remove the prompts"
            )
        with tempfile.TemporaryDirectory() as folder:
            start.assets.of_model().write(Path(folder))
            self._tokenizer = PromptTokenizer(Path(folder), _begin_in_training(catalog))
        self._stop_ids = {number for number in _ends(start) if number < vocab_size}
        if self._tokenizer.document_end is not None and self._tokenizer.document_end < vocab_size:
            self._stop_ids.add(self._tokenizer.document_end)
        self._prompts = [self._encode(number, text, vocab_size) for number, text in enumerate(self._texts)]

    def _encode(self, number: int, text: str, vocab_size: int) -> list[int]:
        assert self._tokenizer is not None
        key = f"logging.sample_prompts[{number}]"
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(
                f"{key} {text[:40]!r} has half of a UTF-16 pair, which is not a character; in YAML, write the "
                "character itself, or \\U and 8 hexadecimal digits"
            )
        ids = self._tokenizer.encode(text)
        if not ids:
            raise UserError(f"{key} {text!r} has no tokens; give at least one word, or remove it")
        if len(ids) >= self._length:
            raise UserError(
                f"{key} {text[:40]!r}... has {len(ids):,} tokens, but training.sequence_length is {self._length:,} and "
                f"at least one token is added; use a prompt of at most {self._length - 1:,} tokens"
            )
        if max(ids) >= vocab_size:
            raise UserError(
                f"{key} {text[:40]!r} has token {max(ids):,}, outside the model's vocabulary of {vocab_size:,}; use "
                "the tokenizer of the model, or remove the prompt"
            )
        return ids


def _begin_in_training(catalog: Catalog) -> tuple[int, ...] | None:
    """Return the ids at the beginning of all documents; None if not recorded, or different between sources."""
    first, *others = [source["bos"] for source in catalog.fingerprints.values()]
    return None if first is None or any(ids != first for ids in others) else tuple(first)


def _ends(start: Start) -> set[int]:
    """Return ``eos_token_id`` of config and generation config: a number, a list of them, or nothing."""
    found: set[int] = set()
    generation = start.assets.files.get(GENERATION_CONFIG, b"{}")
    for content in (start.assets.config or {}, hf_config_of(generation, Path(GENERATION_CONFIG))):
        value: Any = content.get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found
