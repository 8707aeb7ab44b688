"""A text file of any size as one document."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

from ....engine.files.paths import is_url
from ..records.errors import MalformedError, Where
from ..records.json_values import invalid_utf8
from ..records.long_text import LONG_BYTES, LongText
from ..records.reading import ReadContext, Record
from ..workers.tasks import Span
from .streams import open_stream, skip_bom

_COPY_BYTES = 1 << 20


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """Yield the file as one record."""
    file = span.file
    where = Where(file.path)
    with open_stream(file, context) as stream:
        bom = skip_bom(stream, file.path)
        content = stream.read(LONG_BYTES)
        if len(content) < LONG_BYTES:
            context.consumed = file.size
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError as error:
                where = Where(file.path, "line", content.count(b"\n", 0, error.start) + 1)
                wrong = invalid_utf8(content, error)
                context.refuse(where, str(wrong), wrong.kind, None)
                return
            yield Record(text, where)
        elif not file.compression and not is_url(file.path):
            yield from _checked(LongText(file.path, bom, file.size, False, where), context)
            context.consumed = file.size
        else:
            with tempfile.NamedTemporaryFile(dir=context.scratch, prefix="text.") as copy:
                while content:
                    copy.write(content)
                    content = stream.read(_COPY_BYTES)
                copy.flush()
                yield from _checked(LongText(copy.name, 0, copy.tell(), False, where), context)


def _checked(text: LongText, context: ReadContext) -> Iterator[Record]:
    try:
        text.check()
    except MalformedError as error:
        context.refuse(text.where, str(error), error.kind, None)
        return
    yield Record(text, text.where)
