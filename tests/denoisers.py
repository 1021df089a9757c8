"""Small denoisers and smooth images for the tests of denoising."""

import timm
import torch
from torch.nn import functional as F

import timm_pudnet  # noqa: F401, which registers blindspot_unet

SMALL = {'width': 4, 'depth': 2}
NOISE = [[0.01, 0.03], [0.02, 0.02], [0.01, 0.02]]
SHARES = [[0.9, 0.5, 0.2], [0.4, 1.0, 0.7]]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slopes(count, side, seed=0):
    """Images without texture."""
    corners = torch.rand(count, 3, 3, 3, generator=generator(seed))
    return F.interpolate(corners, (side, side), mode='bicubic', align_corners=True).clamp(0.05, 0.95)


def unet(**kwargs):
    """One whose networks all do something."""
    model = timm.create_model('blindspot_unet', **SMALL, **kwargs)
    for name, value in model.named_parameters():
        if name.endswith('output.weight'):
            torch.nn.init.normal_(value, std=0.3)
    return model.eval()
