"""Define a fixed set of texts that distinguishes tokenizers, whatever files they come from.

Two tokenizers with the same vocabulary may still split or normalize text differently. The texts hold every code point
of the blocks where normalizers and pre-tokenizers differ: punctuation, spaces, digits, symbols, compatibility forms and
composed letters, each before a letter. They also hold sequences that pre-tokenizers split in different places:
contractions, numbers, runs of spaces, line ends. No text begins with a space: see :mod:`tokenizer_fingerprint`.

Stored fingerprints depend on the set: changing it needs another ``SCHEME`` there.
"""

from __future__ import annotations

_BLOCKS = (
    *(range(0x20, 0x7F), range(0xA0, 0x530), range(0x590, 0x700), range(0x900, 0xA00), range(0xE00, 0xE80)),
    *(range(0x10A0, 0x1200), range(0x1E00, 0x2C00), range(0x2C60, 0x2C80), range(0x3000, 0x3400)),
    *(range(0x3400, 0xA000, 97), range(0xA640, 0xA6A0), range(0xA720, 0xA800), range(0xAC00, 0xD7A4, 61)),
    *(range(0xF900, 0xFB50), range(0xFE00, 0xFE70), range(0xFF00, 0xFFFE), range(0x1D400, 0x1D800, 5)),
    *(range(0x1F100, 0x1F700, 3), range(0x20000, 0x2A6E0, 4099), range(0x2F800, 0x2FA20, 7)),
)
_CODE_POINTS_A_TEXT = 24
_SEQUENCES = (
    "",
    "the cat sat on the mat; a naïve café's coöperation — 天色 is blue",
    "I'm we'll they've you're he'd it's don't I'M WE'LL THEY'VE YOU'RE HE'D IT'S DON'T x's x'S \u2019s",
    "x 0 00 000 0000 12345 1,234.50 3.14159 2024-01-31 10:59 ٣٤٥ १२३ ⅷ ½ x1 x12 x123 1x 12x",
    "x  two   three    four \t tab\t\ttabs \n line\n\nlines\r\n crlf\r\n\r\n x \u3000wide\u00a0hard \u2028 end  ",
    "x!! ?! ... --- === /* */ // <a href='#'>&amp;</a> {\"key\": [1, 2]} a_b a.b a-b #x @y $5 50% C++",
    "if x == 0:\n    return\n\tpass\n",
    "e\u0301 a\u030a o\u0308\u0304 ﬁ ﬂ Å \u212b ｶﾞ ガ カ\u3099 ㍿ \u1100\u1161\u11a8 각 Ǆ ß ẞ İ \u0131",
    "ÀÉÎÕÜ àéîõü ABC abc Abc aBC ΑΒΓ αβγ АБВ абв",
    "👍🏽 👨‍👩‍👧 🇩🇪 \u200d \u200b \ufeff \u00ad \u202e",
    "日本語のテキスト、中文。한국어 텍스트 ไทย हिन्दी עברית العربية",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbb ababababababab",
    "x\x00\x01\x1f\x7f\x85y",
)


def _texts() -> tuple[str, ...]:
    code_points = [chr(code) for block in _BLOCKS for code in block]
    starts = range(0, len(code_points), _CODE_POINTS_A_TEXT)
    rows = ("x" + " ".join(f"{c}a" for c in code_points[at : at + _CODE_POINTS_A_TEXT]) for at in starts)
    return (*_SEQUENCES, *rows)


PROBES = _texts()
EDGES = tuple(
    f"{before}{text}{after}"
    for text in ("a", "Hello World", "12 x", "cafe\u0301")
    for before in ("", " ", "  ", "\n", "\t ")
    for after in ("", " ", "  ", "\n", "\n\n ")
)
"""Texts that begin or end with spaces and line ends. They are not part of a fingerprint."""
