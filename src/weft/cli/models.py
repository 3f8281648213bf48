"""`weft models`: the published models whose shapes weft knows."""

from __future__ import annotations

import typer


def models(
    name: str | None = typer.Argument(None, help="Print this model's full shape."),
    seq: int = typer.Option(4096, min=1, help="Tokens of a sequence, for the FLOPs; at most the model's context."),
) -> None:
    """List the models that can be named in a config, or print one."""
    if name is None:
        _table(seq)
    else:
        _print(name, seq)


def _table(seq: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from weft.presets import preset_names, preset_series, preset_shape
    from weft.tables import print_table

    columns = ("parameters", "active", "layers", "hidden", "heads", "kv", "ffn", "vocab", "context", "GFLOPs/token")
    table = Table("model", "family", *columns, box=None)
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    table.columns[0].no_wrap = True
    series = None
    for name in preset_names():
        shape = preset_shape(name)
        if series is not None and preset_series(name) != series:
            table.add_section()
        series = preset_series(name)
        sizes = (shape.num_layers, shape.hidden, shape.num_heads, shape.num_kv_heads, shape.ffn, shape.vocab)
        flops = _gigaflops(shape.flops_per_token(min(seq, shape.max_seq), causal=True))
        row = [str(size) for size in (*sizes, shape.max_seq)]
        active = _count(shape.active_params) if shape.experts else ""
        table.add_row(name, shape.family, _count(shape.num_params), active, *row, flops)
    # a pipe has no width: let no column be cut there
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    print_table(table, console)
    console.print(
        f"\nFLOPs of training on one token of {seq}, no recompute, causal attention counted half.", style="dim"
    )


def _print(name: str, seq: int) -> None:
    from weft.presets import preset_shape, preset_text

    shape = preset_shape(name)
    source = [line for line in preset_text(name).splitlines() if line.startswith("#")]
    seq = min(seq, shape.max_seq)
    halved, full = (_gigaflops(shape.flops_per_token(seq, causal=causal)) for causal in (True, False))
    print(*source, sep="\n")
    print(f"# {shape.num_params:,} parameters, {shape.block_params(shape.num_layers - 1):,} of them in each block")
    if shape.experts is not None:
        print(f"# {shape.active_params:,} of them work on one token")
    print(f"# training: {halved} GFLOPs per token of a sequence of {seq} ({full} with the masked half of attention)")
    tables = {}
    for key, value in shape.model_dump(exclude_none=True).items():
        if isinstance(value, dict):
            tables[key] = value
        else:
            print(f"{key} = {_toml(value)}")
    for key, table in tables.items():
        print(f"\n[{key}]", *(f"{item} = {_toml(value)}" for item, value in table.items()), sep="\n")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _count(number: int) -> str:
    """Three figures: 124M, 8.03B."""
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            figures = number / size
            return f"{figures:.{max(0, 2 - len(str(int(figures))) + 1)}f}{letter}"
    return str(number)


def _gigaflops(flops: float) -> str:
    return f"{flops / 1e9:,.2f}" if flops < 1e10 else f"{flops / 1e9:,.0f}"
