"""Memory and time of every stage on a model of the size of LDM-4 ImageNet: 400.9 million parameters, random weights.

    python -m benchmarks.size

Writes a checkpoint in the layout of cin256-v2, first stage included, runs the real commands on it, each in a process of
its own, and prints a table of each process's seconds and largest resident memory, libraries and mapped files included;
`size.json` beside the checkpoint has the same. Takes about 8 GB of disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

COMMANDS = {
    "profile": ["profile", "{checkpoint}", "--steps", "2", "--batch", "1"],
    "plan": ["plan", "--method", "{method}", "--bits", "w4a4"],
    "distill": ["distill", "--trajectories", "2", "--batch", "1"],
    "export": ["export", "--format", "int"],
    "sample fake": ["sample", "fake", "--count", "1", "--batch", "1", "--steps", "2"],
    "sample int": ["sample", "int", "--count", "1", "--batch", "1", "--steps", "2"],
    "sample int --low-memory": [
        "sample", "int", "--count", "1", "--batch", "1", "--steps", "2", "--low-memory", "--force"
    ],
}  # fmt: skip


def shape_of(model: str, channels: int | None = None):
    """A published model's configuration, with `channels` of another width: that of the UNet's first level, which all
    others are multiples of.
    """
    from pipelines.models.compvis_published import PUBLISHED

    params = PUBLISHED[model]
    if channels is None:
        return params
    unet = replace(params.unet_config, params=replace(params.unet, model_channels=channels))
    return replace(params, unet_config=unet)


def write_checkpoint(path: Path, model: str, channels: int | None = None) -> None:
    """Random weights under a published model's names: variance 1/inputs, ones for norms, zeros for biases. Of another
    width (see `shape_of`) the configuration, which no table knows then, goes beside the checkpoint as YAML.
    """
    import diffusers
    import torch

    from pipelines.config import to_dict, write_yaml
    from pipelines.models.compvis_config import first_stage_arguments, unet_arguments
    from pipelines.models.compvis_keys import CLASSES, first_stage_sources, unet_sources
    from pipelines.models.families import FAMILIES

    params = shape_of(model, channels)
    if channels is not None:
        path.with_suffix(".yaml").write_text(write_yaml({"model": {"params": to_dict(params)}}), encoding="utf-8")
    family, arguments, options = unet_arguments(params)
    network = FAMILIES[family].build(arguments, options)
    name, arguments = first_stage_arguments(params)
    with torch.device("meta"):
        first_stage = getattr(diffusers, name)(**arguments)
    generator = torch.Generator().manual_seed(0)
    state = {}
    if params.unet.context_dim is not None:
        state[CLASSES] = torch.randn(params.cond_stage_config.params.n_classes, params.unet.context_dim)
    for source in [*unet_sources(network, averaged=False).values(), *first_stage_sources(first_stage).values()]:
        if len(source.shape) == 1:
            state[source.key] = torch.full(source.shape, 1.0 if source.key.endswith("weight") else 0.0)
        else:
            inputs = torch.Size(source.shape[1:]).numel()
            state[source.key] = torch.randn(source.shape, generator=generator) / inputs**0.5
    torch.save({"state_dict": state}, path)


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and the largest resident memory in GB of one process."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/size"))
    parser.add_argument("--method", default="hqdm")
    parser.add_argument("--keep", action="store_true", help="go on with what an earlier run left there")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--published", default="cin256-v2", help=argparse.SUPPRESS)  # the model whose shape is written
    parser.add_argument("--channels", type=int, help=argparse.SUPPRESS)  # another width than that model's
    options = parser.parse_args()
    if options.write:
        write_checkpoint(options.write, options.published, options.channels)
        return
    if not options.keep:
        shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    checkpoint, results = options.folder / "model.ckpt", options.folder / "size.json"
    if not checkpoint.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.size", "--write", str(checkpoint)], check=True)
    rows = json.loads(results.read_text()) if results.exists() else {}
    for stage, arguments in COMMANDS.items():
        if stage in rows:
            continue
        words = [word.format(checkpoint=checkpoint, method=options.method) for word in arguments]
        seconds, peak = measure(
            [sys.executable, "-m", "hqdm_cli", *words, "--workspace", str(options.folder / "workspace")]
        )
        rows[stage] = {"seconds": round(seconds, 1), "peak_gb": round(peak, 3)}
        results.write_text(json.dumps(rows, indent=1) + "\n")
    weights = next((options.folder / "workspace" / "model").glob("*/denoiser/*.safetensors")).stat().st_size / 1e9
    print(f"\nfp32 weights: {weights:.2f} GB\n\n| stage | seconds | peak memory, GB | times the fp32 weights |")
    print("|---|---:|---:|---:|")
    for stage, row in rows.items():
        print(f"| {stage} | {row['seconds']:.0f} | {row['peak_gb']:.2f} | {row['peak_gb'] / weights:.2f} |")


if __name__ == "__main__":
    main()
