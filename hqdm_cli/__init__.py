"""The command line: a thin skin over the engine in `pipelines`. Typer and rich are used here and nowhere else."""
