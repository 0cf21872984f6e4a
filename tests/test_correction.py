"""What is taken out of a student's predictions: fitted, looked up by timestep, saved, alike in both arithmetics."""

import pytest
import torch
from roads import STEPS, make, tiny_store, tiny_student
from test_students import refused_without, students

from pipelines import diffusion
from pipelines.distillation.side_by_side import measure_correction
from pipelines.events import Report
from pipelines.methods import METHODS
from pipelines.models.denoiser import load_denoiser
from pipelines.plans import Course
from pipelines.quant.correction import FILE, Correction, Moments
from pipelines.quant.layers import quant_layers

SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
SHAPE = (2, 8, 8)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("workspace"))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of(timesteps, slope, bias, deviation):
    return Correction(
        torch.tensor(timesteps, dtype=torch.float64), torch.tensor(slope), torch.tensor(bias), torch.tensor(deviation),
        torch.tensor(1.5),
    )  # fmt: skip


def test_a_systematic_error_is_found_and_what_is_left_is_its_noise():
    true, bias = noise(16, *SHAPE), torch.tensor([0.3, -0.1])
    student = 1.2 * true + bias.view(1, -1, 1, 1) + 0.05 * noise(16, *SHAPE, seed=1)
    moments = Moments()
    for half in (slice(0, 5), slice(5, None)):
        moments.add(true[half], student[half])
    slope, found, deviation = moments.fit()
    assert slope.item() == pytest.approx(0.2, abs=0.01) and deviation.item() == pytest.approx(0.05, abs=0.005)
    assert torch.allclose(found, bias, atol=0.01)
    correction = of([1.0], [slope.item()], [found.tolist()], [deviation.item()])
    left = (correction.corrected(student, torch.tensor(1)) - true).square().mean()
    assert left < (student - true).square().mean() / 30 and left.sqrt() == pytest.approx(0.05 / 1.2, rel=0.1)


def test_a_prediction_that_shrank_is_left_as_large_as_it_is():
    """PTQD holds the slope above 0; the bias is then all of the error's mean."""
    true = noise(16, *SHAPE)
    moments = Moments()
    moments.add(true, 0.8 * true + 0.1)
    slope, bias, _ = moments.fit()
    assert slope == 0 and torch.allclose(bias, (0.1 - 0.2 * true).mean((0, 2, 3)), atol=1e-6)


def test_between_timesteps_it_is_interpolated_and_beyond_the_ends_it_holds():
    correction = of([100.0, 300.0], [0.0, 1.0], [[0.0, 0.0], [2.0, 4.0]], [0.2, 0.8])
    ones = torch.ones(4, *SHAPE)
    mixed = correction.corrected(ones, torch.tensor([0, 100, 200, 900]))
    wanted = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, -1.0 / 1.5], [-0.5, -1.5]])
    assert torch.allclose(mixed, wanted[:, :, None, None].expand_as(mixed))
    for image, timestep in enumerate((0, 100, 200, 900)):
        assert torch.equal(correction.corrected(ones[:1], torch.tensor(timestep)), mixed[image : image + 1])
    assert correction.rest(torch.tensor(200)) == pytest.approx(0.5 / 1.5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_samplers_noise_shrinks_by_what_the_prediction_carries_already(prediction):
    """Against the formula, σ'² = σ² − c²s², and to nothing where the prediction carries more."""
    scheduler = diffusion.make_scheduler("DDIMScheduler", SCHEDULE | {"prediction_type": prediction}, 20)
    timestep = scheduler.timesteps[5]
    now = scheduler.alphas_cumprod[timestep].double()
    then = scheduler.alphas_cumprod[timestep - 50].double()
    variance = (1 - then) / (1 - now) * (1 - now / then)
    if prediction == "epsilon":
        factor = (1 - then - variance).sqrt() - (then * (1 - now) / now).sqrt()
    else:
        factor = ((1 - then - variance) * now).sqrt() - (then * (1 - now)).sqrt()
    share = diffusion.noise_left(scheduler, timestep, 1.0, 0.3)
    assert share == pytest.approx((1 - factor**2 * 0.09 / variance).sqrt().item(), rel=1e-6) and share < 1
    assert diffusion.noise_left(scheduler, timestep, 1.0, 100.0) == 0


@pytest.fixture(scope="module")
def corrected(store):
    return tiny_student(store, "ptqd", "distilled", "w4a4")


@pytest.mark.parametrize("variant", METHODS["ptqd"].variants)
def test_a_systematic_error_of_a_student_is_taken_out_on_images_it_was_not_measured_on(store, variant):
    """Its last layer adds a fifth to all it predicts: quantisation alone leaves noise on so small a network."""
    student = tiny_student(store, "ptqd", variant, "w4a4")
    teacher = load_denoiser(store.ancestor(student, "model").path)
    fake, _ = students(store, student)
    assert len(fake.correction.timesteps) == STEPS
    fake.correction, errors = None, {}
    with torch.no_grad():
        quant_layers(fake.network)["conv_out"].bias.add_(0.2)
    measured = measure_correction(teacher, fake, Course(1, STEPS, 8, 1.5, 0.0, 0), 16, Report())
    indices = list(range(100, 108))
    classes = diffusion.conditions_of(0, indices, 4)
    start = diffusion.noise_of(0, indices, (1, 8, 8))
    with torch.no_grad():
        for step, timestep, x, target in diffusion.trajectory(
            teacher, "DDIMScheduler", teacher.info.schedule, STEPS, start, classes, 1.5, 0.0, 0, indices
        ):
            for fake.correction in (measured, None):
                error = (fake.predict(x, timestep, classes, 1.5) - target).square().mean().item()
                errors.setdefault(fake.correction is None, []).append(error)
            if step == STEPS - 1:
                break
    assert sum(errors[False]) < 0.5 * sum(errors[True])


def test_integers_are_corrected_as_their_fakes_are_with_and_without_a_samplers_noise(store, corrected):
    fake, integer = students(store, corrected)
    assert torch.equal(fake.correction.bias, integer.correction.bias) and len(fake.correction.timesteps) == STEPS
    classes = torch.tensor([0, 1])

    def sampled(model, eta):
        schedule = model.info.schedule
        return diffusion.sample(model, "DDIMScheduler", schedule, 4, (1, 8, 8), classes, 1.5, eta, 0, [0, 1])

    images = [sampled(model, eta) for eta in (0.0, 1.0) for model in (fake, integer)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[2], images[3])
    fake.correction = None
    assert not torch.equal(images[0], sampled(fake, 0.0))


def test_a_corrected_student_without_its_correction_is_refused(store, corrected, tmp_path):
    refused_without(make(store, "export", {"distill": corrected.id}), FILE, tmp_path)
