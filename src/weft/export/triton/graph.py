"""A model as a graph without Python: tokens in, logits of all places out, for ONNX Runtime or as a compiled library.

There is no cache of keys and values: each call computes the whole context. That is what scoring and ranking want; texts are
for the backends that have an engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoint.weights import load_decoder
from weft.models.decoder import Decoder
from weft.serve.triton.repository import PACKAGE

OPSET = 20
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest difference between the graph's logits and the model's, norm over norm."""

Run = Callable[[Tensor], Tensor]


class Logits(nn.Module):
    """`input_ids` [B, T] → logits [B, T, V] in fp32.

    A text that the model cannot read, of more tokens than its context or with one outside its vocabulary, has NaN for all
    of its logits, and of a long one only as many places as the context has. A server that runs a graph looks at no token,
    and puts texts of several requests into one batch: an error would be everybody's, and without one a token -1 is the
    last of the vocabulary, and a place beyond the context anything at all.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model
        # an exported graph has one way for every length, where the model asks whether a text has more than one token
        model.attention_mask = causal_mask
        for norm in [one for one in model.modules() if isinstance(one, nn.RMSNorm)]:
            norm.forward = partial(by_rows, norm.forward)  # type: ignore[method-assign]

    def forward(self, input_ids: Tensor) -> Tensor:
        shape, length = self.model.shape, input_ids.shape[1]
        known = (input_ids >= 0) & (input_ids < shape.vocab)
        read = readable_length(input_ids, shape.max_seq)
        logits = self.model(input_ids.where(known, 0).narrow(1, 0, read)).float()
        readable = known.all(1) & (input_ids.new_full((), length) <= shape.max_seq)
        return logits.where(readable[:, None, None], torch.nan)


def readable_length(input_ids: Tensor, context: int) -> int:
    """The smaller of a text's length and the context, by way of a tensor: of a size a graph has no such choice."""
    length = input_ids.shape[1]
    read: Any = input_ids.new_full((), length).clamp(max=context).item()
    torch._check(read >= 1)
    torch._check(read <= length)
    return read


def by_rows(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """x [..., D] → [..., D]: of four dimensions torch wants to know whether the length is 1, which a graph cannot say."""
    return norm(x.flatten(0, -2)).view_as(x)


def causal_mask(seq: int, window: int | None, documents: Tensor | None, device: torch.device) -> Tensor:
    """As models.attention.attention_mask, but never None: bool [1, 1, T, T]."""
    assert documents is None
    place = torch.arange(seq, device=device)
    distance = place[:, None] - place[None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return seen[None, None]


def write_graph(source: Path, version: Path, backend: str, dtype: torch.dtype | None) -> float:
    """Write `model.onnx` or `model.pt2` into a version's folder, load it again and compare: the difference, norm over norm.

    Raises:
        ValueError: the exporter is not installed or cannot do this model or its dtype, or the logits differ.
    """
    _, model = load_decoder(source, dtype=dtype)
    kind = next(model.parameters()).dtype
    if backend == "onnxruntime" and kind == torch.bfloat16:
        raise ValueError("ONNX Runtime has no bf16 on a CPU, where the graph is proved: choose --dtype fp32 or fp16")
    module = Logits(model.eval().requires_grad_(False)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporters, about themselves
        try:
            run = WRITERS[backend](module, version)
        except ImportError as error:
            raise ValueError(f"--backend {backend} needs {error.name}: pip install 'weft[onnx]'") from error
        except Exception as error:  # what torch raises is an open set
            said = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(f"{backend}: torch cannot export this model: {type(error).__name__}: {said}") from error
    worst = compare(module, run)
    if not worst <= BOUNDS[kind]:
        raise ValueError(
            f"the export is wrong: {backend}'s logits differ from the model's by {worst:.1e}, norm over norm"
        )
    return worst


def compare(module: Logits, run: Run) -> float:
    """The largest difference over texts of several lengths, alone and in a batch."""
    shape, numbers, worst = module.model.shape, torch.Generator().manual_seed(0), 0.0
    for batch, length in (
        (1, 1),
        (1, min(7, shape.max_seq)),
        (3, min(32, shape.max_seq)),
        (1, min(512, shape.max_seq)),
    ):
        tokens = torch.randint(shape.vocab, (batch, length), generator=numbers)
        with torch.inference_mode():
            wants = module(tokens).double()
        worst = max(worst, float((run(tokens).double() - wants).norm() / wants.norm()))
    return worst


def write_onnx(module: Logits, version: Path) -> Run:
    """A folder `model.onnx`, with the graph and, in a file of their own, the weights."""
    import onnxruntime
    import onnxscript  # noqa: F401 (torch's exporter asks for it, in other words)

    folder = version / "model.onnx"
    folder.mkdir()
    torch.onnx.export(
        module, (EXAMPLE,), folder / "model.onnx", input_names=["input_ids"], output_names=["logits"],
        dynamic_shapes=DIMS, opset_version=OPSET, dynamo=True, external_data=True, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda tokens: torch.from_numpy(session.run(None, {"input_ids": tokens.numpy()})[0])


def write_aoti(module: Logits, version: Path) -> Run:
    """`model.pt2`: a library for this kind of processor, with the weights in it."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    exported = torch.export.export(module, (EXAMPLE,), dynamic_shapes=DIMS)
    package = aoti_compile_and_package(exported, package_path=str(version / PACKAGE))
    return aoti_load_package(package)


EXAMPLE = torch.zeros(2, 3, dtype=torch.long)
DIMS = ({0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("seq", min=1)},)
"""Both sizes of the input are open."""

WRITERS: dict[str, Callable[[Logits, Path], Run]] = {"onnxruntime": write_onnx, "aoti": write_aoti}
