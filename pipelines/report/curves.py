"""Curves of a training: the loss over updates (paper, figure 4)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.report.pictures import COLOURS, figure_file


def loss_curve(losses: Mapping[str, Sequence[float]], timesteps: Sequence[int], path: Path) -> None:
    """Loss per image of every update of named runs, each (updates,), over trajectories of len(timesteps) steps in the
    sampler's order.

    Left: the mean of each trajectory. Right: the last timestep of each trajectory alone, which is what the paper's
    figure 4 shows (its step 0).
    """
    steps = len(timesteps)
    with figure_file(path, 7.2, 2.8, "Distillation loss") as figure:
        axes = figure.subplots(1, 2)
        for index, (name, values) in enumerate(losses.items()):
            table = np.asarray(values).reshape(-1, steps)  # (trajectories, steps)
            updates = (np.arange(len(table)) + 1) * steps
            colour = COLOURS[(index + 1) % len(COLOURS)]
            axes[0].plot(updates, table.mean(1), color=colour, label=name)
            axes[1].plot(updates, table[:, -1], color=colour, label=name)
        axes[0].set_title(f"mean over the {steps} timesteps")
        axes[1].set_title(f"timestep {int(timesteps[-1])}, the last of sampling")
        for axis in axes:
            axis.set_xlabel("updates")
            axis.set_ylabel("squared error of the guided prediction")
            axis.set_ylim(bottom=0)
            if len(losses) > 1:
                axis.legend()
