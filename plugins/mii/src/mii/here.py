"""``mii.pipeline``: an engine in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drivetrain.contracts import Serves
from drivetrain.errors import ConfigError
from drivetrain.plan.registry import Registry
from mii.options import Options, Sampling, read
from mii.responses import Response, listed


class MIIPipeline:
    """Generates in this process; made by :func:`pipeline`.

    With several ranks all make the same calls, and all return the results.

    Attributes:
        engine: what generates.
        tokenizer: of the model.
    """

    def __init__(self, options: Options) -> None:
        config: dict[str, Any] = {"inference": options.section}
        if options.ranks > 1:
            config["tensor_parallel"] = {"autotp_size": options.ranks}
        self.engine = engine_of(options.model, config)
        self.tokenizer: Any = self.engine.tokenizer
        if self.tokenizer is None:
            self.engine.close()
            raise ConfigError(f"{options.model} has no tokenizer")

    def __call__(self, prompts: str | Sequence[str], **options: Any) -> list[Response]:
        """Continue one or several prompts.

        Args:
            prompts: texts.
            **options: of :class:`~mii.options.Sampling`.

        Raises:
            UnknownArgument: there is no such option.
            ConfigError: a prompt or an option cannot be served.
        """
        asked, texts = Sampling.read(options), listed(prompts)
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        engine = self.engine
        params = [engine.sampling(**_options(asked, len(r), engine.context)) for r in rows]
        results = engine.generate(rows, params)
        return [
            Response(
                (text if asked.return_full_text else "") + result.text,
                len(row),
                len(result.tokens),
                result.finish_reason,
            )
            for text, row, (result, *_) in zip(texts, rows, results, strict=True)
        ]

    generate = __call__

    def destroy(self) -> None:
        """Give the engine's memory back."""
        self.engine.close()


def pipeline(
    model_name_or_path: str = "",
    model_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> MIIPipeline:
    """An engine in this process.

    Args:
        model_name_or_path: a folder that ``save_pretrained`` has written, or a GGUF file.
        model_config: options as a dict.
        **options: of MII's ``ModelConfig``.

    Raises:
        UnknownArgument: there is no such option.
        ConfigError: the model cannot be served.
    """
    return MIIPipeline(read(str(model_name_or_path), model_config, **options))


def engine_of(model: str, config: Mapping[str, Any]) -> Serves:
    """The engine of whichever installed package generates.

    Raises:
        ConfigError: none does, or the model cannot be served.
    """
    registry = Registry.installed()
    names = registry.names("engines")
    if not names:
        raise ConfigError(
            "no package that generates is installed: pip install drivetrain-inference"
        )
    engine: Any = registry.load("engines", names[0])(Path(model), config)
    if not hasattr(engine, "generate"):
        engine.close()
        raise ConfigError(f"{model} makes vectors of texts and generates none")
    found: Serves = engine
    return found


def _options(asked: Sampling, prompt: int, context: int) -> dict[str, Any]:
    most = asked.new_tokens(prompt, context)
    return {
        "max_new_tokens": most,
        "min_new_tokens": min(asked.min_new_tokens, most),
        "temperature": (asked.temperature or 1.0) if asked.do_sample else 0.0,
        "top_p": asked.top_p if asked.do_sample else 1.0,
        "top_k": (asked.top_k or 0) if asked.do_sample else 0,
        "ignore_eos": asked.ignore_eos,
        "stop": tuple(asked.stops),
    }
