"""Measuring: groups of unseen classes, controls, scratch, own images, what to expect, a report of a prediction."""

from timm_pudnet.evaluation.compare import compare, format_comparison, plot_comparison
from timm_pudnet.evaluation.expectation import Expectation, fit_expectation, read_traits
from timm_pudnet.evaluation.holdout import HeldOutTest, measure_held_out, split_held_out
from timm_pudnet.evaluation.measure import evaluate, format_table, weights_digest
from timm_pudnet.evaluation.metrics import mean_interval, rank_correlation, share_interval
from timm_pudnet.evaluation.protocols import TestGroups
from timm_pudnet.evaluation.report import Report, make_report
from timm_pudnet.evaluation.scratch import compare_scratch, train_from_scratch

__all__ = [
    'Expectation',
    'HeldOutTest',
    'Report',
    'TestGroups',
    'compare',
    'compare_scratch',
    'evaluate',
    'fit_expectation',
    'format_comparison',
    'format_table',
    'make_report',
    'mean_interval',
    'measure_held_out',
    'plot_comparison',
    'rank_correlation',
    'read_traits',
    'share_interval',
    'split_held_out',
    'train_from_scratch',
    'weights_digest',
]
