"""The process that renders chat templates: ``python -m drivetrain_server.templates.process``.

A template may loop for ever or ask for all memory, and no thread can be ended; a process can. It
reads messages from its input and writes answers to its output.
"""

from __future__ import annotations

import contextlib
import json
import signal
import struct
import sys
from typing import Any, BinaryIO

from drivetrain_server.templates.sandbox import BadTemplateError, ChatTemplate

MEMORY = 2**30
"""Bytes of address space that it may have."""

_LENGTH = struct.Struct(">I")


def _read(source: BinaryIO) -> Any:
    head = source.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    return json.loads(source.read(_LENGTH.unpack(head)[0]))


def _write(answer: dict[str, str]) -> None:
    body = json.dumps(answer).encode()
    sys.stdout.buffer.write(_LENGTH.pack(len(body)) + body)
    sys.stdout.buffer.flush()


def _answer(template: ChatTemplate, asked: dict[str, Any]) -> dict[str, str]:
    try:
        return {"text": template.render(asked["messages"], asked["tools"], asked["options"])}
    except BadTemplateError as error:
        return {"error": str(error)[:2000]}
    except MemoryError:
        return {"error": "the chat template asks for too much memory"}


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    first = _read(sys.stdin.buffer)
    if first is None:
        return
    try:
        template = ChatTemplate(first["template"], first["tokens"])
    except BadTemplateError as error:
        _write({"error": str(error)[:2000]})
        return
    _write({})
    while (asked := _read(sys.stdin.buffer)) is not None:
        _write(_answer(template, asked))


if __name__ == "__main__":
    main()
