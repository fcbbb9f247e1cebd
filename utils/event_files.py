"""Edits TensorBoard's event files when a run is continued from an earlier step."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from common import atomic_write

__all__ = ["drop_events_after"]


def drop_events_after(folder: Path, step: int) -> None:
    """Removes events of later steps from the folder's event files, and files without other events."""
    from utils.tf_v1 import tf

    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        kept, size, values = [], 0, 0
        for frame, record in _records(content):
            event = tf.Event.FromString(record)
            if event.step <= step:
                kept.append(frame)
                size += len(frame)
                values += event.HasField("summary")
        if not values:
            os.unlink(path)
        elif size < len(content):
            with atomic_write(path, "wb") as f:
                f.writelines(kept)


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(framed record, record) of a TFRecord file: uint64 length, uint32 checksum, record, uint32 checksum.

    An incomplete last record, left by a killed process, is ignored."""
    at = 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        end = at + 12 + length + 4
        if end > len(content):
            return
        yield content[at:end], content[at + 12 : end - 4]
        at = end
