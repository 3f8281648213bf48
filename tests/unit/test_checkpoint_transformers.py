"""The weights of a checkpoint load in transformers as they lie."""

from pathlib import Path

import pytest
import torch

from weft.checkpoint.folder import step_path
from weft.checkpoint.region import Piece, Region
from weft.checkpoint.save import Checkpointer
from weft.models.decoder import Decoder
from weft.models.huggingface import places
from weft.models.shape import Shape

SIZES = {"num_layers": 2, "hidden": 32, "num_heads": 4, "vocab": 50, "max_seq": 16}


@pytest.mark.parametrize(
    "shape",
    [Shape(family="gpt2", **SIZES), Shape(num_kv_heads=2, ffn=48, **SIZES)],
    ids=["gpt2", "llama"],
)
def test_transformers_loads_a_checkpoint(tmp_path: Path, shape: Shape) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    decoder = Decoder(shape).eval()
    parameters = dict(decoder.named_parameters())
    pieces = [Piece(Region.whole(name, tuple(p.shape)), p) for name, p in parameters.items()]
    checkpointer = Checkpointer(tmp_path, shape, shard_bytes=20_000)
    checkpointer.save(1, pieces, [], {"layout": "single"})
    checkpointer.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(step_path(tmp_path, 1) / "model").eval()
    theirs = model.state_dict()
    for name, place in places(shape).items():
        region = Region.whole(name, tuple(parameters[name].shape))
        start, stop = place.box(region.start, region.stop)
        tensor = theirs[place.tensor][tuple(map(slice, start, stop))]
        assert torch.equal(tensor.T if place.transposed else tensor, parameters[name]), name
    tokens = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, decoder(tokens), rtol=1e-5, atol=1e-5)
