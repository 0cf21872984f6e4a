"""Options that several commands share, spelled once. All default to None or False: defaults live in the stages."""

from pathlib import Path
from typing import Annotated

import typer

Workspace = Annotated[
    Path,
    typer.Option(
        "-w", "--workspace", envvar="HQDM_WORKSPACE", help="Folder of the artifacts.", show_default=True, metavar="DIR"
    ),
]
WORKSPACE = Path("workspace")
Seed = Annotated[int | None, typer.Option(help="Seed of everything random in this stage.", metavar="N")]
Force = Annotated[bool, typer.Option("--force", help="Run afresh, even where the result is there already.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the configuration, what would run and why; run nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Batch = Annotated[int | None, typer.Option(help="Images at a time.", metavar="N")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", metavar="N")]
Scheduler = Annotated[str | None, typer.Option(help="A diffusers scheduler.", metavar="NAME")]
Eta = Annotated[float | None, typer.Option(help="Noise of the sampler: 0 is DDIM, 1 is DDPM.", metavar="X")]
Guidance = Annotated[float | None, typer.Option(help="Strength of classifier-free guidance.", metavar="X")]
Bits = Annotated[str | None, typer.Option(help="Bits of weights and activations, as in w4a4.", metavar="wXaY")]
Method = Annotated[str | None, typer.Option(help="Quantisation method; `hqdm methods` lists them.", metavar="NAME")]
Variant = Annotated[str | None, typer.Option(help="Variant of the method.", metavar="NAME")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="An option of the method, as in order=16, or a key of its recipe, as in recipe.ema=0; may be given again.",
        metavar="NAME=VALUE",
    ),
]
Device = Annotated[str | None, typer.Option(help="Where floating point is computed.", metavar="cpu|cuda")]
Processes = Annotated[
    int | None,
    typer.Option("--processes", help="Processes of this machine that share the work; 1 by default.", metavar="N"),
]
