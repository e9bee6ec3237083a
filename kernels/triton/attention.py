"""Multi-head self-attention on a packed qkv, forward and backward, in Triton.

A program owns a block of rows of one head, so nothing is accumulated by atomics and every result repeats bit by bit.
The forward saves nothing. The backward of a ViT-short head is one program that reads q, k, v and the output's gradient
once and writes all three gradients; a longer head takes three kernels: row statistics, then dK and dV, then dQ.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkd_fast.triton._launch import capability, check_dtype, in_units, strides_of, unit_stride
from vitkd_fast.triton._tiles import Split, Tile, backward_tiles, forward_tiles, padded_head_dim
from vitkd_fast.triton._tune import best

# Strides come in units of up to 8 elements, UNIT: that lets 16-byte loads be compiled, and they need not be looked at:
# by itself Triton compiles anew for each mixture of strides that are 1, multiples of 16, or neither, and some of them
# change with the batch size.
_SIZES = ("tokens", "heads")
_STRIDES = ("batch_units", "token_units", "part_units", "head_units")
_GRAD_STRIDES = ("grad_batch_units", "grad_token_units", "grad_head_units")


@triton.jit
def _locate(blocks, heads):
    """This program's block and its head in the batch. Blocks vary fastest: a head's k and v are reused from L2."""
    program = tl.program_id(0)
    item = program // blocks
    return program % blocks, item.to(tl.int64), (item // heads).to(tl.int64), (item % heads).to(tl.int64)


@triton.jit
def _stride(units, UNIT: tl.constexpr):
    """In elements, and in 64 bits: a tensor of more than 2³¹ elements has such strides."""
    return units.to(tl.int64) * UNIT


@triton.jit
def _head(base, batch, head, batch_units, head_units, UNIT: tl.constexpr):
    return base + batch * _stride(batch_units, UNIT) + head * _stride(head_units, UNIT)


@triton.jit
def _parts(qkv, batch, head, batch_units, part_units, head_units, UNIT: tl.constexpr):
    """Where this head's queries, keys and values begin."""
    query = _head(qkv, batch, head, batch_units, head_units, UNIT)
    stride_part = _stride(part_units, UNIT)
    return query, query + stride_part, query + 2 * stride_part


@triton.jit
def _offsets(rows, dims, stride):
    return rows.to(tl.int64)[:, None] * stride + dims[None, :]


@triton.jit
def _load(base, rows, dims, stride, tokens, HEAD_DIM: tl.constexpr):
    """Rows of a (tokens, head_dim) matrix, zeros beyond its edges."""
    inside = (rows < tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(base + _offsets(rows, dims, stride), mask=inside, other=0.0)


@triton.jit
def _store(base, tile, rows, dims, stride, tokens, HEAD_DIM: tl.constexpr):
    inside = (rows < tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(base + _offsets(rows, dims, stride), tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b):
    """a @ b accumulated in float32; float32 operands keep their 24 bits instead of tf32's 11."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _scores(a, b, NEGATIVE: tl.constexpr):
    """a @ bᵀ, not scaled yet, the sign turned where the scale is negative, so that the largest weighs most."""
    scores = _dot(a, tl.trans(b))
    if NEGATIVE:
        scores = -scores
    return scores


@triton.jit
def _finite(row_max):
    """What to subtract from scores: a row that has met only -inf so far must not turn into -inf - -inf."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def _exp(differences, log2_scale):
    """e^(scale * (score - maximum)).

    The difference is taken before it is scaled. A product score * log2_scale of 1e4 is rounded by up to 5e-4, unless
    the compiler fuses it with the subtraction, which it does in one kernel and not in another: their weights disagree.
    """
    return tl.exp2(differences * log2_scale)


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def _forward_kernel(
    qkv, out, log2_scale, tokens, heads,
    batch_units, token_units, part_units, head_units,
    NEGATIVE: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, _, batch, head = _locate(tl.cdiv(tokens, BLOCK_Q), heads)
    dims = tl.arange(0, BLOCK_D)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_base, key_base, value_base = _parts(qkv, batch, head, batch_units, part_units, head_units, UNIT)
    stride_token = _stride(token_units, UNIT)

    query = _load(query_base, rows, dims, stride_token, tokens, HEAD_DIM)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        key = _load(key_base, columns, dims, stride_token, tokens, HEAD_DIM)
        value = _load(value_base, columns, dims, stride_token, tokens, HEAD_DIM)
        scores = _scores(query, key, NEGATIVE)
        scores = tl.where((columns < tokens)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = _exp(scores - _finite(new_max)[:, None], log2_scale)
        rescale = _exp(row_max - _finite(new_max), log2_scale)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        mixed = mixed * rescale[:, None] + _dot(weights.to(value.dtype), value)
        row_max = new_max

    out_base = out + (batch * tokens * heads + head) * HEAD_DIM
    _store(out_base, mixed / row_sum[:, None], rows, dims, heads * HEAD_DIM, tokens, HEAD_DIM)


@triton.jit(do_not_specialize=_SIZES + _STRIDES + _GRAD_STRIDES)
def _backward_head_kernel(
    grad_out, qkv, grad_qkv, scale, log2_scale, tokens, heads,
    batch_units, token_units, part_units, head_units, grad_batch_units, grad_token_units, grad_head_units,
    NEGATIVE: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program is one head: BLOCK_K >= tokens, so a query's scores are all here and need no saved statistics.

    Scores stand as (keys, queries): dK and dV then take them as left operands from the registers they are in.
    """
    _, _, batch, head = _locate(1, heads)
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_K)
    query_base, key_base, value_base = _parts(qkv, batch, head, batch_units, part_units, head_units, UNIT)
    stride_token = _stride(token_units, UNIT)
    grad_out_base = _head(grad_out, batch, head, grad_batch_units, grad_head_units, UNIT)
    grad_stride_token = _stride(grad_token_units, UNIT)
    packed_stride = 3 * heads * HEAD_DIM
    grad_query_base = grad_qkv + (batch * tokens * 3 * heads + head) * HEAD_DIM
    grad_key_base = grad_query_base + heads * HEAD_DIM
    grad_value_base = grad_key_base + heads * HEAD_DIM

    key = _load(key_base, columns, dims, stride_token, tokens, HEAD_DIM)
    value = _load(value_base, columns, dims, stride_token, tokens, HEAD_DIM)
    grad_key = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        query = _load(query_base, rows, dims, stride_token, tokens, HEAD_DIM)
        grad_mixed = _load(grad_out_base, rows, dims, grad_stride_token, tokens, HEAD_DIM)
        scores = _scores(key, query, NEGATIVE)
        scores = tl.where((columns < tokens)[:, None], scores, float("-inf"))
        weights = _exp(scores - tl.max(scores, 0)[None, :], log2_scale)
        weights = weights / tl.sum(weights, 0)[None, :]
        weights = tl.where((rows < tokens)[None, :], weights, 0.0)  # a query that is none is 0, and 0 * inf no number
        grad_weights = _dot(value, tl.trans(grad_mixed))
        delta = tl.sum(weights * grad_weights, 0)
        grad_scores = (weights * (grad_weights - delta[None, :])).to(key.dtype)
        grad_value += _dot(weights.to(key.dtype), grad_mixed)
        grad_key += _dot(grad_scores, query)
        grad_query = _dot(tl.trans(grad_scores), key) * scale
        _store(grad_query_base, grad_query, rows, dims, packed_stride, tokens, HEAD_DIM)

    _store(grad_key_base, grad_key * scale, columns, dims, packed_stride, tokens, HEAD_DIM)
    _store(grad_value_base, grad_value, columns, dims, packed_stride, tokens, HEAD_DIM)


@triton.jit(do_not_specialize=_SIZES + _STRIDES + _GRAD_STRIDES)
def _backward_rows_kernel(
    grad_out, qkv, statistics, log2_scale, tokens, heads,
    batch_units, token_units, part_units, head_units, grad_batch_units, grad_token_units, grad_head_units,
    NEGATIVE: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each query's maximum score, 1 / (sum of its exponentials) and delta = sum_k weight * grad_weight.

    The maximum is that of scores before scaling. It and the sum stay apart: their log-sum-exp at a score of 1e4 would
    cost the weights 1e-3 in float32.
    """
    block, item, batch, head = _locate(tl.cdiv(tokens, BLOCK_Q), heads)
    dims = tl.arange(0, BLOCK_D)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_base, key_base, value_base = _parts(qkv, batch, head, batch_units, part_units, head_units, UNIT)
    stride_token = _stride(token_units, UNIT)
    grad_out_base = _head(grad_out, batch, head, grad_batch_units, grad_head_units, UNIT)
    grad_stride_token = _stride(grad_token_units, UNIT)

    query = _load(query_base, rows, dims, stride_token, tokens, HEAD_DIM)
    grad_mixed = _load(grad_out_base, rows, dims, grad_stride_token, tokens, HEAD_DIM)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    delta = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, tokens, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        key = _load(key_base, columns, dims, stride_token, tokens, HEAD_DIM)
        value = _load(value_base, columns, dims, stride_token, tokens, HEAD_DIM)
        scores = _scores(query, key, NEGATIVE)
        scores = tl.where((columns < tokens)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = _exp(scores - _finite(new_max)[:, None], log2_scale)
        rescale = _exp(row_max - _finite(new_max), log2_scale)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        delta = delta * rescale + tl.sum(weights * _dot(grad_mixed, tl.trans(value)), 1)
        row_max = new_max

    statistics_base = statistics + item * 3 * tokens
    tl.store(statistics_base + rows, _finite(row_max), mask=rows < tokens)
    tl.store(statistics_base + tokens + rows, 1.0 / row_sum, mask=rows < tokens)
    tl.store(statistics_base + 2 * tokens + rows, delta / row_sum, mask=rows < tokens)


@triton.jit
def _load_statistics(statistics, item, rows, tokens):
    """Beyond the last query: 1 / sum = 0, so that those rows weigh nothing."""
    base = statistics + item * 3 * tokens
    row_max = tl.load(base + rows, mask=rows < tokens, other=0.0)
    inverse_sum = tl.load(base + tokens + rows, mask=rows < tokens, other=0.0)
    delta = tl.load(base + 2 * tokens + rows, mask=rows < tokens, other=0.0)
    return row_max, inverse_sum, delta


@triton.jit(do_not_specialize=_SIZES + _STRIDES + _GRAD_STRIDES)
def _backward_keys_kernel(
    grad_out, qkv, statistics, grad_qkv, scale, log2_scale, tokens, heads,
    batch_units, token_units, part_units, head_units, grad_batch_units, grad_token_units, grad_head_units,
    NEGATIVE: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys, over all queries. Scores stand as (keys, queries), as in the whole-head kernel."""
    block, item, batch, head = _locate(tl.cdiv(tokens, BLOCK_K), heads)
    dims = tl.arange(0, BLOCK_D)
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    query_base, key_base, value_base = _parts(qkv, batch, head, batch_units, part_units, head_units, UNIT)
    stride_token = _stride(token_units, UNIT)
    grad_out_base = _head(grad_out, batch, head, grad_batch_units, grad_head_units, UNIT)
    grad_stride_token = _stride(grad_token_units, UNIT)

    key = _load(key_base, columns, dims, stride_token, tokens, HEAD_DIM)
    value = _load(value_base, columns, dims, stride_token, tokens, HEAD_DIM)
    grad_key = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        row_max, inverse_sum, delta = _load_statistics(statistics, item, rows, tokens)
        query = _load(query_base, rows, dims, stride_token, tokens, HEAD_DIM)
        grad_mixed = _load(grad_out_base, rows, dims, grad_stride_token, tokens, HEAD_DIM)
        scores = _scores(key, query, NEGATIVE)
        weights = _exp(scores - row_max[None, :], log2_scale) * inverse_sum[None, :]
        weights = tl.where((rows < tokens)[None, :], weights, 0.0)  # as above
        grad_weights = _dot(value, tl.trans(grad_mixed))
        grad_scores = (weights * (grad_weights - delta[None, :])).to(key.dtype)
        grad_value += _dot(weights.to(key.dtype), grad_mixed)
        grad_key += _dot(grad_scores, query)

    packed_stride = 3 * heads * HEAD_DIM
    grad_key_base = grad_qkv + (batch * tokens * 3 * heads + heads + head) * HEAD_DIM
    grad_value_base = grad_key_base + heads * HEAD_DIM
    _store(grad_key_base, grad_key * scale, columns, dims, packed_stride, tokens, HEAD_DIM)
    _store(grad_value_base, grad_value, columns, dims, packed_stride, tokens, HEAD_DIM)


@triton.jit(do_not_specialize=_SIZES + _STRIDES + _GRAD_STRIDES)
def _backward_queries_kernel(
    grad_out, qkv, statistics, grad_qkv, scale, log2_scale, tokens, heads,
    batch_units, token_units, part_units, head_units, grad_batch_units, grad_token_units, grad_head_units,
    NEGATIVE: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries, over all keys."""
    block, item, batch, head = _locate(tl.cdiv(tokens, BLOCK_Q), heads)
    dims = tl.arange(0, BLOCK_D)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_base, key_base, value_base = _parts(qkv, batch, head, batch_units, part_units, head_units, UNIT)
    stride_token = _stride(token_units, UNIT)
    grad_out_base = _head(grad_out, batch, head, grad_batch_units, grad_head_units, UNIT)
    grad_stride_token = _stride(grad_token_units, UNIT)

    query = _load(query_base, rows, dims, stride_token, tokens, HEAD_DIM)
    grad_mixed = _load(grad_out_base, rows, dims, grad_stride_token, tokens, HEAD_DIM)
    row_max, inverse_sum, delta = _load_statistics(statistics, item, rows, tokens)
    grad_query = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        key = _load(key_base, columns, dims, stride_token, tokens, HEAD_DIM)
        value = _load(value_base, columns, dims, stride_token, tokens, HEAD_DIM)
        scores = _scores(query, key, NEGATIVE)
        scores = tl.where((columns < tokens)[None, :], scores, float("-inf"))
        weights = _exp(scores - row_max[:, None], log2_scale) * inverse_sum[:, None]
        grad_weights = _dot(grad_mixed, tl.trans(value))
        grad_query += _dot((weights * (grad_weights - delta[:, None])).to(key.dtype), key)

    grad_query_base = grad_qkv + (batch * tokens * 3 * heads + head) * HEAD_DIM
    _store(grad_query_base, grad_query * scale, rows, dims, 3 * heads * HEAD_DIM, tokens, HEAD_DIM)


def _log2_scale(scale: float) -> float:
    """What turns scores into exponents of 2, without the sign: `_scores` takes that. Not 0, with which masked scores,
    -inf, would become NaN: so little makes all others weigh the same."""
    return max(abs(scale) * math.log2(math.e), torch.finfo(torch.float32).tiny)


def attention(qkv: Tensor, scale: float) -> Tensor:
    """softmax(scale * q kᵀ) v per head; see `vitkd_fast.ops.attention`.

    Args:
        qkv: (B, N, 3, H, D) float32, bfloat16 or float16, D <= 128, any strides (copied if D's is not 1).
        scale: what the scores are multiplied by.

    Returns:
        (B, N, H*D), contiguous, in qkv's dtype.

    Raises:
        TypeError: another dtype.
    """
    check_dtype("qkv", qkv)
    qkv = unit_stride(qkv)
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads * head_dim)
    if batch == 0:
        return out
    block_d = padded_head_dim(head_dim)
    strides, unit = in_units(strides_of(qkv))

    def run(tile: Tile) -> None:
        _forward_kernel[(batch * heads * triton.cdiv(tokens, tile.block_q),)](
            qkv, out, _log2_scale(scale), tokens, heads, *strides, NEGATIVE=scale < 0,
            UNIT=unit, HEAD_DIM=head_dim, BLOCK_D=block_d, **tile.options(),
        )  # fmt: skip

    with torch.cuda.device_of(qkv):
        run(best("forward", forward_tiles(tokens, block_d, qkv.dtype), run, qkv))
    return out


def attention_backward(grad_out: Tensor, qkv: Tensor, scale: float) -> Tensor:
    """The gradient of `attention` with respect to qkv; see `vitkd_fast.ops.attention`. Deterministic.

    Args:
        grad_out: (B, N, H*D), qkv's dtype, any strides (copied if the last is not 1).
        qkv: (B, N, 3, H, D) as `attention` takes it.
        scale: as in the forward.

    Returns:
        (B, N, 3, H, D), contiguous, in qkv's dtype.

    Raises:
        TypeError: another dtype, or two different ones.
    """
    check_dtype("qkv", qkv)
    check_dtype("grad_out", grad_out, qkv.dtype)
    qkv, grad_out = unit_stride(qkv), unit_stride(grad_out)
    batch, tokens, _, heads, head_dim = qkv.shape
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if batch == 0:
        return grad_qkv
    block_d = padded_head_dim(head_dim)
    items, log2_scale = batch * heads, _log2_scale(scale)
    strides, unit = in_units((*strides_of(qkv), *strides_of(grad_out), head_dim))
    constants = {"NEGATIVE": scale < 0, "UNIT": unit, "HEAD_DIM": head_dim, "BLOCK_D": block_d}

    def run(tiles: Tile | Split) -> None:
        if isinstance(tiles, Tile):
            _backward_head_kernel[(items,)](
                grad_out, qkv, grad_qkv, scale, log2_scale, tokens, heads, *strides, **constants, **tiles.options()
            )
            return
        statistics = torch.empty(items, 3, tokens, dtype=torch.float32, device=qkv.device)
        _backward_rows_kernel[(items * triton.cdiv(tokens, tiles.rows.block_q),)](
            grad_out, qkv, statistics, log2_scale, tokens, heads, *strides, **constants, **tiles.rows.options()
        )
        shared = grad_out, qkv, statistics, grad_qkv, scale, log2_scale, tokens, heads, *strides
        _backward_keys_kernel[(items * triton.cdiv(tokens, tiles.keys.block_k),)](
            *shared, **constants, **tiles.keys.options()
        )
        _backward_queries_kernel[(items * triton.cdiv(tokens, tiles.queries.block_q),)](
            *shared, **constants, **tiles.queries.options()
        )

    with torch.cuda.device_of(qkv):
        run(best("backward", backward_tiles(tokens, block_d, qkv.dtype, capability(qkv)), run, qkv))
    return grad_qkv
