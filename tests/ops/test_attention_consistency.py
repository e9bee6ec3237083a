"""attention_consistency: transforms of images and of patches agree, a network that must follow does, its errors."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from vitkd_fast.ops import attention_consistency
from vitkd_fast.ops.attention_consistency import TRANSFORMS, Crop, HorizontalFlip, Shift, Transform

GRID = 3, 5
LOSSLESS = [HorizontalFlip(), Shift(1, 2), Shift(-1, -3), Shift(0, 7)]
CUT = [Shift(1, -2, circular=False), Shift(0, 4, circular=False), Crop(0, 0, 3, 5), Crop(1, 2, 2, 1), Crop(0, 1, 2, 4)]
names = dict(ids=str)


def draw(batch, tokens, heads=2, head_dim=3, dtype=torch.float64, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, tokens, 3, heads, head_dim
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def attention_map(qkv):
    """(B, H, N, N) by the definition."""
    scores = torch.einsum("bihd,bjhd->bhij", qkv[:, :, 0], qkv[:, :, 1]) / qkv.shape[-1] ** 0.5
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


def naive(attention, transformed, pairs, prefix, queries):
    """Over probabilities, patch by patch: `pairs` are (before, after) patch numbers."""
    shares = []
    for side, place in ((attention, 0), (transformed, 1)):
        keys = [prefix + pair[place] for pair in pairs]
        asked = keys if queries == "patches" else range(prefix)
        rows = torch.stack([side[:, :, query][..., keys] for query in asked], 2)  # (B, H, queries, keys)
        shares.append((rows / rows.sum(-1, keepdim=True)).mean((1, 2)))
    return (shares[0] * (shares[0] / shares[1]).log()).sum(1)


def by_hand(transform):
    """(before, after) of every patch that stays, from moving a picture of the patch numbers."""
    picture = torch.arange(1, GRID[0] * GRID[1] + 1).view(GRID)
    if isinstance(transform, HorizontalFlip):
        picture = picture.flip(1)
    elif isinstance(transform, Crop):
        rows = slice(transform.top, transform.top + transform.height)
        picture = picture[rows, transform.left : transform.left + transform.width]
    else:
        rolled = picture.roll((transform.rows, transform.columns), (0, 1))
        if not transform.circular:
            y, x = torch.arange(GRID[0]) - transform.rows, torch.arange(GRID[1]) - transform.columns
            inside = ((y >= 0) & (y < GRID[0])).unsqueeze(1) & (x >= 0) & (x < GRID[1])
            rolled = rolled * inside
        picture = rolled
    return [(before - 1, after) for after, before in enumerate(picture.flatten().tolist()) if before], picture.numel()


@pytest.mark.parametrize("transform", LOSSLESS + CUT, **names)
def test_the_patches_move_as_written(transform):
    before, after, count = transform.patches(GRID)
    pairs, total = by_hand(transform)
    assert (list(zip(before, after)), count) == (pairs, total)


@pytest.mark.parametrize("patch", [1, 4, (2, 3)], ids=str)
@pytest.mark.parametrize("transform", LOSSLESS + CUT, **names)
def test_the_image_moves_with_its_patches(transform, patch):
    """An image of one colour per patch becomes the picture of the moved patches, 0 where something came in."""
    size = (patch, patch) if isinstance(patch, int) else patch
    colours = torch.arange(1.0, GRID[0] * GRID[1] + 1).view(1, 1, *GRID)
    images = colours.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)
    moved = transform.image(images, patch)
    before, after, count = transform.patches(GRID)
    expected = torch.zeros(count)
    expected[after] = colours.flatten()[before]
    expected = expected.view(1, 1, moved.shape[2] // size[0], -1).repeat_interleave(size[0], 2)
    assert torch.equal(moved, expected.repeat_interleave(size[1], 3))


def test_images_inside_a_patch_move_too():
    images = torch.randn(2, 3, 6, 8)
    assert torch.equal(HorizontalFlip().image(images, 2), images.flip(-1))
    assert torch.equal(Shift(1, -2).image(images, 2), images.roll((2, -4), (-2, -1)))
    assert torch.equal(Crop(1, 0, 2, 3).image(images, 2), images[:, :, 2:6, 0:6])
    shifted = Shift(1, -2, circular=False).image(images, 2)
    assert torch.equal(shifted[:, :, 2:, :4], images[:, :, :4, 4:]) and shifted.count_nonzero() == 2 * 3 * 4 * 4


@pytest.mark.parametrize(("prefix", "queries"), [(0, "patches"), (1, "patches"), (1, "prefix"), (2, "prefix")], **names)
@pytest.mark.parametrize("transform", LOSSLESS[:2] + CUT, **names)
def test_equals_the_naive_formula_and_its_gradients(transform, prefix, queries):
    pairs, count = by_hand(transform)
    sides = [
        draw(2, prefix + patches, 2, 3, seed=seed).requires_grad_() for seed, patches in enumerate((15, count), start=1)
    ]
    options = dict(grid=GRID, prefix_tokens=prefix, queries=queries)
    losses = attention_consistency(*sides, transform, reduction="none", **options)
    expected = naive(*map(attention_map, sides), pairs, prefix, queries)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(attention_consistency(*sides, transform, **options), expected.mean())
    of_maps = attention_consistency(*map(attention_map, sides), transform, **options)
    torch.testing.assert_close(of_maps, expected.mean())
    grads = torch.autograd.grad(losses.sum(), sides)
    wanted = torch.autograd.grad(expected.sum(), sides)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("queries", ["patches", "prefix"])
@pytest.mark.parametrize("transform", [HorizontalFlip(), Shift(1, 1, circular=False), Crop(0, 0, 1, 2)], **names)
def test_gradcheck(transform, queries):
    count = transform.patches((2, 2))[2]
    sides = [draw(2, 1 + patches, seed=patches).requires_grad_() for patches in (4, count)]

    def loss(*sides):
        options = dict(grid=(2, 2), prefix_tokens=1, queries=queries, reduction="none", scale=0.7)
        return attention_consistency(*sides, transform, **options)

    assert torch.autograd.gradcheck(loss, sides, nondet_tol=0.0)


class PatchBlock(nn.Module):
    """The qkv of a ViT's first block, with a class token and without position embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.qkv = nn.Linear(16, 48)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).mT
        tokens = torch.cat((self.cls.expand(len(tokens), -1, -1), tokens), 1)
        return 3 * self.qkv(tokens).unflatten(-1, (3, 2, 8))


@pytest.mark.parametrize("queries", ["patches", "prefix"])
@pytest.mark.parametrize("transform", LOSSLESS + CUT, **names)
def test_a_set_of_patches_is_followed(transform, queries):
    """Without position embedding a block must follow; by a flip if its patch embedding is symmetric."""
    torch.manual_seed(0)
    block, images = PatchBlock(), torch.randn(2, 3, 12, 20)
    options = dict(grid=GRID, prefix_tokens=1, queries=queries)
    if isinstance(transform, HorizontalFlip):
        assert attention_consistency(block(images), block(transform.image(images, 4)), transform, **options) > 1e-3
        block.embed.weight.data += block.embed.weight.data.flip(-1)
    followed = attention_consistency(block(images), block(transform.image(images, 4)), transform, **options)
    assert abs(followed.item()) < 1e-6
    if transform != Crop(0, 0, 3, 5) and len(transform.patches(GRID)[0]) > 1:
        other = block(transform.image(torch.randn_like(images), 4))
        assert attention_consistency(block(images), other, transform, **options) > 1e-2


def test_a_whole_vit_without_position_embedding_follows():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=12, depth=3, embed_dim=24, num_heads=2)
    nn.init.zeros_(model.pos_embed)
    for name, weight in model.named_parameters():
        if "qkv.weight" in name:
            nn.init.normal_(weight, std=0.5)
    from vitkd_fast.taps import taps

    images, transform = torch.randn(2, 3, 48, 48), Shift(1, -2)
    options = dict(grid=(4, 4), prefix_tokens=model.num_prefix_tokens)
    with taps(model, what={"qkv"}) as tapped:
        model(images)
        before = dict(tapped.qkv)
        model(transform.image(images, 12))
        for block, qkv in tapped.qkv.items():
            assert abs(attention_consistency(before[block], qkv, transform, **options).item()) < 1e-5
        nn.init.normal_(model.pos_embed)
        model(images)
        before = dict(tapped.qkv)
        model(transform.image(images, 12))
        for block, qkv in tapped.qkv.items():
            assert attention_consistency(before[block], qkv, transform, **options) > 1e-2


def test_the_gradient_reaches_the_image_and_makes_attention_follow():
    torch.manual_seed(0)
    block = PatchBlock()
    images, transform = torch.randn(2, 3, 12, 20, requires_grad=True), HorizontalFlip()
    losses = []
    optimizer = torch.optim.Adam([images], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        loss = attention_consistency(
            block(images), block(transform.image(images, 4)), transform, grid=GRID, prefix_tokens=1
        )
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_scores(dtype):
    sides = [draw(2, 15, 2, 4, dtype=dtype, seed=seed, spread=100).requires_grad_() for seed in (0, 1)]
    loss = attention_consistency(*sides, HorizontalFlip(), grid=GRID)
    exact = attention_consistency(*(side.double() for side in sides), HorizontalFlip(), grid=GRID)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, sides))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    sides = [draw(2, 15, 2, 64, dtype=dtype, seed=seed) for seed in (0, 1)]
    sides[0][0, 0] = 200  # scores that float16 does not hold
    wide = [side.float() for side in sides]
    expected = attention_consistency(*wide, Shift(1, 1), grid=GRID)
    assert expected.isfinite() and torch.equal(attention_consistency(*sides, Shift(1, 1), grid=GRID), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_consistency(*wide, Shift(1, 1), grid=GRID), expected)


def test_one_patch_and_one_image():
    sides = [draw(1, 2, seed=seed) for seed in (0, 1)]
    for queries in ("patches", "prefix"):
        options = dict(grid=(1, 1), prefix_tokens=1, queries=queries)
        assert attention_consistency(*sides, HorizontalFlip(), **options) == 0


def test_strides_do_not_matter():
    sides = [draw(2, 15, seed=seed) for seed in (0, 1)]
    strided = [side.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4) for side in sides]
    loss = attention_consistency(*strided, Shift(1, 1), grid=GRID)
    torch.testing.assert_close(loss, attention_consistency(*sides, Shift(1, 1), grid=GRID), rtol=1e-12, atol=0)


def test_repeats_bitwise():
    sides = [draw(4, 15, dtype=torch.float32, seed=seed).requires_grad_() for seed in (0, 1)]
    first = torch.autograd.grad(attention_consistency(*sides, Shift(1, 1), grid=GRID), sides)
    for _ in range(5):
        again = torch.autograd.grad(attention_consistency(*sides, Shift(1, 1), grid=GRID), sides)
        assert all(torch.equal(grad, want) for grad, want in zip(again, first, strict=True))


def test_compiles_in_one_graph():
    sides = [draw(2, 15, seed=seed).requires_grad_() for seed in (0, 1)]

    def loss(*sides):
        return attention_consistency(*sides, Shift(1, 1, circular=False), grid=GRID)

    compiled = torch.compile(loss, fullgraph=True, backend="eager")(*sides)
    torch.testing.assert_close(compiled, loss(*sides))
    torch.testing.assert_close(torch.autograd.grad(compiled, sides), torch.autograd.grad(loss(*sides), sides))


def test_a_transform_of_your_own():
    @dataclass(frozen=True)
    class VerticalFlip(Transform):
        def axes(self, size, patch):
            return range(size[0] - 1, -1, -1), range(size[1])

    images = torch.randn(1, 3, 12, 20)
    assert torch.equal(VerticalFlip().image(images, 4), images.flip(-2))
    qkv = draw(1, 15)
    moved = qkv.unflatten(1, GRID).flip(1).flatten(1, 2)
    assert attention_consistency(qkv, moved, VerticalFlip(), grid=GRID).abs() < 1e-12


def test_the_registry_names_every_transform():
    assert set(TRANSFORMS.values()) == {HorizontalFlip, Shift, Crop}


@pytest.mark.parametrize(
    ("shapes", "transform", "options", "message"),
    [
        (((2, 15), (2, 15)), Shift(1, 1), {}, r"attention must be a packed qkv.*got shape \(2, 15\)"),
        (
            ((2, 16, 3, 2, 4),) * 2,
            Shift(1, 1),
            {},
            "attention has 16 tokens, but 0 prefix tokens and 15 patches make 15",
        ),
        (((2, 15, 3, 2, 4),) * 2, Crop(0, 0, 2, 2), {}, "transformed_attention has 15 tokens, but .* 4 patches"),
        (((2, 15, 3, 2, 4), (3, 15, 3, 2, 4)), Shift(1, 1), {}, "attention has 2 images and transformed_attention 3"),
        (((2, 15, 3, 2, 4),) * 2, Shift(3, 0, circular=False), {}, "leaves none of 3×5 patches"),
        (((2, 15, 3, 2, 4),) * 2, Shift(1, 1), {"queries": "prefix"}, "prefix_tokens is 0"),
        (((2, 15, 3, 2, 4),) * 2, Shift(1, 1), {"queries": "cls"}, "queries is 'cls'; accepted: patches, prefix"),
        (((2, 15, 3, 2, 4),) * 2, Crop(2, 0, 2, 2), {}, "does not lie within 3×5 patches"),
    ],
)
def test_errors_say_what_to_do(shapes, transform, options, message):
    with pytest.raises(ValueError, match=message):
        attention_consistency(*map(torch.zeros, shapes), transform, grid=GRID, **options)


def test_images_that_are_not_whole_patches():
    with pytest.raises(ValueError, match="10×20 pixels are not made of whole 4×4 patches"):
        HorizontalFlip().image(torch.zeros(1, 3, 10, 20), 4)


def test_fewer_prefix_tokens_than_none_are_refused():
    qkv = torch.randn(2, 4, 3, 2, 8)
    with pytest.raises(ValueError, match="prefix_tokens is -1; it must be 0 or more"):
        attention_consistency(qkv, qkv, HorizontalFlip(), grid=(5, 1), prefix_tokens=-1)
