"""Optional cleaning steps: against ftfy, plain regular expressions, datatrove's verdicts, and whole texts in pieces."""

from __future__ import annotations

import itertools
import random
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import ftfy
import pytest
from oracles.gopher_texts import REASONS, VERDICTS, texts
from oracles.megatron_index import read_megatron
from oracles.preprocessing import jsonl, plain_ids, report, run

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.cleaning import filters, gopher, libraries
from retemper.tools.preprocessing.cleaning.cleaner import Cleaner
from retemper.tools.preprocessing.cleaning.filters import count_letters
from retemper.tools.preprocessing.cleaning.gopher import GopherRules
from retemper.tools.preprocessing.cleaning.steps import CollapseWhitespace, FixText, RemoveUrls
from retemper.tools.preprocessing.options import PreprocessOptions
from retemper.tools.preprocessing.report import format_report

ENGLISH = "The committee met on Tuesday to discuss the budget for the coming year, and several members objected. "
GERMAN = "Der Ausschuss traf sich am Dienstag, um den Haushalt für das kommende Jahr zu besprechen. "
CHINESE = "委员会星期二开会讨论来年的预算。几位成员对该提案提出了反对意见。"
SPACES = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u3000"


def cut(draw: random.Random, text: str, times: int) -> list[str]:
    edges = [0, *sorted(draw.randrange(len(text) + 1) for _ in range(times)), len(text)]
    return [text[first:last] for first, last in itertools.pairwise(edges)]


def asked_for(held_out: Path | None = None, **options: object) -> Cleaner:
    return Cleaner(PreprocessOptions(["-"], **options), held_out)  # type: ignore[arg-type]


def in_pieces(cleaner: Cleaner, pieces: list[str]) -> tuple[str, str | None, list[str]]:
    changed: list[str] = []
    text, reason = "", None
    for piece, why in cleaner.clean_pieces(pieces, changed.append):
        assert reason is None
        text, reason = text + piece, why
    return text, reason, changed


def from_alphabet(name: str, alphabet: list[str], longest: int = 40) -> list[str]:
    draw = random.Random(name)
    return ["".join(draw.choices(alphabet, k=draw.randrange(longest))) for _ in range(300)]


FTFY_PARTS = [
    *"ab <&;\n\r\t\x00\x1b\x7f",
    "&amp;",
    "&lt;p>",
    "Ã¼",
    "â€œ",
    "schÃ¶n",
    "ﬁ",
    "“",
    "\u2028",
    "\uff21",
    "\x1b[31m",
    "\ufeff",
    "é",
]


@pytest.mark.parametrize("longest", [7, 1_000_000])
def test_text_is_fixed_by_ftfy_as_datatrove_configures_it(longest, monkeypatch):
    step = FixText()
    monkeypatch.setattr(step, "_config", step._config._replace(max_decode_length=longest))
    draw = random.Random(longest)
    for text in from_alphabet("ftfy", FTFY_PARTS):
        wanted = ftfy.fix_text(
            text,
            fix_latin_ligatures=False,
            fix_character_width=False,
            uncurl_quotes=False,
            fix_line_breaks=False,
            normalization=None,
            max_decode_length=longest,
        )
        assert step.whole(text) == wanted
        assert "".join(step.pieces(cut(draw, text, draw.randrange(6)))) == wanted


def test_ascii_that_ftfy_leaves_alone_is_not_given_to_it():
    step = FixText()
    for code in range(128):
        text = f"x{chr(code)}lt;y"
        assert step.whole(text) == ftfy.fix_text(text, step._config)


URLS = {
    "See https://a.example/b?c=d&e=%20#f.": "See .",
    "(http://a.example/x)": "()",
    "https://en.example.org/wiki/Rose_(genus), and": ", and",
    "www.a.example: WWW.B.EXAMPLE! ftp://c.example/": ": ! ",
    "见https://a.example/天地。": "见天地。",
    "https://de.example.org/wiki/Köln und": " und",
    "awww.b xhttps://c.example https:// www.": "awww.b xhttps://c.example https:// www.",
    "<a href='https://a.example/b'>«https://c.example»": "<a href=''>«»",
    "https://a.example\nhttps://b.example": "\n",
    "mail@a.example http://[::1]:80/x": "mail@a.example ",
}


def test_urls_are_removed_without_the_punctuation_around_them():
    draw = random.Random(3)
    step = RemoveUrls()
    for text, wanted in URLS.items():
        assert step.whole(text) == wanted
        for _ in range(20):
            assert "".join(step.pieces(cut(draw, text, draw.randrange(8)))) == wanted


def test_urls_cost_linear_time():
    for text in ("www." * 50_000, "www." + "." * 200_000, "http://" + "(" * 200_000, "http://a" + "(b" * 100_000):
        assert len(RemoveUrls().whole(text)) < len(text) + 1


def test_white_space_is_collapsed_to_a_space_a_line_end_or_a_paragraph_end():
    step = CollapseWhitespace()
    draw = random.Random(5)
    spaces = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
    assert set(SPACES) <= set(spaces)
    for text in [*from_alphabet("white", [*SPACES, "a", "b", "天", "\r\n", "  "]), "".join(spaces), ""]:
        lines = [" ".join(line.split()) for line in text.splitlines()]
        wanted = re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
        assert step.whole(text) == wanted
        assert "".join(step.pieces(cut(draw, text, draw.randrange(6)))) == wanted


def test_letters_are_counted_by_their_category():
    text = "".join(map(chr, [*range(0x3000), *range(0xAC00, 0xAC20), 0x20000, 0xD800]))
    visible = [character for character in text if not character.isspace()]
    assert count_letters(text) == (sum(unicodedata.category(c)[0] in "LM" for c in visible), len(visible))
    cleaner = asked_for(min_letter_ratio=0.6)
    assert cleaner.clean("abc \n 12")[1] is None
    assert cleaner.clean("abc 12!")[1] == "below --min-letter-ratio"


def test_languages_are_those_of_the_text():
    cleaner = asked_for(languages=["en", "zh"])
    other, uncertain = "in none of --languages", "below --min-language-score"
    wanted = {ENGLISH: None, CHINESE: None, GERMAN: other, "12 34 | 5.6": uncertain, "": uncertain}
    for text, reason in wanted.items():
        assert cleaner.clean(text)[1] == reason
    assert asked_for(languages=["de"]).clean(GERMAN)[1] is None


def test_gopher_rules_agree_with_datatrove():
    rules = GopherRules()
    seen: Counter[str | None] = Counter()
    for number, text in enumerate(texts()):
        words = text.split()
        quality, repetition = (REASONS[code] for code in VERDICTS[2 * number : 2 * number + 2])
        assert rules.quality(text, words) == quality
        assert rules.repetition(text, words, 1) == repetition
        assert rules.reason(text) == (quality or repetition)
        seen.update([quality, repetition])
    assert set(seen) == set(REASONS.values())


def test_texts_of_too_many_words():
    draw = random.Random(1)
    words = ["the", "of", *(f"word{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(600))]
    for count, reason in ((100_000, None), (100_001, "more than 100,000 words")):
        assert GopherRules().reason(" ".join(draw.choices(words, k=count))) == reason
    assert GopherRules().reason("a " * gopher.MAX_CHARACTERS) == "more than 100,000 words"


def test_scripts_without_spaces_have_words():
    rules = GopherRules(has_stop_words=False)
    draw = random.Random(2)
    characters = [chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(400)]
    sentences = ["".join(draw.choices(characters, k=14)) + "。" for _ in range(40)]
    assert rules.reason("".join(sentences)) is None
    assert rules.reason("".join(sentences[:3])) == "fewer than 50 words"
    assert rules.reason("\n".join(sentences[:10] * 3)) == "duplicate lines"
    assert GopherRules().reason("".join(sentences)) == "fewer than 2 stop words"


@pytest.mark.parametrize(
    "options",
    [
        {"fix_text": True, "remove_urls": True, "collapse_whitespace": True, "normalize": "nfc", "strip_control": True},
        {"quality": "gopher", "collapse_whitespace": True, "min_chars": 300},
        {"min_letter_ratio": 0.7, "languages": ["en"], "remove_urls": True},
    ],
)
def test_a_long_text_in_pieces_is_cleaned_as_a_whole(options, monkeypatch):
    monkeypatch.setattr(filters, "MAX_CHARACTERS", 4_000)
    monkeypatch.setattr(gopher, "MAX_CHARACTERS", 4_000)
    monkeypatch.setattr(filters, "IDENTIFIED_CHARACTERS", 40_000)
    cleaner = asked_for(**options)
    draw = random.Random(4)
    parts = [ENGLISH, GERMAN, "https://a.example/b ", "schÃ¶n &amp; ", "e\u0301\x00 ", "  \n\n\n ", "12 34 5 6 ", "\n"]
    seen = set()
    for _ in range(150):
        text = "".join(draw.choices(parts, k=draw.randrange(40)))
        changed: list[str] = []
        ((cleaned, reason),) = cleaner.clean_batch([text], changed.append)
        seen.add(reason)
        got, why, changed_pieces = in_pieces(cleaner, cut(draw, text, draw.randrange(8)))
        assert (why, changed_pieces) == (reason, changed)
        assert got == cleaned if reason is None else cleaned.startswith(got)
    assert len(seen) > 1 or "fix_text" in options


def test_a_reason_before_the_end_stops_reading():
    cleaner = asked_for(languages=["de"], min_chars=5)
    read = []

    def pieces():
        for number in range(10):
            read.append(number)
            yield ENGLISH * 100

    assert [reason for _, reason in cleaner.clean_pieces(pieces())] == ["in none of --languages"]
    assert read == [0]


def test_counts_and_texts_of_a_run(tmp_path, tiny_tokenizer):
    good = ENGLISH * 2
    texts_in = [good, f"{good}https://a.example/b", "schÃ¶n", GERMAN * 2, "1 2 3 4 5 6", f"  {good}", good]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts_in))
    options = {
        "fix_text": True,
        "remove_urls": True,
        "collapse_whitespace": True,
        "min_chars": 8,
        "min_letter_ratio": 0.5,
        "languages": ["en"],
    }
    found = report(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", **options, task_bytes=300, workers=2)
    (sidecar,) = found.sidecars.values()
    assert read_megatron(tmp_path / "out").documents == plain_ids(tiny_tokenizer, [good.strip()] * 4)
    (source,) = sidecar.sources
    assert source.left_out == {"below --min-chars": 1, "in none of --languages": 1, "below --min-letter-ratio": 1}
    # Every good text ends with a space, and the URL follows one.
    assert source.changed == {"--remove-urls": 1, "--collapse-whitespace": 4}
    assert sidecar.options == options
    assert "--collapse-whitespace" in format_report(found)


def test_held_out_texts_are_cleaned_like_the_corpus_and_not_left_out(tmp_path, tiny_tokenizer):
    held_out = "one, two; three: four https://x.example five six seven eight nine ten eleven twelve thirteen fourteen"
    (tmp_path / "held.txt").write_text(held_out)
    (tmp_path / "a.jsonl").write_bytes(jsonl([re.sub(r"\S*//\S* |[,;:]", "", held_out), ENGLISH * 20]))
    options = {"held_out": [str(tmp_path / "held.txt")], "languages": ["en"], "min_language_score": 0.1}
    kept = run(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", **options)
    assert kept.documents == 2
    found = run(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", **options, remove_urls=True, overwrite=True)
    assert found.left_out == {"shares an n-gram with --held-out": 1}
    # The filters do not apply to held-out texts.
    found = run(
        tiny_tokenizer,
        tmp_path,
        tmp_path / "a.jsonl",
        **options,
        remove_urls=True,
        min_letter_ratio=0.95,
        overwrite=True,
    )
    assert found.left_out == {"shares an n-gram with --held-out": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": ["en", "xx"]}, "--languages xx"),
        ({"min_letter_ratio": 1.5}, "--min-letter-ratio 1.5"),
        ({"min_language_score": -0.1}, "--min-language-score -0.1"),
        ({"chat": True, "fix_text": True}, "--fix-text is for texts"),
        ({"chat": True, "quality": "gopher"}, "--quality is for texts"),
    ],
)
def test_wrong_options(tmp_path, tiny_tokenizer, options, message):
    (tmp_path / "a.jsonl").write_bytes(jsonl([ENGLISH]))
    with pytest.raises(UserError, match=message):
        run(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match=r"--fix-text needs ftfy: pip install 'retemper\[clean\]'"):
        libraries.cleaning_libraries(PreprocessOptions(["-"], fix_text=True))
