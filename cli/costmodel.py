"""`castile costmodel`: train a model on records, say how good it is, and what it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import Json, emit, fail, out, say

app = typer.Typer(no_args_is_help=True, help="Train, evaluate and describe the cost model.")

From = Annotated[
    Path | None, typer.Option("--records", help="The file of records; else the user's.", show_default=False)
]
Model = Annotated[Path | None, typer.Option("--model", help="The model's folder; else the user's.", show_default=False)]

LEAST_ROWS = 20


@app.command()
def train(
    records: From = None,
    model: Model = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    json: Json = False,
) -> None:
    """Train a model on what was measured. `castile tune` begins with its first choices."""
    from ..autotune.places import model_path
    from ..costmodel.model import CostModel

    data = _data(records)
    made = CostModel.train(data.rows, data.ratios, data.workloads, seed)
    folder = model or model_path()
    try:
        made.save(folder)
    except OSError as error:
        fail(f"cannot write {folder}: {error.strerror or error}")
    if json:
        emit({**made.info, "model": str(folder)})
    else:
        say(f"trained on {len(data)} trials of {made.info['workloads']} workloads; wrote {folder}")


@app.command("eval")
def evaluate(records: From = None, seed: Annotated[int, typer.Option("--seed", min=0)] = 0, json: Json = False) -> None:
    """Say how well a model chooses on shapes and operators that it was not trained on, beside the roofline alone."""
    from ..autotune.dataset import leave_one_out

    data = _data(records)
    found = {what: leave_one_out(data, what, seed) for what in ("shape", "operator")}
    if json:
        emit({"rows": len(data), **{f"leave_one_{what}_out": scores for what, scores in found.items()}})
        return
    from rich.table import Table

    table = Table("left out", "top-1 regret", "top-8 regret", "roofline top-1", "roofline top-8", "error", "R²")
    for what, s in found.items():
        if s:
            names = ("top1", "top8", "roofline_top1", "roofline_top8", "error")
            table.add_row(what, *(f"{s[n]:.1%}" for n in names), f"{s['r2']:.3f}")
    out().print(table)


@app.command()
def info(model: Model = None, json: Json = False) -> None:
    """Say what a model was trained on."""
    from ..autotune.places import model_path
    from ..costmodel.model import CostModel

    folder = model or model_path()
    found = {**CostModel.load(folder).info, "model": str(folder)}
    if json:
        emit(found)
    else:
        for name, value in found.items():
            say(f"{name}: {value}")


def _data(path: Path | None) -> Any:
    from ..autotune.dataset import dataset
    from ..autotune.probe import describe_cpu
    from ..autotune.records import Records

    with Records(path, read_only=True) as opened:
        data = dataset(opened.all(status="ok", kind="trial"), describe_cpu())
    if len(data) < LEAST_ROWS:
        hint = "castile tune measures more"
        fail(f"{len(data)} trials are too few for a model; it takes {LEAST_ROWS}", hint)
    return data
