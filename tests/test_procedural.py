"""Drawn images: in range at every size, all different, geometry against brute force, the noise's spectrum."""

from itertools import pairwise

import pytest
import torch

from vitkd_fast import procedural
from vitkd_fast.generator import GENERATORS, GeneratorSettings, ImageSpec
from vitkd_fast.procedural import Canvas, drawn

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("count, channels, height, width", [(1, 1, 1, 1), (7, 3, 8, 5), (2, 4, 3, 90), (33, 1, 28, 28)])
def test_images_of_any_size_are_in_range(count, channels, height, width):
    images = drawn(count, channels, height, width, CPU)
    assert images.shape == (count, channels, height, width) and images.dtype == torch.float32
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1


def test_the_random_state_decides_them_and_all_are_different():
    images = drawn(200, 3, 16, 16, CPU)
    torch.manual_seed(0)
    assert torch.equal(images, drawn(200, 3, 16, 16, CPU))
    apart = torch.cdist(images.flatten(1), images.flatten(1)).fill_diagonal_(torch.inf).amin(1)
    assert (apart > 0.1).float().mean() > 0.95  # a shape may lie outside its image
    ground = images.flatten(2).mode(-1).values  # (B, 3)
    assert 0.1 < (ground == 0).all(1).float().mean() < 0.6 and (ground == 1).all(1).any()
    assert (ground.std(1) > 0.1).float().mean() > 0.2  # coloured


def test_the_order_says_nothing():
    """Images are drawn in groups, by the number and kind of their shapes."""
    images = torch.stack([drawn(30, 1, 12, 12, CPU) for _ in range(60)])
    edges = images.diff(dim=-1).abs().mean((0, 2, 3, 4))  # by place in the batch
    assert edges.std() / edges.mean() < 0.2


def test_a_surface_is_plain_or_shaded_and_textured():
    canvas = Canvas(20, 30, CPU)
    colours, textures = torch.rand(400, 3), canvas.noise(40, 3)
    lively = (torch.arange(400) % 2).float().view(-1, 1, 1, 1)
    added = canvas.surface(colours, textures, lively) - colours[:, :, None, None]
    assert added[::2].abs().max() == 0
    torch.testing.assert_close(added.mean((2, 3)), torch.zeros(400, 3), atol=1e-5, rtol=0)
    ramps = torch.stack((canvas.rows.expand(20, 30), canvas.columns.expand(20, 30))).flatten(1)  # (2, H * W)
    slopes = added[1::2].mean(1).flatten(1) @ ramps.T / ramps.square().sum(1)
    assert slopes.square().sum(1).mean().sqrt() == pytest.approx(procedural.SHADE, rel=0.25)
    grain = (added[1::2].mean(1).flatten(1) - slopes @ ramps).std(1)
    assert 0 < grain.min() and grain.max() < 1.1 * procedural.GRAIN and grain.mean() > 0.2 * procedural.GRAIN


@pytest.mark.parametrize("height, width", [(20, 20), (12, 30), (25, 10)])
def test_distance_from_a_line(height, width):
    canvas = Canvas(height, width, CPU)
    corners = torch.rand(3, 5, 2) * 2 - 1
    corners[0, 2] = corners[0, 1]  # a piece without length
    share = torch.linspace(0, 1, 400)[:, None]
    dense = torch.stack([torch.cat([a + share * (b - a) for a, b in pairwise(line)]) for line in corners])
    # Samples are at most 0.0071 apart, so that the nearest one is at most half of that too far.
    expected = torch.cdist(canvas.points.expand(3, -1, -1), dense).amin(-1)
    torch.testing.assert_close(canvas.from_line(corners), expected, atol=5e-3, rtol=0)


def test_lengths_are_alike_in_both_directions_and_end_with_the_image():
    canvas = Canvas(16, 40, CPU)
    assert canvas.pixel == 2 / 16 and canvas.grid == (16, 40)
    rows, columns = canvas.points.view(16, 40, 2).unbind(-1)
    assert rows[0, 0].item() == -15 / 16 and columns[0, -1].item() == pytest.approx(39 / 16)
    for steps in (rows.diff(dim=0), columns.diff(dim=1)):
        torch.testing.assert_close(steps, torch.full_like(steps, canvas.pixel))


def test_large_images_have_the_shapes_of_finely_computed_ones(monkeypatch):
    def both(finest):
        monkeypatch.setattr(procedural, "FINEST", finest)
        torch.manual_seed(3)
        canvas = Canvas(90, 120, CPU)
        thickness, blur = torch.full((20,), 0.15), torch.full((20,), 1.5 * canvas.pixel)
        return canvas.grid, [canvas.cover(outline, blur) for outline in (canvas.strokes(thickness), canvas.regions(20))]

    (coarse, quick), (fine, slow) = both(32), both(90)
    assert coarse == (32, 43) and fine == (90, 120)
    for ours, exact in zip(quick, slow):
        assert ours.shape == exact.shape == (20, 1, 90, 120)
        assert (ours - exact).abs().mean() < 0.01 and 0.02 < exact.mean() < 0.5


def test_a_cover_is_whole_inside_nothing_outside_and_half_on_the_outline():
    canvas = Canvas(3, 3, CPU)
    distance = torch.tensor([[-1.0, -0.1, 0.0, 0.025, 0.1, 1.0, 0.0, 0.0, 0.0]])
    assert canvas.cover(distance, torch.tensor([0.1])).flatten()[:6].tolist() == [1, 1, 0.5, 0.25, 0, 0]


def test_noise_has_unit_variance_no_mean_and_is_mostly_grey():
    noise = Canvas(32, 24, CPU).noise(64, 3)
    torch.testing.assert_close(noise.flatten(1).std(1, correction=0), torch.ones(64))
    assert noise.mean((2, 3)).abs().max() < 1e-5
    red, green = noise[:, 0].flatten(), noise[:, 1].flatten()
    assert 0.6 < torch.corrcoef(torch.stack((red, green)))[0, 1] < 0.95
    power = torch.fft.rfft2(noise).abs().square().mean((0, 1))
    assert power[1:4, 1:4].mean() > 10 * power[12:16, 8:].mean()


def test_noise_is_alike_along_rows_and_columns():
    noise = Canvas(16, 16, CPU).noise(8000, 1)[:, 0]
    power = torch.fft.fft2(noise).abs().square().mean(0)  # of waves that are their own mirror images, too
    torch.testing.assert_close(power, power.T, rtol=0.15, atol=0)
    assert power[0, 0] < 1e-6 and power[0, 1] > 2 * power[0, 2] > 4 * power[0, 8]


def test_shapes_are_of_the_kinds_and_numbers_that_are_meant(monkeypatch):
    canvas = Canvas(4, 4, CPU)
    monkeypatch.setattr(canvas, "strokes", lambda thickness: thickness[:, None].expand(-1, 16))
    monkeypatch.setattr(canvas, "regions", lambda count: torch.full((count, 16), -1.0))
    outlines = canvas.outlines(torch.arange(30.0))
    assert [len(layer) for layer in outlines] == [30, 24, 18, 12, 6]
    for number, layer in enumerate(outlines):
        own = torch.arange(len(layer))
        strokes = (own % 3 == 0) | ((own % 3 == 1) & (number % 2 == 0))
        assert torch.equal(layer[:, 3], torch.where(strokes, own.float(), -1.0))
    assert [len(layer) for layer in canvas.outlines(torch.zeros(1))] == [1] * 5


def test_the_generator_draws_for_the_teacher():
    made = GENERATORS["procedural"](ImageSpec(9, 7, (0.2, 0.5), (0.1, 2.0)), GeneratorSettings(latent=4, width=8))
    pixels = made.pixels(made.sample(5))
    assert pixels.shape == (5, 2, 9, 7) and -1e-6 < pixels.min() and pixels.max() < 1 + 1e-6
    assert not list(made.parameters())
