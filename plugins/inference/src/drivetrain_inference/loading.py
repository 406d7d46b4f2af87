"""Facts of a module that an engine needs, and engines from folders and files."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from drivetrain.contracts import InferenceRequest
from drivetrain.engine.compose import plugins_of_objects
from drivetrain.errors import ConfigError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry

if TYPE_CHECKING:
    from drivetrain_inference.engine import InferenceEngine
    from drivetrain_inference.models.choice import Formats
    from drivetrain_inference.sampling.sampler import Sampler
    from drivetrain_inference.sampling.speculation import Drafter
    from drivetrain_inference.section import InferenceSection

logger = logging.getLogger("drivetrain.inference")

DEFAULT_CONTEXT = 2048
_TOKENIZER = re.compile(r"^(tokenizer|vocab|merges|spiece|sentencepiece|tekken)|[.](model|spm)$")
"""Names of files that tokenizers are made of."""

_SOURCES: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()
"""Files that modules were loaded from."""


def serve(
    model: nn.Module | str | os.PathLike[str],
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any | None = None,
    dtype: torch.dtype | None = None,
    weights: str | os.PathLike[str] | None = None,
    stop_tokens: Iterable[int] = (),
) -> InferenceEngine:
    """An engine that generates, with a job of its own; closing the engine closes the job.

    Args:
        model: a causal language model; a folder that ``save_pretrained`` has written; or a GGUF
            file (which needs the package ``gguf``). Code in such a folder is never run.
        config: the job's; only its section ``inference`` is needed, and that has defaults.
        tokenizer: for text; that of the folder or file by default.
        dtype: of the weights; those of a folder or file keep theirs by default.
        weights: where the parameters of ``model`` get values from instead: a checkpoint of any
            layout, or safetensors files; ``model`` is then on the meta device, or a folder of which
            only the config is read.
        stop_tokens: tokens that end a text, beside the model's.

    Raises:
        ConfigError: the model cannot be served, or the config is wrong.
        CheckpointError: weights do not fit, or are damaged.
    """
    if not isinstance(model, nn.Module):
        folder = Path(model)
        tokenizer = tokenizer or load_tokenizer(folder)
        model = load_model(folder, dtype, empty=weights is not None)
    elif dtype is not None:
        model = model.to(dtype)
    settings = {"inference": {}, **config} if isinstance(config, Mapping) else config
    objects = plugins_of_objects(model)
    plan = Plan.build(settings or {"inference": {}}, batch_required=False, objects=objects)
    job = Job.open(plan)
    try:
        engine = job.engine(model, parameters=(), weights=weights)
        request = InferenceRequest(tokenizer, tuple(stop_tokens))
        built: Any = job.hub.build_inference(job, engine.module, request)
        if built is None:
            raise ConfigError("the config has no section inference, so nothing generates")
    except BaseException as error:
        job.fail(error)
        raise
    built.on_close(job.close)
    found: InferenceEngine = built
    return found


def load_model(path: Path, dtype: torch.dtype | None, *, empty: bool = False) -> nn.Module:
    """A causal language model of Transformers from a folder or a GGUF file.

    Args:
        path: the folder or file.
        dtype: of the weights; theirs by default.
        empty: read the config alone, and leave parameters on the meta device.

    Raises:
        ConfigError: there is none that can be read; says why.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    where = _source(path)
    if not empty and (opened := opened_by_others(path, dtype)) is not None:
        return _with_generation_config(opened, path).eval()
    try:
        if empty:
            known = AutoConfig.from_pretrained(
                **where, local_files_only=True, trust_remote_code=False
            )
            with _EmptyOnMeta():
                module: nn.Module = _factory(known).from_config(known, dtype=dtype)
            return _with_generation_config(_without_memory(module.eval()), path)
        kind = dtype or ("auto" if path.is_dir() else torch.float32)
        loaded: Any = _factory(_config_of(path)).from_pretrained(
            **where,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name and with both shapes
            dtype=kind,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=path.is_dir() or None,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be loaded as a language model: {error}") from error
    model: nn.Module = loaded[0]
    if unlike := sorted(loaded[1]["mismatched_keys"]):
        name, stored, wanted = unlike[0]
        more = f" (and {len(unlike) - 1} more do not fit)" if unlike[1:] else ""
        raise ConfigError(
            f"{path}: {name} has shape {list(wanted)} by its config, but {list(stored)} in its "
            f"files{more}"
        )
    if missing := sorted(loaded[1]["missing_keys"]):  # which Transformers draws at random
        raise ConfigError(f"{path} lacks weights of the model: {', '.join(missing[:6])}")
    _SOURCES[model] = path
    return model.eval()


def _config_of(path: Path) -> Any:
    """The config in a folder; ``None`` for a file."""
    from transformers import AutoConfig

    if not path.is_dir():
        return None
    return AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)


def _factory(config: Any) -> Any:
    """What makes the model of a config: with an encoder, or a decoder alone."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    crossed = getattr(config, "is_encoder_decoder", False)
    return AutoModelForSeq2SeqLM if crossed else AutoModelForCausalLM


def opened_by_others(path: Path, dtype: torch.dtype | None) -> nn.Module | None:
    """The model in a folder that an installed package knows by a file in it, such as packed ones.

    The entry point group ``drivetrain.model_folders`` has the file's name, and a function of path
    and dtype that returns the module, or ``None`` where Transformers is to read the folder.

    Raises:
        ConfigError, CheckpointError: the package cannot open it; says why.
    """
    registry = Registry.installed()
    for name in registry.names("model_folders") if path.is_dir() else ():
        entry = registry.find("model_folders", name)
        if entry is not None and (path / name).is_file():
            module: nn.Module | None = entry.load()(path, dtype)
            return module
    return None


def _with_generation_config(module: nn.Module, path: Path) -> nn.Module:
    """``module`` with the folder's ``generation_config.json``, if there is one.

    Models made from a config alone have one that is derived from it. The file may name more tokens
    that end a text, such as that of the end of a turn.

    Raises:
        ConfigError: the file is damaged.
    """
    from transformers import GenerationConfig

    if path.is_dir() and (path / "generation_config.json").is_file():
        try:
            found: Any = GenerationConfig.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            file = path / "generation_config.json"
            raise ConfigError(f"{file} cannot be read: {error}") from error
        module.generation_config = found
    return module


def load_tokenizer(path: Path) -> Any | None:
    """The tokenizer beside the weights; ``None``, with a warning, if there is none that loads.

    One that needs code of the folder does not: such code is never run, and nobody is asked for it.
    """
    from transformers import AutoTokenizer

    if path.is_dir() and not any(_TOKENIZER.search(each.name) for each in path.iterdir()):
        return None  # Transformers would make one without words
    try:
        return AutoTokenizer.from_pretrained(
            **_source(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        logger.warning("%s has no tokenizer that loads, so it takes tokens only: %s", path, reason)
        return None


def context_of(module: nn.Module, wanted: int | None, limit: int) -> int:
    """Most tokens of a sequence."""
    config = _text_config(module)
    names = ("max_position_embeddings", "max_seq_len")
    own = next((found for name in names if (found := getattr(config, name, None))), None)
    known = own or wanted or DEFAULT_CONTEXT
    return min(each for each in (known, wanted, limit) if each)


def stop_tokens_of(module: nn.Module) -> set[int]:
    """Tokens that end a text, as the module's configs say."""
    found = set[int]()
    for config in (getattr(module, "generation_config", None), _text_config(module)):
        named = getattr(config, "eos_token_id", None)
        several = named if isinstance(named, (list, tuple)) else [named]
        found |= {int(each) for each in several if each is not None}
    return found


def start_of(module: nn.Module) -> int | None:
    """The token that decoders begin with where an encoder reads the prompt; ``None`` elsewhere.

    Raises:
        ConfigError: there is an encoder, and the configs name no such token.
    """
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return None
    found = _first_of(module, "decoder_start_token_id", "bos_token_id")
    if found is None:
        raise ConfigError(
            f"{type(module).__name__}: its configs name no decoder_start_token_id, with which a "
            "decoder begins"
        )
    return found


def sampler_of(module: nn.Module, stop_tokens: Iterable[int]) -> Sampler:
    """What draws tokens as the module's configs say.

    Raises:
        ConfigError: they forbid several tokens in a row.
    """
    from drivetrain_inference.sampling.sampler import Sampler

    return Sampler(frozenset(stop_tokens), forced_tokens_of(module), barred_tokens_of(module))


def forced_tokens_of(module: nn.Module) -> tuple[int | None, int | None]:
    """The tokens that the first and the last possible one of a result must be, if any."""
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return None, None
    names = ("forced_bos_token_id", "forced_eos_token_id")
    first, last = (_first_of(module, name) for name in names)
    return first, last


def barred_tokens_of(module: nn.Module) -> frozenset[int]:
    """The tokens that the module's config for generation forbids, such as a padding that is scored.

    Raises:
        ConfigError: it forbids several tokens in a row.
    """
    config = getattr(module, "generation_config", None)
    words = getattr(config, "bad_words_ids", None) or ()
    if longer := [word for word in words if len(word) != 1]:
        raise ConfigError(
            f"the generation config forbids {list(longer[0])} in a row (bad_words_ids); only "
            "single tokens can be forbidden"
        )
    single = {int(word[0]) for word in words} - stop_tokens_of(module)  # which no bad word forbids
    found = {*single, *(getattr(config, "suppress_tokens", None) or ())}
    vocabulary = vocabulary_of(module)
    return frozenset(token for token in found if token >= 0 and token < (vocabulary or token + 1))


def _first_of(module: nn.Module, *names: str) -> int | None:
    for name in names:
        for config in (getattr(module, "generation_config", None), _text_config(module)):
            found = getattr(config, name, None)
            if found is not None:
                return int(found[0] if isinstance(found, (list, tuple)) else found)
    return None


def vocabulary_of(module: nn.Module) -> int | None:
    """Tokens that the module has embeddings for, if it says so."""
    embedding = getattr(module, "get_input_embeddings", lambda: None)()
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def formats_of(job: Job, module: nn.Module, section: InferenceSection) -> Formats:
    """How the section wants the weights of ``module`` to lie in memory.

    Raises:
        ConfigError: no installed package has the format, or the module's source has not.
    """
    from drivetrain_inference.models.choice import Formats

    name, invariant = section.weight_format, section.batch_invariant
    if not name:
        return Formats(batch_invariant=invariant)
    if name == "gguf":
        from drivetrain_inference.weights.gguf import format_of_file

        weight = next(module.parameters())
        return Formats(format_of_file(_SOURCES.get(module), weight.dtype), True, invariant)
    entry = job.plan.registry.find("weight_formats", name)
    if entry is None:
        known = ", ".join(sorted(["gguf", *job.plan.registry.names("weight_formats")]))
        raise ConfigError(f"inference.weight_format: {name!r} is not known; there are {known}")
    return Formats(entry.load()(), section.quantize_head, invariant)


def drafter_of(engine: InferenceEngine) -> Drafter | None:
    """What guesses tokens for an engine, as its section says; ``None`` if nothing does.

    Raises:
        ConfigError: the model that is to guess cannot be served, or has another vocabulary.
    """
    from drivetrain_inference.cache.blocks import BlockManager
    from drivetrain_inference.cache.paged import PagedCache
    from drivetrain_inference.models import choice
    from drivetrain_inference.ragged import RaggedEngine
    from drivetrain_inference.sampling.sampler import Sampler
    from drivetrain_inference.sampling.speculation import DraftModel, PromptLookup

    section = engine.section
    if not section.speculative_tokens:
        return None
    if not section.speculative_model:
        return PromptLookup()
    model = engine.ragged.model
    module = load_model(Path(section.speculative_model), model.dtype).to(model.device)
    if start_of(module) is not None or start_of(engine.module) is not None:
        raise ConfigError(
            "inference.speculative_model: models do not guess with or for an encoder-decoder; "
            "leave it out, and the prompt is looked up"
        )
    mine, wanted = vocabulary_of(module), vocabulary_of(engine.module)
    if mine != wanted:
        raise ConfigError(
            f"inference.speculative_model: {section.speculative_model} has {mine} tokens, and the "
            f"model that it guesses for {wanted}; both need the same tokenizer"
        )
    small, plain = choice.choose(
        module, section.fast_path, context=engine.context, formats=choice.Formats()
    )
    engine.on_close(plain.close)
    number, size = engine.scheduler.blocks.blocks, section.block_size
    cache = PagedCache(small.layers, number, size, dtype=small.dtype, device=small.device)
    ragged = RaggedEngine(
        small,
        cache,
        BlockManager(number, size, prefix_caching=False),
        budget=section.max_batch_tokens,
        most_sequences=section.max_sequences,
        most_tracked=section.max_tracked_sequences,
        context=context_of(module, engine.context, section.max_context),
    )
    return DraftModel(ragged, Sampler(frozenset(engine.stop_tokens)))


class _EmptyOnMeta(TorchFunctionMode):
    """Makes what nothing has filled yet without memory; buffers that are computed are computed."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def _without_memory(module: nn.Module) -> nn.Module:
    """The module with all parameters on the meta device; shared ones stay shared."""
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter not in moved:
                moved[parameter] = nn.Parameter(parameter.data.to("meta"))
            setattr(part, name, moved[parameter])
    return module


def _source(path: Path) -> dict[str, Any]:
    if path.suffix == ".gguf" and path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path)}
    raise ConfigError(f"{path} is neither a folder nor a GGUF file")


def _text_config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    text = getattr(config, "get_text_config", None)
    return config if text is None else text()
