"""Rearrange documents for fill-in-the-middle training (FIM), so that a code model learns to complete a gap.

A document is cut at two places into a prefix, a middle and a suffix, and the middle is moved to the end, behind the
tokenizer's own FIM tokens (Bavarian et al., 2022, https://arxiv.org/abs/2207.14255):

    PSM    <PRE> prefix <SUF> suffix <MID> middle
    SPM    <PRE> <SUF> suffix <MID> prefix middle          (variant 2 of the paper)

The cuts are uniform over the characters, and the three parts are tokenized separately, as in the paper and in
Megatron-LM's preprocessing for StarCoder. Which documents are rearranged, where they are cut and in which order is a
hash of the seed and the text. So the result does not depend on workers, shards and restarts.

This module does not cut tokens of a packed sequence ("context-level FIM"): documents are rearranged as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from ...engine.data.splitmix import GOLDEN, mix64_of
from ...engine.errors import UserError
from ...engine.tokenizer.backends import FlatIds
from ...engine.tokenizer.frame import Token
from ..tokenizer.handle import TokenizerHandle
from .options import PreprocessOptions

KNOWN_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, Qwen3, CodeGemma, Granite 3, cl100k_base
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, StarCoder2, Granite Code, Stable Code
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder, DeepSeek-V2 and V3  # noqa: RUF001
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),  # CodeLlama, which ends the middle with a token of its own
)
"""Tokens before the prefix, suffix and middle, and perhaps one after the middle, of models trained in this format."""
PSM, SPM = "--fim-rate, PSM", "--fim-rate, SPM"
"""Names under which rearranged documents are counted."""
_Ids = npt.NDArray[np.int32]
_ANCHORS = ("☺", "\n", "=")
"""Texts to put in front of a part that would otherwise begin with a space of the tokenizer; CodeLlama uses the
first."""


@dataclass(frozen=True)
class FimRule:
    """Which documents are rearranged, and with which tokens. Small and picklable."""

    tokens: tuple[Token, ...]
    """Those before prefix, suffix and middle, and perhaps one after the middle."""
    rate: float
    """Share of the documents, 0 to 1."""
    spm_rate: float
    """Share of SPM among them, 0 to 1."""
    seed: int

    def cut(self, text: str) -> Cut | None:
        """Return how ``text`` is rearranged; None if it stays as it is, as does one with a FIM token written in it."""
        key = xxhash.xxh3_64_intdigest(text.encode(), self.seed & (2**64 - 1))
        use, order, *places = (mix64_of(key + number * GOLDEN) for number in range(1, 5))
        if not text or use >= int(self.rate * 2**64) or any(name in text for name, _ in self.tokens):
            return None
        first, last = sorted((len(text) + 1) * place >> 64 for place in places)
        return Cut(text[:first], text[first:last], text[last:], order < int(self.spm_rate * 2**64))


class Cut(NamedTuple):
    """A document in three parts, end to end the text."""

    prefix: str
    middle: str
    suffix: str
    is_spm: bool
    """Whether the suffix comes first."""


def fim_rule(options: PreprocessOptions, tokenizer: TokenizerHandle) -> FimRule | None:
    """Return the rule of ``options`` with the tokens of ``tokenizer``; None without ``--fim-rate``.

    Raises:
        UserError: the tokenizer does not have the tokens that are given, or none of the known ones.
    """
    if not options.fim_rate:
        return None
    given = tuple(options.fim_tokens)
    for names in (given,) if given else KNOWN_TOKENS:
        ids = [tokenizer.id_of(name) for name in names]
        if None not in ids:
            tokens = tuple((name, found) for name, found in zip(names, ids, strict=True) if found is not None)
            return FimRule(tokens, options.fim_rate, options.fim_spm_rate, options.seed)
        if given:
            raise UserError(f"--fim-tokens {names[ids.index(None)]}: {tokenizer.name} has no such token")
    raise UserError(
        f"--fim-rate {options.fim_rate}: {tokenizer.name} has no FIM tokens of a known name, such as "
        f"{KNOWN_TOKENS[0][0]}; name its tokens with --fim-tokens, or use the tokenizer of a model that was trained "
        "with FIM"
    )


class FimEncoder:
    """Encodes a batch of texts, some of them rearranged.

    Args:
        rule: the rule.
        encode: returns the ids of texts, without tokens around them.

    Raises:
        UserError: the tokenizer begins texts specially, in a way that cannot be undone.
    """

    def __init__(self, rule: FimRule, encode: Callable[[Sequence[str]], FlatIds]) -> None:
        self._rule, self._encode = rule, encode
        self._ids = [np.array([token_id], np.int32) for _, token_id in rule.tokens]
        self._anchor, self._anchor_ids = _anchor_of(encode)

    def cut(self, texts: Sequence[str]) -> list[Cut | None]:
        """Return how each text is rearranged; None: it stays as it is."""
        return [self._rule.cut(text) for text in texts]

    def parts(self, texts: Sequence[str], cuts: Sequence[Cut | None]) -> list[str]:
        """Return the texts to encode: one for each text that stays as it is, three for each that is rearranged."""
        parts: list[str] = []
        for text, cut in zip(texts, cuts, strict=True):
            # Only the beginning of a document is encoded as one: CodeLlama suppresses the space before other parts.
            parts += [text] if cut is None else [cut.prefix, self._anchor + cut.middle, self._anchor + cut.suffix]
        return parts

    def join(self, flat: FlatIds, texts: Sequence[str], cuts: Sequence[Cut | None]) -> tuple[FlatIds, Counter[str]]:
        """Return the ids of the documents from those of their :meth:`parts`, and the number rearranged by name."""
        ids, lengths = flat
        pieces = iter(np.split(ids, np.cumsum(lengths)[:-1]))
        documents = [
            [next(pieces)] if cut is None else self._rearranged(text, cut, next(pieces), next(pieces), next(pieces))
            for text, cut in zip(texts, cuts, strict=True)
        ]
        sizes = np.array([sum(map(len, document)) for document in documents], np.int64)
        counts = Counter(
            SPM if cut.is_spm else PSM
            for cut, document in zip(cuts, documents, strict=True)
            if cut is not None and len(document) > 1
        )
        return (np.concatenate([piece for document in documents for piece in document]), sizes), counts

    def _rearranged(self, text: str, cut: Cut, prefix: _Ids, middle: _Ids, suffix: _Ids) -> list[_Ids]:
        """Return the ids of a document in pieces; those of the whole text if its parts cannot be told from anchors."""
        size = len(self._anchor_ids)
        if any(not np.array_equal(part[:size], self._anchor_ids) for part in (middle, suffix)):
            return [self._encode([text])[0]]
        before_prefix, before_suffix, before_middle, *end = self._ids
        if cut.is_spm:
            return [before_prefix, before_suffix, suffix[size:], before_middle, prefix, middle[size:], *end]
        return [before_prefix, prefix, before_suffix, suffix[size:], before_middle, middle[size:], *end]


def _anchor_of(encode: Callable[[Sequence[str]], FlatIds]) -> tuple[str, _Ids]:
    """Return a text to encode in front of a part, and its ids; empty for a tokenizer that begins texts as it continues
    them.
    """
    for anchor in _ANCHORS:
        ids, lengths = encode(["a", anchor, f"{anchor}a"])
        alone, begin, both = np.split(ids, np.cumsum(lengths)[:-1])
        if not len(begin) or not np.array_equal(both[: len(begin)], begin):
            continue
        return ("", ids[:0]) if np.array_equal(both[len(begin) :], alone) else (anchor, begin)
    raise UserError(
        "--fim-rate: this tokenizer does not encode the parts of a text separately; leave --fim-rate out, or use the "
        "tokenizer of a model that was trained with FIM"
    )
