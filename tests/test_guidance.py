"""A student's share of the guidance: what it should be, looked up by timestep, alike in both arithmetics."""

import pytest
import torch
from roads import SAMPLE, STEPS, make, tiny_store, tiny_student
from test_students import plan_of, refused_without, students
from tiny import tiny_denoiser

from pipelines import diffusion
from pipelines.distillation.relation import Relation
from pipelines.distillation.side_by_side import measure_guidance
from pipelines.errors import UsageError
from pipelines.events import Report
from pipelines.models.denoiser import load_denoiser
from pipelines.plans import Course, Recipe, write_plan
from pipelines.quant.guidance import FILE, LEAST, Differences, GuidanceShares
from pipelines.students import load_integer

CLASSES = torch.tensor([0, 1, 2])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def shared(store):
    """At 8 bits, where the tiny model's guidance is not all noise."""
    return tiny_student(store, "hqdm", "tuned", "w8a8")


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of(share, timesteps=(100, 300)):
    return GuidanceShares(torch.tensor(timesteps, dtype=torch.float64), torch.tensor(share))


def share_of(true, mine, signal=1.0):
    sums = Differences()
    for half in (slice(0, 5), slice(5, None)):
        sums.add(true[half], mine[half])
    return sums.share(signal)


@pytest.mark.parametrize("signal", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("slope, deviation", [(0.9, 0.7), (0.7, 1.2), (1.2, 1.5)])
def test_no_other_share_has_less_lost_signal_and_noise_together(signal, slope, deviation):
    true = noise(0, 16, 2, 8, 8)
    mine = slope * true + deviation * noise(1, 16, 2, 8, 8)
    found = share_of(true, mine, signal)

    def cost(share):
        lost, added = 1 - share * slope, share * deviation
        return signal * lost**2 + added**2

    tried = torch.linspace(0, 1, 1001).tolist()
    assert found == pytest.approx(min(tried, key=cost), abs=0.02)


def test_a_difference_as_it_should_be_is_kept_whole_and_one_of_noise_not_at_all():
    true = noise(0, 16, 2, 8, 8)
    assert share_of(true, true) == 1
    assert share_of(true, 0.5 * true) == 1  # never more guidance than was asked for
    assert share_of(true, true + 4 * noise(1, 16, 2, 8, 8)) == 0  # 1/17, under LEAST
    assert share_of(true, -true) == 0 and share_of(torch.zeros_like(true), true) == 0
    assert LEAST > 1 / 17


def test_between_timesteps_shares_are_interpolated_and_images_of_a_batch_have_their_own():
    shares = of([0.0, 0.5])
    assert shares.strength(3.0, torch.tensor(100)) == 1.0 and shares.strength(3.0, torch.tensor([300, 900])) == 2.0
    assert shares.strength(3.0, torch.tensor(200)) == pytest.approx(1.5)
    mixed = shares.strength(3.0, torch.tensor([100, 200, 300]))
    assert mixed.shape == (3, 1, 1, 1) and mixed.flatten().tolist() == pytest.approx([1.0, 1.5, 2.0])


def test_without_a_share_the_unconditional_half_is_not_computed():
    model, rows = tiny_denoiser(0), []
    model.network.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    x = noise(0, 3, 1, 8, 8)
    conditional = model.predict(x, torch.tensor(100), CLASSES, 1.0)
    plain = model.predict(x, torch.tensor(300), CLASSES, 2.0)
    model.guidance_shares = of([0.0, 0.5])
    assert torch.equal(model.predict(x, torch.tensor(100), CLASSES, 3.0), conditional)
    assert torch.equal(model.predict(x, torch.tensor(300), CLASSES, 3.0), plain)
    assert rows == [3, 6, 3, 6]


def test_a_coarse_student_is_nearer_to_its_teacher_by_its_shares_than_guided_as_asked(store, tmp_path):
    """Before any training, on images that were not measured: the share is least squares, so it cannot lose much."""
    plan = make(store, "plan", method="hqdm", variant="code", bits="w3a3")
    untrained = make(store, "distill", {"plan": plan.id}, trajectories=1, batch=2)
    teacher = load_denoiser(store.ancestor(untrained, "model").path)
    fake, _ = students(store, untrained)
    shares = measure_guidance(teacher, fake, Course(1, STEPS, 8, 6.0, 0.0, 0), 1.0, tmp_path, Report())
    assert 0 <= shares.share.min() and shares.share.min() < 1 and shares.share.max() <= 1
    indices, errors = list(range(100, 108)), {}
    classes = diffusion.conditions_of(0, indices, 4)
    start = diffusion.noise_of(0, indices, (1, 8, 8))
    with torch.no_grad():
        for step, timestep, x, target in diffusion.trajectory(
            teacher, "DDIMScheduler", teacher.info.schedule, STEPS, start, classes, 6.0, 0.0, 0, indices
        ):
            if step == STEPS:
                break
            for fake.guidance_shares in (shares, None):
                error = (fake.predict(x, timestep, classes, 6.0) - target).square().mean().item()
                errors.setdefault(fake.guidance_shares is None, []).append(error)
    assert sum(errors[False]) < sum(errors[True])


def test_integers_are_guided_as_their_fakes_are_between_timesteps_too(store, shared):
    fake, integer = students(store, shared)
    share = fake.guidance_shares.share
    assert torch.equal(share, integer.guidance_shares.share) and len(share) == STEPS
    assert ((share > 0) & (share < 1)).any()

    def sampled(model, steps):
        schedule = model.info.schedule
        return diffusion.sample(model, "DDIMScheduler", schedule, steps, (1, 8, 8), CLASSES, 3.0, 0.0, 0, [0, 1, 2])

    for steps in (STEPS, 5):
        assert torch.equal(sampled(fake, steps), sampled(integer, steps))
    before = sampled(fake, STEPS)
    fake.guidance_shares = of([0.5] * STEPS, fake.guidance_shares.timesteps.tolist())
    assert not torch.equal(before, sampled(fake, STEPS))


def test_a_student_without_its_shares_is_refused(store, shared, tmp_path):
    refused_without(make(store, "export", {"distill": shared.id}), FILE, tmp_path)


def test_a_plan_says_so_only_where_shares_are_asked_for(store, shared):
    asked = plan_of(store, shared)
    assert asked.recipe.guidance_signal > 0 and "guidance_signal" in write_plan(asked)
    published = make(store, "plan", method="hqdm", variant="code", bits="w8a8")
    assert "guidance_signal" not in published.file("plan.yaml").read_text()
    with pytest.raises(UsageError, match="guidance_signal cannot be -1"):
        Recipe(guidance_signal=-1.0)


@pytest.mark.parametrize("share", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_relations_are_compared_of_the_half_that_both_have_computed(store, share):
    model, other = (load_denoiser(store.current("model").path) for _ in range(2))
    other.guidance_shares = of(list(share), (499, 500))
    relation, x = Relation(model, other, 100.0), noise(0, 3, 1, 8, 8)
    with torch.no_grad():
        for step, timestep in enumerate((500, 499)):
            for each in (model, other):
                each.predict(x, torch.tensor(timestep), CLASSES, 3.0)
            term = relation.term(step)
    relation.remove()
    assert abs(term) < 1e-3


def test_an_image_is_the_same_in_a_batch_of_mixed_timesteps(store):
    """In floating point: a batch's size moves rounding, and quantisers would make steps of it."""
    guided = load_denoiser(store.current("model").path)
    guided.guidance_shares = of([0.0, 0.6], (100, 700))
    x, timesteps = noise(0, 3, 1, 8, 8), torch.tensor([100, 400, 700])
    with torch.no_grad():
        together = guided.predict(x, timesteps, CLASSES, 3.0)
        for image, timestep in enumerate(timesteps):
            alone = guided.predict(x[image : image + 1], timestep, CLASSES[image : image + 1], 3.0)
            assert torch.allclose(together[image], alone[0], atol=1e-5)


def test_guidance_of_one_or_less_is_as_asked():
    shares = of([0.0, 0.5])
    for guidance in (1.0, 0.5, 0.0):
        assert shares.strength(guidance, torch.tensor(100)) == guidance
        assert shares.strength(guidance, torch.tensor([100, 300])) == guidance


def test_a_student_distilled_without_guidance_keeps_all_of_it(store, tmp_path):
    """It has learned nothing that would stand in for what is left out."""
    distilled = tiny_student(store, "hqdm", "tuned", "w3a3", guidance=1.0)
    assert (GuidanceShares.load(distilled.path).share == 1).all()


def test_sampling_at_another_guidance_than_the_distillations_is_warned_of(store, shared):
    class Warned(Report):
        def __init__(self):
            self.said = []

        def warn(self, text):
            self.said.append(text)

    exported, report = make(store, "export", {"distill": shared.id}), Warned()
    for guidance in (1.5, 4.0):
        make(store, "sample", {"source": exported.id}, report, count=2, batch=2, steps=STEPS, guidance=guidance)
    assert report.said == ["the student was distilled at guidance 1.5, and this is 4"]


def test_an_export_in_floating_point_says_what_it_leaves_behind(store, shared):
    class Warned(Report):
        said = ()

        def warn(self, text):
            self.said = (*self.said, text)

    report = Warned()
    exported = make(store, "export", {"distill": shared.id}, report, format="float")
    assert len(report.said) == 2 and "shares of guidance" in report.said[0]
    assert "factors for each timestep" in report.said[1]
    assert load_denoiser(exported.path).guidance_shares is None


@pytest.mark.parametrize("family", ["ddpm", "flux"])
def test_a_model_without_classifier_free_guidance_has_no_shares(tmp_path, family):
    from families import save_tiny

    from pipelines import runner
    from pipelines.workspace.store import Store

    path, options = save_tiny(family, tmp_path / "model")
    store = Store(tmp_path / "workspace")
    runner.make(store, "model", runner.model_config(path, **options))
    make(store, "profile", steps=2, batch=1, sample=SAMPLE)
    distilled = tiny_student(store, "efficientdm", "tuned")
    exported = make(store, "export")
    assert FILE not in distilled.manifest["files"] and FILE not in exported.manifest["files"]
    assert load_integer(exported.path, "cpu").guidance_shares is None
