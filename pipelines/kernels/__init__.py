"""Integer arithmetic: one op table, a reference that is the truth, and faster back ends that give the same integers."""

from pipelines.errors import UsageError, did_you_mean

BACKENDS = {
    "reference": "plain torch integer operations, the truth; slow",
    "cpu": "8-bit instructions of x86-64, channels-last",
    "cuda": "Triton kernels on an NVIDIA GPU, the rest of the network in fp32 there",
    "cuda-bf16": "the same with the rest of the network in bfloat16",
}
ON_DEVICE = ("cuda", "cuda-bf16")  # a network with their layers lies on a device


def backend(name: str):
    """The back end's module, which offers `prepare(weights) -> Prepared`; UsageError for an unknown
    name.
    """
    if name not in BACKENDS:
        raise UsageError(f"back end {name!r} does not exist", did_you_mean(name, BACKENDS))
    from pipelines.kernels import cpu, cuda, reference

    return {"reference": reference, "cpu": cpu, "cuda": cuda, "cuda-bf16": cuda}[name]
