"""Every preset is the published model: its tensors are those of transformers' own, its size the one on the card."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner

from weft.cli.models import models
from weft.models.huggingface import config_from_shape, places, shape_from_config
from weft.models.parameters import parameter_sizes
from weft.presets import preset_names, preset_series, preset_shape

PUBLISHED = {
    "gpt2-124m": 124_439_808, "gpt2-355m": 354_823_168, "gpt2-774m": 774_030_080, "gpt2-1.5b": 1_557_611_200,
    "llama2-7b": 6_738_415_616, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800, "llama3.2-1b": 1_235_814_400, "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768, "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360, "qwen3-32b": 32_762_123_264,
    "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112, "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560, "deepseek-v2-lite": 15_706_484_224, "deepseek-v3": 671_026_404_352,
}  # fmt: skip
app = typer.Typer()
app.command()(models)

EXPRESSIBLE = [name for name in preset_names() if name != "gpt3-13b"]


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_tensors_are_those_of_transformers(name: str) -> None:
    shape = preset_shape(name)
    config = config_from_shape(shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config), attn_implementation="eager"
        )
    theirs = {key: tuple(parameter.shape) for key, parameter in model.named_parameters() if ".experts." not in key}
    theirs |= {key: tuple(x.shape) for key, x in model.named_buffers() if key.endswith("e_score_correction_bias")}
    ours = {place.tensor: place.sizes for place in places(shape).values()}
    assert {key: dims for key, dims in ours.items() if ".experts." not in key} == {
        key.replace(".mlp.gate.", ".block_sparse_moe.gate.") if shape.family == "mixtral" else key: dims
        for key, dims in theirs.items()
    }  # its experts are fused in memory, and lie one by one on the disk
    assert shape.num_params == sum(parameter.numel() for parameter in model.parameters())
    assert shape_from_config(config) == shape


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_size_is_the_published_one(name: str, count: int) -> None:
    assert preset_shape(name).num_params == count


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x7b", 12.9),
        ("mixtral-8x22b", 39.1),
        ("qwen3-30b-a3b", 3.3),
        ("qwen3-235b-a22b", 22.2),
        ("deepseek-v2-lite", 2.66),  # its paper's 2.4 leaves the embedding out
        ("deepseek-v3", 37),
    ],
)
def test_active_parameters_are_the_published_ones(name: str, billions: float) -> None:
    assert preset_shape(name).active_params / 1e9 == pytest.approx(billions, rel=0.02)


def test_gpt3_names_tell_the_size() -> None:
    for name, billions in {"125m": 0.125, "350m": 0.356, "760m": 0.760, "1.3b": 1.316, "2.7b": 2.65, "6.7b": 6.66,
                           "13b": 12.94, "175b": 174.6}.items():  # fmt: skip
        assert preset_shape(f"gpt3-{name}").num_params / 1e9 == pytest.approx(billions, rel=0.01)


def test_the_13b_of_the_paper_is_refused_where_it_cannot_be_written() -> None:
    shape = preset_shape("gpt3-13b")
    assert sum(torch.Size(dims).numel() for dims in parameter_sizes(shape).values()) == shape.num_params
    with pytest.raises(ValueError, match=r"model\.head_dim times num_heads is 5120, but GPT2LMHeadModel.* has 5140"):
        config_from_shape(shape)


def test_order_is_series_by_series_small_to_large() -> None:
    names = preset_names()
    keys = [(preset_series(name), preset_shape(name).num_params) for name in names]
    assert keys == sorted(keys)
    assert names[:4] == ("deepseek-v2-lite", "deepseek-v3", "gpt2-124m", "gpt2-355m")


@pytest.mark.parametrize("name", ["llama3-9b", "../models/gpt2-124m"])
def test_unknown_preset(name: str) -> None:
    with pytest.raises(ValueError, match=r"there is no preset '.*': (did you mean|`weft models`)"):
        preset_shape(name)


def test_table_lists_all() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0, result.output
    rows = [line.split()[0] for line in result.output.splitlines() if line.split()]
    assert [row for row in rows if row in preset_names()] == list(preset_names())
    assert "8.03B" in result.output
    assert "…" not in result.output


def test_one_preset_prints_as_the_config_it_is() -> None:
    import tomllib

    from weft.models.shape import Shape

    for name in preset_names():
        result = CliRunner().invoke(app, [name])
        assert Shape.model_validate(tomllib.loads(result.output)) == preset_shape(name)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from weft.cli import export, models; "
        "print(sorted({'torch', 'pydantic', 'rich', 'numpy'} & sys.modules.keys()))"
    )
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch" not in listed
    assert "numpy" not in listed
