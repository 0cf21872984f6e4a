"""hqdm bench: how fast a model's step is on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import WORKSPACE, Debug, Guidance, Json, Workspace
from hqdm_cli.skin import config_of

EXAMPLE = "hqdm bench --batch 1,4"


def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="An export, a model, or a checkpoint; by default the newest export.", metavar="[ID|FILE]"),
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Images of a step, with commas.", metavar="N,…")] = None,
    turns: Annotated[int | None, typer.Option(help="How often each is measured.", metavar="N")] = None,
    guidance: Guidance = None,
    device: Annotated[str | None, typer.Option(help="Where steps run.", metavar="cpu|cuda")] = None,
    attention: Annotated[
        str | None, typer.Option(help="What integers' attention multiplies in.", metavar="fp32|int8")
    ] = None,
    memory: Annotated[bool | None, typer.Option("--memory/--no-memory", help="Measure memory as well.")] = None,
    workspace: Workspace = WORKSPACE,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a denoising step: fp32, bfloat16, integers.

    They run in turns in one process. The table has milliseconds with the tenth and ninetieth percentile, the share of
    each kind of layer, resident memory, and what part of the machine's best the integer products reach. JSON and a
    picture are kept as an artifact.
    """

    from pipelines import runner
    from pipelines.errors import FileFault
    from pipelines.workspace.store import Store

    store = Store(workspace)
    with console.Progress() as progress:
        chosen = {}
        if model is not None and Path(model).exists() and not model.startswith(("export/", "model/")):
            chosen["model"] = runner.make(store, "model", runner.model_config(model), {}, progress).artifact.id
        elif model is not None and Path(model).suffix:
            raise FileFault(f"{model} does not exist", "name a checkpoint, a folder, or an artifact such as export/1")
        elif model is not None:
            artifact = store.get(model)
            chosen["export" if artifact.stage == "export" else "model"] = artifact.id
        config = config_of(
            "bench", batch=batch, turns=turns, guidance=guidance, device=device, attention=attention, memory=memory
        )
        outcome = runner.make(store, "bench", config, chosen, progress, force=True)
    table = outcome.artifact.values("bench.json")
    if as_json:
        console.print_json(table)
        return
    digits = 1 if table["device"] == "cpu" else 2
    rows = [
        {"contender": row["contender"], "batch": row["batch"], "ms": round(row["ms"]["median"], digits),
         "p10": round(row["ms"]["p10"], digits), "p90": round(row["ms"]["p90"], digits),
         "ms/image": round(row["ms"]["median"] / row["batch"], digits),
         "times fp32": round(row["times_as_fast_as_fp32"]["median"], 2),
         "quartiles": "{low:.2f}–{high:.2f}".format(**row["times_as_fast_as_fp32"]),
         "s/image": round(row["ms"]["median"] / row["batch"] * table["steps_of_an_image"] / 1e3, 2),
         "GB": round(table["memory_gb"][row["contender"]]["resident"], 2) if table["memory_gb"] else None}
        for row in table["steps"]
    ]  # fmt: skip
    console.out("\n".join(console.table(rows)))
    console.out("")
    fraction = "fraction_of_int8_peak"
    shares = [{"ms of a step": name} | {kind: round(ms, digits) for kind, ms in mine.items() if kind != fraction}
              for name, mine in table["shares"].items()]  # fmt: skip
    console.out("\n".join(console.table(shares)))
    console.out("")
    console.out("\n".join(console.table([{name: round(value, 1) for name, value in table["peaks"].items()}])))
    for name, mine in table["shares"].items():
        if fraction in mine:
            console.out(f"{name}: its products reach {mine[fraction]:.0%} of the machine's best in int8")
    console.say(f"{outcome.artifact.id}\t{outcome.artifact.path}")
