"""Predicts the weights of timm's convolutional networks for images that they have never seen (PudNet).

Predict: `predict_model`, `create_model`, `predict_state_dict`; keep: `save_model`, `push_model`. Which hypernetworks
there are: `list_hypernets`, `load_hypernet`, `pull`, `push`. Improve and compare: `finetune`, `compare`. Denoise:
`predict_denoiser`, `denoise`. Train your own: `Recipe`, `meta_train`, `evaluate`. Look inside: `describe_target`,
`plan_hypernet`, `PudNet`. Errors: `PudNetError` and those that follow from it.
"""

import timm_pudnet.convnet3  # noqa: F401  (registers the architecture convnet3 with timm)
from timm_pudnet.config import (
    DamagedFileError,
    HubError,
    InputConfig,
    InputError,
    NotFoundError,
    OutputExistsError,
    PudNetConfig,
    PudNetError,
    PudNetWarning,
    UnsupportedTargetError,
    __version__,
)
from timm_pudnet.denoising import denoise, meta_train_denoiser, predict_denoiser
from timm_pudnet.evaluation import TestGroups, compare, evaluate
from timm_pudnet.hub import HypernetInfo, Pushed, describe_hypernet, list_hypernets, load_hypernet, pull, push
from timm_pudnet.hypernet import Plan, PudNet, plan_hypernet
from timm_pudnet.images import ImageSource, open_images
from timm_pudnet.predict import create_model, predict_model, predict_state_dict, push_model, save_model
from timm_pudnet.target import TargetSpec, describe_target
from timm_pudnet.training import ImageBank, Recipe, finetune, meta_train

__all__ = [
    'DamagedFileError',
    'HubError',
    'HypernetInfo',
    'ImageBank',
    'ImageSource',
    'InputConfig',
    'InputError',
    'NotFoundError',
    'OutputExistsError',
    'Plan',
    'PudNet',
    'PudNetConfig',
    'PudNetError',
    'PudNetWarning',
    'Pushed',
    'Recipe',
    'TargetSpec',
    'TestGroups',
    'UnsupportedTargetError',
    '__version__',
    'compare',
    'create_model',
    'denoise',
    'describe_hypernet',
    'describe_target',
    'evaluate',
    'finetune',
    'list_hypernets',
    'load_hypernet',
    'meta_train',
    'meta_train_denoiser',
    'open_images',
    'plan_hypernet',
    'predict_denoiser',
    'predict_model',
    'predict_state_dict',
    'pull',
    'push',
    'push_model',
    'save_model',
]
