"""A conversation with a model: its chat template, the history, and the cache of what it has read already."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...engine.errors import UserError
from ...engine.tokenizer.frame import BOS_CHOICES, ids_of
from ..preprocessing.chat.conversation import ChatBos
from ..preprocessing.chat.conversation import Conversation as Messages
from ..preprocessing.chat.encoder import named_tokens, read_tokenizer_config
from ..preprocessing.chat.template import ANSWERS, QUESTION, ChatTemplate
from ..preprocessing.chat.template_files import load_template
from ..preprocessing.records.errors import MalformedError
from .backend import Session
from .sampling import Sampling
from .text_generator import END_OF_TEXT, Completion, OnText, TextGenerator, grow
from .token_choice import TokenChoice

INTERRUPTED = "Ctrl-C"
"""Reason of the end of an answer that the user ended."""
_NEXT_QUESTION = "Beta"


@dataclass
class _Memory:
    """What the model has computed of a conversation."""

    session: Session
    ids: list[int]
    longest: int


class Conversation:
    """A conversation that grows by questions and answers.

    Args:
        model: answers.
        sampling: the options; one sample.
        system: text of the first message, which tells the model how to answer; empty for none.
        template: file of the chat template; None: the one of the tokenizer.
        bos: one of ``BOS_CHOICES``; auto: the template decides.

    Raises:
        UserError: there is no chat template, or it cannot render the system prompt.
    """

    def __init__(
        self,
        model: TextGenerator,
        sampling: Sampling,
        system: str = "",
        template: Path | None = None,
        bos: str = BOS_CHOICES[0],
    ):
        assert sampling.samples == 1
        folder = model.tokenizer.file.parent
        config = read_tokenizer_config(folder)
        source, origin = load_template(folder, config, template)
        self._template = ChatTemplate(source, origin, named_tokens(config), datetime.now())
        bos_ids = () if bos == "auto" else ids_of(model.tokenizer.frame().documents_begin_with("yes"))
        self._model, self._bos = model, ChatBos(bos, bos_ids)
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        self._num_answers = 0
        self._memory: _Memory | None = None
        stop_ids, stops = self._ends_of_turn()
        self._stop_ids = stop_ids
        self._sampling = replace(sampling, stop=(*sampling.stop, *stops))
        self._encode([{"role": "user", "content": QUESTION}])

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system prompt, if there is one, and the questions and answers that the model remembers."""
        return [*self._system, *self._turns]

    def clear(self) -> None:
        """Forget all questions and answers."""
        self._turns, self._memory = [], None

    @torch.inference_mode()
    def ask(self, question: str, on_text: OnText | None = None) -> tuple[Completion, int]:
        """Return the answer to ``question``, and the number of earlier questions that were forgotten for it.

        The oldest ones are, if the context has no room for an answer. Ctrl-C ends the answer; a question without any
        answer is forgotten.

        Raises:
            UserError: the question alone is too long, or the template refuses the conversation; nothing changes.
        """
        turns, ids = self._fitted([*self._turns, {"role": "user", "content": question}])
        forgotten = (len(self._turns) + 1 - len(turns)) // 2
        text = self._model.growing_text(ids, self._num_answers, self._sampling)
        text.ends |= self._stop_ids
        try:
            memory, logits = self._read(ids)
            grow([text], memory.session, logits, TokenChoice(self._sampling), on_text)
            self._memory = replace(memory, ids=text.ids[:-1])  # the last token was not computed
        except KeyboardInterrupt:
            piece = text.interrupt(INTERRUPTED)
            if on_text is not None and piece:
                on_text(piece)
        answer = text.completion()
        if answer.text or answer.ended_by != INTERRUPTED:
            self._turns = [*turns, {"role": "assistant", "content": answer.text}]
            self._num_answers += 1
        return answer, forgotten

    def _read(self, ids: list[int]) -> tuple[_Memory, Tensor]:
        """Return a session that has computed ``ids``, and the logits of the next token.

        If they continue what the model has computed, only the new ones are computed. Until the answer is complete, the
        conversation remembers nothing, because an interruption may come at any point.
        """
        memory, self._memory = self._memory, None
        longest = self._model.limit(len(ids), self._sampling)
        if memory is not None and longest <= memory.longest and _continues(ids, memory.ids):
            return memory, memory.session.append([ids[len(memory.ids) :]])
        unscaled = self._model.backend.architecture.longest_unscaled
        whole = self._model.context or sys.maxsize
        longest = whole if unscaled is None or longest > unscaled else unscaled
        session = self._model.backend.open(longest)
        return _Memory(session, [], longest), session.append([ids])

    def _fitted(self, turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """Return the last turns that leave room for an answer, and the ids of the conversation."""
        context = self._model.context
        while True:
            ids = self._encode(turns)
            if context is None or len(ids) + min(self._sampling.max_new_tokens, context // 4) <= context:
                return turns, ids
            if len(turns) == 1:
                break
            turns = turns[2:]
        if len(ids) >= context:
            raise UserError(
                f"the question has {len(ids):,} tokens with the template, and the model's context "
                f"(max_position_embeddings) is {context:,}; ask a shorter one"
            )
        return turns, ids

    def _encode(self, turns: list[dict[str, str]]) -> list[int]:
        ids = self._model.ids_of(self._render([*self._system, *turns], prompt=True))
        return self._bos.apply(ids, np.zeros(len(ids), np.uint8))[0]

    def _render(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
        try:
            return self._template.render(Messages(list(messages)), prompt)
        except MalformedError as error:
            raise UserError(f"{self._template.origin}: {error}; give --chat-template FILE with another") from None

    def _ends_of_turn(self) -> tuple[dict[int, str], list[str]]:
        """Return the special tokens with which the template ends an answer, or the text if it has none."""
        roles = ("user", QUESTION), ("assistant", ANSWERS[0]), ("user", _NEXT_QUESTION)
        text = self._render([{"role": role, "content": content} for role, content in roles])
        between = text.partition(ANSWERS[0])[2].partition(_NEXT_QUESTION)[0].strip()
        ids = self._model.ids_of(between) if between else []
        if ids and not self._model.tokenizer.decode(ids[:1], special_tokens=False):
            return {ids[0]: END_OF_TEXT}, []
        return {}, [between] if between else []


def _continues(ids: list[int], start: list[int]) -> bool:
    return len(ids) > len(start) and ids[: len(start)] == start
