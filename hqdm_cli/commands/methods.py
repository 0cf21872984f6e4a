"""hqdm methods: what `hqdm plan --method` takes."""

from hqdm_cli import console
from hqdm_cli.options import Debug, Json

EXAMPLE = "hqdm methods"


def methods(as_json: Json = False, debug: Debug = False) -> None:
    """List the quantisation methods and their variants.

    Each is one file that declares transforms, quantisers and what trains; the source says where it comes from.
    """
    from pipelines.methods import METHODS

    if as_json:
        listed = {
            name: {
                "summary": m.summary,
                "source": m.source,
                "default": m.default_variant,
                "variants": {n: v.summary for n, v in m.variants.items()},
            }
            for name, m in METHODS.items()
        }
        console.print_json(listed)
        return
    for name, method in METHODS.items():
        print(f"{name}: {method.summary}")
        print(f"  source: {method.source}")
        width = max(map(len, method.variants), default=0)
        for name, variant in method.variants.items():
            default = " (default)" if name == method.default_variant else ""
            print(f"  --variant {name:<{width}}  {variant.summary}{default}")
