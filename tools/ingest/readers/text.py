"""A text file as one document, whatever its size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

from ..long_text import LONG_BYTES, LongText, invalid_utf8
from ..records import ReadContext, Record, Where
from ..tasks import Span
from .lines import UTF8_BOM
from .streams import open_stream

_COPY_BYTES = 1 << 20


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """The whole file as the only record of ``span``."""
    file = span.file
    with open_stream(file, context) as stream:
        content = stream.read(LONG_BYTES)
        if len(content) < LONG_BYTES:
            context.consumed = file.size
            content = content.removeprefix(UTF8_BOM)
            try:
                yield Record(content.decode("utf-8"), Where(file.path))
            except UnicodeDecodeError as error:
                where = Where(file.path, "line", content.count(b"\n", 0, error.start) + 1)
                wrong = invalid_utf8(content, error)
                context.refuse(where, str(wrong), wrong.kind, None)
        elif not file.compression:
            yield Record(LongText(file.path, 0, file.size, is_json=False), Where(file.path))
            context.consumed = file.size
        else:
            with tempfile.NamedTemporaryFile(dir=context.scratch, prefix="text.") as copy:
                while content:
                    copy.write(content)
                    content = stream.read(_COPY_BYTES)
                copy.flush()
                yield Record(LongText(copy.name, 0, copy.tell(), is_json=False), Where(file.path))
