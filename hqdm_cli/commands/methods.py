"""hqdm methods: what `hqdm plan --method` takes."""

from typing import Any

from hqdm_cli import console
from hqdm_cli.options import Debug, Json

EXAMPLE = "hqdm methods"


def methods(as_json: Json = False, debug: Debug = False) -> None:
    """List the quantisation methods, their variants and options.

    Each is one file that declares transforms, quantisers and what trains; the source says where it comes from. An
    option is set with `hqdm plan --set NAME=VALUE`.
    """
    from pipelines.methods import METHODS

    if as_json:
        listed = {
            name: {
                "summary": m.summary,
                "source": m.source,
                "default": m.default_variant,
                "variants": {n: v.summary for n, v in m.variants.items()},
                "options": {n: _plain(option, m.variants) for n, option in m.options.items()},
            }
            for name, m in METHODS.items()
        }
        console.print_json(listed)
        return
    for name, method in METHODS.items():
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
