"""A student's step as a CUDA graph: recorded once for a batch, replayed at every timestep.

What is recorded is `Body`: tensors that stay where they are go in and come out, and everything that differs from one
timestep to the next is read on the device, at a row that is itself in device memory: the timestep that the network is
told, the quantisers' scales and zero-points, the weights' factors, the strength of guidance. A replay is three copies
into those tensors and one launch. Python, the scheduler, PTQD's correction and the choice of a graph stay outside.

There is one graph for each number of images and, where a student's shares of guidance say so, another of half the rows
for the timesteps at which nothing is guided. Without a device, where Triton's interpreter stands in for one, the body
is called instead of replayed: all of this but `_record` is then what runs, and what tests hold against plain calls.

When a recording fails, something in the network asked the device for a number (`.item()`), or sent it one that lay in
pageable memory (`torch.tensor(…).to(device)`). The body runs three times before it is recorded, since at the first call
Triton tries its tiles, cuBLAS takes its workspace and weights are unpacked; none of that may happen in a recording.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from pipelines.models.denoiser import Denoiser

WARM_UP = 3


class Body:
    """A guided prediction of a batch, `output` (N, C, H, W) fp32, from tensors that stay where they are.

    x: (N, C, H, W) fp32. conditions: (N,) int64. row: (1,) int32, which of `timesteps`; all on one device. halved:
    whether guidance has strength 1, and the unconditional half is left out.
    """

    def __init__(self, steps: "ReplayedSteps", count: int, halved: bool):
        shape = (count, *steps.model.info.shape)
        self.steps, self.halved = steps, halved
        self.x = torch.zeros(shape, device=steps.device).contiguous(memory_format=torch.channels_last)
        self.conditions = torch.zeros(count, dtype=torch.int64, device=steps.device)

    def __call__(self) -> torch.Tensor:
        steps = self.steps
        timestep = steps.told.index_select(0, steps.row)[0]
        strength = 1.0 if self.halved else steps.strengths.index_select(0, steps.row).view(-1, 1, 1, 1)
        with nullcontext() if steps.rows is None else steps.model.network.timestep_tables.reading(steps.rows):
            return steps.model.guided(self.x, timestep, self.conditions, steps.guidance, strength)


def _record(body: Callable[[], torch.Tensor], pool) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of a body's work, and where a replay leaves its output until another graph of the pool is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = body()
    return graph, output


class ReplayedSteps:
    """A denoiser on a device, of which `diffusion.sample` asks predictions at known timesteps and one guidance.

    The network must lie on `device`, and weights must not be forgotten while this is used: graphs hold addresses.
    """

    @torch.inference_mode()
    def __init__(self, model: Denoiser, timesteps: Sequence[float], guidance: float, device: torch.device):
        self.model, self.guidance, self.device = model, guidance, device
        self.correction = model.correction
        told = torch.tensor(timesteps, dtype=torch.float32)
        self._places = {float(timestep): place for place, timestep in enumerate(told)}
        self.told, self.row = told.to(device), torch.zeros(1, dtype=torch.int32, device=device)
        self._strengths = [float(model.strength(guidance, timestep)) for timestep in told]
        self.strengths = torch.tensor(self._strengths).to(device)
        self.rows = None
        if (tables := getattr(model.network, "timestep_tables", None)) is not None:
            unit = model.family.timestep_unit
            # What a network is told, told back: the rows that a plain call would look up.
            self.rows = tables.rows((told / unit * unit).tolist(), device)
            self.row = self.rows.row
        self._bodies: dict[tuple[int, bool], tuple[Body, Callable[[], torch.Tensor]]] = {}
        self._pool = None

    @torch.inference_mode()
    def predict(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: torch.Tensor, guidance: float
    ) -> torch.Tensor:
        """As `Denoiser.predict`. KeyError for a timestep and ValueError for a guidance that it was not made for."""
        if guidance != self.guidance:
            raise ValueError(f"made for guidance {self.guidance}, not {guidance}")
        place = self._places[float(timestep)]
        body, run = self._of(len(x), self._strengths[place] == 1)
        self.row.fill_(place)
        body.x.copy_(x)
        body.conditions.copy_(conditions)
        guided = run().clone()
        return guided if self.correction is None else self.correction.corrected(guided, timestep)

    def forget(self) -> None:
        """Free the graphs and their memory: before weights are forgotten, of which they hold addresses."""
        self._bodies.clear()

    def _of(self, count: int, halved: bool) -> tuple[Body, Callable[[], torch.Tensor]]:
        """The body for a number of images, and what has its output computed."""
        if (count, halved) not in self._bodies:
            body = run = Body(self, count, halved)
            if self.device.type == "cuda":
                graph, output = _record(body, self._pool)
                self._pool = graph.pool()

                def run():
                    graph.replay()
                    return output

            self._bodies[count, halved] = body, run
        return self._bodies[count, halved]
