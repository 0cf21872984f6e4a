"""Triton kernels for CUDA: rotating and quantising in one pass; int8 products with their epilogue.

Integers are exact whatever the order of their sums, so tiles are free to choose. What is in fp32 keeps the definition's
operations, each rounded: division is IEEE's (Triton's own `/` is not), and contraction into fused multiply-adds is
switched off at every launch. Nothing is read back to the host: a scale and a zero-point are read where they lie, from a
table (T, n) at a row that is itself in device memory, so that a CUDA graph can be replayed at another timestep.

TRITON_INTERPRET=1, set before this module is imported, runs the kernels on the processor: slow, for checks. They use
operations of Triton's core alone, so that triton itself may have been imported before.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl

from pipelines.quant.hadamard import signs_of
from pipelines.quant.spec import Site, SitePlan

INTERPRETED = bool(triton.knobs.runtime.interpret)
EXACT = dict(enable_fp_fusion=False)  # multiplications and additions stay apart, each rounded


def _tile(m: int, n: int, k: int, warps: int, stages: int, group: int = 8) -> triton.Config:
    return triton.Config(dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP=group), num_warps=warps, num_stages=stages)


# Hopper's wgmma takes 64 rows a group of four warps; fewer rows (time embeddings) go through 16-row instructions.
PRODUCT_TILES = (
    [_tile(32, 32, 32, 4, 1, group=2)]
    if INTERPRETED
    else [
        _tile(128, 256, 128, 8, 3), _tile(256, 128, 128, 8, 3), _tile(128, 128, 128, 8, 4), _tile(128, 128, 64, 4, 4),
        _tile(128, 64, 128, 4, 4), _tile(64, 128, 128, 4, 4), _tile(64, 64, 128, 4, 4), _tile(64, 32, 128, 4, 5),
        _tile(32, 64, 128, 4, 5), _tile(16, 64, 256, 4, 4), _tile(16, 32, 256, 2, 4),
    ]
)  # fmt: skip
CODE_TILES = (
    [triton.Config(dict(ROWS=32, WIDTH=32))]
    if INTERPRETED
    else [
        triton.Config(dict(ROWS=rows, WIDTH=width), num_warps=warps)
        for rows, width, warps in ((8, 64, 2), (16, 64, 4), (32, 64, 4), (64, 64, 8), (16, 128, 4), (32, 32, 4))
    ]
)


def _worth_trying(configs: list[triton.Config], arguments: dict, **named) -> list[triton.Config]:
    """Tiles less than twice as high and wide as the product, or the smallest."""
    rows, outputs = ((arguments | named)[name] for name in ("rows", "outputs"))
    fitting = [
        config
        for config in configs
        if config.kwargs["BLOCK_M"] < 2 * max(rows, 16) and config.kwargs["BLOCK_N"] < 2 * max(outputs, 32)
    ]
    return fitting or configs[-1:]


@dataclass(frozen=True)
class Lookup:
    """Where kernels read a site's scale and zero-point, all of it on the device.

    scale, zero: (T, n) fp32, contiguous; zero None is 0 (symmetric). row: (1,) int32, which timestep. fault: (n,)
    int32, see `codes`. site: the column.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None
    row: torch.Tensor
    fault: torch.Tensor
    site: int = 0

    def __post_init__(self):
        if not all(table is None or table.is_contiguous() for table in (self.scale, self.zero)):
            raise ValueError("tables are read by rows, so they must be contiguous")

    @classmethod
    def of(cls, scale: float, zero: int | None, device: torch.device) -> Self:
        """A table of one entry, filled on the device. scale: what fp32 holds."""
        scales, zeros = (
            None if value is None else torch.full((1, 1), float(value), device=device) for value in (scale, zero)
        )
        row, fault = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
        return cls(scales, zeros, row, fault)

    def now(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero-point () fp32 of the current row, as torch reads them: still on the device."""
        scale, zero = (
            None if table is None else table[:, self.site].index_select(0, self.row)[0]
            for table in (self.scale, self.zero)
        )
        return scale, zero


@triton.autotune(configs=CODE_TILES, key=["size", "channels", "ORDER", "channel_stride"], cache_results=True)
@triton.jit(do_not_specialize=["site", "size"])
def _codes(
    x, out, signs, centre, gain, fault, scale, zero, row,
    rows, channels, positions, image_stride, position_stride, channel_stride, columns, site, size,
    ORDER: tl.constexpr, STAGES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFTED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """int8 codes of rows × channels values: clamp(⌊((x − centre)·gain)·blockdiag(D·H, …)/scale⌉ + z, low, high) − z,
    or − 128 where shifted.
    """
    ACROSS: tl.constexpr = ORDER if ORDER > WIDTH else WIDTH
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    at = tl.load(row) * columns + site
    z = 0.0
    if zero is not None:
        z = tl.minimum(tl.maximum(tl.load(zero + at), LOW * 1.0), HIGH * 1.0)
    there = (r < rows)[:, None] & (c < channels)[None, :]
    image = (r // positions).to(tl.int64)
    start = image * image_stride + (r % positions).to(tl.int64) * position_stride
    v = tl.load(x + start[:, None] + c.to(tl.int64)[None, :] * channel_stride, mask=there, other=0.0).to(tl.float32)
    if centre is not None:
        v = v - tl.load(centre + c, mask=c < channels, other=0.0)[None, :]
    if gain is not None:
        v = v * tl.load(gain + c, mask=c < channels, other=0.0)[None, :]
    if signs is not None:
        v = v * tl.load(signs + c % ORDER)[None, :]
    # Each stage joins neighbours and moves the bit of the channel's number that it used to the top: halves 1, 2, 4, …
    # apart come by in this order, and after the last all bits are back in their places.
    for _ in tl.static_range(STAGES):
        a, b = tl.split(tl.reshape(v, [ROWS * ACROSS // ORDER, ORDER // 2, 2]))
        v = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [ROWS * ACROSS // ORDER, ORDER])
    # Before the division, which would else be done twice, for two layouts of registers. What was masked is 0.
    bad = tl.reduce((v != v).to(tl.int32), 1, tl.standard._elementwise_max)
    s = tl.load(scale + at)
    bad = tl.where((s != s) | (s == 0.0), 1, bad)
    tl.store(fault + site + bad * 0, bad, mask=bad > 0)  # several threads may write it, all of them the same
    v = tl.div_rn(tl.reshape(v, [ROWS, ACROSS]), s)
    v = tl.minimum(tl.maximum(v, LOW - z), HIGH - z)  # before rounding: the same where the bounds are integers
    n = (v + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # adding 1.5·2²³ rounds to the nearest even
    if SHIFTED:
        n = n + (z.to(tl.int32) - 128)
    tl.store(out + r.to(tl.int64)[:, None] * channels + c[None, :], n.to(tl.int8), mask=there)


@triton.autotune(
    configs=PRODUCT_TILES, key=["size", "outputs", "channels", "KH", "KW", "CODE_DIGITS", "WEIGHT_DIGITS"],
    prune_configs_by=dict(early_config_prune=_worth_trying), cache_results=True,
)  # fmt: skip
@triton.jit(do_not_specialize=["site", "size"])
def _product(
    codes, weight, out, sums, scale, zero, row, weight_scale, bias,
    rows, outputs, channels, rows_in, height, width, out_height, out_width, columns, site, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, POINTWISE: tl.constexpr, CODE_DIGITS: tl.constexpr,
    WEIGHT_DIGITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFTED: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Σ q·V as an implicit matrix product (positions × places of the kernel and channels × outputs), int32, then the
    epilogue; without `weight_scale` the accumulators are what is written.

    codes: (digits, N, H, W, C) int8. weight: (digits, outputs, KH, KW, C) int8: both operands lie along their sums.
    """
    down, across = (rows + BLOCK_M - 1) // BLOCK_M, (outputs + BLOCK_N - 1) // BLOCK_N
    # Programs that run together share rows of codes and of weights in the second-level cache.
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP
    near = tl.minimum(down - first, GROUP)
    m = (first + program % (GROUP * across) % near) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % (GROUP * across) // near * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = 0
    if row is not None:
        at = tl.load(row) * columns + site
    # What a zero of the input is stored as; a convolution pads with it.
    pad = 0
    if SHIFTED:
        pad = tl.minimum(tl.maximum(tl.load(zero + at), LOW * 1.0), HIGH * 1.0).to(tl.int32) - 128
    top = m // out_width % out_height * SH - PH
    left = m % out_width * SW - PW
    image = (m // (out_width * out_height)).to(tl.int64) * (height * width)
    blocks = (channels + BLOCK_K - 1) // BLOCK_K
    acc = tl.full([BLOCK_M, BLOCK_N], 0, tl.int32)
    # Digits by Horner's rule, the largest powers of 128 first: one accumulator for all of them.
    for power in tl.static_range(CODE_DIGITS + WEIGHT_DIGITS - 1):
        if power > 0:
            acc = acc * 128
        for digit in tl.static_range(CODE_DIGITS):
            if CODE_DIGITS + WEIGHT_DIGITS - 2 - power - digit >= 0:
                if CODE_DIGITS + WEIGHT_DIGITS - 2 - power - digit < WEIGHT_DIGITS:
                    q = codes + tl.full([], digit, tl.int64) * rows_in * channels
                    v = weight + (CODE_DIGITS + WEIGHT_DIGITS - 2 - power - digit) * outputs * (KH * KW) * channels
                    for step in range(KH * KW * blocks):
                        tap = step // blocks
                        c = step % blocks * BLOCK_K + k
                        if POINTWISE:
                            from_row = m.to(tl.int64)
                            inside = m < rows
                        else:
                            y = top + tap // KW * DH
                            x = left + tap % KW * DW
                            from_row = image + y * width + x
                            inside = (m < rows) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
                        a = q + from_row[:, None] * channels + c[None, :]
                        there = inside[:, None] & (c < channels)[None, :]
                        if SHIFTED:
                            a = tl.load(a, mask=there, other=pad.to(tl.int8))
                        else:
                            a = tl.load(a, mask=there, other=0)
                        b = v + n[None, :] * (KH * KW * channels) + tap * channels + c[:, None]
                        b = tl.load(b, mask=(c < channels)[:, None] & (n < outputs)[None, :], other=0)
                        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    if SHIFTED:
        acc = acc - pad * tl.load(sums + n, mask=n < outputs, other=0)[None, :]
    to = m.to(tl.int64)[:, None] * outputs + n[None, :]
    there = (m < rows)[:, None] & (n < outputs)[None, :]
    if weight_scale is None:
        tl.store(out + to, acc, mask=there)
    else:
        by_output = tl.load(weight_scale + n, mask=n < outputs, other=0.0)
        by_output = by_output * (tl.load(scale + at) * SHARE)  # SHARE is a power of two: this is rounded once
        y = acc.to(tl.float32) * by_output[None, :]
        if bias is not None:
            y = y + tl.load(bias + n, mask=n < outputs, other=0.0)[None, :]
        tl.store(out + to, y.to(out.dtype.element_ty), mask=there)


def _bucket(rows: int) -> int:
    """For which size of input tiles are tried anew: powers of two."""
    return rows.bit_length()


def codes(
    x: torch.Tensor, plan: SitePlan, at: Lookup, shifted: bool,
    centre: torch.Tensor | None = None, gain: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """int8 codes of x, centred or, `shifted`, code − 128, in x's shape; channels-last in memory for a convolution.

    x: (N, C, H, W) or (…, C), fp32, fp16 or bf16, in any layout; NCHW, channels-last and transposed tokens are read
    where they lie. centre, gain: (C,) fp32. The site's entry of at.fault becomes 1 where a value to be rounded is NaN.
    """
    spatial, transform = plan.site.kind == "conv", plan.transform
    if spatial:
        count, channels, height, width = x.shape
        if x.stride(2) != width * x.stride(3):  # rows of the image are apart
            x = x.contiguous(memory_format=torch.channels_last)
        # Of lengths of 1 torch keeps strides that mean nothing.
        apart = x.stride(3) if width > 1 else x.stride(2)
        strides, positions, rows = (x.stride(0), apart, x.stride(1)), height * width, count * height * width
        out = torch.empty((count, height, width, channels), dtype=torch.int8, device=x.device).permute(0, 3, 1, 2)
    else:
        given = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
        (count, positions, channels), strides = given.shape, given.stride()
        rows, out = count * positions, torch.empty(x.shape, dtype=torch.int8, device=x.device)
        x = given
    low, high = plan.activation_range
    order = transform.order
    if rows:
        _codes[lambda meta: (triton.cdiv(rows, meta["ROWS"]), triton.cdiv(channels, max(order, meta["WIDTH"])))](
            x, out, signs_of(transform, x.device), centre, gain, at.fault, at.scale, at.zero, at.row,
            rows, channels, positions, *strides, at.scale.shape[1], at.site, _bucket(rows),
            ORDER=order, STAGES=order.bit_length() - 1, LOW=low, HIGH=high, SHIFTED=shifted, **EXACT,
        )  # fmt: skip
    return out


def output_size(site: Site, height: int, width: int) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    kernel, sizes = site.weight[2:], (height, width)
    return tuple(
        (size + 2 * padding - dilation * (length - 1) - 1) // stride + 1
        for size, length, stride, padding, dilation in zip(
            sizes, kernel, site.stride, site.padding, site.dilation, strict=True
        )
    )


def product(
    codes: torch.Tensor, weight: torch.Tensor, plan: SitePlan, size: tuple[int, int], at: Lookup | None = None,
    weight_scale: torch.Tensor | None = None, bias: torch.Tensor | None = None, sums: torch.Tensor | None = None,
    share: float = 1.0, dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """(Σ q·V · (s·share))·s_w + b, rounded to fp32 after each, then to `dtype`: (positions, outputs), a convolution's
    by image, row, column. Without weight_scale: the accumulators, int32.

    codes: (digits, positions in, C) int8, digits of 7 bits, the lowest first, each at a convolution's (height, width)
    `size`. weight: (digits, outputs, kh, kw, C) int8, likewise. at: needed for the scale, and for the zero-point where
    codes are shifted, of which `sums` says so: (outputs,) int32, Σ V. share: a power of two.
    """
    code_digits, rows_in, channels = codes.shape
    weight_digits, outputs, kh, kw, _ = weight.shape
    site = plan.site
    around = dict(SH=1, SW=1, PH=0, PW=0, DH=1, DW=1)
    (height, width), rows, out_size = size, rows_in, size
    if site.kind == "conv":
        pairs = zip(("S", "P", "D"), (site.stride, site.padding, site.dilation), strict=True)
        around = {f"{name}{side}": pair[i] for name, pair in pairs for i, side in enumerate("HW")}
        out_size = output_size(site, height, width)
        rows = rows_in // (height * width) * out_size[0] * out_size[1]
    pointwise = kh == kw == 1 and around == dict(SH=1, SW=1, PH=0, PW=0, DH=1, DW=1)
    out = torch.empty((rows, outputs), dtype=torch.int32 if weight_scale is None else dtype, device=codes.device)
    low, high = plan.activation_range
    scale, zero, row, columns, column = (
        (None, None, None, 0, 0) if at is None else (at.scale, at.zero, at.row, at.scale.shape[1], at.site)
    )
    if out.numel():
        _product[lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(outputs, meta["BLOCK_N"]),)](
            codes, weight, out, sums, scale, zero, row,
            None if weight_scale is None else weight_scale.contiguous(), bias,
            rows, outputs, channels, rows_in, height, width, *out_size, columns, column, _bucket(rows),
            KH=kh, KW=kw, **around, POINTWISE=pointwise, CODE_DIGITS=code_digits, WEIGHT_DIGITS=weight_digits,
            LOW=low, HIGH=high, SHIFTED=sums is not None, SHARE=share, **EXACT,
        )  # fmt: skip
    return out
