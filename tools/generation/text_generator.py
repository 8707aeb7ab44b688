"""Generate text from a Hugging Face folder or a checkpoint: the loop over the tokens of a batch, and over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...engine.errors import UserError
from ...engine.model.wrappers import context_length
from ...engine.tokenizer.frame import ids_of
from ..tokenizer.document_frame import DocumentFrame
from .backend import Session
from .model_loading import ModelFolder, find_device, find_model, load_backend, load_tokenizer, read_architecture
from .sampling import Sampling
from .text_stream import TextStream
from .token_choice import TokenChoice, random_numbers

OnText = Callable[[str], object]
"""Receives the pieces of a text, as they become certain."""
END_OF_TEXT, TOKEN_LIMIT, FULL_CONTEXT, STOP_STRING = "end of text", "--max-new-tokens", "full context", "--stop"
"""Reasons of the end of a text."""


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt."""

    text: str
    """The new text, without the token or the stop string that ended it."""
    num_tokens: int
    """Number of new tokens, including those that ended it."""
    ended_by: str
    """Reason of the end: ``end of text``, ``--max-new-tokens``, ``full context`` or ``--stop``."""


@dataclass(frozen=True)
class Request:
    """A continuation that is asked for."""

    prompt: int
    """Number of the prompt."""
    sample: int


class TextGenerator:
    """A model with its tokenizer.

    Args:
        folder: a Hugging Face folder, or a checkpoint folder (training or converted).
        tokenizer: folder, file or Hub name of the tokenizer, of any kind that preprocess accepts; None for the model's
            own.
        dtype: ``auto`` for the dtype in the model's config, else float32; or bfloat16, float16, float32.
        device: where to run: auto, cpu, cuda, cuda:1, ...
        bos: whether a prompt begins with the BOS: yes, no, or auto. auto: as the documents that a checkpoint was
            trained on, or, if that is not recorded, as the tokenizer begins texts.
        trust_remote_code: run the code that comes with a model whose type transformers does not know.

    Raises:
        UserError: the folder, its weights or its tokenizer cannot be used, or there is no such device.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        bos: str = "auto",
        trust_remote_code: bool = False,
    ):
        self.device = find_device(device)
        self.model = find_model(folder, trust_remote_code)
        architecture = read_architecture(self.model)
        self.tokenizer, document_end = load_tokenizer(tokenizer, self.model, architecture.vocab_size)
        self.notes: list[str] = []
        """Remarks about what the user may not expect."""
        self.prefix = self._prefix(bos, own_tokenizer=tokenizer is None)
        """Ids in front of every prompt."""
        self.stop_ids = self.model.stop_ids() | document_end
        self.context = context_length(self.model.config)
        """Maximum number of tokens of the model, if its config has it."""
        self.backend = load_backend(self.model, architecture, dtype, self.device)
        self.notes += [*self.backend.notes, *_notes_on_settings(self.model)]

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of ``prompt``, with special tokens recognized, after a BOS if configured.

        A BOS at the beginning of the prompt is not doubled. Tokens that the tokenizer adds after a text are left out,
        since the model continues the text.

        Raises:
            UserError: the prompt is empty, leaves no room in the context, or has tokens that the model does not know.
        """
        if not prompt:
            raise UserError("the prompt is empty; give at least one character")
        ids = self.ids_of(prompt)
        if not ids:
            raise UserError(f"prompt {prompt[:40]!r}: the tokenizer makes no tokens from it; give another")
        ids = [*DocumentFrame(self.prefix).missing_prefix(np.array(ids)), *ids]
        if self.context is not None and len(ids) >= self.context:
            raise UserError(
                f"the prompt has {len(ids):,} tokens, and the model's context (max_position_embeddings) is "
                f"{self.context:,}; leave room for at least one more"
            )
        return ids

    def ids_of(self, text: str) -> list[int]:
        """Return the token ids of ``text`` with special tokens recognized, and nothing around them.

        Raises:
            UserError: it has tokens that the model does not know.
        """
        ids: list[int] = self.tokenizer.encode_flat([text])[0].tolist()
        vocab_size = self.backend.architecture.vocab_size
        if ids and max(ids) >= vocab_size:
            raise UserError(
                f"the prompt has token {max(ids)}, and the model's vocab_size is {vocab_size}; name the tokenizer that "
                "the model was trained with by --tokenizer"
            )
        return ids

    def generate(self, prompt: str, sampling: Sampling, on_text: OnText | None = None) -> Completion:
        """Continue ``prompt`` once. The same prompt and ``sampling`` give the same text on the same device.

        Raises:
            UserError: see :meth:`encode`.
        """
        return self.generate_one(self.encode(prompt), 0, sampling, on_text)

    @torch.inference_mode()
    def generate_one(
        self, ids: Sequence[int], sample: int, sampling: Sampling, on_text: OnText | None = None
    ) -> Completion:
        """Return one continuation of a prompt.

        Args:
            ids: of the prompt, see :meth:`encode`.
            sample: number of the continuation.
            sampling: the options.
            on_text: receives the pieces of the text.
        """
        return self._generate_batch([Request(0, sample)], [ids], sampling, on_text)[0]

    @torch.inference_mode()
    def generate_all(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        batch_size: int = 1,
    ) -> Iterator[Completion]:
        """Yield the continuations of all prompts: those of the first prompt, those of the second, and so on.

        Args:
            prompts: see :meth:`encode`.
            sampling: the options.
            batch_size: number of texts that are computed at a time.
        """
        requests = [Request(prompt, sample) for prompt in range(len(prompts)) for sample in range(sampling.samples)]
        done: dict[Request, Completion] = {}
        expected = iter(requests)
        awaited = next(expected, None)
        for request, completion in self.generate_in_batches(prompts, sampling, batch_size):
            done[request] = completion
            while awaited in done:
                yield done.pop(awaited)
                awaited = next(expected, None)

    def generate_in_batches(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int = 1
    ) -> Iterator[tuple[Request, Completion]]:
        """Yield the same continuations, each when its batch has been computed, with the numbers of prompt and sample.

        Prompts of one length are computed together if the model needs that; else the order is that of the prompts.
        """
        requests = [Request(prompt, sample) for prompt in range(len(prompts)) for sample in range(sampling.samples)]
        for batch in self._batches(requests, prompts, batch_size):
            yield from zip(batch, self._generate_batch(batch, prompts, sampling), strict=True)

    def limit(self, num_tokens: int, sampling: Sampling) -> int:
        """Return the maximum length of a text with a prompt of so many tokens."""
        longest = num_tokens + sampling.max_new_tokens
        return longest if self.context is None else min(longest, self.context)

    @torch.inference_mode()
    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Return the [V] fp32 logits of the token that follows ``ids``."""
        return self.backend.open(len(ids)).append([ids])[0]

    def describe_cache(self, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int) -> str | None:
        """Return a remark about the size of the cache, if it is large."""
        longest = max((self.limit(len(ids), sampling) for ids in prompts), default=0)
        return self.backend.describe_cache(min(batch_size, len(prompts) * sampling.samples), longest)

    def growing_text(self, ids: Sequence[int], sample: int, sampling: Sampling) -> GrowingText:
        """Return the continuation of the prompt ``ids``, which has no tokens yet."""
        tokens = {stop for text in sampling.stop if (stop := self._special_token(text)) is not None}
        stream = TextStream(self._decode, ids, sampling.stop)
        limit = self.limit(len(ids), sampling) - len(ids)
        at_limit = TOKEN_LIMIT if limit == sampling.max_new_tokens else FULL_CONTEXT
        ends = dict.fromkeys(self.stop_ids, END_OF_TEXT) | dict.fromkeys(tokens, STOP_STRING)
        return GrowingText([*ids], stream, ends, limit, at_limit, random_numbers(sampling.seed, sample))

    def _batches(
        self, requests: list[Request], prompts: Sequence[Sequence[int]], batch_size: int
    ) -> Iterator[list[Request]]:
        """Yield what is computed together."""
        groups = [requests]
        if self.backend.needs_equal_lengths:
            by_length: dict[int, list[Request]] = {}
            for request in requests:
                by_length.setdefault(len(prompts[request.prompt]), []).append(request)
            groups = list(by_length.values())
        for group in groups:
            for first in range(0, len(group), batch_size):
                yield group[first : first + batch_size]

    def _generate_batch(
        self,
        batch: list[Request],
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        different = list(dict.fromkeys(request.prompt for request in batch))
        session = self.backend.open(max(self.limit(len(prompts[prompt]), sampling) for prompt in different))
        logits = session.append([prompts[prompt] for prompt in different])
        # The samples of a prompt share its computation.
        rows = [different.index(request.prompt) for request in batch]
        if rows != list(range(len(different))):
            session.keep(rows)
            logits = logits[rows]
        texts = [self.growing_text(prompts[request.prompt], request.sample, sampling) for request in batch]
        grow(texts, session, logits, TokenChoice(sampling), on_text)
        return [text.completion() for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, special_tokens=False)

    def _special_token(self, text: str) -> int | None:
        """Return the id of the special token that ``text`` is, which decoded text does not show; else None."""
        ids = self.ids_of(text)
        return ids[0] if len(ids) == 1 and not self._decode(ids) else None

    def _prefix(self, bos: str, own_tokenizer: bool) -> tuple[int, ...]:
        frame = self.tokenizer.frame()
        by_training = self.model.is_checkpoint and own_tokenizer and bos == "auto"
        trained = self.model.bos_of_training() if by_training else None
        if trained is None:
            return ids_of(frame.documents_begin_with(bos))
        if trained != ids_of(frame.prefix):
            here, there = (
                f"with token {' '.join(map(str, ids))}" if ids else "without a BOS"
                for ids in (trained, ids_of(frame.prefix))
            )
            self.notes.append(
                f"prompts begin {here}, like the documents in training; the tokenizer begins texts {there}; choose "
                "with --bos"
            )
        return trained


@dataclass
class GrowingText:
    """The continuation of a prompt, while it is generated."""

    ids: list[int]
    """Of the prompt and of the continuation."""
    stream: TextStream
    ends: dict[int, str]
    """Tokens that end the text, and the reason to report."""
    limit: int
    """Maximum number of new tokens."""
    at_limit: str
    """The reason to report at the limit."""
    random: np.random.Generator
    num_tokens: int = 0
    ended_by: str = ""
    """Empty while the text grows."""

    def add(self, token: int) -> str:
        """Append a token, and return the text that is certain now and was not before."""
        self.ids.append(token)
        self.num_tokens += 1
        piece = ""
        if token in self.ends:
            self.ended_by = self.ends[token]
        else:
            piece = self.stream.add(token)
            if self.stream.stopped:
                self.ended_by = STOP_STRING
            elif self.num_tokens == self.limit:
                self.ended_by = self.at_limit
        if not self.ended_by:
            return piece
        piece += self.stream.end()
        # The characters that were held back may complete a stop string.
        self.ended_by = STOP_STRING if self.stream.stopped else self.ended_by
        return piece

    def interrupt(self, reason: str) -> str:
        """End the text now, if it has not ended, and return what was held back of it."""
        if self.ended_by:
            return ""
        self.ended_by = reason
        return self.stream.end()

    def completion(self) -> Completion:
        """Return the result."""
        return Completion(self.stream.text, self.num_tokens, self.ended_by)


def grow(
    texts: Sequence[GrowingText], session: Session, logits: Tensor, choice: TokenChoice, on_text: OnText | None = None
) -> None:
    """Append tokens to all texts until they end. Texts that ended leave the session.

    Args:
        texts: the sequences of ``session``, in its order.
        session: has all their tokens.
        logits: [B, V] fp32, of the next token of each.
        choice: chooses the tokens.
        on_text: receives the new text of all.
    """
    active = list(texts)
    while active:
        tokens = choice.choose(logits, [text.ids for text in active], [text.random for text in active])
        for text, token in zip(active, tokens, strict=True):
            piece = text.add(token)
            if on_text is not None and piece:
                on_text(piece)
        rows = [row for row, text in enumerate(active) if not text.ended_by]
        if 0 < len(rows) < len(active):
            session.keep(rows)
        active = [active[row] for row in rows]
        if active:
            logits = session.append([[text.ids[-1]] for text in active])


def _notes_on_settings(model: ModelFolder) -> list[str]:
    ignored = model.ignored_settings()
    return (
        [f"generation_config.json sets {', '.join(ignored)}, which only options of this command do"] if ignored else []
    )
