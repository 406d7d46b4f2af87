"""Keywords of MII: which there are, what becomes of them, and the rest refused by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain.errors import ConfigError
from drivetrain.paths import at_home

logger = logging.getLogger("mii")

_MODEL = {
    "model_name_or_path": "",
    "tokenizer": None,
    "task": "text-generation",
    "tensor_parallel": None,
    "quantization_mode": None,
    "inference_engine_config": None,
    "replica_num": 1,
    "max_length": None,
    "device_map": "auto",
}

_SERVER = {
    "deployment_name": "",
    "deployment_type": "local",
    "port_number": 50050,
    "enable_restful_api": False,
    "restful_api_host": "localhost",
    "restful_api_port": 51080,
}

_WITHOUT_EFFECT = {
    "all_rank_output": "every rank returns the results",
    "hostfile": "replicas run on this host",
    "instance_type": "it is for a cloud's own deployments",
    "profile_model_time": "the server's page /live shows times",
    "replica_configs": "replicas find their ports by themselves",
    "restful_processes": "one process speaks to all clients",
    "sync_debug": "there is nothing to synchronise",
    "torch_dist_port": "no process group is needed",
    "version": "it is for a cloud's own deployments",
    "zmq_port_number": "nothing travels over ZeroMQ",
}

_FORMATS = {None: "", "wf6af16": "fp6"}
"""Quantisation modes of MII -> formats of weights."""


class UnknownArgument(ConfigError):  # noqa: N818 - MII's name
    """A keyword that MII does not have."""


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Args:
        model: a folder, or a GGUF file.
        section: of the engine.
        ranks: that share each layer.
        replicas: workers of a server.
        most: tokens of a text with its prompt; ``None`` for what the model can.
        name: of the deployment.
        rest_port: port of the server; 0 for a free one.
        rest_host: where it listens.
    """

    model: str
    section: dict[str, Any]
    ranks: int
    replicas: int
    most: int | None
    name: str
    rest_port: int
    rest_host: str


def read(model: str, *configs: Mapping[str, Any] | None, **given: Any) -> Options:
    """The options that a call gives, by dicts and by keywords.

    Raises:
        UnknownArgument: MII has no such keyword.
        ConfigError: one is given twice with different values, or asks for what is not served.
    """
    found: dict[str, Any] = {}
    flat = [item for config in configs if config for item in dict(config).items()]
    nested = [item for key, value in flat if key == "model_config" for item in dict(value).items()]
    for key, value in [*flat, *nested, *given.items(), ("model_name_or_path", model)]:
        if key == "model_config" or (key == "model_name_or_path" and not value):
            continue
        if key in _WITHOUT_EFFECT:
            logger.info("mii: %s has no effect: %s", key, _WITHOUT_EFFECT[key])
            continue
        if key not in _MODEL and key not in _SERVER:
            known = ", ".join(sorted({**_MODEL, **_SERVER, **_WITHOUT_EFFECT}))
            raise UnknownArgument(f"mii does not know {key!r}; it knows {known}")
        if found.setdefault(key, value) != value:
            raise ConfigError(f"mii: {key} is given twice: {found[key]!r} and {value!r}")
    return _options({**_MODEL, **_SERVER, **found})


def _options(known: Mapping[str, Any]) -> Options:
    path = at_home(known["model_name_or_path"])
    if not path or not Path(path).exists():
        raise ConfigError(
            f"mii: there is no model at {path!r}; give a folder that save_pretrained has written, "
            "or a GGUF file (nothing is downloaded)"
        )
    if str(getattr(known["task"], "value", known["task"])).replace("_", "-") != "text-generation":
        raise ConfigError(f"mii: task {known['task']!r} is not served; text-generation is")
    if str(getattr(known["deployment_type"], "value", known["deployment_type"])) != "local":
        raise ConfigError(
            f"mii: deployment_type {known['deployment_type']!r} is not served; local is, and "
            "mii.pipeline where nothing is to stay"
        )
    if known["tokenizer"] not in (None, known["model_name_or_path"]):
        raise ConfigError(
            "mii: tokenizer must be the model's; put its files into the model's folder"
        )
    mode = known["quantization_mode"]
    if mode not in _FORMATS:
        raise ConfigError(f"mii: quantization_mode {mode!r} is not served; wf6af16 is")
    section = {**_engine(known["inference_engine_config"])}
    if _FORMATS[mode]:
        section["weight_format"] = _FORMATS[mode]
    if known["max_length"]:
        section["max_context"] = int(known["max_length"])
    ranks = known["tensor_parallel"]
    name = known["deployment_name"] or f"{Path(path).name}-mii-deployment"
    return Options(
        path,
        section,
        int(os.environ.get("WORLD_SIZE", "1") if ranks is None else ranks),
        int(known["replica_num"]),
        known["max_length"],
        name,
        int(known["restful_api_port"]) if known["enable_restful_api"] else 0,
        str(known["restful_api_host"]),
    )


def _engine(config: Any) -> dict[str, Any]:
    """The engine's section from an ``inference_engine_config``."""
    dump = getattr(config, "model_dump", None)
    settings = dict(config or {}) if dump is None else dict(dump())
    manager = dict(settings.get("state_manager") or {})
    names = {
        "max_tracked_sequences": "max_tracked_sequences",
        "max_ragged_batch_size": "max_batch_tokens",
        "max_ragged_sequence_count": "max_sequences",
        "max_context": "max_context",
    }
    found = {own: manager[name] for name, own in names.items() if manager.get(name)}
    memory = manager.get("memory_config") or {}
    if str(getattr(memory.get("mode"), "value", memory.get("mode"))) == "allocate":
        found["cache_blocks"] = memory["size"]
    return found


@dataclass(frozen=True)
class Sampling:
    """How to generate, under MII's names and with its defaults.

    Args:
        max_length: most tokens with the prompt; ``None``: 1024, or what the model can.
        max_new_tokens: most new tokens; ``None``: as ``max_length`` leaves.
        min_new_tokens: before so many nothing ends.
        stream: give parts as they come; used by ``streaming_fn`` alone.
        ignore_eos: do not end where the model would.
        return_full_text: put the prompt before each result.
        do_sample: draw tokens; else the most likely one is taken.
        top_p: draw among the most likely tokens whose probabilities add up to this.
        top_k: draw among the k most likely.
        temperature: of the distribution.
        stop: text, or texts, that end a result.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stream: bool = False
    ignore_eos: bool = False
    return_full_text: bool = False
    do_sample: bool = True
    top_p: float = 0.9
    top_k: int | None = None
    temperature: float | None = None
    stop: str | list[str] | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Sampling:
        """The options of a call.

        Raises:
            UnknownArgument: MII has no such keyword.
            ConfigError: a temperature that is not positive.
        """
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise UnknownArgument(f"generate does not know {', '.join(unknown)}; it knows {known}")
        found = cls(**given)
        if found.temperature is not None and found.temperature <= 0:
            raise ConfigError(
                f"temperature is {found.temperature}; it must be positive (do_sample=False takes "
                "the most likely tokens)"
            )
        return found

    @property
    def stops(self) -> list[str]:
        """Texts that end a result."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def new_tokens(self, prompt: int, context: int) -> int:
        """Most new tokens after a prompt of so many tokens.

        Raises:
            ConfigError: the prompt leaves no room.
        """
        most = context if self.max_length is None else min(self.max_length, context)
        if self.max_length is None and self.max_new_tokens is None:
            most = min(most, 1024)
        if prompt >= most:
            raise ConfigError(f"the prompt has {prompt} tokens, and max_length is {most}; raise it")
        return min(self.max_new_tokens or most, context - prompt, most - prompt)
