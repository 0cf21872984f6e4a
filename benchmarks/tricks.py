"""What each part of `hqdm --variant auto` gives: the same student with one thing changed at a time, and what the
published rates make of the published placements.

    python -m benchmarks.tricks --bits w4a3
    python -m benchmarks.tricks --bits w4a3 --model benchmarks/cifar10/unet/model.ckpt --extractor cifar10 \
        --reference runs/cifar10/cifar10-test.npz --steps 10 --guidance 3 --workspace runs/cifar10/benchmark

Every row is a chain of artifacts in the workspace (plan, distill, export, sample, score) at the same seeds and the same
number of updates; a row that changes the recipe hands the plan back with that one key edited. What is there is not
computed twice.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hqdm_cli import console
from pipelines import runner
from pipelines.config import to_dict
from pipelines.digits import CHECKPOINT
from pipelines.methods import METHODS
from pipelines.plans import Recipe
from pipelines.quant.spec import Bits
from pipelines.stages import load
from pipelines.workspace.store import Store


@dataclass(frozen=True)
class Row:
    """recipe: its changes against the method's own, where they depend on the bits by a function; shares are of
    trajectories and of images where not 1.
    """

    method: str = "hqdm"
    variant: str = "auto"
    options: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] | Callable[[Bits], dict[str, Any]] = field(default_factory=dict)
    trajectories: float = 1
    images: int = 1


KEPT = ("base_weight", "headroom", "guidance_signal", "site_factors", "order", "momentum", "step")  # which are no rates
NONE = {"updates": "none", "ema": 0.0}
PUBLISHED = {name: value for name, value in to_dict(Recipe()).items() if name not in KEPT}
SCALES = ["weight_scales", "activation_scales", "zero_points"]
ROWS = {
    "auto": Row(),
    "not distilled": Row(recipe=NONE),
    "published rates": Row(recipe=PUBLISHED),
    "adapters at the published rate": Row(recipe={"lora_rate_divisor": 2500.0}),
    **{f"adapters at 1/{n} of the step": Row(recipe={"lora_rate_divisor": float(n)}) for n in (100, 40, 20, 5)},
    "a momentum shared by all timesteps": Row(recipe={"momentum": "shared"}),
    "adapters fixed": Row(recipe={"trains": [*SCALES, "biases"]}),
    "biases fixed": Row(recipe={"trains": ["adapters", *SCALES]}),
    "activation scales by absolute rates, factors too": Row(
        recipe={"relative_scales": False, "activation_scale_rate": 5e-4}
    ),
    "adapters on the quantised weight": Row(recipe={"base_weight": "quantised"}),
    "guided at all steps as asked": Row(recipe={"guidance_signal": 0.0}),
    "no moving average": Row(recipe={"ema": 0.0}),
    "losses of all timesteps as they are": Row(recipe={"weighting": "none"}),
    "no factor for each timestep": Row(recipe={"site_factors": False}),
    "a factor for each timestep and output": Row(recipe={"site_factors": False, "weight_factors": True}),
    "timesteps in the sampler's order": Row(recipe={"order": "trajectory"}),
    "neither factors nor a shuffled order": Row(recipe={"site_factors": False, "order": "trajectory"}),
    "in the sampler's order, with relations of features": Row(recipe={"order": "trajectory", "relation": 100.0}),
    "half the trajectories, twice the images": Row(trajectories=0.5, images=2),
    "no headroom at 8 bits": Row(recipe={"headroom": 1.0}),
    "the systematic error not counted": Row(options={"bias": "0"}),
    "no centring": Row(options={"centring": "false"}),
    "no scaling": Row(options={"scaling": "false"}),
    "neither centring nor scaling": Row(options={"centring": "false", "scaling": "false"}),
    "sites by SQNR (hqdm/ours), auto's recipe": Row(
        variant="ours", recipe=lambda bits: to_dict(METHODS["hqdm"].variants["auto"].recipe_at(bits))
    ),
    "hqdm/code, not distilled": Row(variant="code", recipe=NONE),
    "hqdm/code": Row(variant="code"),
    "hqdm/code, auto's recipe (hqdm/tuned)": Row(variant="tuned"),
    "efficientdm, not distilled": Row("efficientdm", "published", recipe=NONE),
    "efficientdm": Row("efficientdm", "published"),
    "efficientdm, auto's recipe (efficientdm/tuned)": Row("efficientdm", "tuned"),
}
SHOWN = {"psnr_mean_per_image": "PSNR dB", "fd": "FD", "sfd": "sFD", "is": "IS", "precision": "precision"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, default=Path("runs/tricks"))
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--extractor", help="of the scores; by the images' size where it is left out")
    parser.add_argument("--reference", help="images to score against; the extractor's own where it is left out")
    parser.add_argument("--bits", default="w4a3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300, help="images of each row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="the model's where it is left out")
    parser.add_argument("--trajectories", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="images of a trajectory")
    parser.add_argument("--rows", help="some of the rows, with semicolons")
    parser.add_argument("--list", action="store_true", help="say which rows there are")
    options = parser.parse_args()
    names = [name.strip() for name in options.rows.split(";")] if options.rows else list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no such row: {unknown[0]!r}; --list says which there are")
    if options.list:
        print("\n".join(names))
        return
    store = Store(options.workspace)
    drawn = {"steps": options.steps, "guidance": options.guidance}
    rows = []
    with console.Progress() as progress:

        def make(stage: str, chosen: dict[str, str], **values):
            config = load(stage).Config(**values)
            if stage == "score":
                config = load(stage).with_hashes(config)
            return runner.make(store, stage, config, chosen, progress).artifact

        def scored(source: str, maker):
            sample = make(
                "sample", {"source": maker.id}, source=source, count=options.count, seed=options.seed, **drawn
            )
            against = {"extractor": options.extractor, "reference_path": options.reference}
            return make("score", {"samples": sample.id}, **against)

        model = runner.make(store, "model", runner.model_config(options.model), {}, progress).artifact
        profile = make("profile", {"model": model.id}, **drawn)
        rows.append({"changed": "the teacher"} | figures(scored("teacher", model)))
        for name in names:
            row = ROWS[name]
            changes = row.recipe(Bits.parse(options.bits)) if callable(row.recipe) else row.recipe
            plan = make(
                "plan", {"profile": profile.id}, method=row.method, variant=row.variant, bits=options.bits,
                options=row.options,
            )  # fmt: skip
            if changes:
                values = yaml.safe_load(plan.file("plan.yaml").read_text(encoding="utf-8"))
                values["recipe"] |= changes
                edited = options.workspace / f"{options.bits} {name.replace('/', ' ')}.yaml"
                edited.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
                plan = runner.make(
                    store, "plan", runner.edited_plan(edited), {"profile": profile.id}, progress
                ).artifact
            student = make(
                "distill", {"plan": plan.id}, trajectories=max(1, round(options.trajectories * row.trajectories)),
                batch=options.batch * row.images, guidance=options.guidance, seed=options.seed,
            )  # fmt: skip
            rows.append({"changed": name} | figures(scored("int", make("export", {"distill": student.id}))))
    for line in console.markdown(rows):
        print(line)


def figures(score) -> dict:
    """Those of SHOWN that the score has, whatever its extractor; an empty cell where there is none."""
    own = {key.removesuffix(f"_{score.figures.get('extractor')}"): value for key, value in score.figures.items()}
    return {title: "" if own.get(key) is None else f"{own[key]:.3f}" for key, title in SHOWN.items()}


if __name__ == "__main__":
    main()
