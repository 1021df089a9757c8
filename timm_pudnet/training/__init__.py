"""Training a hypernetwork: recipes, groups of images, losses and the loop."""

from timm_pudnet.training.episodes import Augmentation, Group, GroupSampler, ImageBank
from timm_pudnet.training.losses import Losses, group_losses
from timm_pudnet.training.meta_train import load_bank, meta_train, train_plain
from timm_pudnet.training.recipe import Data, Groups, Recipe, Schedule

__all__ = [
    'Augmentation',
    'Data',
    'Group',
    'GroupSampler',
    'Groups',
    'ImageBank',
    'Losses',
    'Recipe',
    'Schedule',
    'group_losses',
    'load_bank',
    'meta_train',
    'train_plain',
]
