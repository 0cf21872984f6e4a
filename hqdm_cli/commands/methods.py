"""hqdm methods: what `hqdm plan --method` takes."""

import shlex
from typing import Annotated, Any

import typer

from hqdm_cli import console
from hqdm_cli.options import Debug, Json

EXAMPLE = """hqdm methods
  hqdm methods hadanorm mpq_dm"""


def methods(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Methods to tell more of. [default: a few lines of each]", metavar="[NAME]..."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the quantisation methods, their variants and options.

    Of those that are named also their equations, where they differ from their papers, and what their recipes set. Each
    is one file that declares transforms, quantisers and what trains; the source says where it comes from. An option, or
    a key of the recipe, is set with `hqdm plan --set NAME=VALUE`.
    """
    from pipelines.errors import UsageError
    from pipelines.methods import METHODS, find

    for name in names or ():
        alone = name.partition(":")[0].partition("/")[0]
        if alone != name and alone in METHODS:
            raise UsageError(
                f"hqdm methods takes a method's name alone, and {name!r} says more",
                f"hqdm methods {alone} tells of all its variants and options",
            )
    chosen = {name: find(name, None)[0] for name in names or METHODS}
    if as_json:
        console.print_json({name: _listed(name, method) for name, method in chosen.items()})
        return
    for place, (name, method) in enumerate(chosen.items()):
        if names and place:
            console.out("")
        console.out(f"{name}: {method.summary}")
        console.out(f"  source: {method.source}")
        width = max(map(len, method.variants), default=0)
        for variant, about in method.variants.items():
            default = " (default)" if variant == method.default_variant else ""
            console.out(f"  --variant {variant:<{width}}  {about.summary}{default}")
        settings = {f"{option}={_word(about.default)}": about for option, about in method.options.items()}
        width = max(map(len, settings), default=0)
        for setting, about in settings.items():
            console.out(f"  --set {setting:<{width}}  {about.summary}{_bounds(about)}")
        if names:
            _tell(name, method)


def _tell(name: str, method: Any) -> None:
    """The method's own text, and what each variant's recipe sets, as --set takes it."""
    from pipelines.config import to_dict
    from pipelines.methods import text_of
    from pipelines.plans import Recipe

    console.out(f"\n{text_of(name)}")
    usual = to_dict(Recipe())
    for variant, about in method.variants.items():
        own = {key: value for key, value in to_dict(about.recipe).items() if value != usual[key]}
        console.out(f"\nrecipe of {variant}: the defaults{', but' if own else ''}")
        for key, value in own.items():
            others = _by_width(about, key, value)
            for inner, part in _flat(key, value):
                console.out(f"  --set {shlex.quote(f'recipe.{inner}={_yaml(part)}')}{others}")


def _by_width(variant: Any, key: str, value: Any) -> str:
    """Where it is another for some widths of the weights: which, in brackets."""
    from pipelines.methods.base import BY_WIDTH
    from pipelines.quant.spec import WEIGHT_BITS, Bits

    if key not in BY_WIDTH:
        return ""
    found = {bits: getattr(variant.recipe_at(Bits(bits, 4)), key) for bits in WEIGHT_BITS}
    words = [f"{other:g} at {bits} bits of weights" for bits, other in found.items() if other != value]
    return f"  ({', '.join(words)})" if words else ""


def _flat(key: str, value: Any) -> Any:
    """A value with its key; of a mapping each entry with its own, joined by dots."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(f"{key}.{name}", inner)


def _yaml(value: Any) -> str:
    """A recipe's value as --set takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(_yaml, value))}]"
    return "null" if value is None else _word(value)


def _listed(name: str, method: Any) -> dict[str, Any]:
    from pipelines.config import to_dict
    from pipelines.methods import text_of

    return {
        "summary": method.summary,
        "source": method.source,
        "default": method.default_variant,
        "variants": {variant: about.summary for variant, about in method.variants.items()},
        "options": {option: _plain(about, method.variants) for option, about in method.options.items()},
        "recipes": {variant: to_dict(about.recipe) for variant, about in method.variants.items()},
        "text": text_of(name),
    }


def _plain(option: Any, variants: Any) -> dict[str, Any]:
    """An option as JSON has it: with the names of the variants that take it, and null where it has no bound."""
    return {
        "default": option.default, "summary": option.summary, "choices": list(option.choices),
        "variants": list(option.variants or variants), "least": option.least, "above": option.above,
        "most": option.most,
    }  # fmt: skip


def _bounds(option: Any) -> str:
    """What an option takes and which variants have it, in brackets; nothing where it is free and theirs all."""
    words = []
    if option.choices:
        words.append(", ".join(map(_word, option.choices)))
    elif not (option.least is option.above is option.most is None):
        words.append(option.takes)
    if option.variants:
        words.append(f"variant{'s' if option.variants[1:] else ''} {', '.join(option.variants)}")
    return f" ({'; '.join(words)})" if words else ""


def _word(value: int | float | str | bool) -> str:
    """A value as --set takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
