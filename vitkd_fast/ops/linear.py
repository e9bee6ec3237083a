"""A linear layer in float32 on AMD's Zen 5, where torch's takes twice as long as it must.

PyTorch multiplies float32 matrices on the CPU with MKL, which computes on AMD's CPUs with vectors of 256 bits whatever
they have: on a Zen 5 core 107 GF/s of 267. Convolutions go to oneDNN, which PyTorch has on board as well and which uses
what is there; and a linear layer is a convolution whose pixels are the rows.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from vitkd_fast.choice import constant
from vitkd_fast.ops._library import LIBRARY, is_plain, transformed

# With less to do, a convolution's preparations are too large a part.
LEAST_ROWS = 128
LEAST_WORK = 1 << 24  # multiply-adds
# oneDNN adds up to a thousand terms in one running sum, MKL 192: at 768 and 1536 of them its error is 2.0 and 2.4 times
# MKL's. Sections cost 5 to 15 % of the time, and leave no more than MKL's own.
MOST_TERMS = 256
# Of one convolution for the gradient of weights: as its channels, more would not stay in a cache.
MOST_ROWS = 2048


ZEN_5 = 26


@cache
def faster_by_convolution() -> bool:
    """Whether a linear layer in float32 is faster as a convolution on this machine: on AMD's CPUs from Zen 5 on, where
    torch has both libraries. Those before it compute with vectors of 256 bits, too, on which oneDNN gains nothing once
    its sums are in sections."""
    try:
        from vitkd_fast import _facts
    except ImportError:
        return False
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wanted = ("_convolution_pointwise_", "_convolution_transpose_pointwise")
    if not libraries or not all(hasattr(torch.ops.mkldnn, name) for name in wanted):
        return False
    return _facts.amd_family() >= ZEN_5 and _facts.cpu()["avx512"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: `torch.nn.functional.linear`, in float32 on AMD's Zen 5 up to twice as fast.

    Args:
        x: (..., in). What is not contiguous float32 on the CPU, or is exported, traced, transformed, under autocast, or
            too small to gain, is torch's.
        weight: (out, in).
        bias: (out,).

    Returns:
        (..., out). Its gradients, second derivatives included, are torch's within rounding, which is that of one
        running sum of up to 256 terms.
    """
    inputs = (x, weight, bias)
    if has_torch_function(inputs):
        if any(isinstance(one, Tensor) and has_torch_function((one,)) for one in inputs):
            return F.linear(x, weight, bias)  # by which name tensors of other kinds know it
        return handle_torch_function(linear, inputs, x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if transformed():
        return F.linear(x, weight, bias)
    if is_plain(*tensors):
        return _Linear.apply(x, weight, bias) if _fits(x, weight, bias) else F.linear(x, weight, bias)
    if torch.compiler.is_dynamo_compiling() and _may_fit(*tensors):
        return torch.ops.vitkd.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _may_fit(*tensors: Tensor) -> bool:
    """As far as torch.compile should look: not at sizes, on which it would put guards."""
    if any(tensor.dtype is not torch.float32 or not tensor.is_cpu for tensor in tensors):
        return False
    if [tensor.dim() for tensor in tensors[1:]] != [2, 1][: len(tensors) - 1]:
        return False
    return not torch.is_autocast_enabled("cpu") and _gains()


@constant
def _gains() -> bool:
    return faster_by_convolution()


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not x.is_cpu or weight.dim() != 2 or not _are_ours(*tensors) or not _is_large(x, *weight.shape):
        return False
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return False  # for torch to make something of, or to say what is wrong
    return not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"))


def _is_large(rows: Tensor, width: int, depth: int) -> bool:
    """Whether rows, each of `depth`, are worth a convolution to `width`."""
    return rows.numel() >= LEAST_ROWS * depth and rows.numel() * width >= LEAST_WORK


def _are_ours(*tensors: Tensor) -> bool:
    if any(tensor.dtype is not torch.float32 or not _is_plainly_stored(tensor) for tensor in tensors):
        return False
    return torch._C._get_mkldnn_enabled() and faster_by_convolution()


def _is_plainly_stored(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and tensor.is_contiguous()


def _flat(x: Tensor) -> Tensor:
    """(..., K) as (M, K)."""
    return x.reshape(-1, x.shape[-1])


def _pixels(rows: Tensor) -> Tensor:
    """(M, K) as one image of M pixels and K channels, channels last."""
    return rows[None, :, None].permute(0, 3, 1, 2)


def _kernel(weight: Tensor) -> Tensor:
    return weight[:, :, None, None]


def _rows(pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `_pixels` made an image of, in this shape. Contiguous already; and no view: what a Function returns may be
    changed in place, as by an activation, if it is none."""
    return torch.ops.aten._unsafe_view(pixels.permute(0, 2, 3, 1).contiguous(), shape)


def _convolved(images: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """By oneDNN, which torch.conv2d would not ask for small images, nor on one thread."""
    return torch.ops.aten.mkldnn_convolution(images, kernel, bias, [0, 0], [1, 1], [1, 1], 1)


def _back(images: Tensor, kernel: Tensor) -> Tensor:
    """A transposed convolution, by oneDNN: what torch.compile makes of one."""
    return torch.ops.mkldnn._convolution_transpose_pointwise(
        images, kernel, None, [0, 0], [0, 0], [1, 1], [1, 1], 1, "none", [], ""
    )


def _add_convolved(out: Tensor, images: Tensor, kernel: Tensor) -> None:
    torch.ops.mkldnn._convolution_pointwise_.binary(
        out, images, kernel, None, [0, 0], [1, 1], [1, 1], 1, "add", 1.0, None, [], ""
    )


def _sections(terms: int) -> list[slice]:
    """A sum's terms in parts as even as multiples of 16 allow, which are a vector's lanes."""
    count = -(-terms // MOST_TERMS)
    size = -(-terms // (16 * count)) * 16
    return [slice(first, first + size) for first in range(0, terms, size)]


def _output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    images, kernel = _pixels(_flat(x)), _kernel(weight)
    first, *others = _sections(x.shape[-1])
    out = _convolved(images[:, first], kernel[:, first], bias)
    for section in others:
        _add_convolved(out, images[:, section], kernel[:, section])
    return _rows(out, (*x.shape[:-1], len(weight)))


def _input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad weight, (..., N) contiguous and (N, K)."""
    images, kernel = _pixels(_flat(grad)), _kernel(weight)
    first, *others = _sections(grad.shape[-1])
    pixels = _back(images[:, first], kernel[first])
    for section in others:
        pixels.add_(_back(images[:, section], kernel[section]))
    return _rows(pixels, (*grad.shape[:-1], weight.shape[1]))


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ x over all M rows, (..., N) and (..., K), both contiguous.

    One image of K pixels and M channels becomes one of N channels. As the gradient of a convolution's weights, what it
    is, oneDNN takes up to five times as long, depending on the prime factors of M.
    """
    sums, rows = _flat(grad), _flat(x)
    count = -(-len(rows) // MOST_ROWS)
    first, *others = zip(sums.tensor_split(count), rows.tensor_split(count))
    gradient = _weight_gradient_of(*first)
    for piece in others:
        gradient.add_(_weight_gradient_of(*piece))
    return gradient


def _weight_gradient_of(sums: Tensor, rows: Tensor) -> Tensor:
    return _back(rows[None, :, None], _kernel(sums))[0, :, 0]


def _bias_gradient(grad: Tensor) -> Tensor:
    return _flat(grad).sum(0)


def _save(ctx, x, weight):
    for_x, for_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if for_weight else None, weight if for_x else None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        _save(ctx, x, weight)
        return _output(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() or not is_plain(grad):  # create_graph, or traced
            return _formula(ctx, grad)
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        return (
            None if weight is None else _input_gradient(grad, weight),
            None if x is None else _weight_gradient(grad, x),
            _bias_gradient(grad) if ctx.needs_input_grad[2] else None,
        )


def _formula(ctx, grad):
    x, weight = ctx.saved_tensors
    return (
        None if weight is None else grad @ weight,
        None if x is None else _flat(grad).t() @ _flat(x),
        _bias_gradient(grad) if ctx.needs_input_grad[2] else None,
    )


# For torch.compile, which sees these and puts no guard on what they ask at run time. Like gelu's, no public ops.
LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
LIBRARY.define("linear_input_gradient(Tensor grad, Tensor weight) -> Tensor")
LIBRARY.define("linear_weight_gradient(Tensor grad, Tensor x) -> Tensor")


def _linear(x, weight, bias):
    return _output(x, weight, bias) if _fits(x, weight, bias) else F.linear(x, weight, bias)


def _linear_input_gradient(grad, weight):
    grad = grad.contiguous()
    ours = _is_large(grad, weight.shape[1], weight.shape[0]) and _are_ours(grad, weight)
    return _input_gradient(grad, weight) if ours else grad @ weight


def _linear_weight_gradient(grad, x):
    grad, x = grad.contiguous(), x.contiguous()
    ours = _is_large(x, grad.shape[-1], x.shape[-1]) and _are_ours(grad, x)
    return _weight_gradient(grad, x) if ours else _flat(grad).t() @ _flat(x)


def _setup_context(ctx, inputs, output):
    _save(ctx, *inputs[:2])


def _backward(ctx, grad):
    if torch.is_grad_enabled():  # create_graph
        return _formula(ctx, grad)
    x, weight = ctx.saved_tensors
    return (
        None if weight is None else torch.ops.vitkd.linear_input_gradient(grad, weight),
        None if x is None else torch.ops.vitkd.linear_weight_gradient(grad, x),
        _bias_gradient(grad) if ctx.needs_input_grad[2] else None,
    )


LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("linear_input_gradient", _linear_input_gradient, "CompositeExplicitAutograd")
LIBRARY.impl("linear_weight_gradient", _linear_weight_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("vitkd::linear", F.linear, lib=LIBRARY)
torch.library.register_fake("vitkd::linear_input_gradient", torch.matmul, lib=LIBRARY)
torch.library.register_fake(
    "vitkd::linear_weight_gradient", lambda grad, x: x.new_empty(grad.shape[-1], x.shape[-1]), lib=LIBRARY
)
torch.library.register_autograd("vitkd::linear", _backward, setup_context=_setup_context, lib=LIBRARY)
