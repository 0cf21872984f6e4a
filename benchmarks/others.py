"""The same denoising step by others' quantisers: torchao, optimum-quanto, onnxruntime and OpenVINO beside hqdm.

    pip install --constraint constraints.txt torchao optimum-quanto onnx onnxscript onnxruntime openvino nncf
    python -m benchmarks.others                             # all that is installed, in the shape of LDM-4 ImageNet
    python -m benchmarks.others --only "openvino int8" "onnxruntime int8 static"
    python -m benchmarks.others --small --turns 2           # a 36th of the weights, to see that everything runs

Every contender is a process of its own, which loads its model from files and makes a step when it is asked to. torch's
fp32 (channels-last) and bfloat16 and hqdm's integers stay for the whole run; each of the others joins them for a round
of turns and leaves, so that every ratio is within turns of one round. What others need files for (an ONNX export, a
calibrated model) is made by a process before, and kept. The error is that of the prediction against fp32's on the same
input, in dB. Memory is the network's process, libraries included, first stage left out; an onnxruntime or OpenVINO
process has no torch in it. What is not installed or fails stands in the table with its reason.

Weights are random, hence so are the predictions: the errors rank arithmetic, not images. Static quantisers are
calibrated on noise at timesteps across the schedule, their ranges by their libraries' defaults.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.options import add_step_options, keep, kept_results
from pipelines.errors import HqdmError

MODEL = "cin256-v2"
SMALL = 32  # channels of the first level, where published LDM-4 has 192
SAMPLES = 8  # that static quantisers are calibrated on, a batch of one each
PATIENCE = 3600  # seconds that an answer may take; the slowest is a calibration
# What the others install, by the module that they import: the package that pip knows.
PACKAGES = {
    "torchao": "torchao", "optimum": "optimum-quanto", "onnx": "onnx", "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime", "openvino": "openvino", "nncf": "nncf",
}  # fmt: skip
INSTALL = "pip install --constraint constraints.txt"

Make = Callable[[int], Callable[[], Any]]  # of a batch, a step without arguments, which returns the prediction


@dataclass(frozen=True)
class Place:
    """What every contender of a run shares: the model's folder, one for prepared files, the timestep, the threads."""

    model: str
    files: str
    timestep: float | None
    threads: int


@dataclass(frozen=True)
class Contender:
    """One way to make the step. `integers` says which products run in integers, or which weights are stored as such."""

    name: str
    integers: str = ""
    needs: tuple[str, ...] = ()  # modules of PACKAGES
    runs_in_torch: ClassVar[bool] = True

    def prepare(self, place: Place) -> None:
        """Make the files that `load` reads, where they are not there yet; in a process of its own."""

    def load(self, place: Place) -> Make:
        """The model, ready to make steps."""
        raise NotImplementedError


def _noise(shape: Sequence[int], batch: int, seed: int = 0):
    """The input of a step, the same that `hqdm bench` takes for seed 0."""
    import torch

    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Ours(Contender):
    """A contender of `hqdm bench`: fp32, bf16 or, with the folder of an export, int."""

    kind: str = "fp32"
    export: str = ""

    def load(self, place):
        return self.step(place).of

    def step(self, place):
        from pipelines.memory import give_back
        from pipelines.stages.bench import Config, Step, floats

        config = Config(guidance=1.0)
        if self.kind == "bf16" and self.kind not in floats(config.place()):
            raise HqdmError("this processor has no instructions for bfloat16", "leave it out: --only names others")
        step = Step(self.kind, self.export or place.model, config, place.timestep)
        step.model.first_stage = None  # which a step has no use for, and the others' files do not have
        give_back(1 << 30)
        return step


@dataclass(frozen=True)
class InTorch(Contender):
    """A library that swaps quantised layers into the network; `weights` and `activations` are its words for them."""

    weights: str = "int8"
    activations: bool = True
    compiled: bool = False

    def load(self, place):
        import torch

        from pipelines.memory import give_back

        step = Ours("fp32").step(place)
        model = step.model

        def make(batch: int):
            x = _noise(model.info.shape, batch).to(memory_format=torch.channels_last)
            classes, timestep = torch.zeros(batch, dtype=torch.int64), torch.tensor(place.timestep)

            def call():
                with torch.no_grad():  # some of these tensors cannot be made under inference_mode
                    return model.predict(x, timestep, classes, 1.0)

            return call

        self.quantise(model)
        if self.compiled:
            import torch._inductor.config

            torch._inductor.config.freezing = True
            model.network.forward = torch.compile(model.network.forward)
        give_back(1 << 30)
        return make

    def quantise(self, model) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Torchao(InTorch):
    def quantise(self, model):
        import torch
        from torchao import quantization

        if self.activations:
            config = quantization.Int8DynamicActivationInt8WeightConfig()
        elif self.weights == "int8":
            config = quantization.Int8WeightOnlyConfig()
        else:  # their fast packings of 4 bits need other packages or a GPU; this one runs everywhere
            config = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))
        quantization.quantize_(model.network, config)


@dataclass(frozen=True)
class Quanto(InTorch):
    def quantise(self, model):
        import torch
        from optimum import quanto

        weights = {"int8": quanto.qint8, "int4": quanto.qint4}[self.weights]
        quanto.quantize(model.network, weights=weights, activations=quanto.qint8 if self.activations else None)
        if self.activations:
            with torch.no_grad(), quanto.Calibration():
                for x, timestep, classes in _calibration(model):
                    model.predict(x, timestep, classes, 1.0)
        quanto.freeze(model.network)


def _calibration(model) -> Iterator[tuple]:
    """Noise, timestep and class of SAMPLES steps across the schedule."""
    import torch

    from pipelines import diffusion
    from pipelines.stages.bench import STEPS

    known = sorted(diffusion.timesteps_of(diffusion.walker(model.info.schedule), model.info.schedule, STEPS))
    for sample in range(SAMPLES):
        timestep = known[round((len(known) - 1) * sample / (SAMPLES - 1))]
        classes = torch.tensor([sample % max(1, model.info.conditions)])
        yield _noise(model.info.shape, 1, 1 + sample), torch.tensor(float(timestep)), classes


@dataclass(frozen=True)
class FromOnnx(Contender):
    """A library that runs the network's ONNX file, or what it made of it."""

    runs_in_torch: ClassVar[bool] = False

    @staticmethod
    def file(place: Place, name: str) -> Path:
        """The main file of a prepared model."""
        return Path(place.files) / name / ("model.xml" if name.startswith("openvino") else "model.onnx")

    def prepare(self, place):
        if not self.file(place, "onnx").exists():
            self._kept(place, "onnx", lambda folder: _export_onnx(place, folder))
        self.convert(place)

    def convert(self, place: Place) -> None:
        """Make this contender's own files of the ONNX file."""

    @staticmethod
    def _kept(place: Place, name: str, write: Callable[[Path], None]) -> None:
        """A folder of files that is there whole or not at all."""
        folder, part = Path(place.files) / name, Path(place.files) / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        part.rename(folder)

    @staticmethod
    def feed(place: Place, batch: int) -> dict[str, Any]:
        """A step's input as arrays, from the values that went with the export: no torch is loaded for it."""
        import numpy as np

        with np.load(Path(place.files) / "onnx" / "inputs.npz") as kept:
            arrays = dict(kept)
        seeds = arrays.pop("noise")
        if batch > len(seeds):
            raise HqdmError(f"a batch of {batch} was not prepared for", "it takes 64 at most")
        arrays = {name.removeprefix("class0/"): np.repeat(value, batch, 0) for name, value in arrays.items()}
        return {"x": seeds[:batch], "timestep": np.array(place.timestep, np.float32)} | arrays

    @staticmethod
    def samples(place: Place) -> Iterator[dict[str, Any]]:
        """Inputs to calibrate on."""
        import torch

        from pipelines.models.denoiser import load_denoiser

        model = load_denoiser(Path(place.model))
        with torch.no_grad():
            for x, timestep, classes in _calibration(model):
                given = {name: value.numpy() for name, value in model.given(classes).items()}
                yield {"x": x.numpy(), "timestep": timestep.numpy()} | given


def _export_onnx(place: Place, folder: Path) -> None:
    """The network as ONNX with a batch of any size, and the inputs of a step beside it."""
    import numpy as np
    import onnx
    import torch

    from pipelines.models.denoiser import load_denoiser

    model = load_denoiser(Path(place.model))
    given = model.given(torch.zeros(2, dtype=torch.int64))
    names = list(given)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = model.network

        def forward(self, x, timestep, values):
            return model.family.call(self.network, x, timestep, dict(zip(names, values, strict=True)), 1.0)

    batch = torch.export.Dim("batch", min=1, max=64)
    file = folder / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(
            Network().eval(), (_noise(model.info.shape, 2), torch.tensor(0.0), list(given.values())), str(file),
            input_names=["x", "timestep", *names], output_names=["prediction"], dynamo=True, external_data=True,
            dynamic_shapes=({0: batch}, None, [{0: batch} for _ in names]), verbose=False,
        )  # fmt: skip
    # The exporter also notes the shapes of weights, which quantisers that transpose some of them stumble over.
    graph = onnx.load(file, load_external_data=False)
    del graph.graph.value_info[:]
    onnx.save(graph, file)
    rows = {f"class0/{name}": value[:1].numpy() for name, value in given.items()}
    np.savez(folder / "inputs.npz", noise=_noise(model.info.shape, 64).numpy(), **rows)


@dataclass(frozen=True)
class OnnxRuntime(FromOnnx):
    how: str = ""  # static, dynamic, or fp32 as exported

    def convert(self, place):
        name = f"onnxruntime-{self.how}"
        if self.how and not self.file(place, name).exists():
            self._kept(place, name, lambda folder: self._quantise(place, folder / "model.onnx"))

    def _quantise(self, place: Place, file: Path) -> None:
        from onnxruntime import quantization

        common = dict(weight_type=quantization.QuantType.QInt8, per_channel=True, use_external_data_format=True)
        source = str(self.file(place, "onnx"))
        if self.how == "dynamic":
            quantization.quantize_dynamic(source, str(file), op_types_to_quantize=["MatMul", "Gemm"], **common)
            return
        samples = self.samples(place)

        class Reader(quantization.CalibrationDataReader):
            def get_next(self):
                return next(samples, None)

        quantization.quantize_static(
            source, str(file), Reader(), activation_type=quantization.QuantType.QUInt8,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"], extra_options={"MatMulConstBOnly": True}, **common,
        )  # fmt: skip

    def load(self, place):
        import onnxruntime

        file = self.file(place, f"onnxruntime-{self.how}" if self.how else "onnx")

        held = []  # one session: another batch is another one, with its shapes fixed

        def make(batch: int):
            held.clear()
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = place.threads
            options.add_free_dimension_override_by_name("batch", batch)
            # Threads may spin in a step as they do by default, but not while another contender has its turn.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            held.append(onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]))
            feed = self.feed(place, batch)
            return lambda: held[0].run(None, feed)[0]

        return make


@dataclass(frozen=True)
class OpenVino(FromOnnx):
    precision: str = "f32"
    quantised: bool = False

    def convert(self, place):
        if self.quantised and not self.file(place, "openvino-int8").exists():
            self._kept(place, "openvino-int8", lambda folder: self._quantise(place, folder / "model.xml"))

    def _quantise(self, place: Place, file: Path) -> None:
        import nncf
        import openvino

        model = openvino.Core().read_model(self.file(place, "onnx"))
        samples = list(self.samples(place))
        # A fixed batch and the default scheme: NNCF's scheme for transformers with an open batch makes a model of this
        # shape that OpenVINO 2026.4.1 then refuses to compile (a reshape of one token's heads).
        model.reshape({name: list(value.shape) for name, value in samples[0].items()})
        quantised = nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples))
        openvino.save_model(quantised, file, compress_to_fp16=False)

    def load(self, place):
        import openvino

        core = openvino.Core()
        model = core.read_model(self.file(place, "openvino-int8" if self.quantised else "onnx"))
        held = []
        options = {
            "INFERENCE_PRECISION_HINT": self.precision, "INFERENCE_NUM_THREADS": place.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }  # fmt: skip

        def make(batch: int):
            held.clear()
            feed = self.feed(place, batch)
            model.reshape({name: list(value.shape) for name, value in feed.items()})
            request = core.compile_model(model, "CPU", options).create_infer_request()
            held.append(request)
            return lambda: next(iter(request.infer(feed).values()))

        return make


_LINEARS, _ALL = "linears, w8a8", "linears and convolutions, w8a8"
BASELINES = (
    Torchao("torchao int8 dynamic", _LINEARS, ("torchao",)),
    Torchao("torchao int8 weights", "weights of linears, w8", ("torchao",), activations=False),
    Torchao("torchao int4 weights", "weights of linears, w4", ("torchao",), weights="int4", activations=False),
    Quanto("quanto int8", _ALL, ("optimum",)),
    Quanto("quanto int8 weights", "weights, w8", ("optimum",), activations=False),
    Quanto("quanto int4 weights", "weights, w4", ("optimum",), weights="int4", activations=False),
    OnnxRuntime("onnxruntime fp32", "", ("onnx", "onnxscript", "onnxruntime")),
    OnnxRuntime("onnxruntime int8 dynamic", _LINEARS, ("onnx", "onnxscript", "onnxruntime"), "dynamic"),
    OnnxRuntime("onnxruntime int8 static", _ALL, ("onnx", "onnxscript", "onnxruntime"), "static"),
    OpenVino("openvino fp32", "", ("onnx", "onnxscript", "openvino")),
    OpenVino("openvino bf16", "", ("onnx", "onnxscript", "openvino"), "bf16"),
    OpenVino("openvino int8", _ALL, ("onnx", "onnxscript", "openvino", "nncf"), quantised=True),
)
# Only when named: torch.compile makes and builds hundreds of kernels first, which takes many minutes on few cores.
COMPILED = Torchao("torchao int8 dynamic, compiled", _LINEARS, ("torchao",), compiled=True)


class Failed(Exception):
    """Why a contender is out."""


def missing(contender: Contender) -> str | None:
    """What to install for a contender; None where all of it is there."""
    lacking = [PACKAGES.get(name, name) for name in contender.needs if not _installed(name)]
    return f"not installed: {INSTALL} {' '.join(lacking)}" if lacking else None


def _installed(module: str) -> bool:
    try:
        importlib.metadata.version(PACKAGES.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec(module) is not None


def versions(contenders: Sequence[Contender]) -> dict[str, str]:
    """Of the packages that some contenders need and that are there."""
    needed = [name for contender in contenders for name in contender.needs]
    return {
        PACKAGES.get(name, name): importlib.metadata.version(PACKAGES.get(name, name))
        for name in dict.fromkeys(needed)
        if _installed(name)
    }


class Process:
    """A contender in a process of its own. Failed tells why one cannot answer."""

    def __init__(self, contender: Contender, place: Place, only_prepare: bool = False, patience: float = PATIENCE):
        context = multiprocessing.get_context("spawn")
        self.name, self._patience = contender.name, patience
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, contender, place, only_prepare), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *fault: Any) -> None:
        self._connection.close()  # which ends a process that waits to be asked
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def answer(self) -> Any:
        """What the process says next."""
        if not self._connection.poll(self._patience):
            raise Failed(f"no answer in {self._patience:g} s")
        try:
            word, value = self._connection.recv()
        except (EOFError, OSError) as fault:
            self._process.join(5)
            code = self._process.exitcode
            raise Failed(f"its process ended with {code}{' (out of memory?)' if code == -9 else ''}") from fault
        if word == "failed":
            raise Failed(value)
        return value

    def ask(self, word: str, value: Any = None) -> Any:
        """`batch` N: get ready for it, make two steps, and answer with the prediction and memory; `step`: make one."""
        try:
            self._connection.send((word, value))
        except OSError:
            pass  # the process is gone: `answer` knows more
        return self.answer()


def serve(connection, contender: Contender, place: Place, only_prepare: bool) -> None:
    """What a contender's process does: get ready, then answer until the other end is closed."""
    os.dup2(2, 1)  # libraries that print are not to print into the table
    # diffusers imports some of the others where they are installed; no process has any that it does not measure.
    for name in PACKAGES:
        if name not in contender.needs:
            sys.modules.setdefault(name, None)
    try:
        from pipelines.memory import peak_bytes, resident_bytes, reuse_freed_memory

        reuse_freed_memory()
        if contender.runs_in_torch or only_prepare:
            import torch

            torch.set_num_threads(place.threads)
        if only_prepare:
            contender.prepare(place)
            connection.send(("prepared", None))
            return
        make = contender.load(place)
        connection.send(("ready", None))
        call = None
        while True:
            word, value = connection.recv()
            if word == "batch":
                call = None
                call = make(value)
                call()
                predicted = call()
                held = {"resident": resident_bytes(), "peak": peak_bytes()}
                connection.send(("batch", (_array(predicted), held)))
            else:
                call()
                connection.send(("step", None))
    except EOFError:
        return
    except Exception as fault:
        connection.send(("failed", _reason(fault)))
        raise


def _reason(fault: BaseException) -> str:
    """The first cause of a fault in one line of 300 characters at most, without colours of terminals and without the
    lines that only say where in a library's source it was.
    """
    while fault.__cause__ is not None:
        fault = fault.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(fault)).strip().splitlines()
    lines = [line for line in lines if not line.startswith("Exception from ")] or lines
    return f"{type(fault).__name__}: {lines[0][:300] if lines else 'without a word'}"


def _array(predicted: Any):
    """A prediction as fp32 numbers outside torch."""
    import numpy as np

    return np.asarray(predicted.float() if hasattr(predicted, "float") else predicted, dtype=np.float32)


def sqnr_db(exact, found) -> float | None:
    """10·log₁₀(Σε² / Σ(ε − ε̂)²) of two arrays; None where they are the same."""
    signal, noise = (exact.astype(float) ** 2).sum(), ((exact.astype(float) - found) ** 2).sum()
    return None if noise == 0 else float(10 * math.log10(signal / noise))


@dataclass
class Rounds:
    """What was measured: for each baseline and batch the seconds of everyone in that round, and what each costs.

    seconds: baseline → batch → contender → seconds. sqnr, memory: contender → batch → dB; → bytes at the first batch.
    failed: baseline → where → why. prepared: baseline → seconds.
    """

    seconds: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    sqnr: dict[str, dict[str, float | None]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    integers: dict[str, str] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    prepared: dict[str, float] = field(default_factory=dict)

    def forget(self, name: str) -> None:
        """Everything of one contender, which is about to be measured anew."""
        for values in (self.seconds, self.sqnr, self.memory, self.integers, self.failed, self.prepared):
            values.pop(name, None)


def measure(
    own: Sequence[Contender], baselines: Sequence[Contender], place: Place, batches: Sequence[int], turns: int,
    rounds: Rounds, kept: Callable[[Rounds], None] = lambda rounds: None, told: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Rounds of turns: `own`, the first of which is what errors are told against, with each of the baselines.

    A baseline that fails is in `rounds.failed`; one of `own` that fails is a HqdmError. `kept` is called after each.
    """
    from contextlib import ExitStack

    with ExitStack() as stack:
        staying = {}
        try:
            for contender in own:
                staying[contender.name] = stack.enter_context(Process(contender, place))
                staying[contender.name].answer()
        except Failed as fault:
            raise HqdmError(f"{contender.name}: {fault}", "run it alone with `hqdm bench`") from fault
        exact = {}
        for contender in baselines:
            rounds.forget(contender.name)
            rounds.integers |= {each.name: each.integers for each in (*own, contender)}
            failed = rounds.failed.setdefault(contender.name, {})
            where = "load"
            try:
                if why := missing(contender):
                    raise Failed(why)
                told(f"{contender.name}: getting ready")
                if type(contender).prepare is not Contender.prepare:
                    begun = time.perf_counter()
                    with Process(contender, place, only_prepare=True) as preparing:
                        preparing.answer()
                    rounds.prepared[contender.name] = time.perf_counter() - begun
                with Process(contender, place) as guest:
                    guest.answer()
                    for batch in batches:
                        where = f"batch {batch}"
                        told(f"{contender.name}: {where}")
                        _round(staying, contender.name, guest, batch, turns, rounds, exact)
            except Failed as fault:
                failed[where] = str(fault)
                told(f"{contender.name}: {fault}")
            kept(rounds)


def _round(
    staying: dict[str, Process], name: str, guest: Process, batch: int, turns: int, rounds: Rounds, exact: dict
) -> None:
    """The turns of one baseline at one batch."""
    from pipelines import speed

    everyone = {**staying, name: guest}
    for each, process in everyone.items():
        predicted, held = process.ask("batch", batch)
        exact.setdefault(batch, predicted)  # of the first, in the first round
        if predicted.shape != exact[batch].shape:
            raise Failed(f"predicts {predicted.shape} instead of {exact[batch].shape}")
        rounds.memory.setdefault(each, held)  # of its first batch
        rounds.sqnr.setdefault(each, {})[str(batch)] = sqnr_db(exact[batch], predicted)
    runs = {each: lambda process=process: process.ask("step") for each, process in everyone.items()}
    rounds.seconds.setdefault(name, {})[str(batch)] = speed.in_turns(runs, turns)


def lines_of(rounds: Rounds, integers: str) -> list[str]:
    """The table as Markdown: `integers` is the contender that the others are held against. Own contenders take part in
    every round, and their times are of all of them.
    """
    from pipelines import speed

    pooled: dict[str, dict[str, dict[str, list[float]]]] = {}  # contender → batch → whose → seconds
    for by_batch in rounds.seconds.values():
        for batch, taken in by_batch.items():
            for each, seconds in taken.items():
                mine = pooled.setdefault(each, {}).setdefault(batch, {})
                for what, paired in (("own", seconds), ("fp32", taken["fp32"]), ("int", taken[integers])):
                    mine.setdefault(what, []).extend(paired)
    lines = [
        f"| contender | in integers | batch | ms | times fp32 | {integers} is faster by | SQNR, dB | resident, GB | "
        "peak, GB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    own = [name for name in pooled if name not in rounds.seconds]
    for name in [*own, *rounds.failed]:
        for batch, mine in pooled.get(name, {}).items():
            told = []
            for what in (("fp32", "own"), ("own", "int")):
                found = speed.ratio(mine[what[0]], mine[what[1]])
                told.append(f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f})")
            error = rounds.sqnr[name][batch]
            memory = [f"{rounds.memory[name][what] / 1e9:.2f}" for what in ("resident", "peak")]
            cells = [
                name, rounds.integers.get(name) or "none", batch, f"{speed.spread(mine['own'])['median']:.0f}", *told,
                "" if error is None else f"{error:.1f}", *memory,
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        for where, why in rounds.failed.get(name, {}).items():
            why = why.replace("|", "\\|")
            at = where.removeprefix("batch ") if where.startswith("batch ") else ""
            lines.append(f"| {name} | {rounds.integers.get(name) or 'none'} | {at} | {why} | | | | | |")
    return lines


def _latest_timestep(file: Path) -> float:
    """The largest that an export has a row of scales for, at which `hqdm bench` makes its steps."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor("tables.timesteps").max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [contender.name for contender in (*BASELINES, COMPILED)]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w8a8"], help="of hqdm's integers; the first is compared")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--small", action="store_true", help="the shape with a sixth of the channels")
    add_step_options(parser, turns=9, kept="files: 10 GB")
    options = parser.parse_args()

    import torch

    from benchmarks import speed
    from hqdm_cli import console
    from pipelines.doctor import findings
    from pipelines.workspace.store import Store

    name = f"{MODEL}-{SMALL}" if options.small else MODEL
    file, results = kept_results(options, f"others{'-small' if options.small else ''}")
    checkpoint, store = options.folder / f"{name}.ckpt", Store(options.folder / name)
    own = [Ours("fp32"), Ours("bf16", kind="bf16")]
    with console.Progress() as progress:
        for bits in options.bits:
            wanted = argparse.Namespace(method=options.method, bits=bits)
            export = speed.export_of(store, checkpoint, MODEL, wanted, progress, SMALL if options.small else None)
            own.append(Ours(f"hqdm {bits}", f"{_ALL[:-4]}{bits}", kind="int", export=str(export.path)))
    place = Place(
        str(store.ancestor(export, "model").path), str(options.folder / f"{name}-others"),
        _latest_timestep(export.file("model.safetensors")), torch.get_num_threads(),
    )  # fmt: skip
    chosen = [each for each in (*BASELINES, COMPILED) if each.name in (options.only or names[:-1])]
    rounds = Rounds(**results.get("rounds", {}))
    told = {finding.what: finding.found for finding in findings(options.folder)}
    here = f"{told['processor']}; {told['libraries']}; {place.threads} threads"

    def kept(rounds: Rounds) -> None:
        found = results.get("versions", {}) | versions(chosen)
        keep(file, {"machine": here, "model": name, "versions": found, "rounds": vars(rounds)})

    batches = [int(word) for word in options.batches.split(",")]
    measure(own, chosen, place, batches, options.turns, rounds, kept, lambda line: print(line, file=sys.stderr))
    found = ", ".join(f"{package} {version}" for package, version in versions(BASELINES).items())
    lines = ["# Others on the same step", "", f"{here}; {found}", "", f"{name}, random weights", ""]
    lines += [*lines_of(rounds, own[2].name), ""]
    file.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
