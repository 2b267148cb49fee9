"""`ibnorm-export serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ibnorm_export.cli import options
from ibnorm_export.cli.console import out, print_aside, print_document
from ibnorm_export.serving.options import ReadyServer, ServeOptions
from ibnorm_export.serving.text_limits import TextLimits
from ibnorm_export.serving.text_settings import TextSettings


def serve_command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="REPO|MODEL.onnx|GENAI_DIR",
            exists=True,
            help="A repository of `package`, or a file or folder of `export`.",
        ),
    ],
    address: Annotated[
        str, typer.Option("--address", help="Address to listen on; 0.0.0.0 listens on every network.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option("--http-port", help="Port for HTTP; 0 means any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option("--grpc-port", help="Port for gRPC; 0 means any free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option("--metrics-port", help="Port for metrics; 0 means any free one.")] = 8002,
    log: Annotated[Path | None, typer.Option("--log", metavar="FILE", help="File for Triton's log.")] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, help="Maximum number of texts at once; further requests get 429.")
    ] = 16,
    max_waiting: Annotated[
        int | None,
        typer.Option(
            "--max-waiting", min=1, help="Maximum number of texts without a first token; further requests get 429."
        ),
    ] = None,
    max_request: Annotated[
        int, typer.Option("--max-request", min=1, metavar="BYTES", help="Maximum size of a request for a text.")
    ] = 1 << 20,
    max_seconds: Annotated[float, typer.Option("--max-seconds", help="Maximum time for a text, in seconds.")] = 120.0,
    finish_seconds: Annotated[
        int,
        typer.Option("--finish-seconds", min=0, help="Seconds for requests in flight to finish when the server stops."),
    ] = 5,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            metavar="NAME",
            help="Name by which clients reach the text endpoint, besides localhost; may be repeated; '*' allows all.",
        ),
    ] = None,
    model_name: Annotated[
        str,
        typer.Option(
            "--model-name", metavar="NAME", show_default="the folder's name", help="Name of the model for clients."
        ),
    ] = "",
    chat_template: Annotated[
        Path | None,
        typer.Option(
            "--chat-template",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            show_default="the tokenizer's",
            help="File with a chat template in Jinja.",
        ),
    ] = None,
    api_key: Annotated[
        str,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help="Key that clients must send. Other users of this machine can read it in the list of processes; "
            "--api-key-file keeps it private.",
        ),
    ] = "",
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="File that holds the key.")
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Write one line of JSON for each request to standard error.")
    ] = False,
    admin: Annotated[
        bool,
        typer.Option("--admin", help="Open Triton's endpoints for traces, logs, shared memory and loading of models."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Run a server on this machine until Ctrl-C or SIGTERM, then let requests in flight finish.

    A repository or an ONNX file gets a Triton server. A folder for onnxruntime-genai gets an endpoint that speaks
    OpenAI's text protocol, with the limits --concurrency, --max-waiting, --max-request and --max-seconds, and
    figures for Prometheus at /metrics.

    Example: ibnorm-export serve repository
    """
    from ibnorm_export.serving.serve import serve

    wanted = ServeOptions(
        address,
        http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        finish_s=finish_seconds,
        log=log,
        allowed_hosts=tuple(allowed_host or ()),
        admin=admin,
        text=TextLimits(concurrency, max_request, request_s=max_seconds, waiting=max_waiting),
        settings=TextSettings(
            model_name, chat_template, api_key=options.one_api_key(api_key, api_key_file), log_requests=log_requests
        ),
    )

    def ready(server: ReadyServer) -> None:
        if as_json:
            print_document("serve", server.to_dict(), files=[path])
        else:
            out.print(str(server), markup=False, soft_wrap=True)
        out.file.flush()

    def stopping() -> None:
        print_aside("stopping: requests in flight may finish, new ones are refused")

    serve(path, options=wanted, ready=ready, stopping=stopping)
