"""What only a GPU can show of the ops: graphs, streams, devices, huge tensors, repeatability, no stalls."""

import pytest
import torch
from testing_rules import NUDGE, assert_follows_rule

from vitkd_fast.ops import attention, kd_loss
from vitkd_fast.ops.attention import attention_backward_formula, attention_formula

pytestmark = pytest.mark.gpu

SCALE = 0.125


def packed(*shape, seed=0, dtype=torch.bfloat16, device="cuda"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.fixture(params=["vitkd", "vitkd_triton"])
def ops(request):
    """The kernels of the CUDA library (Triton's where it is missing), and Triton's."""
    return getattr(torch.ops, request.param)


class Step:
    """Both ops forward and backward, as the loop uses them: loss, and gradients of qkv and the teacher's logits.

    Of the public functions, or of one namespace's kernels. Only the latter are sure to repeat bit by bit: the public
    function leaves some sizes to torch.
    """

    def __init__(self, name):
        self.exact = name != "public"
        self.ops = getattr(torch.ops, name) if self.exact else None

    def loss(self, qkv, teacher):
        if self.ops is None:
            return kd_loss(attention(qkv).mean(1), teacher, temperature=4.0)
        student = self.ops.attention(qkv, SCALE).mean(1)
        return self.ops.kd_loss(student, teacher, 0, 4.0, True, True)[0].mean()

    def __call__(self, qkv, teacher):
        loss = self.loss(qkv, teacher)
        return loss.detach(), *torch.autograd.grad(loss, (qkv, teacher))


@pytest.fixture(params=["public", "vitkd", "vitkd_triton"])
def step(request):
    return Step(request.param)


def draw(tokens=65, seed=0, device="cuda"):
    qkv, teacher = packed(4, tokens, 3, 3, 64, seed=seed, device=device), packed(4, 192, seed=seed + 1, device=device)
    return qkv.requires_grad_(), teacher.requires_grad_()


def assert_same(results, expected, exact=True):
    for result, value in zip(results, expected, strict=True):
        assert result.isfinite().all()
        if exact:
            assert torch.equal(result, value)
        else:  # a few roundings of bfloat16; other inputs give something altogether different
            assert (result - value).abs().max() <= 0.02 * value.abs().max()


@pytest.mark.parametrize("tokens", [17, 65, 197, 300])
def test_a_captured_step_replays_on_changed_inputs(step, tokens):
    inputs = draw(tokens)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or set up at a first call must not be captured
        for _ in range(3):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*inputs)
    for seed in (2, 4, 6):
        changed = draw(tokens, seed)
        with torch.no_grad():
            for mine, new in zip(inputs, changed):
                mine.copy_(new)
        graph.replay()
        assert_same(results, step(*changed), step.exact)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_for_cuda(mode):
    """reduce-overhead captures CUDA graphs by itself, at the second call; the later ones replay them."""

    step = Step("public")
    torch._dynamo.reset()
    compiled = torch.compile(step.loss, fullgraph=True, mode=mode)
    for seed in range(0, 8, 2):
        inputs = draw(seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(*inputs)
        results = [each.detach().clone() for each in (loss, *torch.autograd.grad(loss, inputs))]
        assert_same(results, step(*inputs), exact=False)


def test_the_kernels_run_on_the_current_stream(step):
    """Its input is written there, late: a kernel on another stream would read what was there before."""
    expected = step(*draw(seed=2))
    inputs, new = draw(), draw(seed=2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        with torch.no_grad():
            for mine, changed in zip(inputs, new):
                mine.copy_(changed)
        results = step(*inputs)
    stream.synchronize()
    assert_same(results, expected, step.exact)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_than_the_current_device(step):
    expected = step(*draw(device="cuda:0"))
    with torch.cuda.device(0):
        results = step(*draw(device="cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert_same([result.to("cuda:0") for result in results], expected, exact=False)  # they may be different models


@pytest.mark.parametrize("layout", ["batch first", "tokens first"])
@pytest.mark.parametrize("tokens", [17, 300])
def test_more_than_two_to_the_31_elements(ops, tokens, layout):
    """Every image as if it were in a batch of its own: 4.3 GB of qkv, whose tokens may lie 2³¹ / N elements apart."""
    heads, head_dim = 4, 64
    batch = 2**31 // (tokens * 3 * heads * head_dim) + 64
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    kind = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, **kind)
    if layout == "tokens first":
        qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    grad_out = torch.randn(batch, tokens, heads * head_dim, **kind)
    assert qkv.numel() > 2**31
    out, grad = ops.attention(qkv, SCALE), ops.attention_backward(grad_out, qkv, SCALE)
    # Not bit by bit against calls on contiguous pieces: offsets that 32 bits do not hold may send a head to another
    # kernel. But each image has numbers of its own, so what is read or written in a wrong place is wrong altogether.
    piece = -(-batch // 64)
    for part in (slice(start, start + piece) for start in range(0, batch, piece)):
        few, few_grad = qkv[part].contiguous(), grad_out[part].contiguous()
        assert_largest_error_follows_rule(
            out[part], attention_formula(few.double(), SCALE), attention_formula(few, SCALE)
        )
        exact = attention_backward_formula(few_grad.double(), few.double(), SCALE)
        formula = attention_backward_formula(few_grad, few, SCALE)
        for each in range(3):
            assert_largest_error_follows_rule(grad[part][:, :, each], exact[:, :, each], formula[:, :, each])
    last, last_grad = qkv[-2:], grad_out[-2:]
    assert_follows_rule(out[-2:], attention_formula(last.double(), SCALE), attention_formula(last, SCALE), "out")
    exact = attention_backward_formula(last_grad.double(), last.double(), SCALE)
    assert_follows_rule(grad[-2:], exact, attention_backward_formula(last_grad, last, SCALE), "grad_qkv")


def assert_largest_error_follows_rule(result, exact, formula):
    """The maximum of `assert_follows_rule`, on the GPU: two billion numbers are too many for the CPU."""
    stored = exact.to(result.dtype)
    nudged = (stored + NUDGE - NUDGE).double() - stored.double()
    bound = 2 * (formula.double() - exact).abs().max() + 2 * nudged.abs().max()
    assert (result.double() - exact).abs().max() <= bound  # not so if NaN is among them


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [17, 50, 65, 197, 257, 577])
def test_the_backward_repeats_bit_by_bit(ops, tokens, dtype):
    """With every multiprocessor busy: 384 heads."""
    qkv, grad_out = packed(64, tokens, 3, 6, 64, dtype=dtype), packed(64, tokens, 384, seed=1, dtype=dtype)
    first = ops.attention(qkv, SCALE), ops.attention_backward(grad_out, qkv, SCALE)
    for _ in range(20):
        assert_same((ops.attention(qkv, SCALE), ops.attention_backward(grad_out, qkv, SCALE)), first)


def mean_inputs(rows, classes, dtype=torch.bfloat16, seed=0):
    return packed(rows, classes, seed=seed, dtype=dtype), packed(rows, classes, seed=seed + 1, dtype=dtype)


def loss_of(ops, inputs, kind=0, mean=True):
    temperature = 1.0 if kind > 2 else 4.0
    return ops.kd_loss(*inputs, kind, temperature, True, True, 1.0, mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize(
    ("rows", "classes"),
    [(1, 1000), (3, 10), (257, 1000), (4096, 1000), (4099, 10), (8193, 100), (65_537, 4), (300, 1001), (130, 5000)],
)
def test_the_mean_is_that_of_the_rows_and_repeats_bit_by_bit(ops, rows, classes, kind, dtype):
    """Whichever block ends last: the order of the blocks is another in every run."""
    inputs = mean_inputs(rows, classes, dtype)
    loss, *grads = loss_of(ops, inputs, kind, mean=False)
    first, *rest = loss_of(ops, inputs, kind)
    assert_same(rest, grads)
    torch.testing.assert_close(first.double(), loss.double().mean(), rtol=1e-6, atol=0)
    for _ in range(20):
        assert_same(loss_of(ops, inputs, kind)[:1], (first,))


def test_the_mean_of_no_rows_is_torchs(ops):
    mean, *_ = loss_of(ops, mean_inputs(0, 10))
    assert mean.shape == () and mean.isnan()


SIZES = [(256, 1000), (4096, 1000), (4099, 10)]


@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_means_of_streams_that_run_at_once(ops, rows, classes):
    inputs = [mean_inputs(rows, classes, seed=2 * i) for i in range(2)]
    expected = [loss_of(ops, each)[0] for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found = []
    for _ in range(200):
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(loss_of(ops, each)[0])
    torch.cuda.synchronize()
    for i in range(2):
        assert_same([torch.stack(found[i::2])], [expected[i].expand(200)])


@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_means_of_graphs_of_one_stream_that_run_at_once(ops, rows, classes):
    """Captured on one stream, replayed on two; and the same graph again and again on either."""
    inputs = [mean_inputs(rows, classes, seed=2 * i) for i in range(2)]
    expected = [loss_of(ops, each)[0] for each in inputs]
    torch.cuda.synchronize()
    captured = torch.cuda.Stream()
    graphs, means = [torch.cuda.CUDAGraph() for _ in inputs], []
    for graph, each in zip(graphs, inputs, strict=True):
        with torch.cuda.graph(graph, stream=captured):
            means.append([loss_of(ops, each)[0] for _ in range(5)])
    streams = [torch.cuda.Stream() for _ in inputs]
    for turn in range(40):
        for several in means:
            for mean in several:
                mean.zero_()
        torch.cuda.synchronize()
        for _ in range(5):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    graphs[(i + turn) % 2].replay()
        torch.cuda.synchronize()
        for several, mean in zip(means, expected, strict=True):
            assert_same(several, [mean] * 5)


@pytest.mark.parametrize("tokens", [65, 577])
def test_nothing_waits_for_the_gpu(step, tokens):
    inputs = draw(tokens)
    step(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
