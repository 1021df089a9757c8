"""Whatever a caller hands over -> batches of tensors and labels, the same bits as timm's eval transform would give."""

from timm_pudnet.images.datasets import (
    TRAIN_OR_TEST,
    any_timm_name,
    check_root,
    is_timm_name,
    reorders,
    takes_folder,
    torch_name,
)
from timm_pudnet.images.folders import natural_key, scan_folder
from timm_pudnet.images.pixels import channel_statistics, open_file, quiet_pillow, reason_of, to_bchw
from timm_pudnet.images.source import ImageSource, open_images

__all__ = [
    'TRAIN_OR_TEST',
    'ImageSource',
    'any_timm_name',
    'channel_statistics',
    'check_root',
    'is_timm_name',
    'natural_key',
    'open_file',
    'open_images',
    'quiet_pillow',
    'reason_of',
    'reorders',
    'scan_folder',
    'takes_folder',
    'to_bchw',
    'torch_name',
]
