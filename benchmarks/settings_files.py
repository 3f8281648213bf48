"""Claim: settings that others use are read, or refused with a reason; and nothing ends in a traceback.

    python benchmarks/settings_files.py FOLDER

FOLDER holds scripts (*.sh, *.slurm, *.sbatch) with Megatron-LM's arguments, the model_config.yaml of its tests, and
DeepSpeed's and Hugging Face's JSONs, in folders of any depth; docs/plan.md names repositories that have them. A file that
does not say its GPUs or its vocabulary is told them, as a user would: the fewest GPUs that it can be cut over, and the
model of --model. Beside a script SCRIPT.given may have what it is started with, a line of words and NAME=VALUE.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from common import shown, write
from weft.models.huggingface import shape_from_config
from weft.models.shape import Shape
from weft.plan.emit.deepspeed import SECTIONS
from weft.plan.emit.systems import read
from weft.plan.stand_in import stand_in
from weft.presets import preset_shape

GPUS = (8, 16, 32, 64, 128, 192, 256, 384, 512, 1024, 2048)
NAMES = re.compile(r"\.(sh|slurm|sbatch|json)$|model_config\.yaml$")


def kind_of(file: Path) -> str | None:
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix != ".json":
        kind = "arguments as yaml" if file.suffix == ".yaml" else "script"
        return kind if re.search(r"--num[-_]layers\b", text) else None
    if any(f'"{section}"' in text for section in SECTIONS):
        return "deepspeed"
    return "config" if '"model_type"' in text or '"architectures"' in text else None


def settings(file: Path, kind: str, model: Shape) -> tuple[str, list[str]]:
    """What had to be told, and what was not understood."""
    given = file.with_name(file.name + ".given")
    words = given.read_text(encoding="utf-8").split() if given.exists() else []
    known: dict[str, Any] = {"model": model} if kind == "deepspeed" else {}
    counts = iter(GPUS)
    while True:
        try:
            return " ".join(f"--{name}" for name in known), read(file, given=words, **known)[1]
        except ValueError as error:
            if "with --gpus" in str(error) and (count := next(counts, None)) is not None:
                known["gpus"] = count
            elif "with --model" in str(error) and "model" not in known:
                known["model"] = model
            else:
                raise


def as_model(config: dict[str, Any]) -> dict[str, Any]:
    try:
        shape_from_config(config)
        return {"came": "read"}
    except ValueError:
        return {"came": "planned in its sizes", "taken": stand_in(config)[1]}


def outcome(file: Path, kind: str, model: Shape) -> dict[str, Any]:
    try:
        if kind == "config":
            config = json.loads(file.read_text(encoding="utf-8"))
            config.pop("quantization_config", None)  # as the command does
            return as_model(config)
        told, unknown = settings(file, kind, model)
        return {"came": "read", "told": told, "not understood": unknown}
    except ValueError as error:
        return {"came": "refused", "why": str(error).removeprefix(f"{file}: ")}
    except Exception as error:  # noqa: BLE001 - what must not be
        return {"came": "traceback", "why": f"{type(error).__name__}: {error}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama3-8b", help="whose vocabulary a file has that names none")
    options = parser.parse_args()
    model = preset_shape(options.model)
    rows: dict[str, dict[str, Any]] = {}
    for file in sorted(options.folder.rglob("*")):
        if file.is_file() and NAMES.search(file.name) and (kind := kind_of(file)):
            rows[str(file.relative_to(options.folder))] = {"kind": kind, **outcome(file, kind, model)}
    if not rows:
        parser.error(f"{options.folder} has no settings")
    told: dict[str, Any] = {}
    for kind in sorted({row["kind"] for row in rows.values()}):
        of_kind = [row for row in rows.values() if row["kind"] == kind]
        reasons = Counter(re.sub(r"\d[\d.e+-]*", "N", row["why"])[:100] for row in of_kind if "why" in row)
        told[kind] = {**Counter(row["came"] for row in of_kind), "reasons": dict(reasons.most_common(40))}
        print(
            f"{kind}: {len(of_kind)} files",
            *(f"{count} {came}" for came, count in told[kind].items() if came != "reasons"),
        )
        print(*(f"  {count:4} {why}" for why, count in reasons.most_common(12)), sep="\n")
    path = write("settings_files", {"summary": told, "files": len(rows)}, ())
    print(f"written to {shown(path)}")


if __name__ == "__main__":
    main()
