"""What a process of its own does in tests/test_devices.py: python tests/placed.py WORKSPACE FOLDER METHOD…

`--device cuda` is here a device that is none (tests/elsewhere.py), which a process cannot get rid of again. Students
are distilled and images sampled on it and on the processor, and what became of both is written down.
"""

import csv
import json
import sys
from pathlib import Path

import torch
from elsewhere import DEVICE, Mixed, Reached
from roads import STEPS, make
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines import runner
from pipelines.distillation import training
from pipelines.kernels import cuda
from pipelines.quant import layers
from pipelines.stages import load
from pipelines.workspace.store import Store

COURSE = {"trajectories": 1, "batch": 2, "save_every": 2}


def on_device(store: Store, stage: str, chosen: dict, **options):
    """A stage's artifact, made on the device."""
    config = load(stage).Config(device="cuda", **options)
    with Reached():
        return runner.make(store, stage, config, chosen, force=True).artifact


def mixed(store: Store, plan: str) -> list[str]:
    """What is said where what these functions make is left on the processor."""
    said = []
    places = [(layers.QuantLayer, "quantised"), (layers, "activation_codes"), (training, "noise_of")]
    for owner, name in places:
        usual = getattr(owner, name)

        def lost(*args, usual=usual, **kwargs):
            found = usual(*args, **kwargs)
            found, *rest = found if isinstance(found, tuple) else (found,)

            class Kept(torch.Tensor):
                to = lambda self, *_: self.as_subclass(torch.Tensor)  # noqa: E731

            found = found.as_subclass(Kept) if found.device.type == "cpu" else found.cpu()
            return (found, *rest) if rest else found

        setattr(owner, name, lost)
        try:
            on_device(store, "distill", {"plan": plan}, **COURSE)
            said.append("nothing")
        except Mixed as fault:
            said.append(str(fault))
        setattr(owner, name, usual)
    return said


def main(workspace: str, folder: str, *methods: str) -> None:
    store, seen = Store(Path(workspace)), {}
    usual = cuda.place_of
    cuda.place_of = lambda name: DEVICE if name == "cuda" else usual(name)
    cuda.name_of = lambda device: device.type
    for word in methods:
        method, _, variant = word.partition("/")
        plan = make(store, "plan", method=method, variant=variant or None).id
        here = make(store, "distill", {"plan": plan}, **COURSE)
        there = on_device(store, "distill", {"plan": plan}, **COURSE)
        rows = [csv.DictReader((artifact.path / "losses.csv").open()) for artifact in (here, there)]
        losses = [[float(row["loss_per_image"]) for row in some] for some in rows]
        seen[f"distill {method}"] = {"device": there.figures["device"], "here": losses[0], "there": losses[1]}
    for source in ("teacher", "fake"):
        chosen = {"source": there.id} if source == "fake" else {}
        options = {"source": source, "count": 3, "batch": 2, "steps": STEPS}
        here, there_too = make(store, "sample", chosen, **options), on_device(store, "sample", chosen, **options)
        seen[f"sample {source}"] = {"device": there_too.figures["device"], "digest": here.digest == there_too.digest}
    seen["mixed"] = mixed(store, plan)
    Path(folder, "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    with sdpa_kernel(SDPBackend.MATH):  # the one that the device has
        main(*sys.argv[1:])
