"""`castile costmodel`: train a model on records, say how good it is, and what it was made from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import Json, emit, fail, out, say

if TYPE_CHECKING:
    from ..costmodel.model import CostModel

app = typer.Typer(no_args_is_help=True, help="Train, evaluate and describe the cost model.")

From = Annotated[
    Path | None, typer.Option("--records", help="The file of records; else the user's.", show_default=False)
]
Model = Annotated[Path | None, typer.Option("--model", help="The model's folder; else the user's.", show_default=False)]

Compiled = Annotated[
    list[Path] | None,
    typer.Option("--compiled", help="Rows of compiled GPU kernels, as bench_cross_compile.py writes them."),
]
Cascades = Annotated[Path, typer.Option("--cascades", help="The folder of the cascades that those rows name.")]

LEAST_ROWS = 20


@app.command()
def train(
    records: From = None,
    model: Model = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    with_shipped: Annotated[
        bool, typer.Option("--shipped/--no-shipped", help="With the rows of castile's own.")
    ] = True,
    compiled: Compiled = None,
    cascades: Cascades = Path("examples/cascades"),
    json: Json = False,
) -> None:
    """Train a model on what was measured here and on the rows that came with castile. `castile tune` begins with its
    first choices.

    With --compiled and --model instead a model of the registers that GPU kernels take.
    """
    if compiled is not None:
        if model is None:
            fail("--compiled needs --model: the folder to write")
        _train_registers(compiled, cascades, model, seed, json)
        return
    from ..autotune.dataset import joined, learned, shipped
    from ..autotune.places import model_path

    own = _data(records, least=0 if with_shipped else LEAST_ROWS)
    data = joined(shipped(), own) if with_shipped else own
    made = learned(data, seed)
    folder = model or model_path()
    _save(made, folder)
    if json:
        emit({**made.info, "model": str(folder)})
    else:
        say(f"trained on {len(data)} trials of {made.info['workloads']} workloads; wrote {folder}")


@app.command("eval")
def evaluate(
    records: From = None,
    compiled: Compiled = None,
    cascades: Cascades = Path("examples/cascades"),
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    json: Json = False,
) -> None:
    """Say how well a model chooses on shapes and operators that it was not trained on, beside the roofline alone.

    On the rows that came with castile, or on --records. With --compiled instead how well the registers of GPU kernels
    are foreseen before they are compiled.
    """
    if compiled is not None:
        _registers(compiled, cascades, seed, json)
        return
    from ..autotune.dataset import SPLITS, leave_one_out, shipped
    from ..costmodel.shipped import shipped_rows

    data = shipped() if records is None else _data(records)
    found = {what: leave_one_out(data, what, seed) for what in SPLITS}
    usual = [w["default_over_best"] - 1 for w in shipped_rows().about["workloads"]] if records is None else []
    counts = {"rows": len(data), "workloads": len(set(data.workloads)), "operators": len(set(data.operators))}
    if json:
        names = {what: f"leave_one_{what}_out" if what != "random" else "random_split" for what in SPLITS}
        told = {"default_regret": sum(usual) / len(usual)} if usual else {}
        emit({**counts, **told, **{names[what]: scores for what, scores in found.items()}})
        return
    from rich.table import Table

    title = ", ".join(f"{n} {what}" for what, n in counts.items())
    table = Table("left out", "of", "", "top-1 regret", "top-8 regret", "error", "R²", title=title)
    for what, s in found.items():
        for who, prefix in (("model", ""), ("roofline", "roofline_")):
            regret = [f"{s[n]:.1%}" if (n := f"{prefix}top{k}") in s else "" for k in (1, 8)]
            if s:
                table.add_row(
                    what, f"{s['workloads']:.0f}", who, *regret, f"{s[prefix + 'error']:.1%}", f"{s[prefix + 'r2']:.3f}"
                )
    out().print(table)
    if usual:
        say(f"the default mapping's regret: {sum(usual) / len(usual):.1%}")


def _compiled(paths: list[Path], cascades: Path) -> Any:
    """What was compiled, of all the files."""
    from ..autotune.compiled import compiled_rows

    lines: list[str] = []
    for path in paths:
        try:
            lines += path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            fail(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")
    return compiled_rows(lines, cascades)


def _save(made: CostModel, folder: Path) -> None:
    """Write a model, or end with one line that says why it cannot be written."""
    try:
        made.save(folder)
    except OSError as error:
        fail(f"cannot write {folder}: {error.strerror or error}")


def _train_registers(paths: list[Path], cascades: Path, folder: Path, seed: int, json: bool) -> None:
    from ..autotune.compiled import trained

    made = trained(_compiled(paths, cascades), seed)
    _save(made, folder)
    if json:
        emit({**made.info, "model": str(folder)})
    else:
        say(f"trained on {made.info['rows']} kernels of {made.info['workloads']} examples; wrote {folder}")


def _registers(paths: list[Path], cascades: Path, seed: int, json: bool) -> None:
    from ..autotune.compiled import register_scores

    found = register_scores(_compiled(paths, cascades), seed)
    if not found:
        fail("the rows tell of too few examples to leave some out", "give more files: --compiled A --compiled B")
    if json:
        emit(found)
        return
    from rich.table import Table

    title = f"{found['rows']:.0f} programs of {found['examples']:.0f} examples, {found['spilling']:.0f} spill"
    table = Table("registers by", "mean error", "median", "R²", "spills missed", "spills feared", title=title)
    for who, prefix in (("model, examples left out", ""), ("passes alone", "plain_")):
        errors = [f"{found[f'{prefix}{n}']:.1%}" for n in ("error", "median_error")]
        spills = [f"{found[f'{prefix}spills_{n}']:.0f}" for n in ("missed", "feared")]
        table.add_row(who, *errors, f"{found[f'{prefix}r2']:.3f}", *spills)
    out().print(table)


@app.command()
def info(model: Model = None, json: Json = False) -> None:
    """Say what a model was trained on."""
    from ..autotune.places import model_path
    from ..costmodel.model import CostModel
    from ..costmodel.shipped import DATA

    folder = model or model_path()
    if model is None and not os.path.isfile(folder / "model.json"):
        folder = DATA / "model"
    found = {**CostModel.load(folder).info, "model": str(folder)}
    if json:
        emit(found)
    else:
        for name, value in found.items():
            say(f"{name}: {value}")


def _data(path: Path | None, least: int = LEAST_ROWS) -> Any:
    from ..autotune.dataset import dataset
    from ..autotune.places import have_records, records_path
    from ..autotune.probe import describe_cpu
    from ..autotune.records import Records

    if not least and path is None and not have_records(records_path()):
        return dataset((), describe_cpu())
    with Records(path, read_only=True) as opened:
        data = dataset(opened.all(status="ok", kind="trial"), describe_cpu())
    if len(data) < least:
        hint = "castile tune measures more"
        fail(f"{len(data)} trials are too few for a model; it takes {least}", hint)
    return data
