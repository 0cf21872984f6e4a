"""Runs that are killed at random moments go on and end with the bytes of runs that were not.

The same for all stages, with more kills and a new process for each command: `make test-crash`.
"""

import os
import random
import shutil

import pytest
from crash import PATIENCE, SIGNALS, Command, Fresh, Tally, Warm, disturb, typed_in

KILLS = 6  # of every command in the nightly form, and of all in the other

RECIPE = """model: model.ckpt
profile: {steps: 2, batch: 1}
plan: {method: hqdm, bits: w4a4}
distill: {trajectories: 3, batch: 2, save_every: 1}
export: {format: int}
sample:
  - {source: teacher, count: 5, batch: 2, steps: 2}
  - {source: fake, count: 5, batch: 2, steps: 2}
  - {source: int, count: 5, batch: 2, steps: 2}
score: {reference: digits, extractor: digits}
"""
ROAD = ("model", "profile", "plan", "distill", "export", "sample", "score")
DISTILL = ("distill", "--trajectories", "3", "--batch", "2", "--save-every", "1")
SAMPLE = ("--count", "5", "--batch", "2", "--steps", "2")
# Name, what is typed, and the stages that were made before.
COMMANDS = {
    "profile": (("profile", "model.ckpt", "--steps", "2", "--batch", "1"), 0),
    "plan": (("plan", "--bits", "w3a3"), 2),
    "distill": ((*DISTILL, "--bits", "w4a4"), 3),
    "distill-auto": (("distill", "--bits", "w3a3", "--plan", "auto", *DISTILL[1:]), 2),
    "distill-q_diffusion": (("distill", "--bits", "w4a4", "--method", "q_diffusion", *DISTILL[1:]), 2),
    "export": (("export", "--format", "int"), 4),
    "sample": (("sample", "teacher", "fake", "int", *SAMPLE), 5),
    "score": (("score", "--extractor", "digits"), 6),
    "compare": (
        ("compare", "rtn", "hqdm", "--bits", "w4a4", "--trajectories", "1", *SAMPLE[:2], *SAMPLE[4:], "--option",
         "distill.batch=2", "--option", "sample.batch=2", "--option", "profile.batch=1"), 2,
    ),
    "run": (("run", "recipe.yaml"), 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def seed(request):
    """Printed, so that a failure can be looked at again: pytest tests/test_crash.py --crash-seed N."""
    given = request.config.getoption("--crash-seed")
    number = random.SystemRandom().randrange(10**6) if given is None else given
    print(f"\n--crash-seed {number}")
    return number


def signals(draw, count):
    """Each as often as the others, in any order."""
    chosen = [SIGNALS[place % len(SIGNALS)] for place in range(count)]
    draw.shuffle(chosen)
    return chosen


def test_six_kills_of_a_whole_recipe_change_nothing(tmp_path, seed):
    """Behind the profile, whose pictures take long; in forks, which a library is not loaded again for."""
    base, draw, tally, warm = tmp_path / "base", random.Random(seed), Tally(), Warm()
    try:
        warm.prepare(base, RECIPE.replace("digits, extractor: digits", "null, extractor: none"), steps=2, batch=1)
        disturb(Command("run", ("run", "recipe.yaml")), base, tmp_path, signals(draw, KILLS), draw, tally, warm)
    finally:
        warm.close()
        print(tally)
    assert sum(tally.kills.values()) == KILLS and tally.finished


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The road, made once, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    typed_in(folder, RECIPE)
    assert Fresh().start(("run", "recipe.yaml"), folder).wait(PATIENCE) == 0, (folder / "log").read_text()
    return folder


@pytest.fixture(scope="module")
def counted(seed):
    tally = Tally()
    yield tally
    print(f"\n{tally}")


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMMANDS)
def test_kills_of_every_stage_change_nothing(tmp_path, whole, counted, seed, name):
    words, before = COMMANDS[name]
    base = tmp_path / "base"
    shutil.copytree(whole, base)
    for stage in os.listdir(base / "workspace"):
        if stage not in ROAD[:before]:
            shutil.rmtree(base / "workspace" / stage)
    draw = random.Random(f"{seed} {name}")
    disturb(Command(name, words), base, tmp_path, signals(draw, KILLS), draw, counted, Fresh())
    print(f"{name}: {counted}")
