"""What a server is told when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from drivetrain.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and choices of a server.

    Args:
        model: a path that the engine takes.
        name: how clients call the model.
        engine: name of an entry of ``drivetrain.engines``; empty: the only one that is installed.
        config: the engine's config, or ``None`` for defaults.
        dtype: of the weights, such as ``bfloat16``; empty: as they are stored.
        weights: where parameters get values from instead, such as a checkpoint of training.
        adapters: a folder whose folders are adapters of PEFT, which clients name instead of the
            model; empty: there are none.
        replicas: workers, each with a copy of the model.
        ranks: processes of each worker, which share the model as the config says.
        threads: of each process; 0: the cores, divided by all of them.
        host: address to listen at.
        port: port to listen at; 0: any that is free.
        api_keys: one of them must come with each request; empty: none is asked for.
        cors: origins whose pages may call; none by default.
        chat_template: instead of the tokenizer's.
        max_open: results that wait or run at once; requests beyond get status 429.
        max_tokens: most new tokens of a result.
        max_results: most results of one request (``n`` times the number of prompts).
        max_body: bytes of a request.
        max_schema: bytes of a JSON schema or regular expression.
        request_seconds: a request that takes longer ends with what there is.
        body_seconds: time in which a request's body must arrive.
        stall_seconds: a client that takes no data for so long is left.
        template_seconds: time that a chat template may take.
        silence_seconds: a worker that says nothing for so long is replaced.
        step_seconds: a worker whose step takes longer is replaced.
        drain_seconds: time that running requests have to finish when the server stops.
    """

    model: str
    name: str
    engine: str = ""
    config: Mapping[str, Any] | None = None
    dtype: str = ""
    weights: str = ""
    adapters: str = ""
    replicas: int = 1
    ranks: int = 1
    threads: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors: tuple[str, ...] = ()
    chat_template: str | None = None
    max_open: int = 512
    max_tokens: int = 16384
    max_results: int = 128
    max_body: int = 4 * 2**20
    max_schema: int = 2**16
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    stall_seconds: float = 60.0
    template_seconds: float = 5.0
    silence_seconds: float = 30.0
    step_seconds: float = 300.0
    drain_seconds: float = 120.0

    def __post_init__(self) -> None:
        counts = ("replicas", "ranks", "max_open", "max_tokens", "max_results", "max_body")
        for name in (*counts, "max_schema"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.ranks > 1 and self.config is None:
            raise ConfigError(
                f"ranks is {self.ranks}, and no config says how ranks share the model: give one, "
                'such as {"inference": {}, "tensor_parallel": {"autotp_size": 2}}'
            )
        if any(len(key) < 8 or not key.isascii() for key in self.api_keys):
            raise ConfigError("an API key must have at least 8 characters, all of them ASCII")
        if self.host not in LOOPBACK and not self.api_keys:
            raise ConfigError(
                f"the server would listen at {self.host} without API keys, so that whoever reaches "
                "it may use it; give --api-key, or DRIVETRAIN_API_KEYS, or stay at 127.0.0.1"
            )
        if "*" in self.cors and not self.api_keys:
            raise ConfigError("pages of every origin may call only a server with API keys")
