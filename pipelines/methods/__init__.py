"""The method table: one declaration a method. A new method is its file, one line here and one row in the README.

The contract tests read this table, so that they take a new method by themselves.
"""

import inspect
import sys
from collections.abc import Mapping

from pipelines.errors import UsageError, did_you_mean
from pipelines.methods import (
    apq_dm,
    dmq,
    double_hadamard,
    efficientdm,
    hadanorm,
    hqdm,
    lsq,
    mpq_dm,
    outlier_suppression,
    ptq4dm,
    ptqd,
    q_diffusion,
    quest,
    rtn,
    smoothquant,
    tfmq,
)  # fmt: skip
from pipelines.methods.base import Method, Variant

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        hqdm.METHOD,
        efficientdm.METHOD,
        rtn.METHOD,
        smoothquant.METHOD,
        outlier_suppression.METHOD,
        dmq.METHOD,
        hadanorm.METHOD,
        double_hadamard.METHOD,
        ptqd.METHOD,
        quest.METHOD,
        lsq.METHOD,
        apq_dm.METHOD,
        mpq_dm.METHOD,
        q_diffusion.METHOD,
        tfmq.METHOD,
        ptq4dm.METHOD,
    )
}  # fmt: skip


def find(name: str, variant: str | None, options: Mapping[str, str] | None = None) -> tuple[Method, str, Variant]:
    """A method and one of its variants (its default one for None) with options; UsageError with the nearest name."""
    if name not in METHODS:
        raise UsageError(f"method {name!r} does not exist", did_you_mean(name, METHODS))
    method = METHODS[name]
    chosen = variant or method.default_variant
    if chosen not in method.variants:
        raise UsageError(f"method {name} has no variant {chosen!r}", did_you_mean(chosen, method.variants))
    return method, chosen, method.with_options(chosen, options or {})


def text_of(name: str) -> str:
    """What a method's file says of it: equations, source, and where it differs from the paper and why."""
    return inspect.getdoc(sys.modules[f"{__name__}.{name}"]) or ""
