"""denoising/tiles.py: an image in tiles is the image at once."""

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from timm_pudnet import InputError
from timm_pudnet.denoising.tiles import denoise, fused
from timm_pudnet.denoising.unet import Block


class Stand(nn.Module):
    """A small UNet with all that makes tiles differ: zero padding, three poolings, a padded size, a skip, a norm."""

    multiple = 8
    receptive_field = 23  # convs at 1, 1/2, 1/4, 1/8 and 1: 1 + 2 + 4 + 8 + 1, and 7 within a pooled pixel

    def __init__(self, in_chans=1):
        super().__init__()
        self.in_chans = in_chans
        self.first = nn.Conv2d(in_chans, 4, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, in_chans, 3, padding=1)
        for conv in (self.first, *self.down, self.last):
            nn.init.normal_(conv.weight, 0.1, 0.3)  # so that what is far away counts too
            nn.init.constant_(conv.bias, 0.1)  # so that zero padding is no harmless value
        nn.init.uniform_(self.norm.running_mean)
        type(self).seen = []  # of the class, since denoise runs a copy

    def forward(self, x):
        height, width = x.shape[-2:]
        self.seen.append(tuple(x.shape))
        x = functional.pad(x, (0, -width % 8, 0, -height % 8), mode='replicate')
        y = first = self.first(x)
        for conv in self.down:
            y = conv(functional.max_pool2d(y, 2))
        y = self.last(self.norm(first + functional.interpolate(y, scale_factor=8)))
        return y[..., :height, :width]


def noise(*shape, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def largest_difference(model, image, tile):
    """Over the largest value that the model gives for the image at once."""
    whole = model(image[None])[0].detach()
    return ((denoise(model, image, tile=tile) - whole).abs().max() / whole.abs().max()).item()


SIZES = [(37, 50), (64, 64), (65, 63), (129, 257), (1, 5000), (700, 1), (7, 3), (8, 130), (200, 71), (1, 1)]


@pytest.mark.parametrize(('height', 'width'), SIZES)
@pytest.mark.parametrize('tile', [8, 61, 512])
def test_tiles_give_what_the_whole_image_gives(height, width, tile):
    model = Stand().double().eval()
    assert largest_difference(model, noise(1, height, width), tile) < 1e-10


def test_in_float32_too_as_near_as_it_rounds():
    model = Stand(3).eval()
    assert largest_difference(model, noise(3, 150, 91, dtype=torch.float32), 32) < 1e-5


@pytest.mark.parametrize('wrong', [{'receptive_field': 7}, {'receptive_field': 15}, {'multiple': 1}, {'multiple': 4}])
def test_a_margin_or_grid_too_small_would_show(wrong):
    """That the tests above can fail: without the full margin, or off the pooling grid, there are seams."""
    model = Stand().double().eval()
    for name, value in wrong.items():
        setattr(model, name, value)
    assert largest_difference(model, noise(1, 130, 130), 36) > 1e-4


def test_the_receptive_field_of_the_stand_in_is_what_it_says():
    model = Stand().double().eval()
    image = noise(1, 1, 96, 96).requires_grad_()
    reach = 0
    for at in range(40, 48):
        (gradient,) = torch.autograd.grad(model(image)[0, 0, at, at], image)
        rows = gradient[0, 0].abs().sum(1).nonzero()
        reach = max(reach, at - int(rows.min()), int(rows.max()) - at)
    assert 16 < reach <= model.receptive_field  # so the next smaller margin on the grid would be too small


def test_memory_is_that_of_a_tile_whatever_the_size():
    model = Stand().eval()
    denoise(model, noise(1, 20, 3000, dtype=torch.float32), tile=64)
    denoise(model, noise(1, 300, 300, dtype=torch.float32), tile=64)
    assert len(model.seen) == 38 + 16
    assert all(count * chans == 1 and max(size) <= 80 + 2 * 24 for count, chans, *size in model.seen)
    model.seen.clear()
    denoise(model, noise(1, 70, 85, dtype=torch.float32), tile=64)  # no tile is margin for the most part
    assert [size[2:] for size in model.seen] == [(70, 48 + 24), (70, 85 - 48 + 24)]


def test_bright_images_in_half_precision_are_no_error():
    assert denoise(Stand().eval(), torch.full((1, 300, 300), 1.0, dtype=torch.float16)).isfinite().all()


def test_a_model_in_training_mode_is_not_copied(one_line):
    with pytest.raises(InputError) as error:
        fused(timm.create_model('blindspot_unet', width=4, depth=1))
    one_line(error, 'training mode', 'eval()')


@pytest.mark.parametrize('wrong', [torch.nan, torch.inf, -torch.inf])
def test_pixels_that_are_not_finite_are_refused(wrong, one_line):
    image = noise(1, 20, 20, dtype=torch.float32)
    image[0, 3, 5] = wrong
    with pytest.raises(InputError) as error:
        denoise(Stand().eval(), image)
    one_line(error, 'NaN or infinite')


def test_the_copy_that_is_made_of_a_model_for_large_images_is_made_once_if_asked_for(monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model('blindspot_unet', width=4, depth=1).eval()
    nn.init.normal_(model.output.weight)
    image = noise(3, 400, 400, dtype=torch.float32)
    whole, copied = denoise(model, image), fused(model)
    assert not any(isinstance(part, Block) for part in copied.modules())
    assert any(isinstance(part, Block) for part in model.modules())
    monkeypatch.setattr('timm_pudnet.denoising.tiles.fused', None)
    assert_close(denoise(copied, image), whole, rtol=0, atol=0)


@pytest.mark.parametrize(('turns', 'quarters'), [(1, [0]), (2, [0, 2]), (4, [0, 1, 2, 3])])
def test_turns_are_the_mean_over_turned_copies_turned_back(turns, quarters):
    model, image = Stand(3).double().eval(), noise(3, 40, 21)
    copies = [denoise(model, image.rot90(turn, (1, 2)), tile=16).rot90(-turn, (1, 2)) for turn in quarters]
    assert_close(denoise(model, image, tile=16, turns=turns), torch.stack(copies).mean(0))
    assert turns == 1 or not torch.allclose(copies[0], copies[-1])


def test_other_turns_are_refused(one_line):
    with pytest.raises(InputError) as error:
        denoise(Stand().eval(), noise(1, 8, 8), turns=3)
    one_line(error, 'turns must be 1, 2 or 4', '3')


def test_grey_through_three_channels_is_the_mean_and_colour_through_one_is_each_apart():
    three, one = Stand(3).double().eval(), Stand(1).double().eval()
    image = noise(3, 40, 51)
    grey = three(image[:1].expand(3, -1, -1)[None])[0].mean(0, keepdim=True)
    assert_close(denoise(three, image[:1], tile=16), grey)
    assert_close(denoise(one, image, tile=16), torch.cat([one(plane[None, None])[0] for plane in image]))


def test_the_result_has_the_images_type_and_can_be_used_in_training():
    model = Stand().eval()
    found = denoise(model, noise(1, 9, 9))
    assert found.dtype == torch.float64
    assert not found.is_inference()
    assert denoise(model, noise(1, 9, 9, dtype=torch.float32).half()).dtype == torch.float16


def test_what_is_no_denoiser_is_refused_in_one_line(one_line):
    for wrong in (torch.nn.Conv2d(3, 3, 1), torch.nn.DataParallel(Stand())):
        with pytest.raises(InputError) as error:
            denoise(wrong, noise(3, 9, 9, dtype=torch.float32))
        one_line(error, type(wrong).__name__, 'in_chans', 'predict_denoiser')


def test_what_is_no_image_is_refused_in_one_line(one_line):
    model = Stand().eval()
    for wrong in (noise(1, 1, 9, 9), noise(2, 9, 9), noise(1, 0, 9), torch.zeros(1, 9, 9, dtype=torch.uint8)):
        with pytest.raises(InputError) as error:
            denoise(model, wrong)
        one_line(error, tuple(wrong.shape), '[c, h, w]')
    for wrong in (noise(1, 9, 9).numpy(), Image.new('RGB', (9, 9)), 'noisy/a.png'):
        with pytest.raises(InputError) as error:
            denoise(model, wrong)
        one_line(error, type(wrong).__name__, 'float tensor [c, h, w]')
    with pytest.raises(InputError) as error:
        denoise(model, noise(1, 9, 9), tile=0)
    one_line(error, 'tile', 0)
