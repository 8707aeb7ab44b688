"""The rules for the values of the preprocess command's options, and for their combinations."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from itertools import chain

from ...engine.errors import UserError
from .dataset.bins import parse_weights
from .formats import FORMATS
from .inputs.hub import parse_hub_dataset
from .options import TEXT_KEY, PreprocessOptions

Rules = Iterator[tuple[object, str]]
"""Pairs: whether the options are wrong, and the line that says so, with the remedy."""
_LEAST = {
    **{"workers": 1, "max_tokens": 1, "max_documents": 1, "window": 2},
    **{"min_chars": 0, "min_tokens": 0, "max_expansion": 0, "window_overlap": 0},
}
_SHARES = ("min_letter_ratio", "min_language_score", "fim_rate", "fim_spm_rate")


def check_options(options: PreprocessOptions) -> None:
    """Refuse meaningless values and combinations.

    Raises:
        UserError: naming the flag, its value and the remedy.
    """
    rules = (_numbers, _without_effect, _input, _tokenizer, _fim, _window, _chat, _output, _parts, _lines)
    for is_wrong, message in chain.from_iterable(rule(options) for rule in rules):
        if is_wrong:
            raise UserError(message)
    _ = options.text_choice, options.shard_place, parse_weights(options.bin_weights)


def _numbers(options: PreprocessOptions) -> Rules:
    for name, least in _LEAST.items():
        value = getattr(options, name)
        yield value is not None and value < least, f"{_flag(name)} {value}: must be at least {least}"
    for name in _SHARES:
        share = getattr(options, name)
        yield not 0 <= share <= 1, f"{_flag(name)} {share}: must be between 0 and 1"
    threshold = options.dedup_threshold
    yield not 0 < threshold < 1, f"--dedup-threshold {threshold}: must be between 0 and 1"
    yield (
        options.max_tokens is not None and options.max_tokens < options.min_tokens,
        f"--max-tokens {options.max_tokens} is below --min-tokens {options.min_tokens}; no document fits",
    )


def _without_effect(options: PreprocessOptions) -> Rules:
    """Yield the options that another one makes effective."""
    for name, needed, has_it in (
        ("min_language_score", "--languages", options.languages),
        ("dedup_threshold", "--dedup minhash", options.dedup == "minhash"),
        ("bin_weights", "--bins", options.bins),
        ("fim_spm_rate", "--fim-rate", options.fim_rate),
        ("window_overlap", "--window", options.window),
        ("window_loss", "--window-overlap", options.window_overlap),
    ):
        value = getattr(options, name)
        given = value != getattr(PreprocessOptions, name)
        yield given and not has_it, f"{_flag(name)} {value} needs {needed}; add it, or remove {_flag(name)}"


def _input(options: PreprocessOptions) -> Rules:
    yield list(options.input).count("-") > 1, "--input -: standard input can be read only once"
    for name, form in (("stdin", options.stdin_format), ("input", options.input_format)):
        yield (
            form is not None and form not in FORMATS,
            f"--{name}-format {form}: unknown; choose from {', '.join(FORMATS)}",
        )
    whole = [dataset for each in options.input if (dataset := parse_hub_dataset(each)) and not dataset.path]
    for name, part in (("subset", options.hf_subset), ("split", options.hf_split)):
        yield (
            part is not None and not whole,
            f"--hf-{name} {part}: is for --input hf://namespace/name, and no input is one; leave it out",
        )


def _tokenizer(options: PreprocessOptions) -> Rules:
    yield (
        options.tokenizer is not None and options.model is not None,
        f"--tokenizer {options.tokenizer} and --model {options.model} both name a tokenizer; remove one of them",
    )


def _fim(options: PreprocessOptions) -> Rules:
    """Yield the rules of fill-in-the-middle."""
    tokens = options.fim_tokens
    shown = " ".join(tokens)
    yield tokens and not options.fim_rate, f"--fim-tokens {shown} needs --fim-rate; add it, or remove --fim-tokens"
    yield (
        tokens and len(tokens) not in (3, 4),
        f"--fim-tokens {shown}: {len(tokens)} tokens; give those before prefix, suffix and middle, and perhaps one "
        "after the middle",
    )
    yield (
        len(set(tokens)) < len(tokens),
        f"--fim-tokens {shown}: a token is named twice; the parts of a document need different ones",
    )


def _window(options: PreprocessOptions) -> Rules:
    """Yield the rules of windows."""
    window = options.window
    yield (
        window is not None and options.window_overlap >= window,
        f"--window-overlap {options.window_overlap}: must be less than --window {window}",
    )
    yield (
        window is not None and options.fim_rate,
        f"--fim-rate {options.fim_rate} and --window {window}: a window would cut rearranged documents; remove one of "
        "them",
    )


def _chat(options: PreprocessOptions) -> Rules:
    for name, value in (("template", options.chat_template), ("date", options.chat_date)):
        yield (
            value is not None and not options.chat,
            f"--chat-{name} is for --chat; add it, or leave the {name} out",
        )
    day = options.chat_date
    yield day is not None and not _is_day(day), f"--chat-date {day}: not a day; write it as in 2026-01-31"
    yield (
        options.chat and tuple(options.json_key) != ("text",),
        "--json-key names a text, --chat reads conversations; remove one of them",
    )
    for name, given in (
        ("fix-text", options.fix_text),
        ("strip-control", options.strip_control),
        ("normalize", options.normalize != "none"),
        ("remove-urls", options.remove_urls),
        ("collapse-whitespace", options.collapse_whitespace),
        ("min-chars", options.min_chars),
        ("min-letter-ratio", options.min_letter_ratio),
        ("languages", options.languages),
        ("quality", options.quality != "none"),
        ("held-out", options.held_out),
        ("fim-rate", options.fim_rate),
        ("window", options.window),
    ):
        yield options.chat and given, f"--{name} is for texts, not for --chat; remove one of them"


def _output(options: PreprocessOptions) -> Rules:
    folder = options.cache_folder
    yield (
        folder is not None and options.output_prefix != "dataset",
        f"--output-prefix {options.output_prefix} and --cache-folder {folder} both name the output; remove one of them",
    )
    yield (
        options.bins and options.shard is not None,
        f"--bins {options.bins} and --shard: a shard does not know the bins of the others; leave one of them out",
    )
    yield (
        options.bins and folder is not None,
        f"--bins {options.bins} makes several datasets, --cache-folder one; leave one of them out",
    )


def _parts(options: PreprocessOptions) -> Rules:
    for name, given in (("signatures", options.signatures), ("exclude-documents", options.exclude_documents)):
        yield (
            given is not None and (options.dedup == "none" or options.shard is None),
            f"--{name} {given}: is for the parts of a deduplicated corpus; add --shard and --dedup",
        )


def _lines(options: PreprocessOptions) -> Rules:
    """Yield the rules of ``--to-jsonl``, which needs no tokenizer."""
    for name, given in (
        ("tokenizer", options.tokenizer),
        ("model", options.model),
        ("chat", options.chat),
        ("no-append-eod", not options.append_eod),
        ("eod-token", options.eod_token),
        ("bos", options.bos != "auto"),
        ("allow-special-tokens", options.allow_special_tokens),
        ("min-tokens", options.min_tokens),
        ("max-tokens", options.max_tokens),
        ("cache-folder", options.cache_folder),
        ("fim-rate", options.fim_rate),
        ("window", options.window),
    ):
        yield options.to_jsonl and given, f"--{name} is for tokens, --to-jsonl writes text; remove one of them"
    yield (
        options.to_jsonl and TEXT_KEY in options.metadata,
        f"--metadata {TEXT_KEY}: --to-jsonl writes the text under this key; leave it out",
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
