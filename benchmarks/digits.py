"""Methods by bit widths on the embedded model: the README's table.

    python -m benchmarks.digits --count 1000

A comparison (pipelines/compare.py) in the workspace `runs/table`: every cell is a chain of artifacts on the same work.
What is there is not computed twice, so the table can be stopped and gone on with at any moment.
"""

import argparse
from pathlib import Path

from hqdm_cli import console
from pipelines import compare
from pipelines.digits import CHECKPOINT
from pipelines.report.table import collect
from pipelines.store import Store

METHODS = ("efficientdm", "hqdm/ours")
BITS = ("w8a8", "w4a4", "w4a3", "w3a3")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, default=Path("runs/table"))
    parser.add_argument("--count", type=int, default=1000, help="images of each row")
    parser.add_argument("--trajectories", type=int, default=20, help="of each distillation")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="method[/variant][:option=value,…] …")
    parser.add_argument("--bits", default=",".join(BITS))
    parser.add_argument("--seeds", default="0", help="of distillation and images, with commas")
    options = parser.parse_args()
    asked = compare.comparison(
        options.methods, options.bits.split(","), [int(seed) for seed in options.seeds.split(",")],
        {"distill": {"trajectories": options.trajectories}, "sample": {"count": options.count}},
    )  # fmt: skip
    store = Store(options.workspace)
    with console.Progress() as progress:
        model = compare.model_of(store, str(CHECKPOINT), progress).artifact
        result = compare.compare(store, asked, model, progress)
    mine = {cell.chain["sample"].id for cell in result.cells if "sample" in cell.chain}
    rows = [row for row in collect(store) if row["samples"] in mine]
    for line in console.markdown([{key: value for key, value in row.items() if key != "samples"} for row in rows]):
        print(line)
    console.say(f"{result.outcome.artifact.path / 'table.md'} has deviations, losses and pictures")
    for cell in result.failed:
        console.say(f"failed: {cell.name}: {cell.failed}: {cell.error}")
    return 1 if result.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
