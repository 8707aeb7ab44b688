"""PDF: a file is one document, the text of its pages in drawing order, with an empty line between pages.

With ``pdf_pages`` each page with text is a document. Not supported: OCR of scanned pages, columns and tables, and
removing headers and page numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, BinaryIO

from ....engine.errors import UserError
from ..formats import require_library
from ..records.errors import MalformedError, Where
from ..records.reading import ReadContext, Record
from ..workers.tasks import Span
from .streams import open_stream, short_reason

_BETWEEN_PAGES = "\n\n"


def read(span: Span, context: ReadContext) -> Iterator[Record]:
    """Yield the file, or each page with text, as one record."""
    path = span.file.path
    pypdf = require_library("pypdf", path)
    # It warns about every oddity that it can handle.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL + 1)
    with open_stream(span.file, context) as stream:
        pages: dict[int, str] = {}
        try:
            pages = _pages(pypdf, stream, path)
        except MalformedError as error:
            context.refuse(Where(path), str(error), error.kind, None)
        context.consumed = span.file.size
    if context.options.pdf_pages:
        for number, text in pages.items():
            yield Record(text, Where(path, "page", number))
    elif pages:
        yield Record(_BETWEEN_PAGES.join(pages.values()), Where(path))


def _pages(pypdf: Any, stream: BinaryIO, path: str) -> dict[int, str]:
    """Return the texts of the pages with text by their numbers, from 1. Raise MalformedError if there are none."""
    page = 0
    try:
        reader = pypdf.PdfReader(stream)
        if reader.is_encrypted and not reader.decrypt(""):
            raise MalformedError("locked with a password; save it without one")
        pages = {}
        for page in range(1, len(reader.pages) + 1):
            if text := reader.pages[page - 1].extract_text().strip():
                pages[page] = text
    except (UserError, MalformedError, MemoryError):
        raise
    except pypdf.errors.DependencyError:
        require_library("cryptography", path)
        raise
    except Exception as error:  # pypdf may raise anything for a damaged file
        where = f"page {page}: " if page else ""
        raise MalformedError(f"{where}truncated, damaged or not a PDF ({short_reason(error)})") from None
    if not pages:
        raise MalformedError("no text: a scan? run OCR first")
    try:
        "".join(pages.values()).encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedError("text with half a character (a lone surrogate)") from None
    return pages
