"""PDF files of a few lines of text, written object by object as the format's specification (ISO 32000) has them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence


def tiny_pdf(pages: Sequence[Sequence[str]], compressed: bool = False) -> bytes:
    """A PDF that draws each line of each page, Latin-1, with the standard font Helvetica."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for lines in pages:
        content = b"BT /F1 12 Tf 14 TL 72 720 Td\n"
        content += b"".join(b"(" + _escaped(line) + b") Tj T*\n" for line in lines) + b"ET"
        length = len(objects)
        kids.append(b"%d 0 R" % (length + 1))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> "
            b"/Contents %d 0 R >>" % (length + 2)
        )
        data = zlib.compress(content) if compressed else content
        coding = b" /Filter /FlateDecode" if compressed else b""
        objects.append(b"<< /Length %d%s >>\nstream\n%s\nendstream" % (len(data), coding, data))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    out = b"%PDF-1.4\n"
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return out + b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1,
        table,
        len(objects) + 1,
        len(out),
    )


def _escaped(line: str) -> bytes:
    return line.encode("latin-1").replace(b"\\", rb"\\").replace(b"(", rb"\(").replace(b")", rb"\)")
