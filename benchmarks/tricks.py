"""What each part of `hqdm --variant auto` gives: the same student with one thing changed at a time.

    python -m benchmarks.tricks --bits w4a3

Every row is a chain of artifacts in the workspace `runs/tricks` (plan, distill, export, sample, score) at the same
seeds and the same number of updates; a row that changes the recipe hands the plan back with that one key edited. What
is there is not computed twice.
"""

import argparse
from pathlib import Path

import yaml

from hqdm_cli import console
from pipelines import runner
from pipelines.config import to_dict
from pipelines.digits import CHECKPOINT
from pipelines.plans import Recipe
from pipelines.stages import load
from pipelines.store import Store

PUBLISHED = to_dict(Recipe())
# Name: method, variant, options of the plan, changes of its recipe; shares of trajectories and of images where not 1.
ROWS = {
    "auto": ("hqdm", "auto", {}, {}),
    "published rates": ("hqdm", "auto", {}, {**PUBLISHED, "base_weight": "float", "headroom": 1.3}),
    "adapters at the published rate": ("hqdm", "auto", {}, {"lora_rate_divisor": 2500.0}),
    "biases fixed": ("hqdm", "auto", {}, {"trains": ["adapters", "weight_scales", "activation_scales", "zero_points"]}),
    "adapters fixed": (
        "hqdm", "auto", {}, {"trains": ["weight_scales", "activation_scales", "zero_points", "biases"]},
    ),
    "activation scales by absolute rates": (
        "hqdm", "auto", {}, {"relative_scales": False, "activation_scale_rate": 5e-4},
    ),
    "no moving average": ("hqdm", "auto", {}, {"ema": 0.0}),
    "losses of all timesteps as they are": ("hqdm", "auto", {}, {"weighting": "none"}),
    "adapters on the quantised weight": ("hqdm", "auto", {}, {"base_weight": "quantised"}),
    "a factor on weight scales for each timestep": ("hqdm", "auto", {}, {"weight_factors": True}),
    "no headroom at 8 bits": ("hqdm", "auto", {}, {"headroom": 1.0}),
    "the systematic error not counted": ("hqdm", "auto", {"bias": "0"}, {}),
    "centring and scaling tried": ("hqdm", "auto", {"centring": "true", "scaling": "true"}, {}),
    "half the trajectories, twice the images": ("hqdm", "auto", {}, {}, 0.5, 2),
    "sites as published (hqdm/tuned)": ("hqdm", "tuned", {}, {}),
    "sites by SQNR (hqdm/ours), these rates": ("hqdm", "ours", {}, "tuned"),
}  # fmt: skip
SHOWN = {"psnr": "PSNR dB", "fd_digits": "FD(digits)", "sfd_digits": "sFD(digits)", "is": "IS(digits)",
         "precision": "precision"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, default=Path("runs/tricks"))
    parser.add_argument("--bits", default="w4a3")
    parser.add_argument("--count", type=int, default=300, help="images of each row")
    parser.add_argument("--trajectories", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", help="some of the rows, with semicolons")
    options = parser.parse_args()
    store = Store(options.workspace)
    rows = []
    with console.Progress() as progress:

        def make(stage: str, chosen: dict[str, str], **values):
            config = load(stage).Config(**values)
            if stage == "score":
                config = load(stage).with_hashes(config)
            return runner.make(store, stage, config, chosen, progress).artifact

        def scored(source: str, maker):
            sample = make("sample", {"source": maker.id}, source=source, count=options.count)
            return make("score", {"samples": sample.id})

        model = runner.make(store, "model", runner.model_config(CHECKPOINT), {}, progress).artifact
        profile = make("profile", {"model": model.id})
        scored("teacher", model)
        tuned = None
        for name in options.rows.split(";") if options.rows else ROWS:
            method, variant, chosen, changes, *rest = ROWS[name]
            plan = make(
                "plan", {"profile": profile.id}, method=method, variant=variant, bits=options.bits, options=chosen
            )
            tuned = tuned or yaml.safe_load(plan.file("plan.yaml").read_text())["recipe"]
            if changes:
                values = yaml.safe_load(plan.file("plan.yaml").read_text())
                values["recipe"] |= tuned if changes == "tuned" else changes
                edited = options.workspace / f"{options.bits} {name}.yaml"
                edited.write_text(yaml.safe_dump(values, sort_keys=False))
                config = runner.edited_plan(edited)
                plan = runner.make(store, "plan", config, {"profile": profile.id}, progress).artifact
            share, larger = rest or (1, 1)
            student = make(
                "distill", {"plan": plan.id}, trajectories=int(options.trajectories * share),
                batch=options.batch * larger,
            )  # fmt: skip
            score = scored("int", make("export", {"distill": student.id}))
            rows.append({"changed": name} | figures(score))
    for line in console.markdown(rows):
        print(line)


def figures(score) -> dict:
    """Those of SHOWN that the score has."""
    return {title: round(score.figures[key], 3) for key, title in SHOWN.items() if score.figures.get(key) is not None}


if __name__ == "__main__":
    main()
