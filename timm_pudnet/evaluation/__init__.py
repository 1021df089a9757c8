"""Measuring a hypernetwork: groups of unseen classes, controls, training from scratch, intervals, own images."""

from timm_pudnet.evaluation.compare import compare, format_comparison, plot_comparison
from timm_pudnet.evaluation.holdout import held_out_accuracy, split_held_out
from timm_pudnet.evaluation.measure import evaluate, format_table, weights_digest
from timm_pudnet.evaluation.metrics import mean_interval, share_interval
from timm_pudnet.evaluation.protocols import TestGroups
from timm_pudnet.evaluation.scratch import compare_scratch, train_from_scratch

__all__ = [
    'TestGroups',
    'compare',
    'compare_scratch',
    'evaluate',
    'format_comparison',
    'format_table',
    'held_out_accuracy',
    'mean_interval',
    'plot_comparison',
    'share_interval',
    'split_held_out',
    'train_from_scratch',
    'weights_digest',
]
