"""The server's side of rendering: one process, ended when a template takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import sys
from collections.abc import Mapping
from typing import Any

from drivetrain_server.templates.sandbox import BadTemplateError

_LENGTH = struct.Struct(">I")


class Renderer:
    """Renders messages with a model's chat template.

    Args:
        template: text, or several by name.
        tokens: special tokens by name.
        seconds: time that rendering may take.
    """

    def __init__(
        self, template: str | Mapping[str, str], tokens: Mapping[str, Any], seconds: float
    ) -> None:
        self._first = {"template": template, "tokens": tokens}
        self._seconds = seconds
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def render(
        self, messages: list[Any], tools: list[Any] | None, options: Mapping[str, Any]
    ) -> str:
        """The prompt for ``messages``.

        Raises:
            BadTemplateError: the template cannot be read, fails, or takes too long.
        """
        async with self._turn:
            if self._process is None:
                await self._ask(self._first, 30.0)
            asked = {"messages": messages, "tools": tools, "options": options}
            answer = await self._ask(asked, self._seconds)
        return answer["text"]

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _ask(self, message: Any, seconds: float) -> dict[str, str]:
        try:
            async with asyncio.timeout(seconds):
                answer = await self._exchange(message)
        except TimeoutError:
            await self.close()
            raise BadTemplateError(
                f"the chat template has not rendered these messages in {seconds:g} s"
            ) from None
        except (OSError, asyncio.IncompleteReadError):
            await self.close()
            raise BadTemplateError("the chat template has broken its process") from None
        except BaseException:
            await self.close()  # an answer that nobody has read would be taken for the next
            raise
        if "error" in answer:
            if message is self._first:
                await self.close()
            raise BadTemplateError(answer["error"])
        return answer

    async def _exchange(self, message: Any) -> dict[str, str]:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "drivetrain_server.templates.process",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        source, target = self._process.stdout, self._process.stdin
        assert source is not None
        assert target is not None
        body = json.dumps(message).encode()
        target.write(_LENGTH.pack(len(body)) + body)
        await target.drain()
        (length,) = _LENGTH.unpack(await source.readexactly(_LENGTH.size))
        answer: dict[str, str] = json.loads(await source.readexactly(length))
        return answer
