"""``mii.client``: asks a deployment that ``mii.serve`` has started."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from drivetrain.errors import ConfigError
from mii.deployments import Deployment, find
from mii.options import Sampling
from mii.responses import Response, Streaming, listed

_AT_ONCE = 64
"""Prompts that are under way at the same time."""


class MIIClient:
    """Asks one deployment.

    Attributes:
        deployment: where it is.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment

    def __call__(self, prompts: str | Sequence[str], **options: Any) -> list[Response]:
        """The same as :meth:`generate`."""
        return self.generate(prompts, **options)

    def generate(
        self,
        prompts: str | Sequence[str],
        streaming_fn: Streaming | None = None,
        **options: Any,
    ) -> list[Response]:
        """Continue one or several prompts.

        Args:
            prompts: texts; with ``streaming_fn`` one.
            streaming_fn: called with each part as it comes.
            **options: of :class:`~mii.options.Sampling`.

        Raises:
            UnknownArgument: there is no such option.
            ConfigError: a prompt or an option cannot be served.
            DeploymentError: the server does not answer.
        """
        asked, texts = Sampling.read(options), listed(prompts)
        bodies = [self._body(text, asked) for text in texts]
        if streaming_fn is not None or asked.stream:
            if len(texts) != 1 or streaming_fn is None:
                raise ConfigError(
                    "a stream has one prompt, and a streaming_fn that takes its parts"
                )
            return [self._stream(texts[0], bodies[0], asked, streaming_fn)]
        with ThreadPoolExecutor(min(_AT_ONCE, len(texts) or 1)) as pool:
            whole = list(pool.map(self._whole, bodies))
        return [
            Response(
                (text if asked.return_full_text else "") + answer["choices"][0]["text"],
                answer["usage"]["prompt_tokens"],
                answer["usage"]["completion_tokens"],
                answer["choices"][0]["finish_reason"],
            )
            for text, answer in zip(texts, whole, strict=True)
        ]

    def terminate_server(self) -> None:
        """Let the server finish what runs, and end it."""
        self.deployment.end()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        path = Path(self.deployment.model)
        where = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if path.is_file() else path
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **where
        )

    @cached_property
    def _context(self) -> int:
        with self.deployment.ask("/v1/models") as answer:
            return int(json.load(answer)["data"][0]["max_model_len"])

    def _body(self, text: str, asked: Sampling) -> dict[str, Any]:
        tokens: list[int] = self._tokenizer(text)["input_ids"]
        most = asked.new_tokens(len(tokens), self._context)
        body: dict[str, Any] = {
            "model": self.deployment.name,
            "prompt": tokens,
            "max_tokens": most,
            "min_tokens": min(asked.min_new_tokens, most),
            "temperature": 0.0,
            "ignore_eos": asked.ignore_eos,
        }
        if asked.do_sample:
            body |= {"temperature": asked.temperature or 1.0, "top_p": asked.top_p}
            body |= {"top_k": asked.top_k} if asked.top_k else {}
        return body | ({"stop": asked.stops} if asked.stops else {})

    def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        with self.deployment.ask("/v1/completions", body) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def _stream(
        self, text: str, body: dict[str, Any], asked: Sampling, take: Streaming
    ) -> Response:
        found, reason = text if asked.return_full_text else "", "none"
        prompt = new = 0
        for event in self._events({**body, "stream": True}):
            if event["choices"]:
                (choice,) = event["choices"]
                reason = choice["finish_reason"] or "none"
                found += choice["text"]
                take([Response(choice["text"], len(body["prompt"]), 0, reason)])
            if event.get("usage"):
                prompt, new = event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]
        return Response(found, prompt, new, reason)

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        asked = {**body, "stream_options": {"include_usage": True}}
        with self.deployment.ask("/v1/completions", asked) as answer:
            for line in answer:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise ConfigError(str(event["error"]["message"]))
                    yield event


def client(model_or_deployment_name: str) -> MIIClient:
    """A client of a deployment on this host, by its name or its model's.

    Raises:
        DeploymentError: there is none, or it has ended.
    """
    return MIIClient(find(str(model_or_deployment_name)))
