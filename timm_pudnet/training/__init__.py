"""Training a hypernetwork: recipes, groups of images, losses and the loop; and fine-tuning what it predicted."""

from timm_pudnet.training.conditions import Condition
from timm_pudnet.training.episodes import Augmentation, Groups, GroupSampler, ImageBank, bank_input
from timm_pudnet.training.finetune import FineTuning, Tuning, finetune, finetune_epochs
from timm_pudnet.training.meta_train import (
    check_control,
    check_start,
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
    'GroupSampler',
    'Groups',
    'ImageBank',
    'LossWeights',
    'Recipe',
    'Schedule',
    'Tuning',
    'bank_input',
    'check_control',
    'check_start',
    'finetune',
    'finetune_epochs',
    'load_banks',
    'meta_train',
    'save_control',
    'train_plain',
    'try_recipe',
    'whitening_path',
]
