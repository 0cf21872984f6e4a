"""Schedules and sampling: equal to the published sampler and to diffusers' pipelines, and each image a function of its
seed and number.
"""

import sys

import diffusers
import pytest
import torch
from families import save_tiny
from tiny import tiny_denoiser

from pipelines import diffusion
from pipelines.errors import UsageError
from pipelines.models.denoiser import ready
from pipelines.models.schedule import read_schedule
from pipelines.models.source import take

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def model():
    return tiny_denoiser(0)


def run(model, name="DDIMScheduler", indices=(0, 1, 2), eta=0.0, steps=4, seed=7):
    indices = list(indices)
    classes = diffusion.conditions_of(seed, indices, model.info.conditions)
    return diffusion.sample(model, name, model.info.schedule, steps, SHAPE, classes, 1.5, eta, seed, indices)


def test_noise_and_class_of_an_image_depend_on_seed_and_number_alone():
    assert torch.equal(diffusion.noise_of(3, [5, 9], SHAPE)[1], diffusion.noise_of(3, [9], SHAPE)[0])
    assert diffusion.conditions_of(3, [5, 9], 10)[1] == diffusion.conditions_of(3, [9], 10)[0]
    assert not torch.equal(diffusion.noise_of(3, [5], SHAPE), diffusion.noise_of(4, [5], SHAPE))


def test_classes_are_balanced_and_not_sorted():
    classes = diffusion.conditions_of(0, list(range(100)), 10)
    assert torch.equal(classes.bincount(), torch.full((10,), 10))
    assert not torch.equal(classes, classes.sort().values)


def test_ddim_is_the_samplers_equation(model):
    """x_{t−1} = √ᾱ' x̂₀ + √(1 − ᾱ' − σ²) ε + σ z (Song et al., 2021, equation 12), at timesteps 1, 1 + T/S, …"""
    seed, indices, steps, eta = 2, [0, 1], 4, 1.0
    schedule = model.info.schedule
    betas = torch.linspace(schedule["beta_start"] ** 0.5, schedule["beta_end"] ** 0.5, 1000).double() ** 2
    alphas = torch.cumprod(1 - betas, 0)
    timesteps = [1 + 250 * i for i in reversed(range(steps))]
    classes = diffusion.conditions_of(seed, indices, 4)
    x = diffusion.noise_of(seed, indices, SHAPE)
    with torch.inference_mode():
        for step, timestep in enumerate(timesteps):
            epsilon = model.predict(x, torch.tensor(timestep), classes, 1.5)
            now = alphas[timestep].float()
            # diffusers' set_alpha_to_one=False: before the first timestep stands ᾱ₀, as in CompVis's sampler
            before = (alphas[timestep - 250] if timestep >= 250 else alphas[0]).float()
            sigma = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
            clean = (x - (1 - now).sqrt() * epsilon) / now.sqrt()
            noise = diffusion.noise_of(seed, indices, SHAPE, f"step {step}")
            x = before.sqrt() * clean + (1 - before - sigma**2).sqrt() * epsilon + sigma * noise
    assert torch.allclose(run(model, indices=indices, eta=eta, seed=seed), x, atol=1e-5)


@pytest.mark.parametrize("name", sorted(diffusion.SCHEDULERS))
def test_every_scheduler_samples_the_same_image_twice(model, name):
    first, second = run(model, name), run(model, name)
    assert torch.isfinite(first).all() and torch.equal(first, second)


def test_a_trajectory_goes_on_from_its_middle_with_the_same_bits(model):
    indices, classes = [0, 1], torch.tensor([1, 2])

    def walk(x, first=0):
        steps = diffusion.trajectory(
            model, "DDIMScheduler", model.info.schedule, 4, x, classes, 1.5, 1.0, 0, indices, first
        )
        return [(step, x) for step, _, x, _ in steps]

    with torch.no_grad():
        whole = walk(diffusion.noise_of(0, indices, SHAPE))
        rest = walk(whole[2][1], first=2)
    assert [step for step, _ in rest] == [2, 3, 4]
    assert torch.equal(rest[-1][1], whole[-1][1])


def test_a_wrong_scheduler_and_a_wrong_eta_are_refused(model):
    with pytest.raises(UsageError) as caught:
        run(model, "DDIMSchedule")
    assert caught.value.hint == "did you mean 'DDIMScheduler'?"
    with pytest.raises(UsageError, match="has no eta"):
        run(model, "EulerDiscreteScheduler", eta=1.0)


def test_flux_schnells_timesteps_are_its_pipelines_and_stable_diffusion_3s_its_schedulers():
    """Flux's pipeline spaces σ evenly down to 1/steps; the scheduler's own spacing ends at its smallest σ."""
    from pipelines.models.families import FAMILIES

    stated = dict(num_train_timesteps=1000, shift=1.0)
    name = "FlowMatchEulerDiscreteScheduler"
    assert diffusion.timesteps_of(name, FAMILIES["flux"].schedule(stated), 4) == [1000, 750, 500, 250]
    assert diffusion.timesteps_of(name, FAMILIES["sd3"].schedule(stated), 4)[-1] == 1


# The scheduler of each pipeline is diffusers' own reading of its folder's configuration by the class that students are
# distilled on. Where ours is another on purpose, it is said here: DDIM's step misses linspace's next timestep, and
# DPM-Solver, which never clips, leaves DDIM to clip latents.
ROWS = {
    "ddpm": {},
    "sd": {},
    "sd2": {},
    "dit": {},
    "pixart": dict(timestep_spacing="trailing", clip_sample=False),
    "sd3": {},
    "flux": {},
}


@pytest.mark.parametrize("name", ROWS)
@torch.inference_mode()
def test_a_teacher_draws_what_its_pipeline_draws(name, tmp_path, monkeypatch):
    steps, guidance = 4, 1.0 if name == "ddpm" else 3.0
    folder, options = save_tiny(name, tmp_path / name)
    teacher = ready(take(folder, **options)[0])
    shape, schedule, indices = teacher.info.shape, teacher.info.schedule, [0, 1]
    rows = torch.tensor(indices) if teacher.info.conditions else torch.zeros(2, dtype=torch.int64)
    walker = diffusion.walker(schedule)
    ours = diffusion.sample(teacher, walker, schedule, steps, shape, rows, guidance, 0.0, 3, indices)

    load = diffusers.DiffusionPipeline.from_pretrained
    config = load(folder, local_files_only=True).scheduler.config
    scheduler = getattr(diffusers, walker).from_config(config, **ROWS[name])
    pipeline = load(folder, local_files_only=True, scheduler=scheduler)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    x, words = diffusion.noise_of(3, indices, shape), dict(num_inference_steps=steps)
    if name in ("ddpm", "dit"):  # these take no latents
        monkeypatch.setattr(sys.modules[type(pipeline).__module__], "randn_tensor", lambda *_, **__: x)
        asked = dict(batch_size=2) if name == "ddpm" else dict(class_labels=indices, guidance_scale=guidance)
        theirs = torch.from_numpy(pipeline(output_type="np", **asked, **words).images).permute(0, 3, 1, 2)
        ours = teacher.decode(ours) / 2 + 0.5
    else:
        words |= dict(prompt=list(teacher.info.labels), guidance_scale=guidance, output_type="latent")
        side = shape[1] * pipeline.vae_scale_factor
        if name == "pixart":
            words["use_resolution_binning"] = False
        if name == "flux":
            x = pipeline._pack_latents(x, 2, *shape)
        theirs = pipeline(latents=x, height=side, width=side, **words).images
        if name == "flux":
            theirs = pipeline._unpack_latents(theirs, side, side, pipeline.vae_scale_factor)
    assert theirs.std() > 0.05 and not torch.allclose(theirs[0], theirs[1], atol=1e-2)
    assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max())), (ours - theirs).abs().max()


@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize("name", ["ddpm", "sd", "sdxl", "dit", "pixart"])
def test_each_step_of_ddim_ends_at_the_level_of_the_next_timestep(name, steps, tmp_path):
    """Of √ᾱ_t·x̂₀ without noise a step makes √ᾱ of the next timestep times x̂₀."""
    folder, _ = save_tiny(name, tmp_path / name)
    scheduler = diffusion.make_scheduler(
        "DDIMScheduler", read_schedule(folder / "scheduler" / "scheduler_config.json"), steps
    )
    scale, visited, clean = scheduler.alphas_cumprod.sqrt(), scheduler.timesteps, torch.full((1, 1, 1, 1), 0.7)
    assert len(visited) == steps
    targets = [*(scale[after] for after in visited[1:]), scheduler.final_alpha_cumprod.sqrt()]
    for now, target in zip(visited, targets, strict=True):
        found = scheduler.step(torch.zeros_like(clean), now, scale[now] * clean).prev_sample
        assert torch.allclose(found, target * clean, atol=1e-6), now


def stated(kind, **own):
    return diffusion.completed(dict(beta_start=0.001, beta_end=0.02) | own, getattr(diffusers, kind))


def test_what_a_schedule_does_not_state_is_its_own_classs_default_for_every_scheduler():
    pixels, latents = stated("DDPMScheduler"), stated("PNDMScheduler")
    for name, schedule, clips in (("DDIMScheduler", pixels, True), ("DDIMScheduler", latents, False)):
        config = diffusion.make_scheduler(name, schedule, 10).config
        assert (config.clip_sample, config.steps_offset, config.timestep_spacing) == (clips, 0, "leading")
    assert diffusion.make_scheduler("DDIMScheduler", pixels, 10).final_alpha_cumprod == 1
    assert diffusion.make_scheduler("DDIMScheduler", latents, 10).final_alpha_cumprod < 1
    euler = diffusion.make_scheduler("EulerDiscreteScheduler", pixels, 10)
    assert euler.config.timestep_spacing == "leading" and euler.timesteps[-1] == 0
    assert diffusion.timesteps_of("DDIMScheduler", pixels, 1000) == list(range(999, -1, -1))
    ldm = dict(num_train_timesteps=1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    assert diffusion.timesteps_of("DDIMScheduler", ldm, 20) == list(range(951, 0, -50))
    with pytest.raises(UsageError, match="would visit timestep 1000"):
        diffusion.make_scheduler("DDIMScheduler", ldm, 1000)


@pytest.mark.parametrize("name", sorted(diffusion.SCHEDULERS))
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_every_scheduler_runs_on_a_schedule_that_another_one_states(model, name, kind):
    x, rows = diffusion.noise_of(0, [0], SHAPE), torch.tensor([1])
    with torch.inference_mode():
        *_, last = diffusion.trajectory(model, name, stated(kind), 6, x, rows, 1.0, 0.0, 0, [0])
    assert torch.isfinite(last[2]).all() and not torch.equal(last[2], x)


@pytest.mark.parametrize("learned, fixed", [("learned", "fixed_small"), ("learned_range", "fixed_large")])
def test_a_learned_variance_is_replaced_by_a_fixed_one(model, learned, fixed):
    """The half of the output that says it is cut off."""
    runs = []
    for kind in (learned, fixed):
        x, schedule = diffusion.noise_of(0, [0], SHAPE), stated("DDPMScheduler", variance_type=kind)
        with torch.inference_mode():
            walk = diffusion.trajectory(model, "DDPMScheduler", schedule, 3, x, torch.tensor([1]), 1.0, 0.0, 0, [0])
            runs.append(list(walk)[-1][2])
    assert torch.equal(*runs)


def test_a_scheduler_that_cannot_run_on_a_schedule_says_why(model):
    schedule = stated("DPMSolverMultistepScheduler", algorithm_type="dpmsolver")
    with pytest.raises(UsageError, match="DPMSolverMultistepScheduler does not work .*algorithm_type") as caught:
        diffusion.make_scheduler("DPMSolverMultistepScheduler", schedule, 4)
    assert caught.value.hint
    diffusion.make_scheduler("DDIMScheduler", schedule, 4)
    schedule = stated("DDIMScheduler", prediction_type="sample")
    walk = diffusion.trajectory(
        model, "PNDMScheduler", schedule, 4, torch.zeros(1, *SHAPE), torch.tensor([0]), 1.0, 0.0, 0, [0]
    )
    with pytest.raises(UsageError, match="PNDMScheduler does not work .*prediction_type"), torch.inference_mode():
        list(walk)
