"""What one process of a job does in tests/test_processes.py: python tests/peers.py WORKSPACE FOLDER.

It distills one update and keeps the gradients that the optimiser sees, and extracts features of the digits.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipelines import processes, runner
from pipelines.metrics.extractors import load_extractor
from pipelines.metrics.references import registered_reference
from pipelines.workspace.store import Store


def gradients_of(work) -> dict[str, torch.Tensor]:
    """The gradients of the first update that `work` makes, by the parameters' places."""
    seen: dict[str, torch.Tensor] = {}
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        if not seen:
            groups = (group["params"] for group in self.param_groups)
            flat = [parameter.grad for group in groups for parameter in group]
            seen.update({str(place): grad.clone() for place, grad in enumerate(flat) if grad is not None})
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = watched
    try:
        work()
    finally:
        torch.optim.AdamW.step = step
    return seen


def features_of(folder: Path) -> dict[str, torch.Tensor]:
    images = registered_reference("digits").images.images
    return load_extractor("digits").features(images, kept=folder)._asdict()


def one_update(store: Store, seed: int = 7) -> None:
    config = runner.stages.load("distill").Config(trajectories=1, steps=1, batch=5, seed=seed)
    runner.make(store, "distill", config)


def main(workspace: str, folder: str) -> None:
    store, crew = Store(workspace), processes.crew()

    def distilled():
        if crew.leads:
            one_update(store)
            crew.told(None)
        else:
            runner.follow()

    save_file(gradients_of(distilled), Path(folder) / f"gradients-{crew.rank}.safetensors")
    with processes.sharing(crew):
        save_file(features_of(Path(folder) / "kept"), Path(folder) / f"features-{crew.rank}.safetensors")
    processes.part_company()


if __name__ == "__main__":
    main(*sys.argv[1:])
