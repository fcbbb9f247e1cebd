"""XML files from others, read without document types, so that they cannot declare entities.

A file of a kilobyte may otherwise expand to gigabytes ("billion laughs"), and an external entity may name a local file.
"""

import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.parsers import expat

from common import UserError

__all__ = ["parse_xml", "read_xml"]

DEEPEST = 200  # elements within elements


def read_xml(path: str | os.PathLike, what: str, read: Callable[[Any], Any] = Path.read_bytes) -> ElementTree.Element:
    """The root element of a file; `what` ("CVAT annotations") is named in errors. `read` as in common.read_text."""
    try:
        content = bytes(read(Path(path)))
    except OSError as e:
        raise UserError(f"{what} {path} cannot be read: {e.strerror}") from None
    return parse_xml(content, f"{what} {path}")


def parse_xml(content: bytes, what: str) -> ElementTree.Element:
    """The root element. Encodings that the parser does not support, such as gb2312, are decoded by Python."""
    try:
        try:
            return _parse(content, what)
        except (expat.ExpatError, ValueError, LookupError):
            declared = re.match(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)[\"'][^>]*\?>", content)
            if not declared:
                raise
            return _parse(content[declared.end() :].decode(declared[1].decode()), what)
    except (expat.ExpatError, ValueError, LookupError) as e:
        raise UserError(f"{what} cannot be read: {e}") from None


def _parse(content: bytes | str, what: str) -> ElementTree.Element:
    builder, depth = ElementTree.TreeBuilder(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise UserError(f"{what} cannot be read: its elements are nested too deeply")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise UserError(f"{what} cannot be read: it has a document type (<!DOCTYPE …>); remove that line")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.Parse(content, True)
    return builder.close()
