"""Where a model comes from: a diffusers folder, a single file, or a checkpoint of CompVis latent diffusion.

What decides which files are read is here and loads no torch; the reading is in folder.py, single.py and compvis.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config import strict_json
from pipelines.errors import FileFault, HqdmError, UsageError

if TYPE_CHECKING:
    from pipelines.models.denoiser import Denoiser

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
DENOISERS = ("unet", "transformer")  # components of a pipeline
FIRST_STAGES = ("vae", "vqvae")
WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model", "model"
VARIANTS = ("", ".fp16", ".bf16")  # in the order in which they are looked for

TEXT_PARTS = ("text_encoder", "tokenizer")  # what the names of a pipeline's text components begin with

MOST_JSON = 10 << 20  # bytes
MOST_DEPTH = 32  # of lists and mappings
MOST_NUMBER = 1 << 53
MOST_VALUES = 500_000  # a sharded model's index has one for each tensor
_UNUSED = (".msgpack", ".h5", ".onnx", ".ckpt", ".md", ".png", ".jpg")  # a text encoder's, for other libraries

# Beginnings of tensors' names in the layouts in which models were first published.
_COMPVIS = ("model.diffusion_model.", "model_ema.")
_TRANSFORMERS = ("joint_blocks.", "double_blocks.", "model.diffusion_model.joint_blocks.",
                 "model.diffusion_model.double_blocks.")  # fmt: skip
_TEXTS = ("cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.", "text_encoders.")
_NEEDS_FOLDER = (
    "add --config FOLDER, a diffusers pipeline's folder of the same architecture: model_index.json and its "
    "configurations, weights not needed"
)


def take(
    path: Path, config: Path | None = None, ema: bool = True, prompts: Path | None = None,
    embeddings: Path | None = None, size: int | None = None,
) -> tuple["Denoiser", list[str]]:  # fmt: skip
    """Read a model, on the CPU, and what its user should know of the reading, a sentence each.

    config: a checkpoint's YAML, or a single file's folder of configurations. ema: the moving averages, where the file
    has both. prompts, embeddings: what a model that reads prompts is asked for; UsageError for any other. size: pixels
    a side. Raises HqdmError or FileFault for everything that a file can have wrong.
    """
    path = Path(path)
    from pipelines.models import folder, single

    if path.is_dir():
        if config is not None:
            raise UsageError(f"{config}: a folder has its own configurations", "leave --config out")
        parts = folder.read_folder(path)
        if not ema:
            parts.notes.append("--no-ema changes nothing: a folder has one set of weights")
        return folder.assemble(parts, prompts, embeddings, size)
    if path.name in (INDEX, CONFIG):
        raise UsageError(f"{path}: a folder's description, not a model", f"name the folder: {path.parent}")
    from pipelines.models.checkpoint import read_tensors

    state, left_out = read_tensors(path)
    beside = path.parent / CONFIG
    if config is not None and config.is_dir():
        parts = single.read_single(path, state, config, ema)
    elif any(name.startswith(_TRANSFORMERS) for name in state):
        raise FileFault(f"{path}: a single file of a transformer, which does not say its configuration", _NEEDS_FOLDER)
    elif any(name.startswith(_TEXTS) for name in state):
        if config is None:
            raise FileFault(
                f"{path}: a single file of a text-to-image model, which does not say its configuration", _NEEDS_FOLDER
            )
        parts = single.read_original(path, state, config, ema)
    elif any(name.startswith(_COMPVIS) for name in state):
        return _compvis(path, config, ema, prompts, embeddings, size)
    elif beside.is_file():
        parts = folder.read_model(path.parent, state)
    else:
        if any("lora" in name.lower() for name in state):
            raise FileFault(
                f"{path}: the weights of a LoRA, not a model", "merge it into its model first (diffusers: fuse_lora)"
            )
        some = ", ".join(sorted(state)[:4])
        raise FileFault(
            f"{path}: its {len(state)} tensors ({some}, …) are of no layout that is known",
            "give a checkpoint of latent diffusion (model.diffusion_model.…), a diffusers folder, or put a diffusers "
            "weight file's config.json beside it",
        )
    parts.notes.extend(_left_out(path, left_out))
    return folder.assemble(parts, prompts, embeddings, size)


def _compvis(
    path: Path, config: Path | None, ema: bool, prompts: Path | None, embeddings: Path | None, size: int | None
) -> tuple["Denoiser", list[str]]:
    from dataclasses import replace

    from pipelines.models.compvis import load_checkpoint

    refuse_prompts(prompts, embeddings, "a class-conditional or unconditional model")
    denoiser, left_out = load_checkpoint(path, config, ema)
    denoiser.info = replace(denoiser.info, shape=sized(denoiser.info.shape, size, denoiser.first_stage))
    return denoiser, _left_out(path, left_out)


def _left_out(path: Path, names: list[str]) -> list[str]:
    return [f"left out of {path.name}, without running it: {', '.join(names)}"] if names else []


def refuse_prompts(prompts: Path | None, embeddings: Path | None, what: str) -> None:
    """UsageError where prompts are given to a model that reads none."""
    for option, value in (("--prompts", prompts), ("--embeddings", embeddings)):
        if value is not None:
            raise UsageError(f"{option} {value}: {what} reads no prompts", f"leave {option} out")


def sized(shape: tuple[int, int, int], size: int | None, first_stage: Any) -> tuple[int, int, int]:
    """The shape of what is denoised for images of `size` pixels a side; the model's own where none is asked for."""
    if size is None:
        return shape
    if first_stage is None and shape[0] not in (1, 3):
        raise UsageError(
            f"size {size}: without a first stage nobody knows how many pixels a {shape[0]}-channel latent is",
            "leave --size out, or give the whole pipeline's folder",
        )
    factor = 1 if first_stage is None else first_stage.factor
    if not 0 < size <= 8192 or size % factor:
        raise UsageError(f"size {size} is no multiple of {factor} from {factor} to 8192", "512 is usual")
    return shape[0], size // factor, size // factor


def files_of(path: Path, config: Path | None = None) -> list[Path]:
    """The regular files that reading a model can use, sorted: they decide whether a run is the same run.

    Of a folder: its index, its scheduler's, denoiser's and first stage's configurations, their weights, and what text
    encoders and tokenizers have. Of a file: itself, and the configurations of diffusers beside it. FileFault
    where an index cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        found = _files_in_pipeline(path) if (path / INDEX).is_file() else _files_in_model(path)
    else:
        found = [path, path.parent / CONFIG, scheduler_of(path.parent)]
    if config is not None:
        found += files_of(config)
    return sorted({file for file in found if file.is_file()})


def _files_in_pipeline(path: Path) -> list[Path]:
    found = [path / INDEX]
    for name in components_of(path)[0]:
        part = path / name
        if name in (*DENOISERS, *FIRST_STAGES):
            found += [part / CONFIG, *weights_in(part)]
        elif name == "scheduler":
            found.append(part / SCHEDULER)
        elif name.startswith(TEXT_PARTS) and part.is_dir():
            texts = [file for file in part.iterdir() if file.suffix not in _UNUSED]
            if any(file.suffix == ".safetensors" for file in texts):
                texts = [file for file in texts if file.suffix != ".bin"]
            found += texts
    return found


def _files_in_model(path: Path) -> list[Path]:
    return [path / CONFIG, scheduler_of(path), *weights_in(path)]


def scheduler_of(path: Path) -> Path:
    """Where a model's folder has its scheduler's configuration: in it, or else in the pipeline's folder around it."""
    own, around = path / SCHEDULER, path / ".."
    return around / "scheduler" / SCHEDULER if not own.is_file() and (around / INDEX).is_file() else own


def weights_in(path: Path) -> list[Path]:
    """The files of a model's weights and, last, the index that names them, where there is one; [] without weights.

    safetensors go before a .bin, whole precision before half. FileFault for an index that names files elsewhere.
    """
    for variant in VARIANTS:
        single = path / f"{WEIGHTS}{variant}.safetensors"
        if single.is_file():
            return [single]
        index = path / f"{WEIGHTS}.safetensors.index{variant}.json"
        if index.is_file():
            return [*_shards(index), index]
    binary = path / f"{WEIGHTS}.bin"
    return [binary] if binary.is_file() else []


def text_weights_in(path: Path) -> tuple[list[Path], str]:
    """The safetensors of a text encoder's folder, as transformers looks for them, and their variant ("fp16", or "" for
    none); ([], "") without weights. FileFault for an index that names files elsewhere: transformers would follow it.
    """
    for variant in VARIANTS:
        single = path / f"{TEXT_WEIGHTS}{variant}.safetensors"
        if single.is_file():
            return [single], variant.removeprefix(".")
        index = path / f"{TEXT_WEIGHTS}.safetensors.index{variant}.json"
        if index.is_file():
            return _shards(index), variant.removeprefix(".")
    return [], ""


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FileFault(f"{index}: has no weight_map", "fetch the file again")
    names = set()
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise FileFault(
                f"{index}: names {name!r}, which is no safetensors file of this folder", "fetch the index again"
            )
        names.add(name)
    for name in sorted(names):
        if not _is_file(index.parent / name):
            raise FileFault(f"{index}: the file {name!r} is not there", "fetch all the files that the index names")
    return [index.parent / name for name in sorted(names)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # names that no file can have
        return False


def components_of(path: Path) -> tuple[dict[str, str], str, list[str]]:
    """A pipeline's components, name to class, its own class, and what was left out.

    HqdmError for components that are code from elsewhere; nothing is imported.
    """
    index = path / INDEX
    values = read_json(index)
    pipeline = values.get("_class_name")
    if not isinstance(pipeline, str):
        raise HqdmError(
            f"{index}: its pipeline is {pipeline!r}, not a class of diffusers", "code in a folder is not run"
        )
    found, notes = {}, []
    for name, entry in values.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if not name.isidentifier():  # it is a folder's name, too
            raise FileFault(f"{index}: the component {name[:80]!r} is no plain name", "fetch the file again")
        if len(entry) != 2 or not all(isinstance(part, str) and part.isidentifier() for part in entry):
            raise FileFault(f"{index}: the component {name!r} is {entry!r}", "it takes a library and a class")
        library, kind = entry
        if name in ("safety_checker", "feature_extractor", "image_encoder"):
            notes.append(f"left out of the pipeline: {name} ({library}.{kind})")
        elif library not in ("diffusers", "transformers"):
            raise HqdmError(
                f"{index}: the component {name} is {kind} of {library!r}",
                "only classes of diffusers and transformers are used; other code is never imported",
            )
        else:
            found[name] = kind
    return found, pipeline, notes


def read_json(path: Path, most: int = MOST_JSON) -> dict[str, Any]:
    """The mapping in a JSON file of at most `most` bytes; FileFault names the file and what is wrong with it."""
    path = Path(path)
    hint = "fetch the file again; it takes plain JSON, one mapping"
    try:
        if not path.is_file():
            raise FileFault(f"{path}: there is no such file", "check that the folder is complete")
        if (size := path.stat().st_size) > most:
            raise FileFault(f"{path}: {size} bytes are too many for a configuration (at most {most})", hint)
        # diffusers writes -Infinity where there is no lower limit
        values = strict_json(path.read_bytes().decode("utf-8"), constants=("-Infinity",))
        if not isinstance(values, dict):
            raise FileFault(f"{path}: holds a {type(values).__name__} at its top, not a mapping", hint)
        bounded(values)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise FileFault(f"{path}: not a configuration in JSON: {reason}", hint) from error
    return values


def bounded(values: Mapping | list) -> None:
    """ValueError for plain values too deep, too many or too large to be a configuration."""
    seen, inner = 0, [(values, 1)]
    while inner:
        value, depth = inner.pop()
        seen += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"lists and mappings more than {MOST_DEPTH} deep")
        if seen > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values")
        if isinstance(value, int | float) and not -MOST_NUMBER < value < MOST_NUMBER:
            raise ValueError("a number too large")
        if isinstance(value, Mapping | list):
            inner += [(part, depth + 1) for part in (value.values() if isinstance(value, Mapping) else value)]
