"""Every folder of benchmarks/results/cifar10/: which comparison it holds, and all of them made.

    python -m benchmarks.cifar10.tables --data folder          # all; goes on where it was stopped
    python -m benchmarks.cifar10.tables --data folder --only large seeds
    python -m benchmarks.cifar10.tables                        # where no cells can be made: the committed tables

Each is a call of `benchmarks.cifar10.run` with the words below. DATA is needed until WORK has the test images.
"""

import argparse
from pathlib import Path

from benchmarks.cifar10 import reference, run, widths

PICTURE = run.ROOT / "docs/pictures/cifar10-widths.png"
DIT = "--teacher dit --count 500 --workspace runs/cifar10/dit"
THREE = "hqdm/auto hqdm/code efficientdm"  # the close calls
STARTS = "efficientdm:recipe.activation_scale_from=trajectory hqdm/code:recipe.activation_scale_from=trajectory"
TUNED = "hqdm/tuned efficientdm/tuned quest/tuned mpq_dm/tuned double_hadamard/tuned mpq_dm/tuned:mixed=false"
VARIANTS = (
    f"{TUNED} lsq/tuned double_hadamard/distilled rtn/search smoothquant/search outlier_suppression/search "
    "hadanorm:convolutions=rotated q_diffusion:shortcuts=float"
)
# What was changed after the tables of some widths were made.
MENDED = f"{THREE} hqdm/ours mpq_dm tfmq dmq hadanorm rtn smoothquant outlier_suppression"
PARTS = " ".join(
    f"hqdm/auto:{part}" for part in ("orders=none", "orders=32", "signs=false", "double=false", "quantiser=symmetric")
)

TABLES = {
    "seeds": f"--methods {THREE} --bits w4a4,w4a3,w3a3 --seeds 0 1 2",
    **{bits: f"--bits {bits}" for bits in run.BITS.split(",")},  # every method
    "w4a8": f"--methods {' '.join(run.METHODS)} q_diffusion:shortcuts=float --bits w4a8",
    "mended": f"--methods {MENDED} --bits w8a8,w4a8,w8a4,w2a4",
    "large": f"--methods {THREE} --bits w4a4,w4a3,w3a3 --count 10000",
    "large-widths": f"--methods {THREE} --bits w8a8,w4a8,w8a4,w2a4 --count 10000",
    "large-w4a3": "--methods hqdm double_hadamard quest lsq apq_dm q_diffusion ptq4dm --bits w4a3 --count 10000",
    "large-w4a3-more": "--methods mpq_dm dmq smoothquant tfmq hadanorm ptqd outlier_suppression rtn --bits w4a3 "
    "--count 10000",
    "large-w4a4": "--methods hqdm double_hadamard quest lsq mpq_dm dmq smoothquant tfmq hadanorm ptqd apq_dm ptq4dm "
    "rtn --bits w4a4 --count 10000",
    "variants": f"--methods {VARIANTS} --bits w4a4,w4a3",
    "variants-w3a3": f"--methods {TUNED} --bits w3a3",
    "w3a3-more": "--methods hadanorm:convolutions=rotated rtn/search outlier_suppression/search lsq/tuned "
    "double_hadamard/distilled --bits w3a3",
    "tuned": "--methods hqdm/tuned efficientdm/tuned mpq_dm/tuned mpq_dm/tuned:mixed=false smoothquant/search "
    "--bits w4a4,w4a3,w3a3 --seeds 0 1 2",
    "tuned-others": "--methods dmq/search apq_dm:groups=10 ptqd/tuned tfmq/tuned q_diffusion/tuned "
    "ptq4dm/reconstructed --bits w4a4,w4a3,w3a3",
    "seconds": "--methods hqdm/auto --bits w4a4,w4a3,w3a3 --trajectories 16",  # in the seconds that code takes
    "searched": "--methods hqdm/auto --bits w4a4,w4a3,w3a3 --trajectories 3",  # with the search charged, too
    "longer": "--methods hqdm/code efficientdm --bits w4a3 --trajectories 160",
    "start": f"--methods {STARTS} --bits w4a3,w4a4 --seeds 0 1 2",
    "start-longer": f"--methods {STARTS} --bits w4a3 --trajectories 160",
    "orders": "--methods hqdm/code:order=8 hqdm/code:order=16 hqdm/code:order=32 hqdm/code:order=64 --bits w4a4,w4a3",
    "double": "--methods hqdm/code double_hadamard/distilled --bits w4a3,w3a3 --seeds 0 1 2",  # single against double
    "paper": "--methods hqdm/paper --bits w4a4,w4a3,w3a3",
    "tricks": "--from benchmarks/tricks.yaml --bits w4a3",
    "parts": f"--methods hqdm/auto {PARTS} hqdm/code hqdm/paper --bits w4a3",
    "signs": "--methods hqdm/auto:signs=false --bits w4a4,w4a3 --seeds 0 1 2",
    "guidance": "--methods hqdm/auto:recipe.guidance_signal=0 --bits w4a4,w4a3,w3a3",
    "budget": "--methods hqdm/auto:budget=1 hqdm/auto:budget=0.75 --bits w4a3",
    "images-16": "--methods hqdm/auto --bits w4a3 --trajectories 10 --images 16",
    "images-4": "--methods hqdm/auto --bits w4a3 --trajectories 40 --images 4",
    "dit": f"--methods {THREE} hadanorm rtn smoothquant double_hadamard --bits w4a4 {DIT}",
    "dit-tuned": "--methods hqdm/auto hqdm/tuned efficientdm/tuned double_hadamard/tuned quest/tuned "
    f"smoothquant/search mpq_dm/tuned --bits w4a4 {DIT}",
}


def words_of(folder: str) -> list[str]:
    """What `benchmarks.cifar10.run` is told to make a folder's table."""
    return [*TABLES[folder].split(), "--results", str(widths.RESULTS / folder)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's images; not needed again where WORK has them")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=[*TABLES], metavar="FOLDER", help="these folders")
    parser.add_argument("--dry-run", action="store_true", help="say which cells are missing")
    options = parser.parse_args(arguments)
    data = [] if options.data is None else ["--data", str(options.data)]
    if data or (reference.WORK / "cifar10-test.npz").exists():
        for folder in options.only:
            print(f"# {folder}: {TABLES[folder]}\n", flush=True)
            run.main([*words_of(folder), *data, *(["--dry-run"] if options.dry_run else [])])
            print(flush=True)
        if options.dry_run:
            return
        widths.main(["--picture", str(PICTURE)])
    else:
        print("The committed tables. --data FOLDER, or make benchmark-cifar10 DATA=FOLDER, makes them again: hours.\n")
    widths.main([])
    print()
    widths.main(["--tuned"])


if __name__ == "__main__":
    main()
