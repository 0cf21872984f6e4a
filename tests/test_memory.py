"""What the process measures and asks of the system about its memory."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.memory import (
    give_back,
    let_go,
    peak_bytes,
    reset_peak,
    return_freed_memory,
    reuse_freed_memory,
)  # fmt: skip

BLOCK = 1 << 28
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak or let a page go")


def resident(kind: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{kind}:"))


@linux
def test_a_peak_is_kept_until_it_is_reset():
    reset_peak()
    before = peak_bytes()
    block = torch.ones(BLOCK // 4)
    del block
    assert peak_bytes() >= before + 0.9 * BLOCK
    reset_peak()
    assert peak_bytes() <= before + 0.5 * BLOCK


@linux
def test_large_blocks_go_back_to_the_system_although_small_ones_are_kept():
    assert reuse_freed_memory()
    before = resident("VmRSS")
    block = torch.ones(BLOCK // 4)
    assert resident("VmRSS") >= before + 0.9 * BLOCK
    del block
    assert resident("VmRSS") <= before + 0.1 * BLOCK
    blocks = [torch.ones(1 << 18) for _ in range(BLOCK >> 21)]
    last = torch.ones(1 << 10)  # above them in the heap
    kept = resident("VmRSS")
    del blocks
    assert resident("VmRSS") >= kept - 0.1 * BLOCK
    give_back(BLOCK)
    assert resident("VmRSS") <= kept - 0.4 * BLOCK and last.sum() == 1 << 10


def left_of(made: str) -> float:
    """Of 256 MB of temporaries, with small ones that are kept between them, the share that stays after they are freed,
    in a process whose heap has no holes yet.
    """
    script = f"""
import contextlib, torch
from pipelines.memory import lasting, resident_bytes, reuse_freed_memory
reuse_freed_memory()
before, temporaries, kept = resident_bytes(), [], []
with {made}:
    for _ in range(256):
        temporaries.append(torch.ones(1 << 18))
        kept.append(torch.ones(1 << 10))
    del temporaries
print((resident_bytes() - before) / 2**28)
"""
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@linux
def test_temporaries_beside_what_lasts_leave_no_holes():
    assert left_of("lasting()") < 0.1 < 0.9 < left_of("contextlib.nullcontext()")


@linux
def test_pages_let_go_come_back_with_their_values(tmp_path):
    mine = torch.arange(1 << 20)
    let_go(mine.data_ptr(), mine.nbytes)
    assert torch.equal(mine, torch.arange(1 << 20))
    save_file({"a": torch.full((BLOCK // 4,), 2.0)}, tmp_path / "a.safetensors")
    mapped = load_file(tmp_path / "a.safetensors")["a"]
    assert mapped.mean() == 2.0
    there = resident("RssFile")
    let_go(mapped.data_ptr(), mapped.nbytes)
    assert resident("RssFile") <= there - 0.9 * BLOCK
    assert mapped.mean() == 2.0


@linux
def test_where_memory_is_scarce_free_pages_go_back_however_few_they_are():
    def kept_after(values):
        blocks = [torch.ones(1 << 18) for _ in range(BLOCK >> 21)]
        last = torch.ones(1 << 10)  # above them in the heap
        full = resident("VmRSS")
        del blocks
        give_back(values)
        return resident("VmRSS") >= full - 0.1 * BLOCK and last.sum() == 1 << 10

    assert reuse_freed_memory() and kept_after(1)
    return_freed_memory()
    try:
        assert not kept_after(1)
    finally:
        reuse_freed_memory()
    assert kept_after(1)
