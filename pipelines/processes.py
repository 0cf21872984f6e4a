"""Several processes at one job, through Accelerate and torch.distributed: who they are and which share each has.

One process leads: it reads the command, decides, holds the locks and writes artifacts. The others follow: they wait for
a stage whose work can be shared, do their share of it beside the leader, and wait for the next. They meet in gloo,
which needs no GPU, and share the workspace's file system.

Shares keep the bits: batches of images are dealt out whole, so that what a batch computes does not depend on how many
processes there are. Only a sum over processes (the gradients) is rounded in another order than one process would.
"""

import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pipelines.errors import HqdmError, UsageError

T = TypeVar("T")

# Followers wait while the leader plans or reconstructs alone. A process that dies closes its connections, which the
# others see at once; so the time itself need not end anything.
PATIENCE = datetime.timedelta(days=30)
LAUNCHER = "HQDM_LAUNCHER"  # the process id of whoever started this one, which it does not outlive
WATCH_SECONDS = 1.0
FSDP = "ACCELERATE_USE_FSDP"  # Accelerate's word for weights that are divided among the processes

# What Accelerate's launcher may ask for and hqdm does not do: variable, values that ask for nothing, what it is, and
# the way out.
_NOT_DONE = (
    ("ACCELERATE_USE_DEEPSPEED", (), "DeepSpeed", "weights are divided by FSDP: accelerate launch --use_fsdp"),
    ("ACCELERATE_USE_MEGATRON_LM", (), "Megatron-LM", "weights are divided by FSDP: accelerate launch --use_fsdp"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", (), "a parallelism configuration",
     "processes share trajectories and images, and with FSDP weights: leave --use_parallelism_config out"),
    ("ACCELERATE_MIXED_PRECISION", ("no",), "mixed precision",
     "students train in fp32, whose integers are exact: --mixed_precision no"),
    ("ACCELERATE_DYNAMO_BACKEND", ("no",), "torch.compile", "--dynamo_backend no"),
)  # fmt: skip
# The same of FSDP's own settings.
_NOT_DONE_BY_FSDP = (
    ("FSDP_OFFLOAD_PARAMS", (), "weights kept on the processor", "--fsdp_offload_params false, or more processes"),
    ("FSDP_ACTIVATION_CHECKPOINTING", (), "activations computed again",
     "--fsdp_activation_checkpointing false, and a smaller --batch"),
    ("FSDP_IGNORED_MODULES", ("none",), "modules that stay whole", "leave fsdp_ignored_modules out"),
    ("FSDP_FORWARD_PREFETCH", (), "gathering weights ahead", "--fsdp_forward_prefetch false"),
)  # fmt: skip


class PeerLost(HqdmError):
    """Another process of the job ended, so that this one cannot go on."""


class Processes:
    """The processes of a job as one of them sees it. This class is a job of one process, which has all of it."""

    rank = 0
    count = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def dealt(self, items: Sequence[T]) -> list[T]:
        """This process's items: every count-th, so that neighbours, which take equally long, are at different ones."""
        return list(items[self.rank :: self.count])

    def part(self, total: int) -> slice:
        """This process's part of 0 … total - 1, in one piece; the parts differ by one at most."""
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def told(self, value: T) -> T:
        """The leader's value, at every process; what the others pass is not looked at."""
        return value

    def once(self, make: Callable[[], T]) -> T:
        """What the leader makes, at every process."""
        return self.told(make() if self.leads else None)

    def gathered(self, value: T) -> list[T]:
        """Every process's value by rank, at every process."""
        return [value]

    def add(self, tensors: Sequence[Any]) -> None:
        """Replace fp32 tensors in place by their sums over all processes, the same bits at each."""

    def mesh(self, device: Any) -> Any:
        """The processes as torch's DeviceMesh of one dimension, whose messages travel between tensors on a device."""
        raise HqdmError("one process has nobody to divide weights with", "start several: accelerate launch --use_fsdp")


ALONE = Processes()


class _Several(Processes):
    """More than one, met through Accelerate's state."""

    def __init__(self):
        import torch
        import torch.distributed as dist
        from accelerate import PartialState

        if divides_weights():  # imported later it would hold on to gloo's threads: see `part_company`
            import torch.distributed.fsdp
        if torch.cuda.is_available() and dist.is_nccl_available():  # tensors on GPUs travel between them
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
        state = PartialState(cpu=True, backend="gloo", timeout=PATIENCE)
        self._meshes: dict[str, Any] = {}
        self.rank, self.count = state.process_index, state.num_processes
        if self.count != asked():
            raise HqdmError(
                f"{asked()} processes were started and {self.count} met", "start them with hqdm --processes or torchrun"
            )

    def told(self, value: Any) -> Any:
        import torch.distributed as dist

        values = [value]
        with peers():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        values = [None] * self.count
        with peers():
            dist.all_gather_object(values, value)
        return values

    def add(self, tensors: Sequence[Any]) -> None:
        import torch
        import torch.distributed as dist

        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one message, however many tensors
        with peers():
            dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def mesh(self, device: Any) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        if device.type not in self._meshes:
            with peers():
                self._meshes[device.type] = init_device_mesh(device.type, (self.count,))
        return self._meshes[device.type]

    def leave(self) -> None:
        """Let go of the other processes, and of all threads that wait for them."""
        import gc

        import torch.distributed as dist

        gc.collect()  # weights that were divided hold on to the group
        for mesh in self._meshes.values():  # torch's caches hold on to meshes, which hold on to the group
            getattr(mesh, "_pg_registry", {}).clear()
        dist.destroy_process_group()


@contextmanager
def peers() -> Iterator[None]:
    """What torch and gloo raise where the connection to another process is gone becomes PeerLost."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as fault:
        lost = ("gloo", "connection", "closed", "reset by peer", "timed out")
        if not isinstance(fault, dist.DistError) and not any(word in str(fault).lower() for word in lost):
            raise
        raise PeerLost(
            "another process of this job ended", "it said why, unless it was killed; the same command goes on"
        ) from fault


_here = ALONE  # the processes that share the stage that runs now


def here() -> Processes:
    """Who shares the work of the stage that runs now: this process alone, unless `sharing` says otherwise."""
    return _here


@contextmanager
def sharing(crew: Processes) -> Iterator[None]:
    """Inside, `here` is the crew."""
    global _here
    _here = crew
    try:
        yield
    finally:
        _here = ALONE


def asked() -> int:
    """How many processes torchrun, or `launch`, has started for this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _asks(variable: str, nothing: Sequence[str] = ()) -> bool:
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "f", "no", "n", "off", *nothing)


def divides_weights() -> bool:
    """Whether Accelerate's configuration asks for FSDP."""
    return _asks(FSDP)


def check_settings() -> None:
    """UsageError for what Accelerate's launcher was told to do and hqdm does not do; it would pass in silence."""
    wanted = [*_NOT_DONE, *(_NOT_DONE_BY_FSDP if divides_weights() else ())]
    for variable, nothing, what, way_out in wanted:
        if _asks(variable, nothing):
            raise UsageError(f"{variable}={os.environ[variable]} asks for {what}, which hqdm does not do", way_out)
    if divides_weights() and (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UsageError(
            f"FSDP_VERSION={version}: hqdm divides weights by FSDP 2 alone",
            "--fsdp_version 2, or fsdp_version: 2 in Accelerate's configuration (accelerate config; accelerate "
            "to-fsdp2 converts one)",
        )


def divide_weights() -> bool:
    """Whether the stage that runs now divides its frozen weights among the processes that share it: the leader's word.
    UsageError where that is asked for and there is one process.
    """
    met = here()
    check_settings()
    asked_for = met.once(divides_weights)
    if asked_for and met.count == 1:
        raise UsageError(
            f"{FSDP} asks for weights that are divided among processes, and there is one",
            "start several: accelerate launch --use_fsdp --num_processes 2 (its --cpu starts one), or leave FSDP out",
        )
    return asked_for


_crew: Processes | None = None


def crew() -> Processes:
    """All processes of this job; they meet at the first call."""
    global _crew
    if _crew is None:
        _crew = _Several() if asked() > 1 else ALONE
    return _crew


def dismiss() -> None:
    """The leader's last word: there is nothing more to share."""
    try:
        if (met := crew()).leads:
            met.told(None)
    except PeerLost:  # then nobody waits for it
        pass
    finally:
        part_company()


def part_company() -> None:
    """Leave the other processes, which see this one gone where they wait for it; from now on it works alone.

    Every process owes this before it ends: the interpreter's own end meets gloo's threads now and then where they want
    its lock, and C++ aborts the process then, whose work was whole.
    """
    global _crew
    if _crew is not None and _crew.count > 1:
        _crew.leave()
    _crew = ALONE


def end_with_launcher() -> None:
    """Watch over whoever launched this process: where it was killed, this one ends too instead of working on unseen."""
    launcher = os.environ.pop(LAUNCHER, None)  # whatever this process starts has a launcher of its own
    if launcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(WATCH_SECONDS)
        os._exit(1)  # an artifact is whole or not there at any moment

    threading.Thread(target=watch, daemon=True).start()


def launch(count: int, command: Sequence[str]) -> int:
    """Run a command line of this interpreter (`-m hqdm_cli sample`) in `count` processes of this machine, as torchrun
    does; the exit code: 0, or that of the first process that failed, when the others have been ended.

    The machine's cores are divided among them unless OMP_NUM_THREADS says how many each has.
    """
    import logging
    import sys
    import tempfile

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if count < 1:
        raise UsageError(f"--processes cannot be {count}", "it takes 1 or more")
    if asked() > 1:
        raise UsageError(
            f"--processes {count} inside a job of {asked()} processes", "leave it out: torchrun has started them"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    os.environ[LAUNCHER] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say what went wrong
    try:
        with tempfile.TemporaryDirectory(prefix="hqdm-") as notes:  # torch's own folder for them is never removed
            config = LaunchConfig(
                min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=f"hqdm-{os.getpid()}", rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=0, monitor_interval=0.1,
                logs_specs=DefaultLogsSpecs(log_dir=notes),
            )  # fmt: skip
            elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as fault:
        first = min(fault.failures.values(), key=lambda failure: failure.timestamp)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode  # as a shell tells of a signal
    except SignalException as fault:
        return 128 + fault.sigval
    finally:
        os.environ.clear()
        os.environ.update(before)
    return 0
