"""ConvNet-3, the 3-layer CNN of the paper's table VII, as the timm architecture `convnet3`.

Importing this module (the package does) registers it, so `timm.create_model('convnet3')` and `local-dir:` folders of it
work. It is written the way timm's own models are.

The paper says "a 3-layer CNN (ConvNet-3)" and no more: neither kernel sizes nor widths, norm, pooling or head. Settled
here, after the usual small networks of that kind:

- three blocks of conv 3x3 (padding 1, no bias), BatchNorm, ReLU, max pool 2x2; then the spatial mean and one `Linear`;
- 64, 128 and 256 channels: 0.37M weights without the classifier, nearly all conv kernels, and features of width 256;
- 3x32x32 input, pixels normalised by mean and std 0.5. Any size from 8 pixels works.

Dimension letters: `n` images, `c` channels, `h w` height and width.
"""

from __future__ import annotations

from typing import Any

from timm.layers.classifier import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

from timm_pudnet.target import register_architecture

__all__ = ['ConvNet3']


class ConvBlock(nn.Module):
    """Conv 3x3, BatchNorm, ReLU, max pool: `[n, i, h, w]` to `[n, o, h // 2, w // 2]`.

    Args:
        in_chs: Channels `i` that it takes.
        out_chs: Channels `o` that it gives.
    """

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size=3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_chs)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(kernel_size=2)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        return self.pool(self.act(self.bn(self.conv(x))))


class ConvNet3(nn.Module):
    """The paper's ConvNet-3; the module's docstring says what of it is settled here.

    Args:
        num_classes: Width of the classifier; 0 leaves it out.
        in_chans: Channels of the images.
        channels: Channels of the three blocks; the last is the width of the features.
        global_pool: A pooling that timm knows (`avg`, `max`, `avgmax`, `catavgmax`), or '' for none.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        channels: tuple[int, int, int] = (64, 128, 256),
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(channels) != 3:
            raise ValueError(f'channels of the three blocks are needed, got {channels}')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        first, second, third = channels
        self.block1 = ConvBlock(in_chans, first)
        self.block2 = ConvBlock(first, second)
        self.block3 = ConvBlock(second, third)
        self.feature_info = [
            {'num_chs': width, 'reduction': 2**number, 'module': f'block{number}'}
            for number, width in enumerate(channels, start=1)
        ]
        self.num_features = third
        self.head = ClassifierHead(third, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = third * self.head.global_pool.feat_mult()
        for block in (self.block1, self.block2, self.block3):
            nn.init.kaiming_normal_(block.conv.weight, mode='fan_out', nonlinearity='relu')

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Which parameters form a layer, for timm's layer-wise rates."""
        return {'stem': r'^block1', 'blocks': r'^block(\d+)'}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Part of timm's interface; three blocks have nothing to save."""
        assert not enable, 'gradient checkpointing is not supported'

    def get_classifier(self) -> nn.Module:
        """The classifier: a `Linear`, or an `Identity` without classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new classifier in place, and another pooling if one is named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        """The last block's output `[n, c, h // 8, w // 8]`."""
        return self.block3(self.block2(self.block1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools the features; gives logits `[n, num_classes]`, or with `pre_logits` the pooled features `[n, c]`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[n, num_classes]` of images `[n, c, h, w]`; without a classifier their features."""
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs(
    {
        'convnet3': {
            'url': '',
            'num_classes': 1000,
            'input_size': (3, 32, 32),
            'pool_size': (4, 4),
            'crop_pct': 1.0,
            'interpolation': 'bicubic',
            'mean': (0.5, 0.5, 0.5),
            'std': (0.5, 0.5, 0.5),
            'first_conv': 'block1.conv',
            'classifier': 'head.fc',
        }
    }
)


def convnet3(pretrained: bool = False, **kwargs: Any) -> ConvNet3:
    """ConvNet-3 for `timm.create_model`; `kwargs` are those of `ConvNet3`.

    Example:
        >>> import timm
        >>> model = timm.create_model('convnet3', num_classes=10)
        >>> model.get_classifier()
        Linear(in_features=256, out_features=10, bias=True)
    """
    return build_model_with_cfg(ConvNet3, 'convnet3', pretrained, feature_cfg={'out_indices': (0, 1, 2)}, **kwargs)


register_architecture(convnet3)
