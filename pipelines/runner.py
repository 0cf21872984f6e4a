"""The graph of stages at work: what runs, what is skipped, and why; what is stale; what to type next; whole recipes.

    model -> profile -> plan -> distill -> export -> sample -> score        (sample also from model or distill)

A run is addressed by the deciding part of its configuration, the content of its inputs and the stage's VERSION. The
same address is not computed twice, and every run or skip has a reason that a person can read.
"""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines import processes, stages, stops
from pipelines.config import differences, from_dict, key_dict, read_yaml, replace, to_dict
from pipelines.errors import FileFault, UsageError, did_you_mean
from pipelines.events import Report
from pipelines.memory import peak_bytes, reset_peak, reuse_freed_memory
from pipelines.quant.spec import Bits
from pipelines.workspace.artifacts import Artifact, key_of, links
from pipelines.workspace.drafts import Draft
from pipelines.workspace.seals import sha256_of_file
from pipelines.workspace.store import Store

DIVIDING = ("distill", "sample")  # stages whose floating-point weights FSDP divides
MOST_REASONS = 4  # that are told of why a stage runs


@dataclass(frozen=True)
class Outcome:
    """What `make` did. `artifact` is None only in a dry run of something that would run."""

    stage: str
    artifact: Artifact | None
    ran: bool
    reason: str
    config: dict[str, Any]


def make(
    store: Store,
    stage: str,
    config: Any,
    chosen: Mapping[str, str] | None = None,
    report: Report | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Outcome:
    """The stage's artifact for that configuration and its inputs: found, resumed or made.

    `chosen` names inputs by role (role -> artifact id); the stage takes the newest fitting ones for the rest.
    `force` starts afresh, even where a complete or an interrupted run lies there.
    """
    report = report or Report()
    module = stages.load(stage)
    inputs = module.inputs(config, store, dict(chosen or {}))
    key = key_of(stage, module.VERSION, key_dict(config), inputs)
    runs, reason, found = _decide(store, stage, module, config, inputs, key, force)
    recorded = to_dict(config)
    report.note(f"{stage}: {reason}" if not (runs and dry_run) else f"{stage}: would run ({reason})")
    if not runs:
        outcome = Outcome(stage, found, False, reason, recorded)
        if not dry_run:
            store.mark_current(found)
            report.made(outcome)
        return outcome
    for artifact in inputs.values():
        if faults := artifact.damage():
            raise FileFault(f"{artifact.path}: {faults[0]}", f"restore it, or: {artifact.redo}")
    if dry_run:
        return Outcome(stage, None, False, reason, recorded)
    request = {
        "stage_version": module.VERSION,
        "config": recorded,
        "inputs": links(inputs),
        "seed": recorded.get("seed"),
    }
    reuse_freed_memory()
    reset_peak()
    with store.begin(stage, key, request, afresh=force) as draft, stops.unmasked():
        # Asked again where none else can make it: another process may have, since the first time.
        artifact = store.find(stage, key)
        if runs := force or draft.resumed or artifact is None or bool(artifact.damage()):
            if draft.warning:
                report.warn(draft.warning)
            figures = _run(store, stage, module, config, inputs, draft, report)
            artifact = draft.commit(figures | {"peak_memory_bytes": peak_bytes()})
        else:
            draft.drop()
            reason = f"up to date: another process has just made {artifact.id}"
            report.note(f"{stage}: {reason}")
        store.mark_current(artifact)  # while none can ask for the same: what is current is found first
    outcome = Outcome(stage, artifact, runs, reason, recorded)
    report.made(outcome)
    return outcome


@dataclass(frozen=True)
class _Job:
    """What a follower needs to do its share of a stage: `path` and `work` are the leader's draft."""

    stage: str
    config: Any
    inputs: Mapping[str, Mapping[str, str]]  # role -> id and digest
    root: Path
    path: Path
    work: Path
    threads: int


def _run(
    store: Store, stage: str, module: ModuleType, config: Any, inputs: Mapping[str, Artifact], draft: Draft,
    report: Report,
) -> dict[str, Any]:  # fmt: skip
    """The stage's figures: made by all processes of this job where the stage can share its work, else by this one."""
    crew = processes.crew()
    if processes.divides_weights() and stage not in DIVIDING:
        report.note(f"{stage}: weights stay whole here; FSDP divides those of {' and '.join(DIVIDING)}")
    shared = crew.count > 1 and hasattr(module, "shared") and module.shared(config, inputs)
    if not shared:
        return module.run(config, inputs, draft, report)
    import torch

    places = (path.absolute() for path in (store.root, draft.path, draft.work))
    try:
        crew.told(_Job(stage, config, links(inputs), *places, torch.get_num_threads()))
        with processes.sharing(crew):
            return module.run(config, inputs, draft, report) | {"processes": crew.count}
    except BaseException:
        processes.part_company()  # the others stand somewhere inside the stage, and would wait there
        raise


def follow() -> None:
    """Do this process's share of every stage that the leader shares, until it says that there are no more. PeerLost
    where it ends before.
    """
    import torch

    crew = processes.crew()
    while (job := crew.told(None)) is not None:
        store, module = Store(job.root), stages.load(job.stage)
        torch.set_num_threads(job.threads)
        reuse_freed_memory()
        inputs = {role: _the_leaders(store, link) for role, link in job.inputs.items()}
        with processes.sharing(crew):
            module.run(job.config, inputs, job, Report())


def _the_leaders(store: Store, link: Mapping[str, str]) -> Artifact:
    """The artifact that the leading process works with; FileFault where this one sees another in its place."""
    artifact = store.get(link["id"])
    if artifact.digest != link["digest"]:
        raise FileFault(
            f"{artifact.path} is not what the leading process has there",
            "let all machines of a job see one workspace, on storage that they share",
        )
    return artifact


def _decide(
    store: Store, stage: str, module: ModuleType, config: Any, inputs: Mapping[str, Artifact], key: str, force: bool
) -> tuple[bool, str, Artifact | None]:
    """Whether the stage runs, why, and the artifact that makes a run needless."""
    if force:
        return True, "runs: forced", None
    # Before the complete ones: a draft beside a complete artifact of its key is a forced run that was interrupted.
    if owner := store.owner(stage, key):
        return True, f"process {owner} is at it", None
    if store.interrupted(stage, key):
        return True, "goes on: an interrupted run with this configuration is there", None
    if found := store.find(stage, key):
        if faults := found.damage():
            return True, f"runs: {found.id} is damaged ({faults[0]})", None
        return False, f"up to date: {found.id} has the same configuration, inputs and stage version", found
    reasons = [_changes(artifact, module.VERSION, config, inputs) for artifact in store.artifacts(stage)]
    if not reasons:
        return True, "runs: none yet", None
    # Against the artifact that is most alike, the newest of equals: `sample` has one for each source, for example.
    _, reason = min(reversed(reasons), key=lambda counted: counted[0])
    return True, f"runs: {reason}", None


def _changes(artifact: Artifact, version: int, config: Any, inputs: Mapping[str, Artifact]) -> tuple[int, str]:
    """How many things set a wanted run apart from an artifact, and which."""
    changes = []
    if artifact.manifest["stage_version"] != version:
        before = artifact.manifest["stage_version"]
        changes.append((1, f"stage version changed since {artifact.id}: {before} -> {version}"))
    deciding = key_dict(config)
    recorded_only = to_dict(config).keys() - deciding.keys()
    before = {name: value for name, value in artifact.config.items() if name not in recorded_only}
    if changed := differences(before, deciding):
        changes.append((len(changed), f"configuration changed since {artifact.id}: {', '.join(changed)}"))
    for role in sorted(artifact.inputs.keys() | inputs.keys()):
        link, wanted = artifact.inputs.get(role), inputs.get(role)
        if link and wanted and link["digest"] == wanted.digest:
            continue
        changes.append(
            (1, f"input {role} changed ({link['id'] if link else 'none'} -> {wanted.id if wanted else 'none'})")
        )
    if not changes:  # the same run, whose key was made by other rules
        return 0, f"{artifact.id} is of another workspace format"
    told = [text for _, text in changes]
    if len(told) > MOST_REASONS:  # a comparison has hundreds of inputs
        told = [*told[: MOST_REASONS - 1], f"{len(told) - MOST_REASONS + 1} more changes"]
    return sum(count for count, _ in changes), "; ".join(told)


def _lineages(artifacts: list[Artifact]) -> dict[str, Any]:
    """artifact id -> what was asked for, down to the checkpoint: equal values are versions of one another.

    Hashes of outside files (`sha256`, `…_sha256`) are left out, so that a changed checkpoint or a plan edited once more
    is a newer version of the same thing.
    """
    known: dict[str, Any] = {}
    by_id = {artifact.id: artifact for artifact in artifacts}

    def lineage(ident: str) -> Any:
        if ident not in by_id:
            return ident
        if ident not in known:
            artifact = by_id[ident]
            asked = sorted((n, repr(v)) for n, v in artifact.config.items() if not n.endswith("sha256"))
            below = sorted((role, lineage(link["id"])) for role, link in artifact.inputs.items())
            known[ident] = (artifact.stage, tuple(asked), tuple(below))
        return known[ident]

    for artifact in artifacts:
        lineage(artifact.id)
    return known


def stale(store: Store) -> dict[str, str | None]:
    """artifact id -> why it no longer is what its stage would make, or None; in the order of time."""
    artifacts = store.artifacts()
    lineages = _lineages(artifacts)
    by_id = {artifact.id: artifact for artifact in artifacts}
    newest = {lineages[artifact.id]: artifact for artifact in artifacts}  # the last of each wins
    reasons: dict[str, str | None] = {}
    for artifact in artifacts:
        reasons[artifact.id] = _why_stale(artifact, by_id, newest, lineages, reasons)
    return reasons


def _why_stale(
    artifact: Artifact,
    by_id: Mapping[str, Artifact],
    newest: Mapping[Any, Artifact],
    lineages: Mapping[str, Any],
    reasons: Mapping[str, str | None],
) -> str | None:
    if faults := artifact.damage():
        return faults[0]
    latest = newest[lineages[artifact.id]]
    if latest.id != artifact.id:
        return f"replaced by {latest.id}"
    if artifact.stage in stages.STAGES:
        before, now = artifact.manifest["stage_version"], stages.version_of(artifact.stage)
        if before != now:
            return f"stage version changed: {before} -> {now}"
    for role, link in artifact.inputs.items():
        source = by_id.get(link["id"])
        if source is None:
            return f"input {role} is gone: {link['id']}"
        if source.digest != link["digest"]:
            return f"input {role} changed: {source.id}"
        latest = newest[lineages[source.id]]
        if latest.digest != link["digest"]:
            return f"input {role} has a newer version ({source.id} -> {latest.id})"
        # Replaced by a version of equal content is as good as new; anything else that ails an input ails its heirs.
        if (why := reasons.get(source.id)) and not why.startswith("replaced by"):
            return f"input {role} is stale: {source.id}"
    return None


def next_command(store: Store) -> str:
    """The next `hqdm …` to type: the first stage of the road that is missing or stale behind what was asked for
    last.
    """
    reasons = stale(store)
    above = store.current("model")
    if above is None:
        return "hqdm profile model.ckpt"
    if reasons[above.id]:
        return _profile_command(above)
    for stage in ("profile", "plan", "distill", "export", "sample", "score"):
        heir = _newest_heir(store, stage, above)
        if heir is None or reasons[heir.id]:
            return _command_of(stage, heir, above)
        above = heir
    return "hqdm report"


def another_road(store: Store) -> str:
    """What to try when the road is finished: the first of some bit widths that has no student yet."""
    done = {student.figures.get("bits") for student in store.artifacts("distill")}
    left = [bits for bits in ("w4a3", "w3a3", "w8a8") if bits not in done]
    return f"hqdm distill --bits {left[0]}" if left else "hqdm status"


def _newest_heir(store: Store, stage: str, above: Artifact) -> Artifact | None:
    """The newest artifact of a stage made from `above` from which the road goes on, as it does not from floats.

    By content, not by name: the images of fake and integer student are equal, and one score serves both.
    """

    def fits(artifact: Artifact) -> bool:
        return artifact.config.get("format") != "float" and above.digest in {
            link["digest"] for link in artifact.inputs.values()
        }

    return store.current(stage, fits)


def _command_of(stage: str, artifact: Artifact | None, above: Artifact) -> str:
    """The command that makes `artifact` again, or makes the first artifact of a stage from `above`."""
    known = artifact.config if artifact else {}
    if stage == "profile":
        return _profile_command(above)
    if stage == "plan":
        given = [name for name in ("method", "variant", "bits") if known.get(name)]
        words = [word for name in given for word in (f"--{name}", str(known[name]))]
        words += [word for item in (known.get("options") or {}).items() for word in ("--set", "=".join(item))]
        return shlex.join(["hqdm", "plan", *words])
    if stage == "distill":
        edited = above.config["edited_sha256"]  # then its bits are in the file
        return "hqdm distill" if edited else shlex.join(["hqdm", "distill", "--bits", str(above.config["bits"])])
    if stage == "export":
        return "hqdm export --format int"
    if stage == "sample" and known.get("source"):
        return shlex.join(["hqdm", "sample", str(known["source"])])
    return f"hqdm {stage}"


def _profile_command(model: Artifact) -> str:
    """The command that took the model in, with the files that it was given."""
    from pipelines.models.compvis_config import find_config

    path, config_path = Path(model.config["path"]), model.config["config_path"]
    words = ["hqdm", "profile", str(path)]
    if config_path is not None and not (path.is_file() and find_config(path) == Path(config_path)):
        words += ["--config", config_path]
    for name in ("prompts", "embeddings", "size"):
        if model.config.get(name) is not None:
            words += [f"--{name}", str(model.config[name])]
    if not model.config["ema"]:
        words.append("--no-ema")
    return shlex.join(words)


def samples_of_current_lineage(store: Store) -> list[Artifact]:
    """The sample artifacts that belong together: of the student asked for last and of its teacher, replaced ones
    left out.
    """
    anchor = store.current("sample")
    if anchor is None:
        return []
    teacher = _ids_above(store, anchor).get("model")
    last = store.current("sample", lambda sample: "distill" in _ids_above(store, sample))
    student = _ids_above(store, last).get("distill") if last else None
    lineages = _lineages(store.artifacts())
    newest = {lineages[sample.id]: sample for sample in store.artifacts("sample")}
    above = {sample.id: _ids_above(store, sample) for sample in newest.values()}
    return [
        sample
        for sample in newest.values()
        if above[sample.id].get("model") == teacher and above[sample.id].get("distill", student) == student
    ]


DIGITS = [1, 16, 16]  # the shape of what the embedded model draws, for which there are real images and a classifier


def needs_no_pair(store: Store, sample: Artifact, reference: Any, extractor: str | None) -> bool:
    """Whether a sample artifact can be scored by itself: a teacher's images are measured against a reference, or
    against the digits where they are digits; without either, only its students' images are, against its own.
    """
    if sample.config["source"] != "teacher":
        return True
    info = store.ancestor(sample, "model").figures.get("info", {})
    return extractor != "none" and (reference is not None or info.get("shape", DIGITS) == DIGITS)


def _ids_above(store: Store, artifact: Artifact) -> dict[str, str]:
    """stage -> id of everything that an artifact was made from."""
    ids = {}
    for role in artifact.inputs:
        source = store.linked(artifact, role)
        ids |= {source.stage: source.id} | _ids_above(store, source)
    return ids


def model_config(path: Path | str, config_path: Path | str | None = None, **options: Any) -> Any:
    """The `model` stage's configuration for a checkpoint or a folder, with the hashes of its files.

    Without a `config_path` the YAML beside a checkpoint is taken, where there is one: of its name, or the only one.
    """
    from pipelines.models.compvis_config import find_config

    path = Path(path).absolute()
    if not path.exists():
        raise FileFault(f"{path} does not exist", "name a checkpoint or a folder, as in: hqdm profile model.ckpt")
    if config_path is None and path.is_file():
        config_path = find_config(path)
    given = {name: value for name, value in options.items() if value is not None}
    given |= {} if config_path is None else {"config_path": config_path}
    for name in ("config_path", "prompts", "embeddings"):
        if (value := given.get(name)) is not None:
            given[name] = str(Path(value).absolute())
            if not Path(value).exists():
                raise FileFault(f"{value} does not exist", "check the path")
    stage = stages.load("model")
    return stage.with_hashes(from_dict(stage.Config, {"path": str(path)} | given, "model"))


def edited_plan(path: Path | str) -> Any:
    """The `plan` stage's configuration for a hand-edited plan file, with the method, variant and bits of the file.

    The stage itself reads the rest of the file against its model; a fault in these three is told as it would tell it.
    """
    path = Path(path).absolute()
    values = read_yaml(path)
    named = {}
    for name in ("method", "variant", "bits"):
        if name not in values:
            raise UsageError(f"{path}: the key {name!r} is missing", "it takes text")
        if not isinstance(values[name], str):
            raise UsageError(f"{path}: {name} cannot be {values[name]!r}", "it takes text")
        named[name] = values[name]
    named["bits"] = str(Bits.parse(named["bits"]))
    return replace(stages.load("plan").Config(), edited=str(path), edited_sha256=sha256_of_file(path), **named)


def plan_like(artifact: Artifact) -> Any:
    """The `plan` stage's configuration of an artifact, so that `make` finds it or makes it from a newer profile."""
    module = stages.load("plan")
    if artifact.manifest["stage_version"] == module.VERSION:
        return from_dict(module.Config, artifact.config, f"{artifact.path / 'manifest.json'}")
    known = {field.name for field in dataclasses.fields(module.Config)}
    return replace(module.Config(), **{name: value for name, value in artifact.config.items() if name in known})


PARENT = {"profile": "model", "plan": "profile", "distill": "plan", "export": "distill", "score": "sample"}
SOURCES = {"teacher": "model", "fake": "distill", "int": "export"}  # where `sample` gets its denoiser from
MODEL_KEYS = ("path", "config_path", "ema", "prompts", "embeddings", "size")  # what a recipe may say of its model
SEVERAL = ("sample", "score")  # stages that a recipe may name several times


@dataclass(frozen=True)
class _Step:
    stage: str
    config: Any


def _steps(recipe: Mapping[str, Any], base: Path, where: str) -> list[_Step]:
    """A recipe's steps in the order of the road; everything in it is checked before anything runs."""
    known = ["model", "seed", *(stage for stage in stages.ROAD if stage != "model")]
    for key in recipe:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}", did_you_mean(key, known))
    seed = recipe.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise UsageError(f"{where}: seed cannot be {seed!r}", "it takes a whole number")
    model = recipe.get("model")
    if isinstance(model, str):
        model = {"path": model}
    if not isinstance(model, Mapping) or not isinstance(model.get("path"), str):
        raise UsageError(f"{where}: the key 'model' is missing or no path", "write `model: model.ckpt`")
    for key in model:
        if key not in MODEL_KEYS:
            raise UsageError(f"{where}: unknown key 'model.{key}'", did_you_mean(key, MODEL_KEYS))
    options = {key: value for key, value in model.items() if key != "path" and value is not None}
    for key in ("config_path", "prompts", "embeddings"):
        if key in options and not isinstance(options[key], str):
            raise UsageError(f"{where}: model.{key} cannot be {options[key]!r}", "it takes the path of a file")
        if key in options:
            options[key] = base / options[key]
    steps = [_Step("model", model_config(base / model["path"], **options))]
    for stage in stages.ROAD:
        if stage == "model" or stage not in recipe:
            continue
        entries = recipe[stage]
        if isinstance(entries, list) and stage not in SEVERAL:
            raise UsageError(f"{where}: {stage} cannot be a list", f"only {' and '.join(SEVERAL)} can")
        for values in entries if isinstance(entries, list) else [entries]:
            if values is not None and not isinstance(values, Mapping):
                raise UsageError(f"{where}: {stage} cannot be {values!r}", "it takes a mapping of its options, or null")
            steps.append(_Step(stage, _config_of(stage, values or {}, seed, base, f"{where}: {stage}")))
    return steps


def _config_of(stage: str, values: Mapping[str, Any], seed: int | None, base: Path, where: str) -> Any:
    """A stage's configuration from a recipe: the recipe's seed where it has none, paths from the recipe's folder."""
    cls = stages.load(stage).Config
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if seed is not None and "seed" in fields:
        values = {"seed": seed} | dict(values)
    values = {
        name: str((base / value).absolute())
        if isinstance(value, str) and name in fields and fields[name].metadata.get("path") and (base / value).exists()
        else value
        for name, value in values.items()
    }
    if stage == "plan" and values.get("edited"):
        if mixed := [name for name in ("method", "variant", "bits", "options") if name in values]:
            words = " and ".join(mixed)
            raise UsageError(f"{where}: edited says the {words} already", f"leave out {words}")
        read = edited_plan(base / values["edited"]) if isinstance(values["edited"], str) else None
        values |= to_dict(read) if read else {}
    config = from_dict(cls, values, where)
    with_hashes = getattr(stages.load(stage), "with_hashes", None)  # of the outside files that its paths name
    return with_hashes(config) if with_hashes else config


def run_recipe(
    store: Store,
    recipe: Mapping[str, Any],
    report: Report | None = None,
    dry_run: bool = False,
    force: bool = False,
    base: Path | str = ".",
    where: str = "recipe",
) -> Iterator[Outcome]:
    """Make everything a recipe names, each stage from the artifacts made before it; one Outcome after the other.

        model: model.ckpt            # or a mapping: path, config_path, ema, prompts, embeddings, size
        seed: 0                      # optional; for every stage that takes one
        plan: {bits: w4a4}           # a stage's options, or null for its defaults; a stage left out is not run
        sample: [{source: teacher}, {source: int}]

    Relative paths start from `base`, the recipe's folder. `where` names the recipe in errors.
    """
    report = report or Report()
    made: dict[str, list[str]] = {}  # stage -> ids of this recipe's artifacts
    pending: set[str] = set()  # stages that a dry run would have run
    for step in _steps(recipe, Path(base), where):
        source = getattr(step.config, "source", None) if step.stage == "sample" else None
        parent = SOURCES.get(source) if step.stage == "sample" else PARENT.get(step.stage)
        for chosen in _choices(store, step, parent, made, pending):
            if chosen is None:
                reason = f"would run: its input {parent} will be made first"
                report.note(f"{step.stage}: {reason}")
                outcome = Outcome(step.stage, None, False, reason, to_dict(step.config))
            else:
                outcome = make(store, step.stage, step.config, chosen, report, force, dry_run)
            if outcome.artifact is None:
                pending.add(step.stage)
            else:
                made.setdefault(step.stage, []).append(outcome.artifact.id)
            yield outcome


def _choices(
    store: Store, step: _Step, parent: str | None, made: Mapping[str, list[str]], pending: set[str]
) -> list[dict[str, str] | None]:
    """The inputs of a step, role -> id: what this recipe made of the stage before it; for a score, each of its samples.

    None stands for an input that a real run would have made by then.
    """
    if step.stage == "score":
        if getattr(step.config, "samples_path", None) is not None:
            return [{}]
        against = step.config.reference or getattr(step.config, "reference_path", None)
        extractor = getattr(step.config, "extractor", None)
        drawn = [store.get(ident) for ident in dict.fromkeys(made.get("sample", ()))]
        fit = [sample for sample in drawn if needs_no_pair(store, sample, against, extractor)]
        chosen = [{"samples": sample.id} for sample in fit or drawn]
        return chosen + ([None] if "sample" in pending else []) or [{}]
    if parent in pending:
        return [None]
    role = "source" if step.stage == "sample" else parent
    return [{role: made[parent][-1]} if parent in made else {}]
