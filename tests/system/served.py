"""A server of small random models, on a real socket, in a thread of this process."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvloop
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from weft.checkpoint.region import Region
from weft.checkpoint.weights import create_weights_folder
from weft.models.parameters import stored_sizes
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.loop import EngineLoop
from weft.serve.server.catalogue import Catalogue
from weft.serve.server.config import ModelConfig, ServerConfig
from weft.serve.server.kserve.rpc import start_grpc
from weft.serve.server.run import listen, make_server
from weft.serve.server.version import Version

SPECIAL = ["<|end|>", "<|turn|>"]
SHAPE = Shape(
    family="llama", num_layers=2, hidden=32, num_heads=4, num_kv_heads=2, ffn=48, vocab=256 + len(SPECIAL), max_seq=512
)
RANK, ALPHA = 3, 6.0
TARGETS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
TEMPLATE = """\
{%- for message in messages %}
{{- '<|turn|>' + message.role + '\n' + message.content.split('</think>')[-1] }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '</tool_call>' }}
{%- endfor %}
{{- '<|end|>' }}
{%- endfor %}
{%- if tools %}{{ '<|turn|>tools\n' + tools | tojson + '<|end|>' }}{% endif %}
{%- if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}
"""


def make_folder(path: Path, seed: int = 0, spread: float = 0.3, shape: Shape = SHAPE) -> Path:
    """A Hugging Face directory of random weights, with a tokenizer of bytes and a chat template."""
    numbers = torch.Generator().manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with create_weights_folder(path, shape, torch.float32) as weights:
        for name, dims in stored_sizes(shape).items():
            weights.write(Region.whole(name, dims), spread * torch.randn(dims, generator=numbers) + ("norm" in name))
    alphabet = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": SPECIAL[0], "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}), encoding="utf-8")
    return path


def make_adapter(base: Path, folder: Path, merged: Path, seed: int) -> None:
    """An adapter as peft writes it, and the base's weights with it in them."""
    numbers = torch.Generator().manual_seed(seed)
    shutil.copytree(base, merged)
    [file] = merged.glob("*.safetensors")
    weights, pairs = load_file(file), {}
    for name in weights:
        if not name.endswith(tuple(f"{target}.weight" for target in TARGETS)):
            continue
        a = 0.3 * torch.randn(RANK, weights[name].shape[1], generator=numbers)
        b = 0.3 * torch.randn(weights[name].shape[0], RANK, generator=numbers)
        weights[name] += ALPHA / RANK * b @ a
        module = f"base_model.model.{name.removesuffix('.weight')}"
        pairs |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(weights, file, {"format": "pt"})
    folder.mkdir(parents=True)
    save_file(pairs, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def config(*models: ModelConfig, **settings: Any) -> ServerConfig:
    return ServerConfig(models, **{"port": 0, "drain_seconds": 5.0, "apart": False, **settings})


def model(path: Path, name: str = "tiny", **settings: Any) -> ModelConfig:
    return ModelConfig(name, path, EngineConfig(device="cpu", dtype="float32", **settings))


def engine_of(version: Version) -> Engine:
    """Of a server whose engines are threads of this process."""
    assert isinstance(version.desk, EngineLoop)
    return version.desk.engine


class Served:
    """A server that runs, with gRPC where `settings` have a port for it. `call` runs a coroutine's function in its loop."""

    def __init__(self, settings: ServerConfig) -> None:
        self.settings = settings
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=lambda: uvloop.run(self._main()), daemon=True)

    async def _main(self) -> None:
        try:
            self.loop = asyncio.get_running_loop()
            self.catalogue = Catalogue(self.settings)
            self.server = make_server(self.catalogue)
            listener = listen(self.settings)
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self.port = listener.getsockname()[1]
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)  # what is not read is noticed soon
            await self.catalogue.start()
            rpc = None
            if self.settings.grpc_port is not None:
                rpc, self.grpc_port = await start_grpc(self.catalogue, self.settings)
            serving = asyncio.ensure_future(self.server.serve(sockets=[listener]))
            while not self.server.started:
                await asyncio.sleep(0.01)
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._ready.set()
        await serving
        if rpc is not None:
            await rpc.stop(None)
        listener.close()

    def start(self) -> Served:
        self.thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self

    def call(self, function: Any, *arguments: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(function(*arguments), self.loop).result(60)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextmanager
def served(*models: ModelConfig, **settings: Any) -> Iterator[Served]:
    one = Served(config(*models, **settings)).start()
    try:
        yield one
    finally:
        one.stop()
