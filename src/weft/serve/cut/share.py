"""One process's share of a model that is served by several: the cuts of training, and weights read by regions."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.checkpoint.region import Region
from weft.checkpoint.stacked import stacked_parts
from weft.checkpoint.weights import WeightsFolder
from weft.models.cuts import cut_dim, even_split
from weft.models.decoder import Decoder
from weft.models.moe import Experts, MoE
from weft.models.parameters import buffer_sizes, is_stacked, parameter_sizes
from weft.models.shape import Shape
from weft.parallel.tensor import Axis, cut_tensors
from weft.serve.cut.ranks import Ranks


class SummedMoE(MoE):
    """Every process has all tokens, and of every expert a share of its width: the shares of the sum add up.

    In training the tokens are dealt out first (parallel/experts.py), for there activations count; here there are few.
    """

    axis: Axis

    def routed(self, x: Tensor, *more: object) -> Tensor:
        return self.axis.leave(super().routed(x, *more))


def load_share(
    folder: Path, ranks: Ranks, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """This process's share of a model, in `dtype` or as stored.

    Raises:
        ValueError: as WeightsFolder.open and .check, or as `check_cut`.
    """
    group = ranks.tp_group
    ways, index = group.size(), group.rank()
    with WeightsFolder.open(folder) as weights:
        weights.check()
        shape = weights.shape
        check_cut(shape, ways, ranks.pp)
        with torch.device("meta"):
            model = Decoder(shape, ranks.blocks(shape.num_layers))
        cut_tensors(model, group, sp=False)
        cut_experts(model, group)
        model.tie()
        sizes, tied = parameter_sizes(shape), shape.tied
        for name, parameter in list(model.named_parameters()):
            if is_stacked(name):
                assert shape.experts is not None
                ffn = range(*even_split(shape.experts.ffn, ways, index))
                regions = [region for region, _ in stacked_parts(shape, name, ffn=ffn)]
            else:
                stored = "embed.weight" if tied and name == "head.weight" else name
                region, dim = Region.whole(stored, sizes[stored]), cut_dim(name)
                cut = () if dim is None else (dim, *even_split(region.sizes[dim], ways, index))
                regions = [region.narrow(*cut) if cut else region]
            share = torch.cat([weights.read(region, dtype) for region in regions]).contiguous().to(device)
            assert share.shape == parameter.shape, (name, share.shape, parameter.shape)
            _set(model, name, nn.Parameter(share))
        held = dict(model.named_modules())
        for name, dims in buffer_sizes(shape).items():
            if name.rpartition(".")[0] not in held:
                continue  # another stage's
            _set(model, name, weights.read(Region.whole(name, dims), torch.float32).to(device))
        if tied:
            model.tie()
    return model


def check_cut(shape: Shape, ways: int, stages: int = 1) -> None:
    """Refuse to deal heads out unevenly, and stages without a block."""
    if stages > shape.num_layers:
        raise ValueError(
            f"pp is {stages}, but the model has {shape.num_layers} blocks, one a stage at least: choose less"
        )
    for name, count in (("num_heads", shape.num_heads), ("num_kv_heads", shape.num_kv_heads)):
        if count % ways:
            raise ValueError(f"tp is {ways}, which does not divide the model's {name} ({count}): choose another tp")


def cut_experts(model: Decoder, group: dist.ProcessGroup) -> None:
    """Leave to this process its share of each expert's width. Model on meta."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.__class__ = SummedMoE
            assert isinstance(module, SummedMoE)
            module.axis = Axis(group, sp=False)
        if isinstance(module, Experts):
            start, stop = even_split(module.ffn, group.size(), group.rank())
            count = len(module.gate) // module.ffn
            module.ffn = stop - start
            for name, parameter in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter[: count * module.ffn])))


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, tensor)
