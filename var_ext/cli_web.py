"""`var-ext web`: a page to play with a model."""

from __future__ import annotations

import click

from var_ext.cli_options import machine_options, precision_option


@click.command()
@click.argument("model", default="digits")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Another than the loopback opens the page to whoever reaches it, without a password.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 takes a free one."
)
@click.option(
    "--queue", type=click.IntRange(min=1), default=32, show_default=True, help="Requests that may wait."
)
@click.option(
    "--max-images", type=click.IntRange(min=1), default=64, show_default=True, help="Images of a batch."
)
@precision_option
@machine_options
def web(
    model: str, host: str, port: int, queue: int, max_images: int, precision: str | None, device: str
) -> None:
    """A page to play with MODEL: draw, redraw what a brush covers, compare precisions, download batches.

    \b
    Example: var-ext web
    Example: var-ext web runs/var --port 8000
    Only this machine can open it, unless --host says otherwise; there is no link to share.
    """
    try:
        from var_ext.web import Limits, serve
    except ImportError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise click.ClickException(f"the page needs {error.name}: pip install 'var_ext[web]'") from error
    from var_ext import load

    sampler = load(model, device=device, precision=precision)
    limits = Limits(waiting=queue, images=max_images)
    serve(sampler, model, host=host, port=port, limits=limits, say=click.echo)
