"""Settings: how files and overrides compose, and every wrong one refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from weft.config.layout import Layout
from weft.config.load import load_config, make_config, merge, parse_override
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.models.shape import Shape
from weft.presets import preset_names, preset_shape

SMALL: dict[str, Any] = {
    "family": "llama", "num_layers": 4, "hidden": 32, "num_heads": 8, "num_kv_heads": 4, "ffn": 48, "vocab": 67,
    "max_seq": 32,
}  # fmt: skip


def small(**sections: Any) -> Config:
    return make_config({"model": SMALL, **sections})


def file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# -- composition ------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    config = small()
    assert config.layout == Layout()
    assert config.optimizer.lr == 3e-4
    assert config.seq == 32  # the model's, where train.seq is 0


def test_a_mark_before_the_text_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "marked.toml"
    path.write_text("[train]\nsteps = 5\n[model]\npreset = 'gpt2-124m'\n", encoding="utf-8-sig")
    assert load_config([path]).train.steps == 5


def test_files_go_over_one_another_left_to_right(tmp_path: Path) -> None:
    one = file(tmp_path, "one.toml", '[model]\npreset = "gpt2-124m"\n[optimizer]\nlr = 1e-3\nweight_decay = 0.2\n')
    two = file(tmp_path, "two.toml", "[optimizer]\nlr = 2e-3\n[train]\nsteps = 5\n")
    config = load_config([one, two])
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.train.steps) == (2e-3, 0.2, 5)
    assert load_config([two, one]).optimizer.lr == 1e-3


def test_overrides_go_over_files_left_to_right(tmp_path: Path) -> None:
    path = file(tmp_path, "run.toml", '[model]\npreset = "gpt2-124m"\n[train]\nsteps = 5\n')
    config = load_config([path], [("train.steps", 6), "train.steps=7", "optimizer.lr=0.5"])
    assert (config.train.steps, config.optimizer.lr) == (7, 0.5)


def test_a_list_replaces_a_list(tmp_path: Path) -> None:
    path = file(tmp_path, "run.toml", '[model]\npreset = "gpt2-124m"\n[data]\npaths = ["a", "b"]\n')
    assert load_config([path], ['data.paths=["c"]']).data.paths == ("c",)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("3e-4", 3e-4), ("true", True), ("[1, 2]", [1, 2]), ('"3"', "3"), ("runs/a b", "runs/a b"),
        ("fsdp2.tp2", "fsdp2.tp2"), ("", ""), ("a=b", "a=b"),
    ],
)  # fmt: skip
def test_override_values_are_toml_or_text(text: str, value: object) -> None:
    assert parse_override(f"a.b={text}") == {"a": {"b": value}}


@pytest.mark.parametrize("text", ["a", "=1", " =1", ""])
def test_override_without_key_or_value(text: str) -> None:
    with pytest.raises(ValueError, match="write it as key=value"):
        parse_override(text)


def test_merge_leaves_its_arguments_alone() -> None:
    base, over = {"a": {"b": 1}, "c": 2}, {"a": {"d": 3}}
    assert merge(base, over) == {"a": {"b": 1, "d": 3}, "c": 2}
    assert (base, over) == ({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}})


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_preset_is_its_shape(name: str) -> None:
    assert make_config({"model": {"preset": name}}).model == preset_shape(name)
    assert make_config({"model": name}).model == preset_shape(name)


def test_keys_beside_a_preset_change_it() -> None:
    shape = preset_shape("llama3-8b")
    config = make_config({"model": {"preset": "llama3-8b", "num_layers": 2, "rope_scaling": {"factor": 4.0}}})
    scaling = shape.rope_scaling
    assert scaling is not None
    assert config.model == shape.model_copy(
        update={"num_layers": 2, "rope_scaling": scaling.model_copy(update={"factor": 4.0})}
    )


def test_a_later_preset_replaces_the_model(tmp_path: Path) -> None:
    path = file(tmp_path, "run.toml", '[model]\npreset = "llama3-8b"\nnum_layers = 2\n')
    assert load_config([path], [("model.preset", "gpt2-124m")]).model == preset_shape("gpt2-124m")
    assert load_config([path], ["model.num_layers=3"]).model.num_layers == 3


def test_no_model() -> None:
    with pytest.raises(ValueError, match=r"which model.*weft models.*--model gpt2-124m"):
        load_config([])


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="no preset 'gpt2-123m': did you mean 'gpt2-124m'"):
        make_config({"model": "gpt2-123m"})


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_layout_as_text_or_table() -> None:
    assert small(layout="fsdp2.tp2").layout == small(layout={"fsdp": 2, "tp": 2}).layout


def test_a_key_changes_a_text_layout_and_a_text_replaces_a_table(tmp_path: Path) -> None:
    text = '[model]\npreset = "gpt2-124m"\n'
    path = file(tmp_path, "run.toml", f'layout = "fsdp2.tp2"\n{text}')
    assert str(load_config([path], ["layout.tp=4"]).layout) == "fsdp2.tp4"
    table = file(tmp_path, "table.toml", f"{text}[layout]\nfsdp = 2\ntp = 2\n")
    assert str(load_config([table], ["layout=dp2"]).layout) == "dp2"
    assert str(load_config([table], ["layout.tp=1"]).layout) == "fsdp2"


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimzer.lr=1", "unknown setting 'optimzer': did you mean 'optimizer'"),
        ("optimizer.lrr=1", "unknown setting 'optimizer.lrr': did you mean 'lr'"),
        ("layout.tpp=2", "unknown setting 'layout.tpp': did you mean 'tp'"),
        ("model.hiden=2", "unknown setting 'model.hiden': did you mean 'hidden'"),
        ("model.rope_scaling.facto=8", "unknown setting 'model.rope_scaling.facto': did you mean 'factor'"),
        ("train.xyzzy=1", "unknown setting 'train.xyzzy': known here: .*steps.*seed"),
        ("train.steps=many", "train.steps = 'many'"),
        ("train.steps=0", "train.steps = 0.*greater than or equal to 1"),
        ("optimizer.lr=0", "optimizer.lr = 0.*greater than 0"),
        ("schedule.kind=cosin", "schedule.kind = 'cosin'.*'cosine'"),
        ("train.device=tpu", "train.device = 'tpu'.*'cuda'"),
        ("train.nonfinite=ignore", "train.nonfinite = 'ignore'.*'skip'"),
        ("checkpoint.keep=0", "checkpoint.keep = 0"),
        ("layout.tp=0", "layout.tp = 0"),
        ("layout.zero=5", "layout.zero = 5"),
        ("layout.precision=fp9", "layout.precision = 'fp9'.*'bf16'"),
        ("layout=tp2.xp2", "'xp2' is not understood"),
        ("model.num_heads=5", "model.num_kv_heads .4. must divide model.num_heads .5."),
        ("data.split=[1]", "data.split"),
    ],
)
def test_wrong_settings_name_themselves(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_config([], [("model", SMALL), override])
    assert not isinstance(caught.value, ValidationError)  # in weft's own words
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"paths": ["a"], "weights": [1, 2]}}, "data.weights has 2 numbers for 1 data.paths"),
        ({"schedule": {"warmup": 1000}}, "schedule.warmup = 1000 leaves nothing of train.steps = 1000"),
        (
            {"schedule": {"kind": "wsd", "warmup": 500, "decay": 600}},
            "schedule.warmup . schedule.decay = 1100 is more than train.steps = 1000",
        ),
        ({"layout": "tp3"}, "layout.tp = 3 does not divide model.num_heads = 8"),
        ({"layout": "dp3"}, "train.global_batch = 8 is not a multiple of dp·fsdp = 3"),
        ({"layout": "tp2.sp", "train": {"seq": 31}}, "layout.sp .*train.seq = 31"),
    ],
)
def test_wrong_combinations_name_what_to_change(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**sections)


def test_learned_positions_end() -> None:
    gpt2 = {"family": "gpt2", "num_layers": 1, "hidden": 8, "num_heads": 2, "vocab": 9, "max_seq": 16}
    assert make_config({"model": gpt2, "train": {"seq": 16}}).seq == 16
    with pytest.raises(ValueError, match=r"train.seq = 17 is longer than the 16 learned positions"):
        make_config({"model": gpt2, "train": {"seq": 17}})
    assert small(train={"seq": 64}).seq == 64  # rotary positions go on


def test_8bit_moments_are_not_offloaded() -> None:
    with pytest.raises(ValueError, match=r"optimizer.states = 8bit .*layout.offload_optimizer .*leave one of them out"):
        small(layout="offloadoptimizer", optimizer={"states": "8bit"})


def test_moments_are_not_offloaded_twice() -> None:
    with pytest.raises(ValueError, match=r"layout.offload_weights .*layout.offload_optimizer .*leave one of them out"):
        small(layout="offloadweights.offloadoptimizer.bf16")


def test_missing_sizes_are_named_all_at_once() -> None:
    with pytest.raises(ValueError, match=r"'model.num_layers' is missing") as caught:
        make_config({"model": {"family": "llama", "hidden": 8}})
    assert "'model.vocab' is missing" in str(caught.value)


@pytest.mark.parametrize("wrong", [("hidden", "x"), ("num_heads", None), ("num_heads", []), ("family", [])])
def test_a_size_that_is_no_number_is_told_and_not_those_that_follow_from_it(wrong: tuple[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{wrong[0]} = [^\n]*$"):
        make_config({"model": {**SMALL, wrong[0]: wrong[1]}})


def test_a_size_may_be_written_in_quotes() -> None:
    assert make_config({"model": {**SMALL, "hidden": str(SMALL["hidden"])}}) == small()


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no config file .*none\.toml"):
        load_config([tmp_path / "none.toml"])
    with pytest.raises(ValueError, match=r"bad\.toml is not TOML"):
        load_config([file(tmp_path, "bad.toml", "[model\n")])


# -- the tree ---------------------------------------------------------------------------------------------------------


def test_frozen() -> None:
    config = small()
    with pytest.raises(ValidationError, match="frozen"):
        config.run = "elsewhere"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.layout.tp = 2  # type: ignore[misc]


def test_every_setting_but_sizes_and_folders_says_what_it_is() -> None:
    """Names that say it all need no description; whoever adds one must decide."""
    plain = {"betas", "eps", "weight_decay", "device", "tensorboard", "steps"}
    for section in Config.model_fields.values():
        kind = section.annotation
        if isinstance(kind, type) and hasattr(kind, "model_fields") and kind is not Shape:
            silent = {name for name, found in kind.model_fields.items() if not found.description}
            assert silent <= plain, f"{kind.__name__}: {sorted(silent - plain)} without description"


@pytest.mark.parametrize("layout", ["single", "fsdp2.tp2.sp.mb1", "pp2.stages3-1.gpipe.full.bf16"])
def test_written_as_toml_it_is_the_same(tmp_path: Path, layout: str) -> None:
    config = small(layout=layout, data={"paths": ["a b", 'c"d'], "weights": [1, 2.5]}, optimizer={"eps": 1e-12})
    assert load_config([file(tmp_path, "whole.toml", config_toml(config))]) == resolved(config)


@pytest.mark.parametrize("name", preset_names())
def test_presets_written_as_toml_are_the_same(tmp_path: Path, name: str) -> None:
    config = make_config({"model": name})
    assert load_config([file(tmp_path, "whole.toml", config_toml(config))]) == resolved(config)


def resolved(config: Config) -> Config:
    """What stands for another setting is written out."""
    return config.model_copy(update={"train": config.train.model_copy(update={"seq": config.seq})})
