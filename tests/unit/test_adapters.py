"""Adapters of peft, several in one batch, against peft itself."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_engine import SHAPES, outputs_of, random_prompts

from weft.checkpoint.adapter import load_adapter
from weft.checkpoint.weights import load_decoder
from weft.models.huggingface import config_from_shape
from weft.models.shape import Family
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.kernels.native import find_compiler
from weft.serve.requests.request import Request, Sampling
from weft.serve.steps import compiled
from weft.serve.steps.adapters import Adapters
from weft.serve.steps.runner import Runner

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3_moe": ["q_proj", "o_proj"],
    "deepseek_v3": ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
}


def made(family: str, folder: Path, names: tuple[str, ...] = ("first", "second")) -> peft.PeftModel:
    """A model in `folder`/model with random weights, and adapters of other ranks and scales beside it."""
    config = transformers.AutoConfig.for_model(**config_from_shape(SHAPES[family]))  # type: ignore[index]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "norm" not in name:
                weight.normal_(0, 0.2)
    model.save_pretrained(folder / "model")
    wrapped: peft.PeftModel | None = None
    for number, name in enumerate(names):
        lora = peft.LoraConfig(
            r=4 + number, lora_alpha=8 * (number + 1), target_modules=TARGETS[family], use_rslora=number == 1,
            fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM",
        )  # fmt: skip
        if wrapped is None:
            wrapped = peft.get_peft_model(model, lora, adapter_name=name)
        else:
            wrapped.add_adapter(name, lora)
    assert wrapped is not None
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


BY_COMPILER = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # its own
    pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler"),
]


@pytest.mark.parametrize(
    ("family", "way"),
    [(family, way) for family in TARGETS for way in ("plain", "in fixed sizes")]
    + [pytest.param(family, "compiled", marks=BY_COMPILER) for family in ("llama", "deepseek_v3")],
)
def test_each_request_has_its_adapter(
    family: Family, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = made(family, tmp_path)
    adapters = {name: str(tmp_path / name) for name in ("first", "second")}
    _, model = load_decoder(tmp_path / "model")
    if way == "in fixed sizes":
        monkeypatch.setattr(compiled, "compile_step", lambda model, layers: layers)
        monkeypatch.setattr(Runner, "warm_up", lambda run: setattr(run, "decoding", run.in_fixed_sizes(config)))
    config = EngineConfig(max_sequences=4, step_tokens=16, block_tokens=4, adapters=adapters, compile=way != "plain")
    engine = Engine(model, None, config)
    [prompt] = random_prompts(1, 21)
    for again in (False, True):  # the second time out of the cache, each its own
        for name in (None, "first", "second"):
            engine.add(Request(str(name), prompt, Sampling(max_tokens=12), adapter=name, logprobs=0))
        outputs = outputs_of(engine)
        for name in (None, "first", "second"):
            told = [one for output in outputs[str(name), 0] for one in output.logprobs or ()]
            text = torch.tensor([prompt + [one.token for one in told]])
            with torch.inference_mode():
                if name is None:
                    with reference.disable_adapter():
                        logits = reference(text).logits
                else:
                    reference.set_adapter(name)
                    logits = reference(text).logits
            expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert [one.token for one in told] == expected.argmax(-1).tolist()
            found = torch.tensor([one.logprob for one in told])
            torch.testing.assert_close(found, expected.amax(-1), rtol=1e-4, atol=1e-4)
            assert (outputs[str(name), 0][0].cached > 0) == again
    texts = {tuple(token for output in outputs[str(name), 0] for token in output.tokens) for name in (None, *adapters)}
    assert len(texts) == 3
    if way == "in fixed sizes":  # those of the model as it is, and none of an adapter's
        engine.add(Request("alone", prompt, Sampling(max_tokens=12)))
        expected_tokens = [token for output in outputs["None", 0] for token in output.tokens]
        assert [token for output in outputs_of(engine)["alone", 0] for token in output.tokens] == expected_tokens
        assert engine.runner.decoding is not None
        assert list(engine.runner.decoding.steps) == [(1, 8)]


def test_blocks_are_alike_where_an_adapter_changes_some(tmp_path: Path) -> None:
    made("llama", tmp_path, ("one",))
    file = tmp_path / "one" / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".layers.0." in name}
    assert tensors
    save_file(tensors, file)
    _, model = load_decoder(tmp_path / "model")
    sites = Adapters(model, {"one": tmp_path / "one"}).sites
    assert len(sites) == 7 * len(model.blocks)
    assert {name.split(".")[1] for name, site in sites.items() if site.pairs} == {"0"}


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    made("llama", tmp_path, ("one",))
    shape, folder = SHAPES["llama"], tmp_path / "one"
    assert len(load_adapter(folder, shape)) == 2 * 7
    with pytest.raises(ValueError, match=r"belongs to another model"):
        load_adapter(folder, SHAPES["mistral"])
    with pytest.raises(ValueError, match=r"the model has nothing for .*lora_A.weight and 27 more"):
        load_adapter(folder, SHAPES["gpt2"])
    with pytest.raises(ValueError, match=r"has no adapter_config.json: give the directory that peft"):
        load_adapter(tmp_path / "model", shape)
    settings = json.loads((folder / "adapter_config.json").read_text())
    for change, words in (({"peft_type": "IA3"}, "peft_type is IA3"), ({"use_dora": True}, "use_dora is True")):
        (folder / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=words):
            load_adapter(folder, shape)
    _, model = load_decoder(tmp_path / "model")
    with pytest.raises(ValueError, match=r"adapter is 'other'; this engine has none"):
        Engine(model).check(Request("a", [1], adapter="other"))
