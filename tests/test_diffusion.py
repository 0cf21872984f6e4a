"""Schedules and sampling: equal to the published sampler, and each image a function of its seed and number."""

import pytest
import torch
from tiny import tiny_denoiser

from pipelines import diffusion
from pipelines.errors import UsageError

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
