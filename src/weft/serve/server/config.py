"""The server's settings. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from weft.config.load import read_text
from weft.serve.config import EngineConfig
from weft.serve.server.limits import Limits

OPTIONS = {"request_seconds": " (--timeout)", "drain_seconds": " (--drain)", "follow_seconds": " (--follow)"}
"""Of `weft serve`, where they are called otherwise than the settings."""


@dataclass(frozen=True)
class ModelConfig:
    """One model that is served.

    Attributes:
        name: by which clients ask for it.
        path: a checkpoint, a run (its newest checkpoint) or a Hugging Face directory.
        engine: settings of its engine.
        draft: where a smaller model that speculates is.
        chat_template: a file with a chat template, in place of the model's own.
    """

    name: str
    path: Path
    engine: EngineConfig = field(default_factory=EngineConfig)
    draft: Path | None = None
    chat_template: Path | None = None

    def __post_init__(self) -> None:
        self.engine.check_draft(self.draft)  # before anything is loaded


@dataclass(frozen=True)
class ServerConfig:
    """How the server meets its clients.

    Attributes:
        models: what is served; the first one answers requests that name none.
        host, port: where HTTP is spoken; port 0 takes a free one.
        grpc_port: where gRPC is spoken; None: nowhere.
        api_keys: one of them must come with every request (`Authorization: Bearer …`); none: anybody may ask.
            Each key is a tenant: no two share cached prompts.
        admin_keys: of them, those whose requests may go before others', and may load and unload models; none: the only one,
            if there is one.
        open: with no key, serve beyond this machine, and pages of other origins in its browsers.
        model_control: let clients load and unload the models that are named here.
        limits: of one request.
        max_connections: that are open at once.
        max_per_key: completions of one key that run or wait in one model; None: where there are several keys, half of its
            room, so that no key takes all of it.
        request_seconds: after which a request ends, where it names no earlier time itself.
        drain_seconds: that requests have to end once the server stops, or new weights have come.
        hang_seconds: without a step, though there is work, after which an engine counts as hung; sooner, if it has been
            quick (`serve/pace.py`).
        follow_seconds: how often to look for a newer checkpoint of each run; None: only when told to (SIGHUP).
        gate: by how much (nats per token) the loss of newer weights may be above that of the present ones, on `gate_text`;
            None: they are taken unseen, if they are finite.
        gate_text: a file of text that weights are compared on; None: a few paragraphs that come with weft.
        apart: engines have processes of their own, so that what they compute and what clients are told do not wait for each
            other (`serve/apart.py`); else threads of this one.
    """

    models: tuple[ModelConfig, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    open: bool = False
    model_control: bool = False
    limits: Limits = field(default_factory=Limits)
    max_connections: int = 4096
    max_per_key: int | None = None
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    hang_seconds: float = 60.0
    follow_seconds: float | None = None
    gate: float | None = 0.05
    gate_text: Path | None = None
    apart: bool = True

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        names += [adapter for model in self.models for adapter in model.engine.adapters]
        if not names:
            raise ValueError("no model to serve: name at least one checkpoint, run or Hugging Face directory")
        for name in names:
            if not name or len(name) > 256 or not name.isprintable():
                raise ValueError(f"{name!r} cannot be a model's name: it must be 1 to 256 printable characters")
            if names.count(name) > 1:
                raise ValueError(f"two models or adapters are named {name}: give each its own name, as in NAME=PATH")
        if "" in self.api_keys:
            raise ValueError("an API key is empty")
        if self.model_control and len(set(self.api_keys)) > 1 and not self.admin_keys:
            raise ValueError(
                "--model-control: there are several API keys, and none may load and unload models; write admin behind "
                "those of --api-key-file that may, as in: KEY admin"
            )
        if not (self.open or self.api_keys or is_loopback(self.host)):
            raise ValueError(
                f"{self.host} can be reached from other machines, and there is no API key: set WEFT_API_KEY or "
                "--api-key-file, or say --open where a proxy in front of the server looks after that"
            )
        for name in ("request_seconds", "hang_seconds", "max_connections", "follow_seconds", "max_per_key"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0{OPTIONS.get(name, '')}")
        if self.gate_text is not None and not self.gate_text.is_file():
            raise ValueError(f"gate_text: there is no file {self.gate_text}")
        if self.gate_text is not None and not read_text(self.gate_text).strip():
            raise ValueError(
                f"gate_text: {self.gate_text} is empty; write some pages that models of this kind read well"
            )
        for name in ("port", "grpc_port"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**16:
                raise ValueError(f"{name} is {value}; it must be from 0, which takes a free one, to 65535")
        if self.port and self.port == self.grpc_port:
            raise ValueError(f"port and grpc_port are both {self.port}: HTTP and gRPC want one each")
        for name in ("drain_seconds", "gate"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more{OPTIONS.get(name, '')}")

    def is_admin(self, tenant: str) -> bool:
        """Whether a key may do what touches other keys' requests.

        Args:
            tenant: its number; "" where there is no key, and nobody is told from another.
        """
        return not tenant or len(set(self.api_keys)) == 1 or self.api_keys[int(tenant)] in self.admin_keys

    def most_per_key(self, room: int) -> int | None:
        """Completions of one key in a model that has room for so many; None: no less than that."""
        if self.max_per_key is not None or len(self.api_keys) < 2:
            return self.max_per_key
        return max(1, room // 2)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False  # a name, which may be any machine's
