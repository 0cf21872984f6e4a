"""Integer arithmetic: one op table, a reference that is the truth, and faster back ends that give the same integers."""

from pipelines.errors import UsageError, did_you_mean

BACKENDS = {
    "reference": "plain torch integer operations, the truth; slow",
    "cpu": "oneDNN's int8 operators on x86-64, channels-last",
}


def backend(name: str):
    """The back end's module, which offers `prepare(weights) -> Prepared`; UsageError for an unknown
    name.
    """
    if name not in BACKENDS:
        raise UsageError(f"back end {name!r} does not exist", did_you_mean(name, BACKENDS))
    from pipelines.kernels import cpu, reference

    return {"reference": reference, "cpu": cpu}[name]
