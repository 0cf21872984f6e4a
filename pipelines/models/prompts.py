"""What a model that reads prompts is told: embeddings of a file's prompts, made once by the model's own text encoders,
or read from a file.
"""

import inspect
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipelines.config import strict_json
from pipelines.errors import FileFault, HqdmError, UsageError
from pipelines.models.checkpoint import first_line, read_tensors
from pipelines.models.families.base import CLASSIFIER_FREE, Family
from pipelines.models.source import (
    CONFIG,
    INDEX,
    MOST_JSON,
    TEXT_PARTS,
    TEXT_WEIGHTS,
    components_of,
    read_json,
    text_weights_in,
)

MOST = 10_000  # prompts, and bytes of one
WITHOUT = "give --embeddings file.safetensors instead of --prompts"
MOST_LAYERS = 512  # of a text encoder
MOST_TOKENS = 512  # of a prompt
MOST_LEVELS = 16  # of an autoencoder


def conditions_of(
    family: Family, config: Mapping[str, Any], folder: Path | None, prompts: Path | None, embeddings: Path | None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The tensors that a network reading prompts is told, fp32, by name: (n + 1, …) with the null prompt last, or
    (n, …) where guidance needs none; and the prompts (none where a file of embeddings does not name them).

    config: the network's. folder: the pipeline's, for its text encoders; None for a file on its own. prompts: UTF-8
    text, one prompt a line; blank lines and lines that begin with # are skipped. embeddings: a .safetensors file with
    rows of what `family.wanted(config)` says, and in its metadata, if it likes, "prompts", a JSON list. Raises
    UsageError for both files, HqdmError for neither, FileFault for what is wrong with one.
    """
    if prompts is not None and embeddings is not None:
        raise UsageError(f"--prompts {prompts} and --embeddings {embeddings} exclude each other", "leave one out")
    if prompts is None and embeddings is None:
        raise HqdmError(
            f"a {family.network} reads prompts, and none were given",
            "--prompts prompts.txt (one a line); "
            "or --embeddings file.safetensors, where the folder has no text encoders",
        )
    if embeddings is not None:
        found, lines = read_embeddings(family, config, Path(embeddings))
    else:
        lines = read_prompts(Path(prompts))
        found = encode(family, config, folder, lines)
    rows = slice(None) if family.guidance(config)[0] == CLASSIFIER_FREE else slice(-1)
    return {name: value[rows].float().contiguous() for name, value in found.items()}, tuple(lines)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, stripped, in order; FileFault names the line."""
    found = []
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(MOST + 1), b""), 1):
                if len(raw) > MOST:
                    raise FileFault(f"{path}: line {number} is longer than {MOST} bytes", "one prompt a line")
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line and not line.startswith("#"):
                    found.append(line)
                if len(found) > MOST:
                    raise FileFault(f"{path}: line {number} is prompt {len(found)} of at most {MOST}", "give fewer")
    except OSError as error:
        raise FileFault(f"{path}: {error.strerror}", "give a text file, one prompt a line") from error
    except UnicodeDecodeError as error:
        raise FileFault(f"{path}: line {number} is not UTF-8: {error.reason}", "save the file as UTF-8") from error
    if not found:
        raise FileFault(f"{path}: holds no prompt", "write one a line; lines that begin with # are skipped")
    return found


def read_embeddings(
    family: Family, config: Mapping[str, Any], path: Path
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The tensors of an embeddings file, (n + 1, …) fp32, and its prompts; FileFault says what was wanted."""
    wanted = family.wanted(config)
    hint = _hint(wanted)
    try:
        with safe_open(path, framework="pt") as file:
            stored, metadata = set(file.keys()), file.metadata() or {}
            if missing := sorted(set(wanted) - stored):
                raise FileFault(f"{path}: has no {', '.join(missing)}", hint)
            if unknown := sorted(stored - set(wanted)):
                raise FileFault(f"{path}: a {family.network} is not told {', '.join(unknown)}", hint)
            found = {name: file.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise FileFault(f"{path}: {error}", f"give a .safetensors file; {hint}") from error
    _check(found, wanted, path)
    rows = len(next(iter(found.values())))
    found = {name: value.float().contiguous() for name, value in found.items()}
    return found, _named(metadata, rows - 1, path)


def _hint(wanted: Mapping[str, tuple[int | None, ...]]) -> str:
    shapes = (f"{name} {_shape(('n + 1', *tail))}" for name, tail in wanted.items())
    return f"wanted: {', '.join(shapes)}; n prompts and last the empty one"


def _shape(sizes) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in sizes)})"


def _check(found: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[int | None, ...]], where: Path) -> None:
    """FileFault for embeddings that the network cannot be told."""
    hint = _hint(wanted)
    for name, value in found.items():
        tail = wanted[name]
        fits = value.ndim == len(tail) + 1 and all(b in (None, a) for a, b in zip(value.shape[1:], tail, strict=True))
        if not fits or value.is_complex() or not value.numel():
            kind = str(value.dtype).removeprefix("torch.")
            raise FileFault(f"{where}: {name} is {kind} {_shape(value.shape)}", hint)
    rows = max(2, len(next(iter(found.values()))))
    for name, value in found.items():
        if len(value) != rows:
            raise FileFault(f"{where}: {name} has {len(value)} rows where {rows} were expected", hint)
        states = found.get(name.replace("_attention_mask", "_hidden_states"), value)
        if value.shape[1:2] != states.shape[1:2]:
            raise FileFault(f"{where}: {name} masks {value.shape[1]} tokens of {states.shape[1]}", hint)
        if not value.float().isfinite().all():
            raise FileFault(f"{where}: {name} holds NaN or Inf", "compute the embeddings again, in fp32 or bf16")


def _named(metadata: Mapping[str, str], count: int, path: Path) -> tuple[str, ...]:
    """The prompts that an embeddings file names; none where it names none."""
    try:
        names = strict_json(metadata.get("prompts", "[]"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) not in (0, count):
        raise FileFault(
            f"{path}: the metadata's prompts are not a JSON list of {count} strings", "mend them, or leave them out"
        )
    return tuple(names)


def encode(
    family: Family, config: Mapping[str, Any], folder: Path | None, prompts: list[str]
) -> dict[str, torch.Tensor]:
    """The embeddings of prompts by a folder's text encoders, (n + 1, …) fp32; FileFault where they do not go with the
    network or with their tokenizers.
    """
    try:
        with torch.no_grad():
            found = family.encode(text_pipeline(family, config, folder), prompts)
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError) as error:
        raise FileFault(
            f"{folder}: its text encoders failed: {first_line(error)}", f"fetch the folder again, or {WITHOUT}"
        ) from error
    _check(found, family.wanted(config), folder)
    return found


def text_pipeline(family: Family, config: Mapping[str, Any], folder: Path | None):
    """A folder's pipeline with its text encoders and tokenizers, fp32, evaluation mode. The denoiser is there for its
    configuration alone, on the meta device; everything else is None.

    Only classes of transformers and diffusers themselves and .safetensors files are loaded. HqdmError for anything
    else, FileFault for text encoders whose configuration and weights do not go together.
    """
    if folder is None or not (path := Path(folder) / INDEX).is_file():
        raise HqdmError(f"{folder or 'the file'}: no pipeline's folder, so it has no text encoders", WITHOUT)
    folder = path.parent
    components, kind, _ = components_of(folder)
    parts = {name: of for name, of in components.items() if name.startswith(TEXT_PARTS)}
    if not any(name.startswith("text_encoder") for name in parts):
        raise HqdmError(f"{path}: the pipeline has no text encoders", WITHOUT)

    import diffusers

    made = getattr(diffusers, kind, None)
    if not (inspect.isclass(made) and issubclass(made, diffusers.DiffusionPipeline) and hasattr(made, "encode_prompt")):
        raise HqdmError(f"{path}: {kind} is no pipeline of diffusers that encodes prompts", WITHOUT)
    accepted = inspect.signature(made.__init__).parameters
    given = {name: None for name, parameter in accepted.items() if parameter.default is parameter.empty}
    del given["self"]
    given |= {name: value for name, value in read_json(path).items() if name in accepted and isinstance(value, bool)}
    if "requires_safety_checker" in accepted:
        given["requires_safety_checker"] = False
    texts = {name: _load(folder / name, of) for name, of in parts.items() if name in accepted}
    for name in texts:
        if name.startswith("tokenizer"):
            encoder = texts.get(name.replace("tokenizer", "text_encoder"))
            _limit(texts[name], getattr(encoder, "config", None), folder / name)
    pipeline = made(**given | texts | {family.component: family.build(config, {})})
    factor = _factor(folder / "vae" / CONFIG) if "vae" in given else None
    if factor is not None:
        pipeline.vae_scale_factor = factor  # as the pipeline itself would find from its autoencoder
    return pipeline


def _factor(path: Path) -> int | None:
    """Pixels a latent, along one side, by an autoencoder's configuration; None where there is none that says it."""
    if not path.is_file():
        return None
    config = read_json(path)
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if levels is None:
        return None
    if not isinstance(levels, list) or len(levels) > MOST_LEVELS:
        raise FileFault(f"{path}: block_out_channels is no list of at most {MOST_LEVELS}", "fetch the file again")
    return 2 ** (len(levels) - 1)


def _limit(tokenizer, config, folder: Path) -> None:
    """Pad and cut a tokenizer's texts to no more tokens than its encoder reads: a file can state any number, and
    pipelines pad to it.
    """
    stated = tokenizer.model_max_length
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not stated >= 1:
        raise FileFault(
            f"{folder}: model_max_length cannot be {reprlib.repr(stated)}", f"77 and 512 are usual; or {WITHOUT}"
        )
    most = min(getattr(config, "max_position_embeddings", None) or MOST_TOKENS, MOST_TOKENS)
    tokenizer.model_max_length = int(min(stated, most))


def _load(folder: Path, name: str):
    """A text encoder or tokenizer from its folder."""
    import transformers

    kind = getattr(transformers, name, None)
    known = (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)
    if not inspect.isclass(kind) or not issubclass(kind, known):
        raise HqdmError(f"{folder}: transformers has no text encoder or tokenizer {name}", WITHOUT)
    options: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
    model = issubclass(kind, transformers.PreTrainedModel)
    if model:
        # the usual attention by name: a configuration can name a repository to fetch another's code from
        attention = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
        options |= dict(use_safetensors=True, dtype=torch.float32, attn_implementation=attention)
        options |= dict(variant=_check_encoder(folder, kind, attention), output_loading_info=True)
    else:
        _check_names(folder / "tokenizer_config.json", ("fast_tokenizer_files", "init_inputs"))
    bar = transformers.utils.logging
    shown = bar.is_progress_bar_enabled()
    bar.disable_progress_bar()
    try:
        loaded = kind.from_pretrained(folder, **options)
    except Exception as error:  # a tokenizer's file is parsed in Rust, which raises Exception itself
        raise FileFault(f"{folder}: {first_line(error)}", f"fetch the folder again, or {WITHOUT}") from error
    finally:
        if shown:
            bar.enable_progress_bar()
    if not model:
        return loaded
    encoder, info = loaded
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, info[what])):
            some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise FileFault(
                f"{folder}: {len(names)} {what.replace('_keys', ' tensors')}: {some}",
                f"fetch the folder again, or {WITHOUT}",
            )  # transformers itself would fill them at random
    return encoder.eval()


def _check_names(path: Path, keys: tuple[str, ...]) -> None:
    """FileFault for entries by which a configuration leads transformers to other files than the folder's usual ones."""
    try:
        if not path.is_file():
            return
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"more than {MOST_JSON} bytes")
        # not read_json: 1e30, transformers' word for any length, stands in many of these files
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FileFault(f"{path}: {first_line(error)}", f"fetch the file again, or {WITHOUT}") from error
    if not isinstance(values, dict):
        raise FileFault(f"{path}: not a mapping", f"fetch the file again, or {WITHOUT}")
    for key in keys:
        if values.get(key):
            raise FileFault(f"{path}: {key} is not supported", f"leave the key out, or {WITHOUT}")


def _check_encoder(folder: Path, kind: type, attention: str) -> str | None:
    """The variant of a text encoder's weights, once its configuration asks for no more than they hold: transformers
    builds, and fills, whatever it asks for.
    """
    from accelerate import init_empty_weights

    weights, variant = text_weights_in(folder)
    if not weights:
        raise FileFault(f"{folder}: has no {TEXT_WEIGHTS}.safetensors", f"fetch the file, or {WITHOUT}")
    if (adapter := folder / "adapter_config.json").is_file():
        raise FileFault(f"{adapter}: adapters are not supported", f"merge it into the weights, or {WITHOUT}")
    sizes = [value.numel() for file in weights for value in read_tensors(file)[0].values()]
    path, held = folder / CONFIG, sum(sizes)
    inner = [read_json(path)]
    _check_names(path, ("configuration_files", "transformers_weights", "quantization_config"))
    while inner:
        value = inner.pop()
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            key = str(key)
            most = min(len(sizes), MOST_LAYERS) if "layers" in key or "labels" in key else held
            if isinstance(part, int | float) and part > most and not key.endswith("_token_id"):
                raise FileFault(
                    f"{path}: {key} is {part} where the weights have {len(sizes)} tensors of {held} numbers",
                    f"fetch the folder again, or {WITHOUT}",
                )
            if isinstance(part, dict | list):
                inner.append(part)
    try:
        with init_empty_weights(include_buffers=True):
            config = kind.config_class.from_pretrained(folder, local_files_only=True, attn_implementation=attention)
            asked = sum(value.numel() for value in kind(config).parameters())
    except Exception as error:  # whatever a configuration makes a constructor raise
        raise FileFault(f"{path}: {first_line(error)}", f"fetch the file again, or {WITHOUT}") from error
    if asked > 2 * held:  # tied weights stand in a file once
        raise FileFault(
            f"{path}: asks for {asked} numbers where the weights have {held}", f"fetch the folder again, or {WITHOUT}"
        )
    return variant or None
