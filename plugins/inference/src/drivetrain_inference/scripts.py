"""What scripts for DeepSpeed call: ``init_inference``, and engines of its second kind by folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_inference.engine import InferenceEngine as Engine
from drivetrain_inference.loading import serve, start_of
from drivetrain_inference.models.crossed import is_crossed
from drivetrain_inference.ragged import all_logits
from drivetrain_inference.requests import SamplingParams

logger = logging.getLogger("drivetrain.inference")

_DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "float": torch.float32,
    "fp16": torch.float16, "float16": torch.float16, "half": torch.float16,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "bfloat": torch.bfloat16,
    "int8": torch.int8,
}  # fmt: skip
_DEFAULTS: Mapping[str, Any] = {
    "dtype": "fp16",
    "tensor_parallel": {},
    "replace_with_kernel_inject": False,
    "max_out_tokens": 1024,
    "min_out_tokens": 1,
    "checkpoint": None,
    "enable_cuda_graph": False,
    "keep_module_on_host": False,
    "replace_method": "auto",
    "return_tuple": True,
    "triangular_masking": True,
    "zero": {},
}
_ALIASES = {
    "kernel_inject": "replace_with_kernel_inject",
    "tp": "tensor_parallel",
    "max_tokens": "max_out_tokens",
    "min_tokens": "min_out_tokens",
    "tm": "triangular_masking",
}
_GENERATION = {
    "max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "typical_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size",
    "num_beams", "length_penalty", "early_stopping",
}  # fmt: skip


class InferenceEngine(nn.Module):
    """A module whose ``generate`` and ``forward`` are the engine's.

    Attributes:
        module: the client's module.
        engine: what generates.
    """

    def __init__(self, module: nn.Module, engine: Engine) -> None:
        super().__init__()
        self.module, self.engine = module, engine

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Logits of rows of tokens, computed as the engine computes; else the module is run.

        The engine takes ``input_ids``, with an ``attention_mask`` of 0 where rows are padded at
        their ends or without, where no gradients are recorded and its cache has room; logits of
        padding are 0. It returns no ``past_key_values``, so it is asked only where the caller wants
        none: with ``use_cache=False``, or where the module's config has ``use_cache`` false.
        Whatever else is given (labels, caches, embeddings), the module's code takes.
        """
        named = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
        given = {name for name, value in named.items() if value is not None}
        ids: Any = named.get("input_ids")
        mask: Any = named.get("attention_mask")
        known = {"input_ids", "attention_mask", "use_cache"}
        plain = len(args) <= 2 and given <= known and ids is not None
        if (
            not plain
            or self._keeps_cache(named.get("use_cache"))
            or torch.is_grad_enabled()
            or ids.dim() != 2
            or is_crossed(self.module)
        ):
            return self.module(*args, **kwargs)
        if mask is not None and (
            mask.shape != ids.shape or bool((mask.int().diff(dim=1) > 0).any())
        ):
            return self.module(*args, **kwargs)
        kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = [row[own].tolist() for row, own in zip(ids, kept, strict=True)]
        logits = all_logits(self.engine.ragged, rows)
        if logits is None:
            return self.module(*args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutput

        found = logits.new_zeros(*ids.shape, logits.shape[1])
        found[kept] = logits
        return CausalLMOutput(logits=found)

    def _keeps_cache(self, asked: bool | None) -> bool:
        """Whether the module would return a cache, with which a script decodes by itself."""
        if asked is not None:
            return asked
        return bool(getattr(getattr(self.module, "config", None), "use_cache", True))

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        do_sample: bool = False,
        max_length: int | None = None,
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Continue rows of tokens, as Transformers' ``generate`` does.

        Args:
            input_ids: [rows, tokens].
            attention_mask: 0 where a row is padded, on either side.
            do_sample: draw tokens; else the most likely one is taken.
            max_length: most tokens with the prompt, where there is no ``max_new_tokens``.
            num_return_sequences: results of each row.
            eos_token_id: tokens that end a row, beside the model's.
            pad_token_id: fills rows up; 0 by default.
            **options: of :class:`SamplingParams` under Transformers' names.

        Returns:
            [rows * num_return_sequences, tokens], prompts first; of a model with an encoder what
            its decoder has written, from the token that it begins with.

        Raises:
            ConfigError: an option is not known, or cannot be served.
        """
        unknown = {name for name, value in options.items() if value is not None} - _GENERATION
        if unknown:
            raise ConfigError(f"generate does not know {', '.join(sorted(unknown))}")
        start = start_of(self.module)
        before = input_ids if start is None else torch.full_like(input_ids[:, :1], start)
        width = before.shape[1]
        given = {name: value for name, value in options.items() if value is not None}
        given.setdefault("max_new_tokens", (max_length or width + 20) - width)
        given["temperature"] = given.get("temperature", 1.0) if do_sample else 0.0
        stops = [] if eos_token_id is None else torch.tensor(eos_token_id).reshape(-1).tolist()
        params = SamplingParams(n=num_return_sequences, stop_tokens=tuple(stops), **given)
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, kept, strict=True)]
        results = self.engine.generate(prompts, params)
        new = [(row, result.tokens) for row, each in enumerate(results) for result in each]
        longest = max(len(tokens) for _, tokens in new)
        found = input_ids.new_full((len(new), width + longest), pad_token_id or 0)
        for place, (row, tokens) in enumerate(new):
            found[place, :width] = before[row]
            found[place, width : width + len(tokens)] = found.new_tensor(tokens)
        return found

    def destroy(self) -> None:
        """Give the cache back."""
        self.engine.close()


def default_inference_config() -> dict[str, Any]:
    """What ``init_inference`` takes, with defaults."""
    return deepcopy(dict(_DEFAULTS))


def init_inference(
    model: nn.Module, config: Mapping[str, Any] | str | None = None, **options: Any
) -> InferenceEngine:
    """An engine for a module; arguments are those of ``deepspeed.init_inference``.

    With ``tensor_parallel.tp_size`` so many ranks share each layer (by whichever package serves the
    section ``tensor_parallel``), and all of them make the same calls.

    ``replace_with_kernel_inject`` asks for the fast path wherever there is one; without it the
    module's own code runs. ``enable_cuda_graph`` asks for forwards that the accelerator repeats
    without Python; where that cannot be (off the CPU, and without the fast path) a warning says so.
    ``dtype`` int8 rounds the blocks' matrices, and what
    they are multiplied with, to 8 bits. ``checkpoint`` is a
    checkpoint of any layout, for a module on the meta device.

    Raises:
        ConfigError: a key is not known or is given twice with different values, or a value asks for
            what is not there.
    """
    settings = _merged(config, options)
    dtype = settings["dtype"]
    dtype = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(str(dtype).split(".")[-1])
    if dtype not in _DTYPES.values():
        raise ConfigError(
            f"init_inference: dtype {settings['dtype']!r} is none of {', '.join(_DTYPES)}"
        )
    section: dict[str, Any] = {"max_context": settings["max_out_tokens"]}
    if settings["enable_cuda_graph"]:
        section["capture_decodes"] = True
    section["fast_path"] = "auto" if settings["replace_with_kernel_inject"] else "never"
    if dtype is torch.int8:
        section |= {"weight_format": "w8a8", "fast_path": "always"}
        dtype = None
    whole: dict[str, Any] = {"inference": section}
    shared = dict(settings["tensor_parallel"] or {})
    if (ranks := shared.get("tp_size", 1)) > 1 and shared.get("enabled", True):
        if section["fast_path"] == "always":
            raise ConfigError(
                "init_inference: dtype int8 is served by one rank; leave tensor_parallel out"
            )
        whole["tensor_parallel"] = {"autotp_size": ranks}
    engine = serve(model, whole, dtype=dtype, weights=settings["checkpoint"])
    if settings["enable_cuda_graph"] and not getattr(engine.ragged.model, "captures", False):
        logger.warning(
            "init_inference: enable_cuda_graph changes nothing here: forwards are captured on the "
            "fast path alone (replace_with_kernel_inject), and on devices with a kernel of their "
            "own for attention over the cache, which CPUs have"
        )
    return InferenceEngine(engine.module, engine)


def build_hf_engine(path: str | os.PathLike[str], engine_config: Any = None, **_: object) -> Engine:
    """An engine with ``put``, ``query``, ``can_schedule`` and ``flush`` for a folder.

    Args:
        path: a folder that ``save_pretrained`` has written; nothing is downloaded.
        engine_config: a dict, or an object with ``model_dump``: ``state_manager`` with
            ``max_tracked_sequences``, ``max_ragged_batch_size``, ``max_ragged_sequence_count``,
            ``max_context`` and ``memory_config``.

    Raises:
        ConfigError: the folder holds no model, or a setting is not served.
    """
    dump = getattr(engine_config, "model_dump", None)
    settings = dict(engine_config or {}) if dump is None else dump()
    manager = dict(settings.get("state_manager") or settings.get("manager") or {})
    if manager.get("offload"):
        raise ConfigError("state_manager.offload is not served; leave it out")
    section: dict[str, Any] = {
        "max_tracked_sequences": manager.get("max_tracked_sequences", 2048),
        "max_batch_tokens": manager.get("max_ragged_batch_size", 768),
        "max_sequences": manager.get("max_ragged_sequence_count", 512),
        "max_context": manager.get("max_context", 8192),
    }
    memory = manager.get("memory_config") or {}
    if memory.get("mode") == "allocate":
        section["cache_blocks"] = memory["size"]
    return serve(Path(path), {"inference": section})


def _merged(config: Mapping[str, Any] | str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, str):
        config = json.loads(Path(config).read_text("utf-8"))
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError(f"config must be a dict or a path, got {type(config).__name__}")
    found: dict[str, Any] = {}
    for name, value in [*(config or {}).items(), *options.items()]:
        key = _ALIASES.get(name, name)
        if key == "mp_size":
            key, value = "tensor_parallel", {"tp_size": value}
        if key not in _DEFAULTS:
            raise ConfigError(
                f"init_inference does not know {name!r}; it knows {', '.join(_DEFAULTS)}"
            )
        if key in found and found[key] != value:
            raise ConfigError(
                f"init_inference: {name} is given twice: {found[key]!r} and {value!r}"
            )
        found[key] = value
    return {**_DEFAULTS, **found}
