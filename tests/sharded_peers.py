"""What one process of a job does in tests/test_sharding.py: python tests/sharded_peers.py WORKSPACES FOLDER.

It distills and samples with whole weights and with divided ones, is stopped on the way and goes on, and writes what it
saw: bytes of all tensors between updates, and what is left when it is done.
"""

import gc
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from roads import STEPS
from torch.distributed.tensor import DTensor

from pipelines import processes, runner
from pipelines.errors import HqdmError
from pipelines.workspace.store import Store

ON = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
COURSE = {"trajectories": 1, "batch": 3, "save_every": 1}
METHODS = {"hqdm": "tuned", "efficientdm": None, "quest": None}  # float base, integers as base, weights that train


def bytes_of_tensors() -> int:
    """Of everything in this process that is a tensor, each memory once."""
    gc.collect()
    found = {}
    for value in gc.get_objects():
        kind = type(value)  # isinstance would ask what torch has deprecated for its class
        if issubclass(kind, torch.Tensor) and not issubclass(kind, DTensor) and value.device.type == "cpu":
            memory = value.untyped_storage()
            found[memory.data_ptr()] = max(memory.nbytes(), found.get(memory.data_ptr(), 0))
    return sum(size for address, size in found.items() if address)


class Watched:
    """While it is entered the optimiser's steps are watched: bytes of tensors before the last, a stop before `stop`."""

    def __init__(self, stop: int | None = None):
        self.stop, self.steps, self.bytes = stop, 0, 0

    def __enter__(self):
        self._step = step = torch.optim.AdamW.step

        def watched(optimiser, *args, **kwargs):
            self.steps += 1
            if self.steps == self.stop:
                raise HqdmError("stopped")
            if self.steps == STEPS:
                self.bytes = bytes_of_tensors()
            return step(optimiser, *args, **kwargs)

        torch.optim.AdamW.step = watched
        return self

    def __exit__(self, *_):
        torch.optim.AdamW.step = self._step


def together(crew, root: str, stage: str, divided: bool, stop: int | None = None, **options) -> Watched:
    """One stage by all processes; a stop leaves the interrupted run, and the processes together."""
    os.environ.update(ON if divided else dict.fromkeys(ON, ""))
    stay, processes.part_company = processes.part_company, lambda: None
    config = runner.stages.load(stage).Config(**options)
    with Watched(stop) as seen:
        try:
            if crew.leads:
                runner.make(Store(Path(root)), stage, config)
                crew.told(None)
            else:
                runner.follow()
        except HqdmError as fault:
            assert fault.what == "stopped", fault
    processes.part_company = stay
    crew.gathered(None)
    return seen


def main(workspaces: str, folder: str) -> None:
    os.environ.update(ON)
    crew, seen = processes.crew(), {}
    for method in METHODS:
        for divided in (False, True):
            root = f"{workspaces}/{method}-{'divided' if divided else 'whole'}"
            seen[f"{method} {divided}"] = together(crew, root, "distill", divided, **COURSE).bytes
    for way in (True, False):  # what began with whole weights ends with divided ones, and the other way round
        root = f"{workspaces}/stopped-{'whole' if way else 'divided'}"
        together(crew, root, "distill", not way, stop=STEPS, **COURSE)
        if crew.leads and not way:
            shutil.copytree(root, f"{workspaces}/stopped-alone")
        together(crew, root, "distill", way, **COURSE)
    for source in ("teacher", "fake"):
        together(crew, f"{workspaces}/hqdm-divided", "sample", True, source=source, count=5, batch=2, steps=STEPS)
    processes.part_company()
    tasks = Path("/proc/self/task")
    seen["threads"] = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.exists() else []
    Path(folder, f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
