"""The verb that answers over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_lm.cli.generate import (
    Base,
    Compile,
    Device,
    DeviceMap,
    DType,
    MaxMemory,
    OffloadFolder,
    RunPath,
    read_spread,
    refuse_compile,
)
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.kernels.native import build as native


def add_to(app: typer.Typer) -> None:
    """Put the verb behind those that are there."""
    app.command(rich_help_panel="Use")(serve)


def serve(
    run: RunPath,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="MOE_LM_API_KEY", show_envvar=True, help="What clients must send as Bearer.")
    ] = None,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Texts that are written at a time.")] = 32,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; more are refused with 429.")] = 256,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Positions of prompt and answer; without, the model's.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most that a request may ask for.")] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1 << 20,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that a request may take.")] = 600.0,
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds that running requests have when a signal comes.")
    ] = 30.0,
    model_name: Annotated[
        str | None, typer.Option(help="What clients call it; without, the run folder's name.")
    ] = None,
    device: Device = "auto",
    dtype: DType = "float32",
    compiled: Compile = False,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    base: Base = None,
) -> None:
    """Answer OpenAI's clients over HTTP, and serve a chat page."""
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise UsageError("--api-key is empty or has a character that no header can carry; give printable ASCII")
    spread = read_spread(device_map, max_memory, offload_folder, device)
    refuse_compile(compiled, spread)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MoeLmError(f"serve needs {error.name}, which is not installed; pip install 'moe-lm[serve]'") from error

    native.start()
    from moe_lm.tools.serve import server

    server.serve(
        run,
        host=host,
        port=port,
        api_key=api_key,
        slots=max_concurrent,
        max_queue=max_queue,
        max_context=max_context,
        max_tokens=max_tokens,
        max_body=max_body,
        timeout=timeout,
        grace=grace,
        model=model_name,
        device=device,
        dtype=dtype,
        base=base,
        spread=spread,
        compiled=compiled,
    )
