"""Texts around the thresholds of Gopher's rules, and what datatrove says about them.

``VERDICTS`` was recorded with datatrove 0.10.1: GopherQualityFilter and GopherRepetitionFilter with their defaults,
and with ``split_into_words`` replaced by ``str.split``. Without this, datatrove splits English with spaCy.
"""

from __future__ import annotations

import random

_TEXT = (
    "the of and to with have that be river mountain letter winter orchard engine harbour copper signal garden "
    "window method theory captain village market yellow distance question morning evening science history "
    "building people number system reason animal country machine journey teacher student weather kitchen blanket "
    "compass lantern"
)
_WORDS = _TEXT.split()
_LINES = ("plain", "bullet", "dash", "ellipsis", "dots")
_SYMBOLS = ("#", "...", "…", "12", "3.5", "-", "##")


def texts() -> list[str]:
    """Return 400 texts of words, symbols, repeated lines, paragraphs and n-grams in random shares."""
    return [_text(random.Random(f"gopher {number}")) for number in range(400)]


def _text(draw: random.Random) -> str:
    vocabulary = draw.sample(_WORDS, draw.choice([4, 8, 20, len(_WORDS)]))
    if draw.random() < 0.15:
        vocabulary = [word[: draw.randint(1, 3)] for word in vocabulary]
    if draw.random() < 0.15:
        vocabulary = [word + draw.choice(_WORDS) for word in vocabulary]
    symbols, repeats = draw.choice([0, 0, 0.05, 0.15, 0.3]), draw.choice([0, 0, 0.1, 0.2, 0.3, 0.5])
    kind, marked = draw.choice(_LINES), draw.choice([0.2, 0.35, 0.95])
    lines: list[str] = []
    for _ in range(draw.randint(1, 40)):
        if lines and draw.random() < repeats:
            lines.append(draw.choice(lines))
            continue
        words = [
            draw.choice(_SYMBOLS) if draw.random() < symbols else draw.choice(vocabulary)
            for _ in range(draw.randint(2, 14))
        ]
        lines.append(_marked(" ".join(words), kind if draw.random() < marked else "plain"))
    ends = ["\n", "\n\n"] if draw.random() < 0.5 else ["\n"]
    return "".join(line + draw.choice(ends) for line in lines)


def _marked(line: str, kind: str) -> str:
    begin = {"bullet": "• ", "dash": " - "}.get(kind, "")
    return begin + line + {"ellipsis": "…", "dots": "... "}.get(kind, "")


REASONS = {
    "a": None,
    "b": "characters in duplicate lines",  # dup_line_char_frac
    "c": "duplicate lines",  # dup_line_frac
    "d": "characters in duplicate paragraphs",  # dup_para_char_frac
    "e": "duplicate paragraphs",  # dup_para_frac
    "f": "duplicate 10-grams",  # duplicated_10_n_grams
    "g": "duplicate 5-grams",  # duplicated_5_n_grams
    "h": "duplicate 6-grams",  # duplicated_6_n_grams
    "i": "duplicate 7-grams",  # duplicated_7_n_grams
    "j": "duplicate 8-grams",  # duplicated_8_n_grams
    "k": "duplicate 9-grams",  # duplicated_9_n_grams
    "l": "mean word length above 10",  # gopher_above_avg_threshold
    "m": "fewer than 80% of words have a letter",  # gopher_below_alpha_threshold
    "n": "mean word length below 3",  # gopher_below_avg_threshold
    "o": "fewer than 2 stop words",  # gopher_enough_stop_words
    "p": "fewer than 50 words",  # gopher_short_doc
    "q": "more than 90% of lines begin with a bullet",  # gopher_too_many_bullets
    "r": "more than 0.1 ellipses per word",  # gopher_too_many_ellipsis
    "s": "more than 30% of lines end with an ellipsis",  # gopher_too_many_end_ellipsis
    "t": "more than 0.1 hash signs per word",  # gopher_too_many_hashes
    "u": "most frequent 2-gram",  # top_2_gram
    "v": "most frequent 3-gram",  # top_3_gram
    "w": "most frequent 4-gram",  # top_4_gram
}
"""Our reasons, and datatrove's names of them; None: the text is kept."""
VERDICTS = (
    "tbnututcrcraaaoaoglaaanbsaabactcpwpiobouqatkpctaaaparaogpwaclapbpancacacpurjocoapulgaaaaabmaaatbaaoc"
    "tbncnaacnaoaaaacpapunarbpdrbagncpulcpvaaobnarcsbratbtalaaaactbpcoapwraaalataacabqanasarcoaoupwpatapw"
    "taqclbobpcpctaogmalalaafncpwtalaaapaocnanatarcaatcaamaoerbabobaapapbtatboupaqataoatctalcaamalanctaaa"
    "afncrbaboanasaoglatbogqaaatcsaaaaaqbaaaapapwagnaaesaaclftcahpumapbpwoctancncpclaaapcranaacaaaaaaaaaa"
    "ncqcsaaknaaaaaqgacaataqalcratbtbpvtapamaabranaaaraogacraaaaancousgaasbrcpatclaqalaagpaaiabograoaoapv"
    "aascaaactktarclbrcoambqaacpuaaaaoclararatapuahtcsapvpcafmboaparapaaaqanbtaactaocnbtascogoutapapapcra"
    "obnamaoanapuoctataaaaatapulbscoaacraoaoasarercaapascaaaaluobaanaoalararamctapashlaohobpanaagmclamaqc"
    "tboaoataoaaaaaleluaarksbpupaaaraaaacaanambnaacnaocrararalbtancocpvnalaaanalanaoctcrkrbpvranaoascncta"
)
"""For each text, the reasons of the quality rules and of the repetition rules."""
