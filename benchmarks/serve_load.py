"""Many streaming clients at once on one server: are any lost, how fast is it, does memory grow?

    python benchmarks/serve_load.py                        # 200 clients for 60 s, a tiny model
    python benchmarks/serve_load.py --seconds 600 --pause 20
    python benchmarks/serve_load.py --model FOLDER_OR_GGUF_FILE --clients 8 --tokens 128

The server is ``drivetrain serve`` in a process of its own, the clients are OpenAI's package. Each
client streams one answer after another until the time is over, with a pause between them if asked.
Memory is that of the server and of its worker, after a third of the time and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai


@dataclass
class Seen:
    """What the clients have seen."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)


def tiny(folder: Path) -> Path:
    """A small random Llama over bytes, so that the server is what is measured."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "server" / "tests"))
    import tiny_model

    return tiny_model.write(folder)


def started(options: argparse.Namespace, model: Path) -> tuple[subprocess.Popen[str], str]:
    command = [
        *(sys.executable, "-m", "drivetrain.cli", "serve", str(model), "--port", "0"),
        *("--name", "model", "--dtype", options.dtype, "--max-open", str(options.clients + 8)),
        *(("--config", options.config) if options.config else ()),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"is served at (\S+)", line):
            return process, found[1]
        sys.stderr.write(line)
    raise SystemExit("the server has not started")


def resident(process: int) -> int:
    """Bytes of memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def client(
    many: openai.AsyncOpenAI, number: int, end: float, options: argparse.Namespace, seen: Seen
) -> None:
    turn = 0
    while time.perf_counter() < end:
        turn += 1
        asked: dict[str, Any] = {
            "model": "model", "stream": True, "stream_options": {"include_usage": True},
            "max_tokens": options.tokens, "temperature": 0.7,
            "messages": [{"role": "user", "content": f"Tell story {number} in turn {turn}."}],
            "extra_body": {"ignore_eos": True},
        }  # fmt: skip
        began, first, usage = time.perf_counter(), 0.0, None
        try:
            async for chunk in await many.chat.completions.create(**asked):
                if not first and chunk.choices and chunk.choices[0].delta.content:
                    first = time.perf_counter()
                usage = chunk.usage or usage
        except openai.RateLimitError:
            seen.refused += 1
            await asyncio.sleep(1)
            continue
        except openai.OpenAIError as error:
            seen.lost.append(f"{type(error).__name__}: {error}")
            continue
        if usage is None or usage.completion_tokens != options.tokens:
            seen.lost.append(f"ended early: {usage}")
            continue
        seen.first.append((first or time.perf_counter()) - began)
        seen.whole.append(time.perf_counter() - began)
        seen.tokens += usage.completion_tokens
        await asyncio.sleep(options.pause)


async def load(url: str, options: argparse.Namespace, processes: list[int]) -> dict[str, Any]:
    seen, began = Seen(), time.perf_counter()
    end = began + options.seconds
    samples: list[list[int]] = []

    async def watch() -> None:
        while True:
            samples.append([resident(each) for each in processes])
            await asyncio.sleep(options.seconds / 60)

    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600
    ) as many:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client(many, n, end, options, seen) for n in range(options.clients)))
        watching.cancel()
    took = time.perf_counter() - began
    early = [max(values) for values in zip(*samples[: len(samples) // 3 + 1], strict=True)]
    last = [max(values) for values in zip(*samples[-3:], strict=True)]
    return {
        "clients": options.clients,
        "seconds": round(took, 1),
        "answers": len(seen.whole),
        "lost": len(seen.lost),
        "why": sorted(set(seen.lost))[:5],
        "refused": seen.refused,
        "tokens_per_second": round(seen.tokens / took, 1),
        "first_token": {
            "median": round(statistics.median(seen.first), 3),
            "p95": round(statistics.quantiles(seen.first, n=20)[-1], 3),
        },
        "memory": {
            name: {
                "after_a_third_mib": round(a / 2**20, 1),
                "at_the_end_mib": round(b / 2**20, 1),
            }
            for name, a, b in zip(("server", "worker"), early, last, strict=True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or a GGUF file; by default a tiny random one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--config", help="with the section inference")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--pause", type=float, default=0.0, help="of a client between answers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(options.model) if options.model else tiny(Path(folder))
        process, url = started(options, model)
        try:
            with urlopen(f"{url}/live/status") as answer:  # noqa: S310 - our own server
                worker = json.load(answer)["workers"][0]["process"]
            found = asyncio.run(load(url, options, [process.pid, worker]))
            print(json.dumps(found, indent=2), flush=True)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=240)  # what runs is finished first


if __name__ == "__main__":
    main()
