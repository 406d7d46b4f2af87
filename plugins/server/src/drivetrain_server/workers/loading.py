"""From a path to an engine, by whichever installed package generates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from drivetrain.contracts import Adapts, Embeds, Serves
from drivetrain.errors import ConfigError, DrivetrainError
from drivetrain.plan.registry import Registry
from drivetrain_server.workers.wire import Message


def load(order: Message) -> Serves | Embeds:
    """The engine that ``order`` asks for; whether it generates is the model's business.

    Raises:
        ConfigError: no package generates, several do and none is named, or the model cannot be
            served.
    """
    if order["threads"]:
        torch.set_num_threads(order["threads"])
    # Code of a model's folder is never run; without this Transformers may ask at the terminal.
    os.environ["HF_HUB_OFFLINE"] = "1"
    registry = Registry.installed()
    names = registry.names("engines")
    if not names:
        raise ConfigError(
            "no package that generates is installed: pip install drivetrain-inference"
        )
    name = order["engine"] or names[0]
    if name not in names:
        raise ConfigError(f"there is no engine {name!r}; there are {', '.join(names)}")
    if not order["engine"] and len(names) > 1:
        raise ConfigError(f"several packages generate; choose with --engine: {', '.join(names)}")
    dtype = getattr(torch, order["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype {order['dtype']!r} is none of torch")
    engine: Serves | Embeds = registry.load("engines", name)(
        Path(order["model"]),
        order["config"],
        dtype=dtype if order["dtype"] else None,
        weights=order["weights"] or None,
    )
    return engine


def load_adapters(engine: Any, order: Message) -> dict[str, str]:
    """Load the adapters that ``order`` names; those that could not be loaded, and why.

    Raises:
        ConfigError: one cannot be loaded and the order is ``strict``: the server starts, and who
            starts it is told. Later an adapter must not keep a worker from being started again.
    """
    failed: dict[str, str] = {}
    for name, path in order["adapters"].items():
        try:
            adapters_of(engine).load(name, path)
        except DrivetrainError as error:
            if order["strict"]:
                raise
            failed[name] = str(error)
    return failed


def adapters_of(engine: Any) -> Adapts:
    """What loads the adapters of an engine.

    Raises:
        ConfigError: it has none.
    """
    found: Adapts | None = getattr(engine, "adapters", None)
    if found is None:
        raise ConfigError("this model's engine computes without adapters; leave --adapters out")
    return found


def described(engine: Any) -> dict[str, Any]:
    """What a server has to know of an engine: its room, its chat template, its special tokens."""
    tokenizer = engine.tokenizer
    embeds = hasattr(engine, "embed")
    room = engine.context if embeds else min(engine.context, int(engine.status()["cache_tokens"]))
    return {
        "context": engine.context,
        "capacity": room,
        "embeds": embeds,
        "template": None if embeds else getattr(tokenizer, "chat_template", None),
        "tokens": dict(getattr(tokenizer, "special_tokens_map", None) or {}),
        "process": os.getpid(),
    }
