"""Encoders from folders, and the engine that fits a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain_inference.encoders.encoder import Encoder
from drivetrain_inference.encoders.pooling import head_of
from drivetrain_inference.loading import (
    DEFAULT_CONTEXT,
    load_tokenizer,
    opened_by_others,
    serve,
)

if TYPE_CHECKING:
    from drivetrain_inference.engine import InferenceEngine

MOST_TOKENS = 8192
"""Tokens of a batch, padding included."""

_NO_LIMIT = 10**6
"""Tokenizers give larger numbers as their longest text when they know none."""


def engine_for(
    path: str | os.PathLike[str],
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> InferenceEngine | Encoder:
    """What serves a folder or file: an engine that generates, or an encoder.

    A folder of sentence-transformers, and one whose architecture is not among Transformers' causal
    language models and those from text to text with an encoder, is an encoder.

    Raises:
        ConfigError: the model cannot be served, or the config is wrong.
    """
    if is_encoder(Path(path)):
        return load_encoder(path, config, dtype=dtype, weights=weights)
    return serve(path, config, dtype=dtype, weights=weights)


def is_encoder(path: Path) -> bool:
    """Whether the folder holds an encoder; see :func:`engine_for`."""
    if (path / "modules.json").is_file():
        return True
    architecture = _architecture(path)
    return architecture is not None and architecture not in _causal() | _crossed()


def load_encoder(
    path: str | os.PathLike[str],
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> Encoder:
    """An encoder of Transformers or sentence-transformers, with a job of its own.

    An architecture for the classification of sequences classifies; any other makes vectors, with
    the pooling that the folder describes or else the mean over tokens (for causal models, the last
    token). Code in the folder is never run.

    Args:
        path: a folder that ``save_pretrained`` has written, of either library.
        config: the job's.
        dtype: of the weights; theirs by default.
        weights: where parameters get values from instead.

    Raises:
        ConfigError: there is no such model, or one that is not known, or its folder lacks weights;
            says why.
        CheckpointError: its packed weights are damaged.
    """
    folder = Path(path)
    architecture = _architecture(folder) or ""
    classifies = architecture.endswith("ForSequenceClassification")
    module = _load(folder, dtype, classifies=classifies, replaced=weights is not None)
    head = None if classifies else head_of(folder, causal=architecture in _causal())
    tokenizer = load_tokenizer(folder)
    job = Job.open(Plan.build(config or {}, batch_required=False))
    try:
        engine = job.engine(module, parameters=(), weights=weights)
    except BaseException as error:
        job.fail(error)
        raise
    context = _context(folder, module, tokenizer)
    return Encoder(
        engine.module.eval(),
        tokenizer,
        head,
        context=context,
        most_tokens=max(MOST_TOKENS, context),
        release=job.close,
    )


def _load(
    folder: Path, dtype: torch.dtype | None, *, classifies: bool, replaced: bool
) -> nn.Module:
    """The module of a folder, without a head that makes words.

    Args:
        folder: of the model.
        dtype: of the weights; theirs by default.
        classifies: whether its head classifies, and is needed.
        replaced: whether all parameters get values from elsewhere afterwards.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForSequenceClassification

    opened: Any = None if replaced else opened_by_others(folder, dtype)
    if opened is not None:
        whole: nn.Module = opened if classifies else getattr(opened, "base_model", opened)
        return whole
    factory: Any = AutoModelForSequenceClassification if classifies else AutoModel
    try:
        loaded: Any = factory.from_pretrained(
            str(folder),
            output_loading_info=True,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ConfigError(f"{folder} cannot be loaded as an encoder: {error}") from error
    module: nn.Module = loaded[0]
    # Transformers draws them at random. Many folders have no pooler, which vectors do not need.
    missing = sorted(
        name for name in loaded[1]["missing_keys"] if classifies or "pooler" not in name.split(".")
    )
    if missing and not replaced:
        raise ConfigError(f"{folder} lacks weights of the model: {', '.join(missing[:6])}")
    return module


def _architecture(path: Path) -> str | None:
    """Name of the class in the folder's config, if it has one."""
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return None
    try:
        names = json.loads(file.read_text("utf-8")).get("architectures") or [None]
    except (ValueError, AttributeError):
        return None  # whoever loads it says what is wrong
    return None if names[0] is None else str(names[0])


def _causal() -> set[str]:
    """Names of Transformers' classes of causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _crossed() -> set[str]:
    """Names of Transformers' classes that make text of what an encoder has read."""
    from transformers.models.auto import modeling_auto

    return _names(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def _names(table: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    found: set[str] = set()
    for names in table.values():
        found.update([names] if isinstance(names, str) else names)
    return found


def _context(folder: Path, module: nn.Module, tokenizer: Any | None) -> int:
    """Most tokens of a text: the least that model, tokenizer and folder say."""
    known = [
        getattr(getattr(module, "config", None), "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    ]
    file = folder / "sentence_bert_config.json"
    if file.is_file():
        known.append(json.loads(file.read_text("utf-8")).get("max_seq_length"))
    limits = [int(each) for each in known if each and 0 < each < _NO_LIMIT]
    return min(limits, default=DEFAULT_CONTEXT)
