"""Whole networks on the CUDA back end: the ε and the images of fake quantisation, bit for bit, where Triton's
interpreter stands in for a device and what is in floating point is the processor's; that a step asks the host for
nothing, which a CUDA graph could not hold; and, where there is a device, the graph itself.
"""

import copy
import json

import pytest
import torch
from roads import make, tiny_store, tiny_student
from safetensors.torch import save_file
from tiny import tiny_denoiser
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import speed as benchmark
from hqdm_cli.app import main
from pipelines import diffusion, doctor, speed
from pipelines.errors import HqdmError, NumericalFault, UsageError
from pipelines.kernels.layers import DeviceLayer, check_inputs, forget_weights
from pipelines.models.denoiser import Denoiser, find_sites
from pipelines.plans import Plan, Recipe
from pipelines.quant.affine import choose
from pipelines.quant.correction import Correction
from pipelines.quant.guidance import GuidanceShares
from pipelines.quant.hadamard import rotate_weight
from pipelines.quant.spec import IDENTITY, Bits, Site, SitePlan, Transform
from pipelines.quant.surroundings import taps_of
from pipelines.replay import Body, ReplayedSteps
from pipelines.stages import bench
from pipelines.students import load_fake, load_integer, move, new_student, save_integer, student_tensors

pytest.importorskip("triton", reason="the CUDA kernels are written in Triton")
from pipelines.kernels import cuda, triton_ops  # noqa: E402

GPU = torch.cuda.is_available()
on_the_processor = pytest.mark.skipif(GPU, reason="norms and attention of a GPU round otherwise than the processor's")
on_a_device = pytest.mark.skipif(not GPU, reason="needs a CUDA device: it records and replays a graph")
META = torch.device("meta")
TIMESTEPS = [667.0, 334.0, 1.0]
ALL = (IDENTITY, "none", 4, 4, "symmetric", "symmetric")
# What each site of a student takes of in turn: transforms and where they are undone, widths, quantisers, surroundings.
CONVOLUTIONS = [
    (ALL, {}),
    ((Transform("channels", 16, 3), "single", 4, 8, "symmetric", "asymmetric"), {}),
    ((Transform("width", 4, 5), "activation", 4, 8, "asymmetric", "asymmetric"), {}),
    ((Transform("channels", 32), "double", 3, 3, "asymmetric", "symmetric"), {}),
    ((Transform("channels", 32, 1), "single", 8, 4, "symmetric", "asymmetric"), dict(scaling=True, centring="static")),
    ((IDENTITY, "none", 8, 6, "symmetric", "symmetric"), dict(mixed=True)),
]
LINEARS = [
    ((Transform("channels", 32, 2), "single", 4, 8, "asymmetric", "asymmetric"), {}),
    ((Transform("channels", 32), "double", 4, 4, "symmetric", "symmetric"), dict(scaling=True, centring="dynamic")),
    ((IDENTITY, "none", 8, 4, "asymmetric", "asymmetric"), dict(scaling=True, centring="static")),
    ((Transform("channels", 8), "single", 8, 3, "symmetric", "symmetric"), {}),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Large tiles: what the interpreter takes goes by the number of programs and of operations in them. On a device
    one tile, since trying all on every shape takes hours.
    """
    if GPU:
        for kernel in (triton_ops._product, triton_ops._codes):
            monkeypatch.setattr(kernel, "configs", kernel.configs[len(kernel.configs) // 2 :][:1])
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(triton_ops._product, "configs", [triton_ops._tile(64, 64, 128, 4, 1)])
        monkeypatch.setattr(triton_ops._codes, "configs", [triton_ops.triton.Config(dict(ROWS=128, WIDTH=64))])


def planned(site: Site, index: int) -> SitePlan:
    kinds = CONVOLUTIONS if site.kind == "conv" else LINEARS
    (transform, inverse, *widths), around = kinds[index % len(kinds)]
    if not site.admits(transform):
        transform, inverse = IDENTITY, "none"
    if around.get("centring") == "dynamic" and site.rank < 3:
        around = {}
    weight, activation, weight_quantiser, activation_quantiser = widths
    return SitePlan(
        site, True, transform, inverse, weight, activation, weight_quantiser, activation_quantiser, **around
    )


def student_of_everything() -> tuple[Denoiser, Plan, dict]:
    """A fake student, its weights random and its scales by range, with every placement on convolutions and linears."""
    teacher, generator = tiny_denoiser(0), torch.Generator().manual_seed(5)
    seen = {"conv": 0, "linear": 0}
    plans, scales = [], {"timesteps": torch.tensor(TIMESTEPS, dtype=torch.float64)}
    for site in find_sites(teacher):
        plan = planned(site, seen[site.kind])
        seen[site.kind] += 1
        plans.append(plan)
        weight = teacher.network.get_submodule(site.name).weight
        tensors = {"weight_scale": None, "weight_zero": None}
        rows = weight
        if plan.scaling:
            tensors["gain"] = torch.rand(site.channels, generator=generator) + 0.5
            rows = weight / tensors["gain"].view(1, -1, *[1] * (weight.ndim - 2))
        if plan.centring == "static":
            tensors["centre"] = torch.randn(site.channels, generator=generator) * 0.1
            tensors["taps"] = taps_of(tensors["centre"], weight, site)
        if plan.mixed:
            tensors["row_bits"] = torch.tensor([2, 3, 4, 8], dtype=torch.uint8).repeat(site.outputs // 4 + 1)
            tensors["row_bits"] = tensors["row_bits"][: site.outputs].clone()
        if plan.inverse == "double":
            rows = rotate_weight(rows, plan.transform)
        tensors["weight_scale"], tensors["weight_zero"] = choose(rows.flatten(1), *plan.weight_range, steps=1)
        wide = (plan.transform.order**0.5) * 2.0 ** (3 - plan.activation_bits)
        tensors["activation_scale"] = wide * (1 + torch.rand(len(TIMESTEPS), generator=generator))
        zero = 0 if plan.activation_quantiser == "symmetric" else plan.activation_range[1] // 2
        tensors["activation_zero"] = torch.full((len(TIMESTEPS),), float(zero))
        scales |= {f"{site.name}/{what}": value for what, value in tensors.items()}
    recipe = Recipe(base_weight="float", weight_factors=True, trains=[], updates="none")
    plan = Plan("hqdm", "ours", Bits(4, 4), recipe, TIMESTEPS, plans)
    student = new_student(teacher, plan, scales, 0)
    with torch.no_grad():
        for factor in student.network.timestep_tables.factor:
            factor.mul_(0.9 + 0.2 * torch.rand(factor.shape, generator=generator))
    return student, plan, scales


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """(fake student, folder of its integers)."""
    folder = tmp_path_factory.mktemp("export")
    student, plan, scales = student_of_everything()
    save_file(student_tensors(student, plan, scales), folder / "student.safetensors")
    fake = load_fake(tiny_denoiser(0), plan, folder / "student.safetensors")
    save_integer(fake, plan, folder)
    return fake, folder


def measured(student: Denoiser) -> Denoiser:
    """With shares of guidance, of which the last timestep has none, and a correction."""
    student = copy.copy(student)
    timesteps = torch.tensor(sorted(TIMESTEPS), dtype=torch.float64)
    student.guidance_shares = GuidanceShares(timesteps, torch.tensor([0.0, 0.5, 1.0]))
    slope, bias, deviation = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([[0.01], [0.02], [0.03]]), torch.ones(3) * 0.05
    student.correction = Correction(timesteps, slope, bias, deviation, torch.tensor(1.5))
    return student


def along(model, timesteps: int, device="cpu") -> list[torch.Tensor]:
    """x and ε of every step of a trajectory with noise, one after another."""
    x = diffusion.noise_of(0, [4], (1, 8, 8)).to(device)
    schedule = getattr(model, "model", model).info.schedule
    given = "DDIMScheduler", schedule, timesteps, x, torch.tensor([2]), 1.5, 1.0, 0, [4]
    with torch.inference_mode():
        return [value.cpu() for step in diffusion.trajectory(model, *given) for value in step[2:]]


@on_the_processor
def test_every_epsilon_of_a_trajectory_is_that_of_fake_quantisation_with_every_placement(everything):
    fake, integer = measured(everything[0]), measured(load_integer(everything[1], "cuda"))
    layers = [module for module in integer.network.modules() if isinstance(module, DeviceLayer)]
    assert {layer.prepared.form for layer in layers} >= {"one", "columns", "digits"}
    assert any(layer.plan.site.stride == (2, 2) for layer in layers) and any(layer.prepared.shifted for layer in layers)
    assert any(layer.prepared.code_digits > 1 for layer in layers)
    steps = ReplayedSteps(integer, TIMESTEPS, 1.5, cuda.device())
    assert all(map(torch.equal, along(steps, 3), along(fake, 3)))
    assert sorted(steps._bodies) == [(1, False), (1, True)]  # the last timestep takes half the rows
    check_inputs(integer.network)


@on_the_processor
def test_a_recorded_step_reads_interpolated_rows_at_timesteps_between_the_learned_ones(everything):
    fake, integer = everything[0], load_integer(everything[1], "cuda")
    # Of sixty draws the one at which a code flips where torch's norms, which training takes, stand in for ours.
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(42))
    timestep, condition = torch.tensor(500), torch.tensor([1])
    steps = ReplayedSteps(integer, [800.0, 500.0], 1.0, cuda.device())
    with torch.no_grad():
        wanted = fake.predict(x, timestep, condition, 1.0)
    assert torch.equal(steps.predict(x, timestep, condition, 1.0), wanted)
    with pytest.raises(ValueError, match="made for guidance 1.0"):
        steps.predict(x, timestep, condition, 2.0)
    with pytest.raises(KeyError):
        steps.predict(x, torch.tensor(501), condition, 1.0)


@on_the_processor
def test_plain_calls_look_their_rows_up_each_images_own_where_a_batch_mixes_timesteps(everything):
    fake, integer = everything[0], load_integer(everything[1], "cuda")
    x, conditions, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([1, 3]), torch.tensor([334, 500])
    with torch.no_grad():
        mixed = [model.predict(x, timesteps, conditions, 1.0) for model in (fake, integer)]
    assert torch.equal(*mixed)


@on_the_processor
def test_floating_point_around_can_be_of_16_bits_and_what_enters_integers_is_then_that(everything):
    """In fp16, which the interpreter rounds as devices do; bf16 is the same code with another type."""
    _, folder = everything
    narrow, truth = load_integer(folder, "cuda"), load_integer(folder, "reference")
    move(narrow, cuda.device(), torch.float16)
    for module in truth.network.modules():
        if hasattr(module, "prepared"):
            module.register_forward_pre_hook(lambda _module, args: (args[0].float(),))
            module.register_forward_hook(lambda _module, args, y: y.half())
    move(truth, torch.device("cpu"), torch.float16)
    x, condition, timestep = torch.randn(1, 1, 8, 8), torch.tensor([1]), torch.tensor(334)
    with torch.no_grad():
        found, wanted = (model.predict(x, timestep, condition, 1.0) for model in (narrow, truth))
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    layers = [module for module in narrow.network.modules() if isinstance(module, DeviceLayer)]
    assert all(layer.weight_scale.dtype == torch.float32 for layer in layers)
    assert next(narrow.network.timestep_tables.parameters()).dtype == torch.float32


class Launched:
    """In place of a kernel: whether all that it is given lies on the device."""

    def __init__(self):
        self.calls = 0

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
            assert {value.device for value in tensors} == {META}
            self.calls += 1

        return launch


class Recording(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: an operation on what lies on the processor or is sent from there."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        assert {value.device for value in tensors} <= {META}, operation
        return operation(*args, **kwargs or {})


def test_a_step_lies_on_the_device_and_asks_the_host_for_nothing(everything, monkeypatch):
    """On torch's device without memory, which has no number to give. The first call, which unpacks weights, is not
    recorded either.
    """
    integer = measured(load_integer(everything[1], "cuda"))
    move(integer, META, torch.float32)
    steps, kernels = ReplayedSteps(integer, TIMESTEPS, 1.5, META), (Launched(), Launched())
    monkeypatch.setattr(triton_ops, "_codes", kernels[0])
    monkeypatch.setattr(triton_ops, "_product", kernels[1])
    monkeypatch.setattr(triton_ops, "INTERPRETED", True)
    for halved in (False, True):
        body = Body(steps, 2, halved)
        with torch.inference_mode():
            body()
            with Recording():
                assert body().shape == (2, 1, 8, 8)
    # One token needs no queries and keys.
    called = [module.plan for name, module in integer.network.named_modules()
              if isinstance(module, DeviceLayer) and not name.endswith(("attn2.to_q", "attn2.to_k"))]  # fmt: skip
    assert kernels[1].calls == 4 * len(called)
    assert kernels[0].calls == 4 * sum(plan.inverse != "activation" for plan in called)
    with pytest.raises(AssertionError, match="aten"), Recording():
        torch.ones(2, device=META) + torch.ones(2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = tiny_store(tmp_path_factory.mktemp("workspace"), levels=1)
    make(store, "export", {"distill": tiny_student(store).id})
    return store


@on_the_processor
def test_images_sampled_on_the_back_end_are_those_of_the_processors(store):
    options = dict(source="int", count=1, steps=1, guidance=1.0)
    artifact = make(store, "sample", backend="cuda", **options)
    assert artifact.digest == make(store, "sample", **options).digest
    assert artifact.figures["backend"] == "cuda" and artifact.figures["device"] == "cpu"


def test_what_cannot_run_on_a_device_is_refused_with_the_way_out(store, monkeypatch):
    for stage, options in (("sample", dict(source="int", backend="cuda")), ("bench", dict(device="cuda"))):
        with pytest.raises(UsageError, match="--attention int8 is compiled for processors alone"):
            make(store, stage, attention="int8", **options)
    with pytest.raises(UsageError, match="--backend chooses integer kernels, and fake has none"):
        make(store, "sample", source="fake", backend="cuda-bf16")
    assert doctor._back_end("cuda").state == "fine"
    monkeypatch.setattr(triton_ops, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in (
        dict(stage="sample", source="int", count=1, steps=2, backend="cuda"),
        dict(stage="bench", device="cuda"),
    ):
        with pytest.raises(HqdmError, match="no CUDA device") as caught:
            make(store, **options)
        assert "--backend cpu" in caught.value.hint
    found = doctor._back_end("cuda-bf16")
    assert found.state == "without" and "no CUDA device" in found.found and "TRITON_INTERPRET=1" in found.hint


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_in_a_layers_input_is_said_once_by_its_sites_name(everything):
    integer = load_integer(everything[1], "cuda")
    integer.network.timestep_tables.set_timestep(334)
    layer = integer.network.get_submodule("down_blocks.0.resnets.0.conv1")
    x = torch.randn(1, 32, 8, 8).to(cuda.device())
    layer(x)
    check_inputs(integer.network)
    x[0, 3, 5, 5] = torch.nan
    layer(x)
    with pytest.raises(NumericalFault, match="site down_blocks.0.resnets.0.conv1: its input holds NaN"):
        check_inputs(integer.network)
    check_inputs(integer.network)


def test_a_forgotten_network_unpacks_its_weights_again(everything):
    integer = load_integer(everything[1], "cuda")
    integer.network.timestep_tables.set_timestep(334)
    layer, x = integer.network.conv_in, torch.randn(1, 1, 8, 8).to(cuda.device())
    first = layer(x)
    forget_weights(integer.network)
    assert not layer.prepared._held and torch.equal(layer(x), first)


def test_steps_of_all_contenders_are_measured_on_a_device(store, monkeypatch, capsys):
    monkeypatch.setattr(speed, "WARM_UP", 0)
    monkeypatch.setattr(speed, "TRIES", 1)
    monkeypatch.setattr(speed, "SIDE", 256)
    monkeypatch.setattr(speed, "multiplies_bfloat16", lambda device: True)
    monkeypatch.delitem(bench.INTEGER, "int")  # which takes as long
    options = ["--device", "cuda", "--batch", "1", "--turns", "1", "--guidance", "1", "--no-memory"]
    assert main(["bench", *options, "--json", "-w", str(store.root)]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [row["contender"] for row in table["steps"]] == ["fp32", "bf16", "int-bf16"]
    assert table["device"] == "cuda" and table["shares"]["int-bf16"]["quantisers"] > 0
    assert all(row["times_as_fast_as_bf16"]["median"] > 0 for row in table["steps"])
    assert store.current("bench").file("bench.png").exists()
    text = "\n".join(benchmark.lines_of({"machine": "a machine", "steps": {"tiny": {"fp32": table}}}))
    assert "| times fp32 | times bf16 |" in text and "| int-bf16 | 1 |" in text


@on_a_device
def test_a_graph_replays_what_plain_calls_compute_at_every_timestep(everything):
    integer = measured(load_integer(everything[1], "cuda"))
    steps = ReplayedSteps(integer, TIMESTEPS, 1.5, cuda.device())
    assert all(map(torch.equal, along(steps, 3, "cuda"), along(integer, 3, "cuda")))
    assert sorted(steps._bodies) == [(1, False), (1, True)]


@on_a_device
def test_every_layer_of_a_network_on_a_device_gives_what_the_reference_gives_of_its_input(everything):
    """What is in floating point between the layers rounds otherwise on a GPU; a dynamic centre is such a thing."""
    integer, truth = (load_integer(everything[1], name) for name in ("cuda", "reference"))
    seen = {}
    for name, module in integer.network.named_modules():
        if isinstance(module, DeviceLayer) and module.plan.centring != "dynamic":
            module.register_forward_hook(
                lambda _module, args, y, name=name: seen.update({name: (args[0].cpu(), y.cpu())})
            )
    x, timestep = torch.randn(2, 1, 8, 8), torch.tensor(334)
    with torch.inference_mode():
        integer.predict(x.cuda(), timestep, torch.tensor([1, 3]), 1.5)
        truth.network.timestep_tables.set_timestep(334)
        for name, (given, y) in seen.items():
            layer = truth.network.get_submodule(name)
            wanted = layer(given)
            if layer.surroundings.taps is None:
                assert torch.equal(y, wanted), name
            else:  # a convolution's sum of taps is the library's
                assert torch.allclose(y, wanted, atol=1e-5), name
    assert len(seen) > 40
