"""Extend a model's vocabulary: read the corpus, learn tokens, check the new tokenizer, measure, write the model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ...engine.errors import UserError
from ...engine.files.atomic import new_folder, require_absent
from ...engine.files.outputs import Use, require_separate
from ...engine.model.wrappers import with_vocab_size
from ...engine.tokenizer.files import SENTENCEPIECE_FILE, TOKENIZER_FILE, tokenizer_file_name
from ...engine.tokenizer.json_file import parse_tokenizer
from ...engine.weights.checkpoint.assets import ASSET_FOLDER, HfAssets
from ...engine.weights.conversion.checkpoint_files import write_converted_manifest
from ...engine.weights.conversion.stored_model import StoredModel
from ...engine.weights.hugging_face.weight_options import parse_shard_size
from ..tokenizer.handle import TokenizerHandle, load_tokenizer
from .corpus import CorpusSample, is_held_out, read_documents
from .options import ExtendOptions
from .report import REPORT_FILE, Gain, TextSize, format_gain, format_tokens, write_page, write_report
from .sentencepiece_file import escaped
from .sentencepiece_json import converted
from .serving import require_served_alike
from .token_list import read_list, texts_of
from .tokenizer_json import BpeJson
from .unigram_json import UnigramJson
from .vocabulary import ExtensibleTokenizer, Extension, NewToken, Wanted
from .weights import ExtendedVocabulary, choose_rows, open_model, require_known_tables, write_weights

_BATCH = 256
_MEASURED_CHARACTERS = 1 << 26
"""Maximum number of characters of documents kept in memory for measuring: at most 256 MiB."""


@dataclass
class LearningCorpus:
    """The result of reading the corpus: words to learn from, and documents to measure with."""

    words: Counter[str]
    held_out_words: Counter[str]
    measured: list[str]
    """Documents."""
    what: str
    """Description of these documents."""


def extend(options: ExtendOptions, say: Callable[[str], None] = print) -> None:
    """Write ``options.output``.

    Raises:
        UserError: model, tokenizer, corpus or options cannot be used, or the output exists or cannot be written.
            Nothing is left behind.
    """
    output = require_absent(options.output)
    listed = None if options.tokens is None else read_list(options.tokens)
    model = open_model(options.model)
    require_separate([Use("--model", model.folder)], folders=[Use(f"--output {output}", output)])
    old = load_tokenizer(_tokenizer_path(model))
    tokenizer, notes = open_tokenizer(model.assets.files, old.file)
    require_known_tables(model, options.model)
    rows = model.architecture.vocab_size
    if tokenizer.first_id > rows:
        raise UserError(
            f"--model {options.model}: its tokenizer has ids up to {tokenizer.first_id - 1:,}, but its embedding has "
            f"{rows:,} rows; use the tokenizer that belongs to it"
        )
    for line in [*model.notes, *notes, f"tokenizer: {tokenizer.kind}, ids up to {tokenizer.first_id - 1:,}"]:
        say(line)
    corpus = _read(options, tokenizer) if options.corpus else None
    if listed is not None:
        extension = tokenizer.take(texts_of(listed, tokenizer.text_of, str(options.tokens)))
    else:
        assert corpus is not None
        with tqdm(desc="learning", total=options.num_tokens, unit="token", disable=None, leave=False) as bar:
            wanted = Wanted(options.num_tokens, options.min_count, options.max_characters)
            extension = tokenizer.learn(corpus.words, corpus.held_out_words, wanted, bar.update)
    for line in extension.notes:
        say(line)
    vocab_size, line = choose_rows(rows, tokenizer.first_id, len(extension.tokens), options.pad_vocab_to_multiple_of)
    say(line)
    with new_folder(output) as temporary:
        gain = _write(temporary, options, model, old, extension, vocab_size, corpus, say)
    texts = {part: old.decode([part]) for token in extension.tokens for part in token.subtokens}
    say(format_tokens(extension.tokens, texts))
    if gain is not None:
        say(format_gain(gain))
    say(f"wrote {output}: {'a checkpoint' if model.is_checkpoint else 'a Hugging Face folder'}, and {REPORT_FILE}")


def _write(
    folder: Path,
    options: ExtendOptions,
    model: StoredModel,
    old: TokenizerHandle,
    extension: Extension,
    vocab_size: int,
    corpus: LearningCorpus | None,
    say: Callable[[str], None],
) -> Gain | None:
    """Write everything into ``folder``, which is renamed later."""
    beside = folder / ASSET_FOLDER if model.is_checkpoint else folder
    _extended_assets(model, extension, vocab_size).write(beside)
    require_ids(model.asset_folder, beside, extension.tokens)
    for line in require_served_alike(beside, extension.tokens):
        say(line)
    new = load_tokenizer(beside)
    gain = None if corpus is None else _measure(corpus, old, new)
    first_id = extension.tokens[0].id
    old_weights, tables = model.published, model.published_tables
    if model.is_checkpoint:
        old_weights, tables = model.parameters, model.architecture.tables
    source = ExtendedVocabulary(old_weights, tables, vocab_size, first_id, extension.tokens)
    done = write_weights(folder, model.is_checkpoint, source, parse_shard_size(options.max_shard_size))
    facts = {
        "model": options.model,
        "tokenizer": old.file.name,
        "first_new_id": first_id,
        "num_new_tokens": len(extension.tokens),
        "rows_before": model.architecture.vocab_size,
        "rows": vocab_size,
    }
    write_report(folder, facts, extension.tokens, gain, extension.curve)
    if gain is not None and len(extension.curve) > 1:
        write_page(folder, f"New tokens for {Path(options.model).name}", gain, extension.curve, extension.tokens)
    if model.is_checkpoint:
        write_converted_manifest(folder, done.values())
    return gain


def open_tokenizer(files: dict[str, bytes], where: Path) -> tuple[ExtensibleTokenizer, list[str]]:
    """Return the extendable tokenizer of a folder, and lines about it for the console.

    Args:
        files: of the folder, by name.
        where: path of the tokenizer's file.

    Raises:
        UserError: tokenizers of this kind cannot be extended.
    """
    notes: list[str] = []
    if where.name == SENTENCEPIECE_FILE:
        content, notes = converted(files, where)
        files, where = {**files, TOKENIZER_FILE: content}, where.with_name(TOKENIZER_FILE)
    if where.name != TOKENIZER_FILE:
        raise UserError(f"{where}: a tiktoken file cannot be extended; save the tokenizer as {TOKENIZER_FILE} first")
    kind = _kind_of_model(files[TOKENIZER_FILE])
    if kind == "BPE":
        return BpeJson(files, where), notes
    if kind == "Unigram":
        return UnigramJson(files, where), notes
    raise UserError(f"{where}: a {kind} model cannot be extended; supported: BPE and Unigram")


def _kind_of_model(content: bytes) -> str:
    """Return the model type of a tokenizer.json. Old ones, such as GPT-2's, do not store it; the library tries each
    type.
    """
    kind = json.loads(content)["model"].get("type")
    return kind or type(parse_tokenizer(content, TOKENIZER_FILE).model).__name__


def _tokenizer_path(model: StoredModel) -> Path:
    name = tokenizer_file_name(model.assets.files)
    if name is None:
        raise UserError(f"{model.asset_folder}: holds no {TOKENIZER_FILE} and no {SENTENCEPIECE_FILE}; add one")
    return model.asset_folder / name


def _read(options: ExtendOptions, tokenizer: ExtensibleTokenizer) -> LearningCorpus:
    """Split the corpus by documents; if a tenth of it would be empty, use all documents for learning and measuring.

    Only the words to learn from and a bounded part of the documents to measure with stay in memory.
    """
    words: Counter[str] = Counter()
    held_out_words: Counter[str] = Counter()
    measured, num_others, num_held_out = CorpusSample(_MEASURED_CHARACTERS), 0, 0
    documents = read_documents(
        options.corpus, options.json_key, options.txt_mode, options.max_documents, options.max_bytes
    )
    with tqdm(desc="reading", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for text in documents:
            bar.update(len(text))
            if is_held_out(text):
                if num_held_out == 0:  # otherwise the held-out documents suffice
                    measured = CorpusSample(_MEASURED_CHARACTERS)
                num_held_out += 1
                measured.add(text)
                held_out_words.update(tokenizer.words(text))
            else:
                num_others += 1
                if num_held_out == 0:
                    measured.add(text)
                words.update(tokenizer.words(text))
    if not measured.texts:
        raise UserError(f"--corpus {' '.join(options.corpus)}: contains no document; name files with text")
    what = "held-out tenth of the corpus"
    if num_held_out == 0 or num_others == 0:
        what = "corpus itself, since it is too small to hold out a part"
        words = held_out_words = words + held_out_words
    if measured.one_in > 1:
        what += f", one in {measured.one_in} of its documents"
        held_out_words = Counter(word for text in measured.texts for word in tokenizer.words(text))
    return LearningCorpus(words, held_out_words, measured.texts, what)


def _extended_assets(model: StoredModel, extension: Extension, vocab_size: int) -> HfAssets:
    files = {name: data for name, data in model.assets.files.items() if extension.files.get(name, data) is not None}
    files |= {name: data for name, data in extension.files.items() if data is not None}
    assets = HfAssets(files)
    if vocab_size == model.architecture.vocab_size:
        return assets
    return assets.with_config(with_vocab_size(model.config, vocab_size))


def require_ids(old: Path, new: Path, tokens: Sequence[NewToken]) -> None:
    """Check that every token of the tokenizer in ``old`` has the same id in ``new``, and that ``tokens`` have theirs.

    Ids are compared as the library reads them.

    Raises:
        AssertionError: an id differs, which would be a bug of this program.
    """
    before, after = _ids(old), _ids(new)
    moved = [(token, before[token], after.get(token)) for token in before if after.get(token) != before[token]]
    assert not moved, f"{new}: {moved[:3]}"
    assert len(after) == len(before) + len(tokens), new
    assert all(token.id in (after.get(token.piece), after.get(escaped(token.piece))) for token in tokens), new


def _ids(folder: Path) -> dict[str, int]:
    if (folder / TOKENIZER_FILE).is_file():
        file = folder / TOKENIZER_FILE
        return parse_tokenizer(file.read_bytes(), file).get_vocab(with_added_tokens=True)
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE))
    return {model.IdToPiece(place): place for place in range(model.GetPieceSize())}


def _measure(corpus: LearningCorpus, old: TokenizerHandle, new: TokenizerHandle) -> Gain:
    characters, num_bytes = sum(map(len, corpus.measured)), sum(len(text.encode()) for text in corpus.measured)
    difference = new.check_fast_path(corpus.measured[:_BATCH])
    if difference:
        new.use_reference(difference)
    before, after = (TextSize(characters, num_bytes, _num_tokens(handle, corpus.measured)) for handle in (old, new))
    return Gain(corpus.what, len(corpus.measured), before, after)


def _num_tokens(handle: TokenizerHandle, texts: Sequence[str]) -> int:
    return sum(int(handle.encode_flat(batch)[1].sum()) for batch in _batches(texts))


def _batches(texts: Sequence[str]) -> Iterable[Sequence[str]]:
    return (texts[first : first + _BATCH] for first in range(0, len(texts), _BATCH))
