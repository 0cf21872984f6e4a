"""A student reads the right scale wherever it is called from: a diffusers pipeline, guidance by one batch or by two
calls, any scheduler.
"""

import json

import pytest
import torch
from families import save_tiny
from roads import SAMPLE, make

from pipelines import diffusion, runner
from pipelines.models.denoiser import load_denoiser
from pipelines.plans import read_plan
from pipelines.quant.layers import quant_layers
from pipelines.quant.spec import site_from_dict
from pipelines.students import load_fake, load_integer
from pipelines.workspace.store import Store

STEPS = 3


@pytest.fixture(scope="module", params=["sd", "flux"])
def family(request, tmp_path_factory):
    """A family's folder and its fake and integer students, whose scales differ from timestep to timestep."""
    root = tmp_path_factory.mktemp(request.param)
    folder, options = save_tiny(request.param, root / "model")
    store = Store(root / "workspace")
    model = runner.make(store, "model", runner.model_config(folder, **options)).artifact
    make(store, "profile", steps=STEPS, batch=1, sample=SAMPLE)
    make(store, "plan", bits="w4a4")
    distilled = make(store, "distill", trajectories=1, batch=1)
    exported = make(store, "export")
    sites = [site_from_dict(entry) for entry in json.loads(model.file("sites.json").read_text())]
    plan = read_plan(distilled.file("plan.yaml"), sites)
    fake = load_fake(load_denoiser(model.path), plan, distilled.file("student.safetensors"))
    return request.param, folder, {"fake": fake, "int": load_integer(exported.path, "cpu")}


def start_of(student, count=1):
    return diffusion.noise_of(3, list(range(count)), student.info.shape)


@pytest.mark.parametrize("kind", ["fake", "int"])
@torch.inference_mode()
def test_a_student_inside_its_diffusers_pipeline_draws_what_it_draws_here(family, kind):
    """Guidance by batch, and the pipeline's own way of passing timesteps (Flux: t/1000). Stable Diffusion's scheduler
    is replaced by the one that students are distilled on, Flux's is its own.
    """
    import diffusers

    name, folder, students = family
    student = students[kind]
    given = student.given(torch.tensor([0]))
    x = start_of(student)
    schedule, scheduler = student.info.schedule, diffusion.walker(student.info.schedule)
    ours = diffusion.sample(
        student, scheduler, schedule, STEPS, student.info.shape, torch.tensor([0]), 3.0, 0.0, 3, [0]
    )
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    words = dict(num_inference_steps=STEPS, guidance_scale=3.0, output_type="latent")
    if name == "sd":
        null = student.given(torch.tensor([student.info.conditions]))
        pipeline.unet = student.network
        pipeline.scheduler = diffusion.make_scheduler(scheduler, schedule, STEPS)
        theirs = pipeline(
            latents=x, prompt_embeds=given["encoder_hidden_states"],
            negative_prompt_embeds=null["encoder_hidden_states"], **words,
        ).images  # fmt: skip
    else:
        pipeline.transformer = student.network
        side = student.info.shape[1] * pipeline.vae_scale_factor
        packed = pipeline._pack_latents(x, 1, *student.info.shape)
        theirs = pipeline(
            latents=packed, prompt_embeds=given["encoder_hidden_states"],
            pooled_prompt_embeds=given["pooled_projections"], height=side, width=side, **words,
        ).images  # fmt: skip
        theirs = pipeline._unpack_latents(theirs, side, side, pipeline.vae_scale_factor)
    assert torch.allclose(ours, theirs, atol=1e-4), (ours - theirs).abs().max()


@torch.inference_mode()
def test_guidance_by_two_calls_is_guidance_by_one_batch(family):
    for student in family[2].values():
        if student.info.guidance != "classifier-free":
            continue
        x, timestep = start_of(student, 2), torch.tensor(401)
        rows = torch.tensor([0, 1])
        null = torch.full_like(rows, student.info.conditions)
        without, given = (
            student.family.call(student.network, x, timestep, student.given(some), 1.0) for some in (null, rows)
        )
        by_batch = student.predict(x, timestep, rows, 3.0)
        assert torch.allclose(by_batch, without + 3.0 * (given - without), atol=1e-4)


@torch.inference_mode()
def test_every_scheduler_reads_the_scale_of_the_timestep_that_it_visits(family):
    """The rows that the layers read are those that the tables give for the scheduler's own timesteps, in its order."""
    student = family[2]["fake"]
    tables, schedule = student.network.timestep_tables, student.info.schedule
    layer = next(iter(quant_layers(student.network).values()))
    names = diffusion.FLOW_SCHEDULERS if diffusion.is_flow(schedule) else diffusion.SCHEDULERS
    for name in names:
        read = []
        handle = layer.register_forward_hook(lambda *_, read=read: read.append(tables.of(layer.index)[0].item()))
        steps = len(diffusion.timesteps_of(name, schedule, STEPS))
        diffusion.sample(student, name, schedule, STEPS, student.info.shape, torch.tensor([0]), 1.0, 0.0, 3, [0])
        handle.remove()
        wanted = []
        for timestep in diffusion.timesteps_of(name, schedule, STEPS):
            tables.set_timestep(timestep)
            wanted.append(tables.of(layer.index)[0].item())
        assert len(read) >= steps and read[: len(wanted)] == pytest.approx(wanted, rel=1e-5), name
        assert len(set(wanted)) > 1, name
