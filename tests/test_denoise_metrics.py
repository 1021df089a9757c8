"""denoising/metrics.py: the numbers of scikit-image and torchmetrics."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn import functional
from torch.testing import assert_close
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr
from torchmetrics.functional.image import structural_similarity_index_measure as torchmetrics_ssim

from timm_pudnet import InputError
from timm_pudnet.denoising.metrics import psnr, ssim

FASHION = Path(__file__).parents[1] / 'examples' / 'fashion'


def fashion(count=3):
    paths = sorted(FASHION.glob('Sneaker/*.png'))[:count]
    return torch.stack([torch.from_numpy(np.array(Image.open(path).convert('L'), np.float32) / 255) for path in paths])


def colours(height, width):
    """A smooth colour image `[1, 3, h, w]` in 0-1."""
    coarse = torch.rand(1, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    return functional.interpolate(coarse, (height, width), mode='bicubic').clamp(0, 1)


def noisy(clean, sigma):
    return clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))


PAIRS = {
    'fashion': (fashion()[:, None], 0.25),
    'fashion, strong noise': (fashion()[:, None], 0.75),
    'colour': (colours(65, 40), 25 / 255),
    'as large as the window': (colours(11, 11), 0.5),
    'one row of windows': (colours(11, 200), 0.1),
    'dark, far from 0-1': (colours(32, 33) * 1e-3, 1e-4),
}


@pytest.mark.parametrize('name', PAIRS)
def test_both_are_those_of_scikit_image_and_torchmetrics(name):
    clean, sigma = PAIRS[name]
    image = noisy(clean, sigma)
    ours = torch.stack([psnr(image, clean), ssim(image, clean)])
    theirs = []
    for one, other in zip(image.double().numpy(), clean.double().numpy(), strict=True):
        similarity = structural_similarity(
            one, other, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0
        )
        theirs.append((peak_signal_noise_ratio(other, one, data_range=1), similarity))
    assert_close(ours, torch.tensor(theirs, dtype=torch.float64).T, rtol=0, atol=1e-6)
    for row, (one, other) in enumerate(zip(image.double(), clean.double(), strict=True)):
        assert abs(torchmetrics_psnr(one[None], other[None], data_range=1.0) - ours[0, row]) < 1e-4
        # Its mean is over a mirrored border of 5 pixels too, where the window lies partly outside.
        _, everywhere = torchmetrics_ssim(one[None], other[None], data_range=1.0, return_full_image=True)
        assert abs(everywhere[..., 5:-5, 5:-5].mean() - ours[1, row]) < 1e-4


def test_an_image_alone_has_the_value_that_it_has_among_others_and_no_axis():
    clean = fashion()[:, None]
    image = noisy(clean, 0.3)
    for measure in (psnr, ssim):
        together = measure(image, clean)
        assert together.shape == (3,)
        assert len(set(together.tolist())) == 3
        for row in range(3):
            assert measure(image[row], clean[row]).shape == ()
            assert_close(measure(image[row], clean[row]), together[row])


def test_the_range_is_that_of_the_pixels():
    clean = colours(20, 30)
    image = noisy(clean, 0.2)
    for measure in (psnr, ssim):
        assert_close(measure(image * 255, clean * 255, data_range=255), measure(image, clean), rtol=1e-5, atol=1e-6)
        assert abs(measure(image, clean, data_range=255) - measure(image, clean)) > 0.1


def test_equal_images_have_an_infinite_psnr_and_an_ssim_of_one():
    clean = colours(16, 16)
    assert psnr(clean, clean).item() == float('inf')
    assert_close(ssim(clean, clean).item(), 1.0)


def test_what_cannot_be_compared_is_refused_in_one_line(one_line):
    clean = colours(16, 16)
    for measure in (psnr, ssim):
        with pytest.raises(InputError) as error:
            measure(clean, clean[:, :1])
        one_line(error, (1, 3, 16, 16), (1, 1, 16, 16))
        with pytest.raises(InputError) as error:
            measure(clean[0, 0], clean[0, 0])
        one_line(error, (16, 16), '[c, h, w]')
        with pytest.raises(InputError) as error:
            measure(clean.to(torch.uint8), clean)
        one_line(error, 'uint8', 'floats in 0-1')
    for image in (clean[..., :10], clean[:, :, :10]):
        with pytest.raises(InputError) as error:
            ssim(image, image)
        one_line(error, '11x11')
        assert psnr(image, image + 0.1) > 19.9  # defined for any size
