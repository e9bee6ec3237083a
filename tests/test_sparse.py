"""Sparse inversion: the most attended patches are kept, the rest is neither seen nor learned."""

import pytest
import torch
from test_methods import vit, vits
from test_synthesis import make
from tiny import SIZE, tiny_student, tiny_teacher

from vitkd_fast.sparse import LivePatches, class_attention

pytestmark = pytest.mark.usefixtures("seeded")


def test_class_attention_is_the_class_tokens_row_averaged_over_heads():
    qkv = torch.randn(2, 6, 3, 2, 4)
    query, key, _ = qkv.double().permute(2, 0, 3, 1, 4)
    maps = (query @ key.mT / 2).softmax(-1)  # (B, H, N, N)
    for prefix, has_class, expected in (
        (1, True, maps[:, :, 0, 1:].mean(1)),
        (2, True, maps[:, :, 0, 2:].mean(1)),
        (0, False, maps.mean((1, 2))),
        (2, False, maps.mean((1, 2))[:, 2:]),  # registers
    ):
        with torch.autocast("cpu", torch.bfloat16):  # which is not for these products
            found = class_attention(qkv, prefix, has_class)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_patches_are_dropped_in_four_stages_down_to_the_share():
    made = make(*vits(), method="smi", generator_steps=50)
    patches = made.patches
    assert patches.counts == [16, 11, 8, 5, 4]
    due = []
    for step in range(50):
        if patches.due(step, 50):
            due.append(step)
            count = 1 + (16 if patches.live is None else patches.live.shape[1])
            patches.drop(torch.randn(8, count, 3, 2, 8), step, 50)
    assert due == [5, 10, 15, 20] and patches.live.shape == (8, 4)
    patches.begin()
    assert patches.live is None and patches.due(0, 1)  # a round of one step drops at once
    patches.drop(torch.randn(8, 17, 3, 2, 8), 0, 1)
    assert patches.live.shape == (8, 4)


def test_the_most_attended_are_kept_through_all_stages():
    patches = make(*vits(), method="smi").patches
    importance = torch.stack([torch.randperm(16) for _ in range(8)]).float()  # of each image's 16 patches
    for step in range(4):
        live = torch.arange(16).expand(8, 16) if patches.live is None else patches.live
        qkv = torch.zeros(8, 1 + live.shape[1], 3, 1, 1)
        qkv[:, 0, 0] = 1  # the class token's query; a patch's key is its importance
        qkv[:, 1:, 1, 0, 0] = importance.gather(1, live)
        patches.drop(qkv, 10 * (step + 1), 100)
        kept = importance.gather(1, patches.live).sort(1, descending=True).values
        expected = torch.arange(15, 15 - patches.counts[step + 1], -1.0).expand_as(kept)
        assert torch.equal(kept, expected)


def test_the_teacher_computes_with_live_patches_only_and_then_with_all_again():
    teacher, student = vits()
    patches = make(teacher, student, method="smi").patches
    patches.live = torch.tensor([[3, 0, 9]] * 4)
    images = torch.randn(4, 1, SIZE, SIZE)
    counts = []
    teacher.blocks[0].register_forward_hook(lambda module, args, output: counts.append(output.shape[1]))
    with patches.watching():
        sparse = teacher(images)
    dense = teacher(images)
    assert counts == [4, 17]
    tokens = teacher.patch_drop(teacher._pos_embed(teacher.patch_embed(images)))
    expected = teacher.forward_head(teacher.norm(teacher.blocks(tokens[:, [0, 4, 1, 10]])))
    torch.testing.assert_close(sparse, expected)
    assert not torch.allclose(sparse, dense)


def test_dropped_patches_are_blank_and_get_no_gradient():
    patches = make(*vits(), method="smi").patches
    patches.live = torch.tensor([[0, 5], [15, 2]])
    images = torch.randn(2, 1, SIZE, SIZE, requires_grad=True)
    shown = patches.shown(images)
    squares = shown.detach().view(2, 4, 2, 4, 2).transpose(2, 3).flatten(1, 2)  # (B, patches, 2, 2)
    for image, live in enumerate(patches.live):
        for patch in range(16):
            assert (squares[image, patch].abs().sum() > 0) == (patch in live)
    shown.diff(dim=-1).square().sum().backward()
    assert torch.equal(images.grad != 0, shown != 0) or not images.grad[shown == 0].any()
    assert images.grad[shown != 0].any()


def test_a_round_leaves_its_share_in_the_pool():
    made = make(*vits(), method="smi", generator_steps=20, mean=(0.5,), std=(0.25,))
    calls = []
    made.pair.teacher.blocks[0].register_forward_hook(lambda module, args, output: calls.append(output.shape[1] - 1))
    made.round(0.0)
    assert calls == [16] * 3 + [11] * 2 + [8] * 2 + [5] * 2 + [4] * 11
    blank = (made.pool.bytes[:8] - 127.5).abs() < 1  # mean 0.5 as a byte
    squares = blank.view(8, 4, 2, 4, 2).transpose(2, 3).flatten(3).all(3).flatten(1)
    assert (squares.sum(1) == 12).all()
    made.round(0.5)
    assert calls[20] == 16  # the next images begin whole


def test_teachers_whose_patches_cannot_be_dropped():
    reasons = {
        "not a ViT of timm": make(tiny_teacher(), tiny_student(), method="smi"),
        "cannot be tapped": make(_without_maps(), vit(8, 1, seed=1), method="smi"),
        "have 4 patches, and 4 are always kept": make(vit(16, 1, 0, patch_size=4), vit(8, 1, 1), method="smi"),
    }
    for reason, made in reasons.items():
        assert made.patches is None
        assert any(note.startswith("keep_patches is off: ") and reason in note for note in made.pair.notes), reason
    assert LivePatches.missing(make(*vits(), method="deepinversion").pair) is None


def _without_maps():
    teacher = vit(16, 2, seed=0)
    teacher.blocks[1].attn.forward = teacher.blocks[1].attn.forward  # a forward of its own
    return teacher
