"""Options of `serve`, and what a server reports when it is ready."""

from __future__ import annotations

import json
import shlex
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any

from ibnorm_export.choices import real_number, whole_number
from ibnorm_export.serving.text_limits import TextLimits
from ibnorm_export.serving.text_settings import TextSettings

__all__ = ["ReadyServer", "ServeOptions"]


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where a server listens, and how long it may take.

    Args:
        address: address to listen on; 0.0.0.0 listens on every network.
        http_port: port for HTTP; 0 means any free port, here and below.
        grpc_port: port for gRPC (Triton only).
        metrics_port: port for metrics (Triton only).
        ready_s: seconds to wait until the server is ready (Triton only).
        finish_s: seconds for requests in flight to finish when the server stops.
        log: file for Triton's log; None keeps the log only until the server stops.
        text: limits of the text endpoint.
        settings: name, template, key and log of the text endpoint.
        allowed_hosts: names by which clients may reach the text endpoint, besides `address` and loopback; "*" allows
            every name.
        admin: open Triton's endpoints for traces, logs, shared memory and the loading of models.

    Raises:
        IBNormError: a port is outside its range.
    """

    address: str = "127.0.0.1"
    http_port: int = 8000
    _: KW_ONLY
    grpc_port: int = 8001
    metrics_port: int = 8002
    ready_s: float = 120.0
    finish_s: int = 5
    log: Path | None = None
    text: TextLimits = field(default_factory=TextLimits)
    settings: TextSettings = field(default_factory=TextSettings)
    allowed_hosts: tuple[str, ...] = ()
    admin: bool = False

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port", "metrics_port"):
            port = whole_number(getattr(self, name), name=name, least=0, most=65535, hint="; 0 means any free port")
            object.__setattr__(self, name, port)
        object.__setattr__(self, "ready_s", real_number(self.ready_s, name="ready_s", above=0.0))
        object.__setattr__(self, "finish_s", whole_number(self.finish_s, name="finish_s", least=0))
        hosts: object = self.allowed_hosts
        object.__setattr__(self, "allowed_hosts", (hosts,) if isinstance(hosts, str) else tuple(self.allowed_hosts))
        if self.log is not None:
            object.__setattr__(self, "log", Path(self.log))


@dataclass(frozen=True, slots=True)
class ReadyServer:
    """A server that is ready.

    Args:
        http: HOST:PORT for HTTP.
        pid: process id of the server.
        models: names of its models.
        grpc: HOST:PORT for gRPC; empty for the text endpoint.
        metrics: HOST:PORT for metrics; empty for the text endpoint.
        paths: paths that the text endpoint serves; empty for Triton.
        needs_key: whether clients must send a key.
    """

    http: str
    pid: int
    _: KW_ONLY
    models: tuple[str, ...]
    grpc: str = ""
    metrics: str = ""
    paths: tuple[str, ...] = ()
    needs_key: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return what `serve --json` prints."""
        return asdict(self)

    @property
    def example(self) -> str:
        """A command that asks the text endpoint for a text."""
        chat = "/v1/chat/completions" in self.paths
        prompt = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
        body = json.dumps({"model": self.models[0], **prompt, "max_tokens": 50})
        address = f"http://{self.http.replace('0.0.0.0', 'localhost')}/v1/{'chat/' * chat}completions"
        key = ' -H "Authorization: Bearer $API_KEY"' if self.needs_key else ""
        return f"curl {address}{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"

    def __str__(self) -> str:
        if self.paths:
            return f"ready: http://{self.http} ({', '.join(self.paths)})\ntry it: {self.example}"
        addresses = [f"{name}: {getattr(self, name)}" for name in ("http", "grpc", "metrics")]
        try_it = f"try it: curl http://{self.http.replace('0.0.0.0', 'localhost')}/v2/models/{self.models[0]}"
        return "\n".join([f"ready: {', '.join(self.models)}", *addresses, try_it])
