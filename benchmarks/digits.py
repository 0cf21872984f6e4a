"""Methods by bit widths on the embedded model: the README's table.

    python -m benchmarks.digits --count 1000

Every cell is a chain of artifacts in the workspace `runs/table`: plan, distill, export, sample, score, all with the
same
seeds. What is there is not computed twice, so the table can be stopped and gone on with at any moment.
"""

import argparse
from pathlib import Path

from hqdm_cli import console
from pipelines import runner
from pipelines.digits import CHECKPOINT
from pipelines.report.table import collect
from pipelines.stages import load
from pipelines.store import Store

METHODS = ("efficientdm", "hqdm:ours")
BITS = ("w8a8", "w4a4", "w4a3", "w3a3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, default=Path("runs/table"))
    parser.add_argument("--count", type=int, default=1000, help="images of each row")
    parser.add_argument("--trajectories", type=int, default=20, help="of each distillation")
    parser.add_argument("--methods", default=",".join(METHODS), help="method or method:variant, with commas")
    parser.add_argument("--bits", default=",".join(BITS))
    parser.add_argument("--sources", default="int", help="fake, int or both, with commas; their images are equal")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    store = Store(options.workspace)

    with console.Progress() as progress:

        def make(stage: str, chosen: dict[str, str] | None = None, **values):
            config = load(stage).Config(**values)
            if stage == "score":
                config = load(stage).with_hashes(config)
            outcome = runner.make(store, stage, config, chosen or {}, progress)
            return outcome.artifact

        def images(source: str, maker) -> None:
            sample = make("sample", {"source": maker.id}, source=source, count=options.count, seed=options.seed)
            make("score", {"samples": sample.id})

        model = runner.make(store, "model", runner.model_config(CHECKPOINT), {}, progress).artifact
        profile = make("profile", {"model": model.id}, seed=options.seed)
        images("teacher", model)
        for bits in options.bits.split(","):
            for name in options.methods.split(","):
                method, _, variant = name.partition(":")
                plan = make("plan", {"profile": profile.id}, method=method, variant=variant or None, bits=bits)
                student = make("distill", {"plan": plan.id}, trajectories=options.trajectories, seed=options.seed)
                exported = make("export", {"distill": student.id})
                for source in options.sources.split(","):
                    images(source, exported if source == "int" else student)
    rows = [{key: value for key, value in row.items() if key != "samples"} for row in collect(store)]
    for line in console.markdown(rows):
        print(line)


if __name__ == "__main__":
    main()
