"""KServe v2 over gRPC, and gRPC's health service: `grpc.aio` in the event loop of the HTTP server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from weft.serve.server.catalogue import Catalogue
from weft.serve.server.config import ServerConfig
from weft.serve.server.errors import HttpError, problem
from weft.serve.server.keys import Keys
from weft.serve.server.kserve import models
from weft.serve.server.kserve.infer import infer, whole
from weft.serve.server.kserve.messages import decode, final, read_call, written
from weft.serve.server.kserve.schema import HEALTH, MESSAGES, SERVICE

__all__ = ["start_grpc"]

log = logging.getLogger("weft.serve")

Context = Any  # grpc.aio.ServicerContext[bytes, bytes]

IN_FLIGHT = 128
"""Requests of one stream that run at once; the next one is read when one has ended."""

WATCH_SECONDS = 0.5

OPEN = {"ServerLive", "ServerReady", "Check", "Watch"}
"""Methods that need no key: probes have none."""


async def start_grpc(catalogue: Catalogue, config: ServerConfig) -> tuple[grpc.aio.Server, int]:
    """A server that runs, and its port.

    Raises:
        ValueError: the port cannot be had.
    """
    limits = config.limits
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", limits.body_bytes), ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", limits.header_bytes), ("grpc.absolute_max_metadata_size", limits.header_bytes),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=config.max_connections,
    )  # fmt: skip
    service = Service(catalogue, config)
    server.add_generic_rpc_handlers((service.inference(), service.health()))
    host = f"[{config.host}]" if ":" in config.host else config.host
    try:
        port = server.add_insecure_port(f"{host}:{config.grpc_port or 0}")
    except RuntimeError:
        raise ValueError(
            f"gRPC cannot listen at {host}:{config.grpc_port}: is another server there? Choose another --grpc-port"
        ) from None
    await server.start()
    return server, port


class StalledError(HttpError):
    """Nobody takes what is written: the whole call ends."""


async def send(context: Context, message: Any, seconds: float) -> None:
    """
    Raises:
        StalledError: the client does not read, or is gone.
    """
    try:
        await asyncio.wait_for(context.write(message.SerializeToString()), seconds)
    except TimeoutError:
        raise StalledError(408, "the client does not read its responses", "stalled") from None
    except grpc.aio.InternalError:  # a write that was under way when the call ended
        raise StalledError(408, "the client went away", "disconnected") from None


class Service:
    """Both services. Methods get a message and their context, and give a response's fields."""

    def __init__(self, catalogue: Catalogue, config: ServerConfig) -> None:
        self.catalogue, self.config = catalogue, config
        self.keys = Keys(config.api_keys)

    def inference(self) -> grpc.GenericRpcHandler:
        catalogue = self.catalogue
        answers: dict[str, Callable[[Any], Any]] = {
            "ServerLive": lambda _: {"live": catalogue.live},
            "ServerReady": lambda _: {"ready": catalogue.ready},
            "ServerMetadata": lambda _: models.server_metadata(),
            "ModelReady": lambda it: {"ready": models.ready(catalogue, it.name, it.version)},
            "ModelMetadata": lambda it: models.metadata(catalogue, it.name, it.version),
            "ModelConfig": lambda it: {"config": models.config(catalogue, it.name, it.version)},
            "ModelStatistics": lambda it: models.statistics(catalogue, it.name, it.version),
            "RepositoryIndex": lambda it: {"models": models.index(catalogue, it.ready)},
        }
        methods = {name: self._unary(name, _soon(answer)) for name, answer in answers.items()}
        methods["RepositoryModelLoad"] = self._unary("RepositoryModelLoad", self._load)
        methods["RepositoryModelUnload"] = self._unary("RepositoryModelUnload", self._unload)
        methods["ModelInfer"] = self._unary("ModelInfer", self._infer)
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._guarded("", self._stream))
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def health(self) -> grpc.GenericRpcHandler:
        watch = grpc.unary_stream_rpc_method_handler(self._guarded("Watch", self._watch))
        check = _soon(lambda it: {"status": self._status(it.service)})
        return grpc.method_handlers_generic_handler(
            HEALTH, {"Check": self._unary("Check", check, "HealthCheck"), "Watch": watch}
        )

    # -- the way in ---------------------------------------------------------------------------------------------------

    def _guarded(self, name: str, method: Callable[..., Awaitable[Any]]) -> Callable[[Any, Context], Awaitable[Any]]:
        """The method behind the keys; what goes wrong is told in gRPC's words."""

        async def run(message: Any, context: Context) -> Any:
            try:
                tenant = "" if name in OPEN else self._tenant(context)
                return await method(message, context, tenant)
            except Exception as error:
                told = problem(error, self.catalogue.draining)
                if told.status == 500:
                    log.exception("gRPC: a call failed")
            if context.done():
                return None  # nobody is left to be told
            if told.retry_after is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", str(int(1000 * told.retry_after))),))
            return await context.abort(grpc.StatusCode[told.grpc], told.message)

        return run

    def _tenant(self, context: Context) -> str:
        given = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        return self.keys.tenant(given.get("authorization", ""))

    def _unary(
        self, name: str, method: Callable[[Any, Context, str], Awaitable[dict[str, Any]]], kind: str = ""
    ) -> grpc.RpcMethodHandler:
        """
        Args:
            kind: messages are `<kind>Request` and `<kind>Response`; "": they are named as the method is.
        """

        async def run(data: bytes, context: Context, tenant: str) -> bytes:
            fields = await method(decode(f"{kind or name}Request", data), context, tenant)
            return bytes(MESSAGES[f"{kind or name}Response"](**fields).SerializeToString())

        return grpc.unary_unary_rpc_method_handler(self._guarded(name, run))

    # -- what takes time ----------------------------------------------------------------------------------------------

    async def _load(self, message: Any, context: Context, tenant: str) -> dict[str, Any]:
        await models.load(self.catalogue, message.model_name, message.parameters, tenant)
        return {}

    async def _unload(self, message: Any, context: Context, tenant: str) -> dict[str, Any]:
        await models.unload(self.catalogue, message.model_name, tenant)
        return {}

    async def _infer(self, message: Any, context: Context, tenant: str) -> dict[str, Any]:
        hosted, adapter = self.catalogue.host(message.model_name or "?")
        call = read_call(message, context.time_remaining())
        found = await whole(call, hosted, message.model_version, self.config, tenant, adapter)
        return written(call, message.model_name, found)

    async def _stream(self, messages: AsyncIterable[bytes], context: Context, tenant: str) -> None:
        """Requests as they come, all at once; the responses of each in their order, under its id. What is wrong with one
        is told as its response, and harms no other."""
        places, writing = asyncio.Semaphore(IN_FLIGHT), asyncio.Lock()

        async def tell(**response: Any) -> None:
            async with writing:
                message = MESSAGES["ModelStreamInferResponse"](**response)
                await send(context, message, self.config.limits.stall_seconds)

        async def run(data: bytes) -> None:
            id = ""
            try:
                message = decode("ModelInferRequest", data)
                id = message.id[:256]
                hosted, adapter = self.catalogue.host(message.model_name or "?")
                call = read_call(message, context.time_remaining())
                responses = infer(call, hosted, message.model_version, self.config, tenant, adapter)
                async with aclosing(responses):
                    async for response in responses:
                        await tell(infer_response=written(call, message.model_name, response, streamed=True))
            except StalledError:
                raise
            except Exception as error:
                told = problem(error, self.catalogue.draining)
                if told.status == 500:
                    log.exception("gRPC: a request of a stream failed")
                await tell(error_message=told.message, infer_response={"id": id, **final(True)})
            finally:
                places.release()

        try:
            async with asyncio.TaskGroup() as group:
                async for data in messages:
                    await places.acquire()
                    group.create_task(run(data))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    # -- health -------------------------------------------------------------------------------------------------------

    async def _watch(self, data: bytes, context: Context, tenant: str) -> None:
        """Health now, and whenever it changes."""
        service, last = decode("HealthCheckRequest", data).service, ""
        while True:
            if (status := self._status(service)) != last:
                await send(context, MESSAGES["HealthCheckResponse"](status=status), self.config.limits.stall_seconds)
                last = status
            await asyncio.sleep(WATCH_SECONDS)

    def _status(self, service: str) -> str:
        if service not in ("", SERVICE):
            return "SERVICE_UNKNOWN"
        return "SERVING" if self.catalogue.ready else "NOT_SERVING"


def _soon(answer: Callable[[Any], dict[str, Any]]) -> Callable[[Any, Context, str], Awaitable[dict[str, Any]]]:
    """A method of an answer that is there at once."""

    async def run(message: Any, context: Context, tenant: str) -> dict[str, Any]:
        return answer(message)

    return run
