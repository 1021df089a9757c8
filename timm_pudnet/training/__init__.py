"""Training a hypernetwork: recipes, groups of images, losses and the loop; and fine-tuning what it predicted."""

from timm_pudnet.training.conditions import Condition
from timm_pudnet.training.episodes import Augmentation, Group, Groups, GroupSampler, ImageBank, bank_input
from timm_pudnet.training.finetune import FineTuning, Tuning, finetune, finetune_epochs
from timm_pudnet.training.losses import Losses, group_losses, sketch_loss
from timm_pudnet.training.meta_train import (
    check_control,
    check_start,
    classes_seen,
    load_banks,
    meta_train,
    save_control,
    train_plain,
    try_recipe,
    whitening_path,
)
from timm_pudnet.training.recipe import Data, LossWeights, Recipe, Schedule

__all__ = [
    'Augmentation',
    'Condition',
    'Data',
    'FineTuning',
    'Group',
    'GroupSampler',
    'Groups',
    'ImageBank',
    'LossWeights',
    'Losses',
    'Recipe',
    'Schedule',
    'Tuning',
    'bank_input',
    'check_control',
    'check_start',
    'classes_seen',
    'finetune',
    'finetune_epochs',
    'group_losses',
    'load_banks',
    'meta_train',
    'save_control',
    'sketch_loss',
    'train_plain',
    'try_recipe',
    'whitening_path',
]
