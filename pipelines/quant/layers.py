"""Fake quantisation as layers: integers held in floats, with gradients, in exactly the arithmetic of the integer
kernels.

A layer computes  y = (q·V)·((s_t/order)·s_w) + b  where q and V hold integers. Products of integer-valued fp32 operands
are exact below 2²⁴, and are taken in parts where they might pass it, so q·V has the very bits of the integer
accumulator, and the epilogue is the kernels' epilogue, operation for operation. What is trained is what is deployed.

A backward pass of a large model would keep several tensors of every weight's size. Here it keeps the layer's input and
its parameters; V and everything between is computed again when the gradient arrives, some outputs at a time, so that it
stays in the processor's caches and in memory that the process has already.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipelines.quant.affine import centred_codes, quantise
from pipelines.quant.hadamard import rotate_activation, rotate_last
from pipelines.quant.integers import IntegerWeights, accumulator_bound
from pipelines.quant.passes import WeightRows, activation_codes, activation_gradient
from pipelines.quant.products import times
from pipelines.quant.spec import HALVES, Site, SitePlan, largest_magnitude
from pipelines.quant.surroundings import Surroundings
from pipelines.quant.tables import TimestepTables

EXACT_FP32 = 2**24  # integers below it are exact in fp32, and so are sums that stay below it
EXACT_BFLOAT16 = 2**8
AT_ONCE = 2**19  # weights that one pass over rows takes: 2 MB in fp32
A_PRODUCT = 2**22  # weights of one product, 16 MB: what is larger the C library maps anew each time, page by page


def epilogue(
    accumulator: torch.Tensor, activation_scale: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """acc·(s_x·s_w[c]) + b, each operation rounded to fp32.

    The scales are multiplied first, so that an operator which takes two of them has one left to apply: in which order
    oneDNN's fused epilogue would multiply with both depends on the processor.
    """
    shape = (-1, *[1] * (accumulator.ndim - 2)) if accumulator.ndim == 4 else (-1,)
    y = accumulator * (weight_scale * activation_scale).view(shape)
    return y if bias is None else y + bias.view(shape)


def zero_point(zero: torch.Tensor, plan: SitePlan) -> torch.Tensor | None:
    """A table's zero-point as a site uses it: within its codes, which the integer bounds rely on; None where
    symmetric.
    """
    return None if plan.activation_quantiser == "symmetric" else zero.clamp(*plan.activation_range)


def product(codes: torch.Tensor, folded: torch.Tensor, site: Site, narrow: bool = False) -> torch.Tensor:
    """q·V of a linear or convolution, without epilogue, in the operands' dtype.

    narrow: both operands are integers of at most 256 (EXACT_BFLOAT16), so that a processor on which bfloat16 products
    are faster may multiply a linear's as such and add in fp32: the same bits. torch ignores it on others.

    A convolution's result is channels-last, as the integer operators give it: torch decides otherwise for one input
    channel, and the next GroupNorm rounds differently in another layout.
    """
    if is_matrix(site):
        rows, weight = flat(codes, site), folded.flatten(1)
        with _bfloat16_products() if narrow and codes.dtype == torch.float32 else nullcontext():
            return unflat(F.linear(rows, weight) if narrow else times(rows, weight), codes, site)
    result = F.conv2d(codes, folded, None, site.stride, site.padding, site.dilation, site.groups)
    return result.contiguous(memory_format=torch.channels_last)


def is_matrix(site: Site) -> bool:
    """Whether a site's product is one of matrices: a linear's, or that of a convolution which sees one position."""
    one = (1,) * len(site.weight[2:])
    return site.kind == "linear" or (
        site.weight[2:] == site.stride == one and not any(site.padding) and site.groups == 1
    )  # fmt: skip


def flat(x: torch.Tensor, site: Site) -> torch.Tensor:
    """What enters or leaves a site as (rows, channels); a view where it is contiguous or channels-last."""
    return (x.permute(0, 2, 3, 1) if site.kind == "conv" else x).flatten(0, -2)


def unflat(rows: torch.Tensor, like: torch.Tensor, site: Site) -> torch.Tensor:
    """The inverse of `flat`, a view; `like` has the shape but for the channels."""
    if site.kind == "linear":
        return rows.view(*like.shape[:-1], rows.shape[1])
    return rows.view(len(like), *like.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


def exact_product(codes: torch.Tensor, folded: torch.Tensor, plan: SitePlan, narrow: bool) -> torch.Tensor:
    """`product` of integer-valued fp32 operands, exact whatever they hold: integers rounded once, to fp32.

    Sums may pass 2²⁴ where 8-bit operands meet many inputs. Then the channels are taken in parts whose sums cannot, and
    the parts are added in fp64. Where one channel's sum could reach that far, all of it is fp64.
    """
    reach = largest_magnitude(plan.activation_range) * largest_magnitude(plan.weight_range) * plan.transform.order
    if reach * folded[0].numel() < EXACT_FP32:  # by the bits alone, as with 4 of them
        return product(codes, folded, plan.site, narrow)
    rows = as_rows(folded)
    inputs = torch.cat([  # Σ|V| over the kernel, (out, in)
        rows[span].view(len(rows[span]), -1, folded.shape[1]).abs().sum(1, dtype=torch.float64)
        for span in row_spans(*rows.shape)
    ])  # fmt: skip
    low, high = codes.aminmax()
    reach = max(-low.item(), high.item())
    parts = 1
    while max(part.sum(1).max().item() for part in inputs.chunk(parts, 1)) * reach >= EXACT_FP32:
        parts *= 2
        if parts > folded.shape[1] or plan.site.groups > 1:
            return product(codes.double(), folded.double(), plan.site).float()
    if parts == 1:
        return product(codes, folded, plan.site, narrow)
    channel = 1 if plan.site.kind == "conv" else -1
    pairs = zip(codes.chunk(parts, channel), folded.chunk(parts, 1), strict=True)
    return sum(product(part, weight, plan.site, narrow).double() for part, weight in pairs).float()


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def is_narrow(plan: SitePlan, undone_on: Literal["weight", "activation", "neither"]) -> bool:
    """Whether both operands of a site's product stay within ±EXACT_BFLOAT16, wherever its transform is undone."""
    largest = {
        "weight": largest_magnitude(plan.weight_range), "activation": largest_magnitude(plan.activation_range),
    }  # fmt: skip
    if undone_on != "neither":
        largest[undone_on] *= plan.transform.order
    return max(largest.values()) <= EXACT_BFLOAT16


def as_rows(weight: torch.Tensor) -> torch.Tensor:
    """A weight (out, in, …) as (out, …·in), the input channels last: a view where it is a linear's or channels-last."""
    return weight if weight.ndim == 2 else weight.movedim(1, -1).reshape(len(weight), -1)


def from_rows(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `as_rows`, a view; a convolution's weight is channels-last."""
    return rows if len(shape) == 2 else rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def row_spans(rows: int, columns: int, at_once: int | None = None) -> Iterator[slice]:
    """Slices of rows with about `at_once` entries (AT_ONCE)."""
    step = max(1, (at_once or AT_ONCE) // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def product_spans(weight: torch.Tensor, groups: int) -> list[slice]:
    """Equal slices of a weight's outputs, but for the last, that are multiplied one after the other; in groups, where
    outputs have inputs of their own, all of them at once.
    """
    parts = -(-weight.numel() // A_PRODUCT) if groups == 1 else 1
    step = -(-len(weight) // parts // 16) * 16  # whole blocks of oneDNN's
    return [slice(start, min(start + step, len(weight))) for start in range(0, len(weight), step)]


class QuantLayer(nn.Module):
    """A linear or convolution with fake-quantised weight and activation, and low-rank adapters merged before Q(W + BA).

    weight: (out, in, …) fp32, frozen and shared with whoever gave it. lora_a: (r, in, …), lora_b: (out, r).
    `index` is the site's column in the timestep tables and `span` its outputs' columns in the tables' weight factors.
    """

    def __init__(
        self,
        plan: SitePlan,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_scale: torch.Tensor,
        weight_zero: torch.Tensor,
        tables: TimestepTables,
        index: int,
        span: slice,
        constants: Mapping[str, torch.Tensor] | None = None,
    ):
        super().__init__()
        self.plan, self.index, self.span = plan, index, span
        self.surroundings = Surroundings(plan, constants or {})
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.weight_scale = nn.Parameter(weight_scale.clone())
        self.register_buffer("weight_zero", weight_zero.clone())
        self.register_buffer("base_codes", None, persistent=False)
        self.register_buffer("base_scale", None, persistent=False)
        self.lora_a = self.lora_b = None
        self.soft_codes: Callable[[], torch.Tensor] | None = None  # codes − zero-points while their rounding is learned
        self.float_inputs = False  # whether inputs are left unrounded, while weights alone are reconstructed
        self._tables = [tables]  # in a list, so that the shared tables are not a child of every layer
        self._frozen: tuple[torch.Tensor, torch.dtype] | None = None

    @torch.no_grad()
    def set_base(self, scale: torch.Tensor) -> None:
        """Let the adapters add to the weight as it is quantised at `scale` (out,), dequantised, instead of to the
        weight itself: EfficientDM. It is held as integers, (out, …·in) uint8.
        """
        self.base_codes = self.base_scale = None
        rows = as_rows(self.weight)
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        for span in row_spans(*rows.shape):
            low, high = self.surroundings.bounds(span)
            part = self._rows(span).turned(rows[span])
            part = quantise(part, scale[span, None], self.weight_zero[span, None], low, high)
            codes[span] = part.sub_(low).to(torch.uint8)
        self.base_codes, self.base_scale = codes, scale.clone()

    @torch.no_grad()
    def set_codes(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        """Let the adapters add to codes (out, …·in) uint8, from each row's smallest, that were rounded otherwise than
        to the nearest, at `scale` (out,).
        """
        self.base_codes, self.base_scale = codes, scale.clone()

    def train_weight(self) -> None:
        """Make the weight itself a parameter, a copy that is no longer shared."""
        weight = self.merged_weight()
        del self.weight
        self.base_codes = self.base_scale = None
        self.weight = nn.Parameter(weight)

    def train_bias(self) -> None:
        """Make the bias a parameter of its own; zeros where there was none."""
        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias.clone()
        del self.bias
        self.bias = nn.Parameter(bias)

    def _rows(self, span: slice) -> WeightRows:
        """Some outputs' weights, and how they are quantised."""
        base = as_rows(self.weight[span]) if self.base_codes is None else self.base_codes[span]
        base_scale = None if self.base_scale is None else self.base_scale[span]
        return WeightRows(
            self.plan, self.surroundings, base.contiguous(), base_scale, self.weight_scale[span],
            self.weight_zero[span], *self.surroundings.bounds(span),
        )  # fmt: skip

    def _added(self, span: slice, a: torch.Tensor | None) -> torch.Tensor | None:
        """Rows of BA; a: `lora_a` as rows."""
        return None if a is None else times(self.lora_b[span], a.T)

    def _a(self) -> torch.Tensor | None:
        return None if self.lora_a is None else as_rows(self.lora_a)

    def add_lora(self, rank: int, generator: torch.Generator) -> None:
        """Adapters of the given rank: A Kaiming-uniform(a = √5), B zero, no alpha (Hu et al., 2022; EfficientDM)."""
        inputs = self.weight[0].numel()
        bound = 1 / math.sqrt(inputs)  # what kaiming_uniform with a = √5 comes to
        a = (torch.rand((rank, *self.weight.shape[1:]), generator=generator) * 2 - 1) * bound
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(torch.zeros(self.weight.shape[0], rank))

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """W + BA, (out, in, …)."""
        result, a = self.weight_scale.new_empty(len(self.weight), self.weight[0].numel()), self._a()
        for span in row_spans(*result.shape):
            base, added = self._rows(span).values(), self._added(span, a)
            result[span] = base if added is None else added.add_(base)
        return from_rows(result, self.weight.shape)

    @torch.no_grad()
    def quantised(
        self, whole: slice, fold: bool, factor: torch.Tensor | None = None, keep: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes − zero-points of some outputs of W + BA, (outputs, in, …) fp32, where `fold` rotated to V, times factor
        (outputs,); and with `keep` what `WeightRows.gradient` asks for.
        """
        count, columns, a = whole.stop - whole.start, self.weight[0].numel(), self._a()
        centred, rounded = self.weight_scale.new_empty(count, columns), None
        if keep:
            rounded = torch.empty_like(centred, dtype=torch.int8 if self.plan.weight_bits < 8 else torch.int16)
        for part in row_spans(count, columns):
            span = slice(whole.start + part.start, whole.start + part.stop)
            self._rows(span).quantise(
                self._added(span, a), None if rounded is None else rounded[part], centred[part], fold,
                None if factor is None else factor[part],
            )  # fmt: skip
        return from_rows(centred, (count, *self.weight.shape[1:])), rounded

    def folded(self) -> torch.Tensor:
        """V (out, in, …) fp32, integer-valued: quantise W + BA, then fold the inverse transform in."""
        return self.quantised(slice(0, len(self.weight)), self.plan.inverse == "single")[0]

    def integers(self) -> IntegerWeights:
        """The integers that this layer computes with."""
        return IntegerWeights(
            self.plan,
            self.quantised(slice(0, len(self.weight)), fold=False)[0].to(torch.int16),
            self.weight_zero.to(torch.int16),
            self.weight_scale.detach().clone(),
            None if self.bias is None else self.bias.detach().float().clone(),
            self.surroundings.tensors(),
        )

    @torch.no_grad()
    def freeze(self) -> None:
        """Compute V once, for sampling. Where the accumulator can leave fp32's exact range, products go through
        fp64.
        """
        folded = self.folded()
        growth = self.plan.transform.order if self.plan.inverse == "activation" else 1
        # Where a student is broken V is no number, which its prediction tells with its timestep.
        finite = bool(folded.isfinite().all())
        exact = finite and accumulator_bound(folded, self.plan.activation_range, growth) < EXACT_FP32
        dtype = torch.float32 if exact else torch.float64
        self._frozen = (folded.to(dtype), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._tables[0].each(x, self._at_one_timestep, self.plan.site.name)

    def _at_one_timestep(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero = self._tables[0].of(self.index)
        zero = zero_point(zero, self.plan)
        if self.plan.site.kind == "conv":
            x = x.contiguous(memory_format=torch.channels_last)
        factor = self._tables[0].factors_of(self.span)
        output_scale = self.weight_scale if factor is None else self.weight_scale * factor
        given = x
        x, mean = self.surroundings.before(x)
        own = [value if value is not None and value.requires_grad else None for value in (self.weight, self.bias)]
        learned = (x, scale, zero, output_scale, self.weight_scale, self.lora_a, self.lora_b, *own)
        if self.soft_codes is not None:
            y = self._softly(x, scale, zero, output_scale)
        elif torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in learned):
            y = _Trained.apply(self, *learned)
        else:
            y = self.output(self.codes(x, scale, zero), scale, output_scale)
        return self.surroundings.after(y, given, mean, self._folded_now, output_scale.detach())

    def _folded_now(self) -> torch.Tensor:
        return self.folded() if self._frozen is None else self._frozen[0].float()

    def _softly(self, x, scale, zero, output_scale) -> torch.Tensor:
        """The forward pass with codes whose rounding is being learned; gradients are torch's own."""
        codes = self.soft_codes()  # (out, …·in)
        if self.plan.inverse == "single":
            codes = rotate_last(codes, self.plan.transform)
        accumulator = product(self.codes(x, scale, zero), from_rows(codes, self.weight.shape), self.plan.site)
        return epilogue(accumulator, scale / self.plan.transform.order, output_scale, self.bias)

    def codes(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """What V is multiplied with: x rotated and quantised, centred, and rotated back where that is the plan."""
        plan, spatial = self.plan, self.plan.site.kind == "conv"
        if not (torch.is_grad_enabled() or self.float_inputs):
            return activation_codes(x, plan, scale, zero, plan.inverse == "activation")
        codes = rotate_activation(x, plan.transform, spatial)
        codes = codes / scale if self.float_inputs else centred_codes(codes, scale, zero, *plan.activation_range)
        if plan.inverse == "activation":
            codes = rotate_activation(codes, plan.transform, spatial, inverse=True)
        return codes

    def output(self, codes: torch.Tensor, scale: torch.Tensor, output_scale: torch.Tensor) -> torch.Tensor:
        """The product with V and the epilogue."""
        undone_on = {"single": "weight", "activation": "activation"}.get(self.plan.inverse, "neither")
        narrow = is_narrow(self.plan, undone_on) and not self.float_inputs
        if self._frozen is None and self.float_inputs:
            accumulator = product(codes, self.folded(), self.plan.site)
        elif self._frozen is None:
            accumulator = exact_product(codes, self.folded(), self.plan, narrow)
        else:
            folded, dtype = self._frozen
            accumulator = product(codes.to(dtype), folded, self.plan.site, narrow).to(torch.float32)
        return epilogue(accumulator, scale / self.plan.transform.order, output_scale, self.bias)


class _Trained(torch.autograd.Function):
    """A layer's forward pass that keeps its input and its parameters for the backward pass, and nothing else.

    A single transform is undone on the side with fewer entries, the weight's integers (V) or the activation's: the
    accumulators are the same integers. With dC the gradient of the weight's codes, the rows' sums Σ C·dC are what the
    scales of the epilogue need, ∂L/∂s_w = Σ C·dC/s_w and ∂L/∂s_x = Σ C·dC/s_x over all rows, so that the accumulator
    need not be kept.
    """

    @staticmethod
    def forward(ctx, layer, x, scale, zero, output_scale, weight_scale, lora_a, lora_b, weight, bias):
        ctx.layer, plan = layer, layer.plan
        single = plan.inverse == "single"
        ctx.folds = single and x.numel() >= layer.weight.numel()
        ctx.undoes = plan.inverse == "activation" or (single and not ctx.folds)
        ctx.save_for_backward(x, scale, zero, output_scale, weight_scale, lora_a, lora_b, weight, bias)
        codes = activation_codes(x, plan, scale, zero, ctx.undoes)
        narrow = is_narrow(plan, "activation" if ctx.undoes else "weight" if ctx.folds else "neither")
        parts = [
            exact_product(codes, layer.quantised(span, ctx.folds)[0], plan, narrow)
            for span in product_spans(layer.weight, plan.site.groups)
        ]
        accumulator = parts[0] if len(parts) == 1 else torch.cat(parts, 1 if plan.site.kind == "conv" else -1)
        return epilogue(accumulator, scale / plan.transform.order, output_scale, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        layer, (x, scale, zero, output_scale, *_) = ctx.layer, ctx.saved_tensors  # checks that none was written to
        plan = layer.plan
        site, spatial = plan.site, plan.site.kind == "conv"
        bias_grad = None
        if layer.bias is not None and layer.bias.requires_grad:
            bias_grad = grad.sum((0, 2, 3)) if spatial else grad.flatten(0, -2).sum(0)
        codes = activation_codes(x, plan, scale, zero, ctx.undoes)
        by_output = output_scale * (scale / plan.transform.order)
        x_grad, learned = None, _WeightGradients(layer, by_output)
        for span in product_spans(layer.weight, site.groups):
            weight, rounded = layer.quantised(span, ctx.folds, by_output[span], keep=True)
            part, weight_grad = _product_gradients(grad, span, codes, weight, site)
            del weight
            x_grad = part if x_grad is None else x_grad.add_(part)
            learned.add(span, as_rows(weight_grad), rounded, ctx.folds)
            del part, weight_grad, rounded
        del codes, grad
        x_grad, outside, through = activation_gradient(x_grad, x, plan, scale, zero, ctx.undoes)
        zero_grad = None if zero is None else outside.neg().float()
        sums, scale_grad, a_grad, b_grad, weight_grad = learned.result()
        return (
            None, x_grad, ((sums.sum() - through) / scale).float(), zero_grad, sums.float() / output_scale, scale_grad,
            a_grad, b_grad, weight_grad, bias_grad,
        )  # fmt: skip


def _product_gradients(
    grad: torch.Tensor, span: slice, codes: torch.Tensor, weight: torch.Tensor, site: Site
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the gradient of a product, of which `span` are the outputs of `weight`: that of the codes, as far as it
    comes through those, and that of the weight, (outputs, in, …) channels-last.
    """
    if is_matrix(site):
        part, rows = flat(grad, site)[:, span], flat(codes, site)
        weight_grad = times(part.T, rows.T)
        return unflat(times(part, weight.flatten(1).T), codes, site), weight_grad.view(weight.shape)
    part = grad[:, span].contiguous(memory_format=torch.channels_last)
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        part, codes, weight, None, site.stride, site.padding, site.dilation, False, (0, 0), site.groups,
        (True, True, False),
    )  # fmt: skip
    return x_grad, weight_grad


class _WeightGradients:
    """Puts together what a gradient of by_output·codes, which comes some outputs after others, means to a layer.

    With dW that of W = base + BA, the scale's −Σ x/s²·∂L/∂code is −Σ W·dW/s (see `affine._CentredCodes`), and of BA's
    part there Σ B·dB, so that BA need not be computed again. by_output (out,) never multiplies what has a weight's
    size.
    """

    def __init__(self, layer: QuantLayer, by_output: torch.Tensor):
        self.layer, self.by_output = layer, by_output
        outputs = len(layer.weight)
        self.sums, self.base_sums = by_output.new_empty(2, outputs, dtype=torch.float64)
        self.by_row = by_output / layer.weight_scale
        self.a, self.a_grad, self.b_grad, self.weight_grad = layer._a(), None, None, None
        if self.a is not None:
            self.b_grad = torch.empty_like(layer.lora_b)
        if layer.weight.requires_grad:
            self.weight_grad = by_output.new_empty(outputs, layer.weight[0].numel())

    def add(self, span: slice, grad: torch.Tensor, rounded: torch.Tensor, folds: bool) -> None:
        """grad: (outputs, …·in), overwritten; rounded: what `QuantLayer.quantised` kept of the same outputs."""
        layer, by_row = self.layer, self.by_row[span]
        self.sums[span], self.base_sums[span] = layer._rows(span).gradient(rounded, grad, folds)
        if self.a is not None:
            part = times((layer.lora_b[span] * by_row[:, None]).T, grad.T)
            self.a_grad = part if self.a_grad is None else self.a_grad.add_(part)
            torch.mul(times(grad, self.a), by_row[:, None], out=self.b_grad[span])
        if self.weight_grad is not None:
            torch.mul(grad, by_row[:, None], out=self.weight_grad[span])

    def result(self) -> tuple:
        """Σ code·∂L/∂code (out,) fp64, and the gradients of weight_scale, lora_a, lora_b and the weight, None where
        those are not there or not trained.
        """
        layer = self.layer
        moved = self.base_sums * self.by_row
        if self.a is not None:
            moved += (layer.lora_b * self.b_grad).sum(1)
        scale_grad = (moved / layer.weight_scale).neg_().float()
        a_grad = None if self.a is None else from_rows(self.a_grad, layer.lora_a.shape)
        weight_grad = None if self.weight_grad is None else from_rows(self.weight_grad, layer.weight.shape)
        return self.sums * self.by_output, scale_grad, a_grad, self.b_grad, weight_grad


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The fake-quantised layers of a model by site name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


class Divided(nn.Module):
    """A linear or convolution as the sum of two, of the first and of the other channels of its input (Q-Diffusion)."""

    def __init__(self, first: nn.Module, second: nn.Module, joint: int):
        super().__init__()
        self.first, self.second, self.joint = first, second, joint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channel = 1 if x.ndim == 4 else -1
        return self.first(x.narrow(channel, 0, self.joint)) + self.second(
            x.narrow(channel, self.joint, x.shape[channel] - self.joint)
        )


def divide(network: nn.Module, sites: list[Site]) -> None:
    """Replace, in place, every layer of which `sites` names a half by a `Divided` one, which shares its weight."""
    for site in sites:
        whole, _, half = site.name.rpartition(".")
        if half not in HALVES or isinstance(original := network.get_submodule(whole), Divided):
            continue
        joint = site.channels if half == HALVES[0] else original.weight.shape[1] - site.channels
        halves = []
        for weight, bias in (
            (original.weight[:, :joint], original.bias),
            (original.weight[:, joint:], None),
        ):
            part = copy.copy(original)  # the layer's own forward pass and settings, with parameters of its own
            part._parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": bias}
            if isinstance(part, nn.Conv2d):
                part.in_channels = weight.shape[1]
            else:
                part.in_features = weight.shape[1]
            halves.append(part)
        network.set_submodule(whole, Divided(*halves, joint))


def output_spans(plans: list[SitePlan]) -> list[slice]:
    """Where each site's outputs stand in a row of all outputs."""
    spans, start = [], 0
    for plan in plans:
        spans.append(slice(start, start + plan.site.outputs))
        start += plan.site.outputs
    return spans


def swap_in(
    network: nn.Module,
    plans: list[SitePlan],
    tables: TimestepTables,
    weight_scale: dict[str, torch.Tensor],
    weight_zero: dict[str, torch.Tensor],
    unit: float = 1.0,
    constants: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> dict[str, QuantLayer]:
    """Replace the planned layers of `network`, in place, by quantised ones that share their weights.

    The plans are the quantised sites, in the tables' order; `constants` are their surroundings' tensors by site. The
    tables follow the network's timestep, times `unit`, from here on.
    """
    layers = {}
    divide(network, [plan.site for plan in plans])
    for index, (plan, span) in enumerate(zip(plans, output_spans(plans), strict=True)):
        name = plan.site.name
        original = network.get_submodule(name)
        layers[name] = QuantLayer(
            plan, original.weight, original.bias, weight_scale[name], weight_zero[name], tables, index, span,
            (constants or {}).get(name),
        )  # fmt: skip
        network.set_submodule(name, layers[name])
    network.timestep_tables = tables
    tables.follow(network, unit)
    return layers
