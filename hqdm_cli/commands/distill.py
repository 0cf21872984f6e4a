"""hqdm distill: train the quantised student against its teacher, without data."""

import re
from pathlib import Path
from typing import Annotated

import typer

from hqdm_cli import console
from hqdm_cli.options import (
    WORKSPACE,
    Batch,
    Bits,
    Debug,
    Device,
    DryRun,
    Eta,
    Force,
    Guidance,
    Json,
    Method,
    Processes,
    Seed,
    Set,
    Steps,
    Variant,
    Workspace,
)  # fmt: skip
from hqdm_cli.skin import config_of, finish, leave_out, named, pairs, shared_out

EXAMPLE = """hqdm distill --bits w4a4
  hqdm distill --bits w4a3 --method efficientdm --trajectories 40
  hqdm distill --bits w4a3 --plan auto
  hqdm distill --plan plan/3"""
AUTO = {"method": "hqdm", "variant": "auto"}


def _is_path(plan: str) -> bool:
    """Whether a word for --plan is or looks like a file, there or not, rather than an artifact's id or digest."""
    ident = plan.strip("/")
    has_folder = "/" in ident and not re.fullmatch(r"\w+/\d+", ident)
    return Path(plan).is_file() or Path(plan).suffix.lower() in (".yaml", ".yml") or has_folder


def distill(
    context: typer.Context,
    bits: Bits = None,
    method: Method = None,
    variant: Variant = None,
    options: Set = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help="The plan: an artifact, a YAML file edited by hand, or auto, the search of hqdm's variant auto.",
            metavar="ID|FILE|auto",
        ),
    ] = None,
    trajectories: Annotated[int | None, typer.Option(help="Teacher trajectories to train on.", metavar="N")] = None,
    steps: Steps = None,
    eta: Eta = None,
    guidance: Guidance = None,
    batch: Batch = None,
    save_every: Annotated[int | None, typer.Option(help="Updates between two saved states.", metavar="N")] = None,
    device: Device = None,
    seed: Seed = None,
    processes: Processes = None,
    workspace: Workspace = WORKSPACE,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train the quantised student on its teacher; no data needed.

    The newest plan is used if it is of the bits, method, variant and options asked for; otherwise that plan is made
    first.
    """
    shared_out(context, processes, dry_run)
    from pipelines import runner
    from pipelines.errors import UsageError
    from pipelines.workspace.store import Store

    given = (("bits", bits), ("method", method), ("variant", variant), ("options", pairs(options)))
    asked = {name: value for name, value in given if value}
    if plan == AUTO["variant"]:
        plan = None
        for name, value in AUTO.items():
            if asked.setdefault(name, value) != value:
                raise UsageError(f"--plan auto is {name} {value}, not {asked[name]}", f"leave out --{name}")
    if plan and asked:
        raise UsageError(f"--plan {plan} says the {' and '.join(asked)} already", leave_out(asked))
    store = Store(workspace)
    config = config_of(
        "distill",
        trajectories=trajectories,
        steps=steps,
        eta=eta,
        guidance=guidance,
        batch=batch,
        save_every=save_every,
        device=device,
        seed=seed,
    )
    outcomes = []
    with console.Progress() as progress:
        if plan and not _is_path(plan):
            chosen = named(store, plan, "plan")
        else:
            newest = store.current("plan")
            if plan:
                wanted = runner.edited_plan(plan)
            else:
                # An edited plan's sites need not have the bits of its head: it is taken when nothing else is asked for.
                edited = newest and newest.config["edited_sha256"]
                fits = newest and all(newest.config[n] == value and not edited for n, value in asked.items())
                wanted = runner.plan_like(newest) if fits else config_of("plan", **asked)
            made = runner.make(store, "plan", wanted, {}, progress, dry_run=dry_run)
            chosen = made.artifact
            outcomes = [made] if chosen is None else []
        if chosen is None:
            progress.note("distill: would run (its input plan will be made first)")
        else:
            outcomes.append(runner.make(store, "distill", config, {"plan": chosen.id}, progress, force, dry_run))
    finish(workspace, outcomes, dry_run, as_json)
