"""Augmentation: each image moves by its own, edges stay, nothing moves at 0, gradients reach the images."""

import torch

from vitkd_fast.augment import augmented, shifted, turned


def test_shifted_moves_each_image_and_repeats_edges():
    images = torch.arange(2 * 25.0).view(1, 2, 5, 5).expand(300, -1, -1, -1)
    seen = set()
    for moved in shifted(images, 0.2):
        row, column = (moved[0, 2, 2].long() // 5).item(), (moved[0, 2, 2].long() % 5).item()
        seen.add((row - 2, column - 2))
        rows = (torch.arange(5) + row - 2).clamp(0, 4)
        columns = (torch.arange(5) + column - 2).clamp(0, 4)
        assert torch.equal(moved, images[0][:, rows][:, :, columns])
    assert seen == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    assert shifted(images, 0) is images


def test_turned_follows_each_images_own_angle_and_size():
    torch.manual_seed(0)
    height, width = 24, 36
    rows, columns = torch.meshgrid(torch.arange(height) - 11.5, torch.arange(width) - 17.5, indexing="ij")
    images = torch.stack((columns, rows)).expand(64, 2, -1, -1)  # pixels say where they came from
    seen = turned(images, 0.3)[:, :, 9:15, 13:23]
    matrices = torch.linalg.lstsq(
        torch.stack((columns, rows), -1)[9:15, 13:23].reshape(1, -1, 2).expand(64, -1, -1), seen.flatten(2).mT
    ).solution  # (64, 2, 2): from a pixel's place to where it came from
    assert torch.allclose(matrices[:, 0, 0], matrices[:, 1, 1], atol=1e-3)  # turned in pixels, not in shares of sides
    assert torch.allclose(matrices[:, 0, 1], -matrices[:, 1, 0], atol=1e-3)
    angle, size = torch.atan2(matrices[:, 0, 1], matrices[:, 0, 0]), matrices.det().sqrt() - 1
    assert 0.25 < angle.abs().max() <= 0.3 and 0.15 < size.abs().max() <= 0.21 + 1e-3
    assert angle.min() < 0 < angle.max() and len(angle.round(decimals=4).unique()) > 50


def test_gradients_reach_the_images_and_zero_moves_nothing():
    torch.manual_seed(0)
    images = torch.rand(16, 1, 8, 8, requires_grad=True)
    augmented(images, 0.125, 0.2).sum().backward()
    assert (images.grad != 0).float().mean() > 0.8
    assert augmented(images, 0, 0.0) is images


def test_autocast_does_not_reach_the_grid():
    images = torch.rand(4, 1, 96, 96)
    torch.manual_seed(1)
    expected = turned(images, 0.2)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(turned(images, 0.2), expected)
