"""What can be asked of models beside inference, for both protocols: each function's result is JSON, and the fields of
gRPC's message."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version as installed
from typing import Any

from weft.serve.desk import DeadError
from weft.serve.server.catalogue import Catalogue
from weft.serve.server.errors import HttpError, UnknownModelError
from weft.serve.server.hosted import Hosted
from weft.serve.server.keys import check_admin
from weft.serve.server.kserve import signature
from weft.serve.server.kserve.infer import version_of
from weft.serve.server.statistics import PARTS

EXTENSIONS = (
    "binary_tensor_data", "generate", "model_configuration", "model_repository", "parameters", "schedule_policy",
    "statistics",
)  # fmt: skip


def server_metadata() -> dict[str, Any]:
    return {"name": "weft", "version": installed("weft"), "extensions": list(EXTENSIONS)}


def ready(catalogue: Catalogue, name: str, version: str) -> bool:
    """Whether a model takes requests; one that is not there does not."""
    try:
        hosted, _ = catalogue.host(name or "?")
        version_of(hosted, version)
    except (UnknownModelError, DeadError):
        return False
    return hosted.ready and not catalogue.draining


def metadata(catalogue: Catalogue, name: str, version: str) -> dict[str, Any]:
    hosted, _ = catalogue.host(name or "?")
    return signature.metadata(name, version_of(hosted, version).number)


def config(catalogue: Catalogue, name: str, version: str) -> dict[str, Any]:
    hosted, _ = catalogue.host(name or "?")
    return signature.config(name, version_of(hosted, version).words is not None)


def statistics(catalogue: Catalogue, name: str, version: str) -> dict[str, Any]:
    """Of one model, or of all that are there where no name is given. An adapter's are its model's."""
    if name:
        hosted, _ = catalogue.host(name)
        version_of(hosted, version)
        return {"model_stats": [_statistics(name, hosted)]}
    return {"model_stats": [_statistics(name, hosted) for name, hosted in catalogue.models.items() if hosted.ready]}


def _statistics(name: str, hosted: Hosted) -> dict[str, Any]:
    found, version = hosted.statistics, hosted.current
    return {
        "name": name, "version": version.number, "last_inference": int(1000 * found.last),
        "inference_count": found.count["success"], "execution_count": version.desk.stats().steps,
        "inference_stats": {
            part: {"count": found.count[part], "ns": int(1e9 * found.seconds[part])} for part in PARTS
        },
    }  # fmt: skip


def index(catalogue: Catalogue, only_ready: bool) -> list[dict[str, str]]:
    return [
        {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
        for entry in catalogue.index()
        if entry.state == "READY" or not only_ready
    ]


async def load(catalogue: Catalogue, name: str, parameters: Mapping[str, Any], tenant: str) -> None:
    """
    Raises:
        HttpError: this client may not.
        ValueError: the client wants to say what is loaded.
    """
    _check_control(catalogue, tenant)
    if parameters:
        raise ValueError("a load takes no parameters: what a model is stands in the server's settings, files included")
    await catalogue.load(name)


async def unload(catalogue: Catalogue, name: str, tenant: str) -> None:
    """
    Raises:
        HttpError: this client may not.
    """
    _check_control(catalogue, tenant)
    await catalogue.unload(name)


def _check_control(catalogue: Catalogue, tenant: str) -> None:
    if not catalogue.config.model_control:
        raise HttpError(
            403, "models are not loaded or unloaded by clients here; weft serve --model-control allows it", "forbidden"
        )
    check_admin(catalogue.config, tenant, "load or unload models")
