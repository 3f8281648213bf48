"""`weft serve`: a server around one model or several."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from weft.cli import triton as on_triton
from weft.cli.options import Device, Dtype

if TYPE_CHECKING:
    from weft.serve.server.config import ServerConfig
    from weft.serve.server.hosted import Hosted

KEY = "WEFT_API_KEY"

TRITON_TAKES = {"triton", "host", "port", "grpc_port", "drain"}


def serve(
    context: typer.Context,
    models: list[str] = typer.Argument(
        None, metavar="[NAME=]PATH...", help="Checkpoints (step-…), runs (their newest) or Hugging Face directories."
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; other machines need a key, see --api-key-file."),
    port: int = typer.Option(8000, help="Port of HTTP; 0: a free one."),
    grpc_port: int | None = typer.Option(None, help="Port of KServe's gRPC, as 8001; 0: a free one; by default none."),
    api_key_file: Path | None = typer.Option(
        None,
        help=f"A file with an API key on each line; {KEY} in the environment is one more. Each is a tenant. Behind the "
        "administrators' stands `admin`: they may set priorities below 0 and, with --model-control, (un)load models.",
    ),
    open: bool = typer.Option(
        False, "--open", help="With no key, serve other machines, and pages from elsewhere: a proxy looks after that."
    ),
    device: Device = "auto",
    dtype: Dtype = "auto",
    tp: int = typer.Option(1, help="Processes that each model's matrices are cut over."),
    pp: int = typer.Option(1, help="Stages that its blocks are dealt out to, of --tp processes each."),
    adapter: list[str] = typer.Option(
        [], metavar="[NAME=]DIR", help="A LoRA adapter of the first model, as peft wrote it: served by its own name."
    ),
    draft: Path | None = typer.Option(None, help="A smaller model that speculates; see --draft-tokens."),
    draft_tokens: int = typer.Option(
        0, help="Tokens that speculation guesses at each step; without --draft, by what the text itself repeats."
    ),
    max_sequences: int = typer.Option(64, help="Completions of a model that run at once."),
    max_waiting: int = typer.Option(
        256, help="Completions that may wait; one more is refused with a time to come back."
    ),
    max_per_key: int | None = typer.Option(
        None, help="Completions of one API key that run or wait; by default half of all where there are several keys."
    ),
    max_context: int | None = typer.Option(
        None, help="Tokens of a prompt and its completion, at most the model's, which is the default."
    ),
    cache_tokens: int | None = typer.Option(None, help="Tokens whose keys and values are kept, of all sequences."),
    gpu_share: float = typer.Option(
        0.9, help="Of a GPU's memory, what a model and its cache fill up: less where others, or newer weights, follow."
    ),
    cache_dtype: str = typer.Option("auto", help="Of keys and values; int8: about twice as many tokens have room."),
    invariant: bool = typer.Option(
        False,
        "--invariant",
        help="What one request gets does not depend, to the bit, on others: as slow as one by one.",
    ),
    compile: bool | None = typer.Option(
        None, "--compile/--no-compile", help="Compile the models at the start; by default on a GPU. See docs/engine.md."
    ),
    chat_template: Path | None = typer.Option(None, help="A file with a chat template, in place of the models' own."),
    timeout: float = typer.Option(600.0, help="Seconds after which a request ends, if it names no earlier time."),
    drain: float = typer.Option(30.0, help="Seconds that requests have to end when the server stops."),
    follow: float | None = typer.Option(None, help="Look for newer checkpoints of the runs every so many seconds."),
    gate: float = typer.Option(0.05, help="By how much newer weights' loss may be higher, in nats per token."),
    gate_text: Path | None = typer.Option(None, help="The text that weights are compared on; one comes with weft."),
    model_control: bool = typer.Option(
        False, "--model-control", help="Let clients unload and load these models; of several keys, administrators."
    ),
    triton: Path | None = typer.Option(
        None,
        help="Start Triton Inference Server on this repository of `weft export triton` instead: `weft serve-triton`.",
    ),
) -> None:
    """Serve models in the ways of OpenAI and, as Triton Inference Server does, of KServe v2.

    It listens on this machine only, unless told otherwise. Ctrl-C or SIGTERM stops it, once what is being answered has
    ended. SIGHUP, or --follow, takes a run's newer checkpoint without a pause, if it is no worse than the present one.

    weft serve runs/small                         one model, by the name of small

    weft serve chat=exports/chat base=runs/base   two, by these names

    weft serve base=runs/base --adapter tuned=adapters/tuned   a model, and the same with an adapter
    """
    if triton is not None:
        if models:
            raise ValueError(f"--triton serves what its repository holds: leave {models[0]} out, or --triton")
        if wrong := given(context) - TRITON_TAKES:
            raise ValueError(
                f"Triton does not take --{min(wrong).replace('_', '-')}: leave it out, or --triton; what a model's engine "
                "does stands in its 1/model.json, and Triton asks nobody for a key"
            )
        from weft.serve.triton.serve import TritonOptions

        rpc = TritonOptions.grpc if grpc_port is None else grpc_port
        on_triton.start(triton, TritonOptions(host, port, rpc, drain_seconds=int(drain)))
        return
    if not models:
        raise ValueError("no model: name a checkpoint, a run or a Hugging Face directory")
    import logging
    from dataclasses import replace

    from weft.serve.apart import EngineError
    from weft.serve.config import EngineConfig
    from weft.serve.server.config import ModelConfig, ServerConfig

    engine = EngineConfig(
        max_sequences=max_sequences, max_waiting=max_waiting, max_context=max_context, cache_tokens=cache_tokens,
        gpu_share=gpu_share, cache_dtype=cache_dtype, draft_tokens=draft_tokens, invariant=invariant, compile=compile,
        tp=tp, pp=pp, device=device, dtype=dtype,
    )  # fmt: skip
    keys, admins = read_keys(api_key_file)
    named = [split_name(model) for model in models]
    adapted = replace(engine, adapters=split_adapters(adapter))
    config = ServerConfig(
        tuple(
            ModelConfig(name, path, engine if number else adapted, draft, chat_template)
            for number, (name, path) in enumerate(named)
        ),
        host, port, grpc_port, keys, admins, open, model_control, max_per_key=max_per_key,
        request_seconds=timeout, drain_seconds=drain, follow_seconds=follow, gate=gate, gate_text=gate_text,
    )  # fmt: skip
    from weft.serve.folder import find_model

    for path in [model.path for model in config.models] + ([draft] if draft else []):
        find_model(path)  # before torch is imported, which takes a while

    import uvloop

    from weft.serve.server.run import serve as run

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    start = time.monotonic()
    ports: list[int] = []
    names = ", ".join(model.name for model in config.models)

    def listening(found: list[int]) -> None:
        ports.extend(found)
        print(f"listening on {address(config, ports[0])}; loading {names} …", flush=True)

    def loaded(model: Hosted) -> None:
        print(f"{describe(model)}, after {time.monotonic() - start:.1f} s", flush=True)

    def ready() -> None:
        print(routes(config, ports), flush=True)

    try:
        uvloop.run(run(config, listening, loaded, ready, lambda: print("stopped", flush=True)))
    except EngineError as error:  # its process has said more
        print(f"weft: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def given(context: typer.Context) -> set[str]:
    """Names of what the command line says."""
    return {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}


def split_name(model: str) -> tuple[str, Path]:
    """NAME=PATH, or a path, whose last part is the name; of a checkpoint inside a run, the run's."""
    name, equals, path = model.partition("=")
    if equals and not Path(model).exists():
        return name, Path(path)
    whole = Path(model)
    parent = whole.resolve().parent
    inside = whole.name.startswith("step-") and parent.name == "checkpoints"
    return (parent.parent.name if inside else whole.resolve().name), whole


def split_adapters(adapters: list[str]) -> dict[str, str]:
    """
    Raises:
        ValueError: two have one name, or a directory is no adapter's.
    """
    found: dict[str, str] = {}
    for name, path in map(split_name, adapters):
        if name in found:
            raise ValueError(f"--adapter: two are named {name}: give each its own name, as in NAME=DIR")
        found[name] = find_adapter(path)
    return found


def find_adapter(path: Path) -> str:
    """Before anything is loaded.

    Raises:
        ValueError: the directory is not there, or is no adapter's.
    """
    if not path.is_dir():
        raise ValueError(f"--adapter: there is no directory {path}")
    if not (path / "adapter_config.json").is_file():
        raise ValueError(
            f"--adapter: {path} has no adapter_config.json: give the directory that peft's save_pretrained wrote"
        )
    return str(path)


def read_keys(file: Path | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All keys, and of them the administrators'.

    Raises:
        ValueError: the file is not there, has no key, or a line is none.
    """
    from weft.config.load import read_text

    own = os.environ.get(KEY, "").strip()  # what comes out of a file, as secrets do, mostly ends with a line break
    keys, admins = [own] if own else [], []
    if file is not None:
        if not file.is_file():
            raise ValueError(f"--api-key-file: there is no file {file}")
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            words = line.split()
            if words[1:] not in ([], ["admin"]):
                raise ValueError(
                    f"--api-key-file: {file}, line {number}: a key is one word, and behind it stands admin or nothing"
                )
            keys += words[:1]
            admins += words[:1] if words[1:] else []
        if len(keys) == bool(own):
            raise ValueError(f"--api-key-file: {file} has no key; write one on each line")
    return tuple(keys), tuple(admins)


def address(config: ServerConfig, port: int) -> str:
    return f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}"


def describe(model: Hosted) -> str:
    version = model.current
    shape, device = version.shape, version.desk.about.device
    wanted = min(shape.max_seq, model.config.engine.max_context or shape.max_seq)
    short = (
        f" (of {wanted:,}: the cache has no room for more, see --cache-tokens)" if version.max_context < wanted else ""
    )
    return (
        f"{model.name}: {shape.family}, {shape.num_params / 1e6:,.1f} M parameters, {version.max_context:,} tokens of "
        f"context{short}, on {device}, {'with' if version.template else 'without'} a chat template; loaded"
    )


def routes(config: ServerConfig, ports: list[int]) -> str:
    """What there is, and a command to try it with.

    Args:
        ports: of HTTP and, where it is spoken, gRPC.
    """
    base, first = address(config, ports[0]), config.models[0].name
    rpc = "".join(f", gRPC at {address(config, port).removeprefix('http://')}" for port in ports[1:])
    own = f"${KEY}" if os.environ.get(KEY) else "KEY"  # else in the file, and not to be printed
    key = f' -H "Authorization: Bearer {own}"' if config.api_keys else ""
    body = f'{{"model": "{first}", "prompt": "Once", "max_tokens": 16}}'
    return f"""
page     {base}/             to try the models in a browser
OpenAI   {base}/v1           completions, chat/completions, embeddings, models
KServe   {base}/v2           infer, generate, generate_stream of each model{rpc}
tokens   {base}/tokenize     and /detokenize
health   {base}/health/live  and /health/ready, /health/generate
metrics  {base}/metrics      for Prometheus

curl {base}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'
"""
