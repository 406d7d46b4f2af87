"""``drivetrain serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from drivetrain.cli import UserPath
from drivetrain_server.settings import Settings

_DEFAULTS = Settings(model=".", name="model")


@click.command(context_settings={"auto_envvar_prefix": "DRIVETRAIN_SERVE"})
@click.argument("model", type=UserPath(exists=True))
@click.option("--name", help="How clients call the model; the name of MODEL by default.")
@click.option("--host", default=_DEFAULTS.host, show_default=True, help="Address to listen at.")
@click.option("--port", default=_DEFAULTS.port, show_default=True, help="Port; 0 for any free one.")
@click.option("--config", type=UserPath(exists=True), help="Config with the section `inference`.")
@click.option("--dtype", default="", help="Of the weights, such as bfloat16; as stored by default.")
@click.option("--weights", type=UserPath(exists=True), help="Checkpoint that has the weights.")
@click.option("--adapters", type=UserPath(exists=True, file_okay=False),
              help="Folder of PEFT adapters, which requests name as model.")  # fmt: skip
@click.option("--engine", default="", help="Which engine, where several are installed.")
@click.option("--replicas", default=1, show_default=True, help="Workers, each with a copy.")
@click.option("--ranks", default=1, show_default=True,
              help="Processes of each worker; the config says how they share.")  # fmt: skip
@click.option("--threads", default=0, help="Of each worker; its share of the cores by default.")
@click.option(
    "--api-key", "api_keys", multiple=True, envvar="DRIVETRAIN_API_KEYS",
    help="Key that requests must bring; several may be given. Better in DRIVETRAIN_API_KEYS, "
    "separated by spaces, as other users of the machine see options.",
)  # fmt: skip
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Origin whose pages may call.")
@click.option("--chat-template", type=UserPath(exists=True, dir_okay=False), help="Jinja file.")
@click.option("--max-open", default=_DEFAULTS.max_open, show_default=True,
              help="Results that wait or run at once; beyond, status 429.")  # fmt: skip
@click.option("--max-tokens", default=_DEFAULTS.max_tokens, show_default=True,
              help="Most new tokens of a result.")  # fmt: skip
@click.option("--max-results", default=_DEFAULTS.max_results, show_default=True,
              help="Most results of one request.")  # fmt: skip
@click.option("--max-body", default=_DEFAULTS.max_body, show_default=True,
              help="Bytes of a request.")  # fmt: skip
@click.option("--request-seconds", default=_DEFAULTS.request_seconds, show_default=True,
              help="A request that takes longer ends with what there is.")  # fmt: skip
@click.option("--drain-seconds", default=_DEFAULTS.drain_seconds, show_default=True,
              help="Time that running requests have when the server stops.")  # fmt: skip
def serve(model: str, name: str | None, config: str | None, **options: Any) -> None:
    """Serve MODEL: a folder of save_pretrained, or a GGUF file.

    There are the OpenAI protocol under /v1, a page to chat at /, a page that shows the engine at
    /live, /health and /metrics. The first Ctrl-C lets running requests finish.
    """
    import asyncio
    import logging

    from drivetrain_server.running import serve as run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    path = Path(model).resolve()
    template = options.pop("chat_template")
    options["weights"] = options["weights"] or ""
    options["adapters"] = str(Path(options["adapters"]).resolve()) if options["adapters"] else ""
    settings = Settings(
        model=str(path),
        name=name or (path.stem if path.is_file() else path.name),
        config=None if config is None else _config(Path(config)),
        chat_template=None if template is None else Path(template).read_text("utf-8"),
        **options,
    )
    click.echo(f"loading {settings.name} ...", err=True)

    def begun(_: Any, url: str, __: Any) -> None:
        click.echo(f"{settings.name} is served at {url} (protocol: {url}/v1)", err=True)

    asyncio.run(run(settings, begun))


def _config(path: Path) -> dict[str, Any]:
    from drivetrain.plan.config.loading import load_config

    return dict(load_config(path))
