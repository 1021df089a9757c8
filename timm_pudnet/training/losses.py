"""The losses of meta-training: the paper's three (III-E, eq. 8-11), the sketch's own, and distillation.

Dimension letters: `n` images, `d` features, `k` classes of the group, `a` all training classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_pudnet.adapt import centroid_logits, class_centroids
from timm_pudnet.target import batch_norms


def group_losses(
    support: Tensor,
    query: Tensor,
    support_classes: Tensor,
    query_classes: Tensor,
    full_logits: Tensor,
    temperature: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """The losses of one group: L1, L2, L3 of eq. 8-10, by the names of their weights; eq. 11 is the sum.

    Args:
        support: Features `[n_s, d]` that give the centroids.
        query: Features `[n_q, d]` that are classified by them.
        support_classes: Training class `[n_s]` of each support image, in `0..a-1`.
        query_classes: Training class `[n_q]` of each query image; one of the support's.
        full_logits: The full head's logits `[n_s + n_q, a]` of support and query, in that order.
        temperature: `tau`.
        label_smoothing: Of the full head's cross-entropy.

    Returns:
        `metric`: cross-entropy of eq. 7 over the query. `full`: that of the full head over all images. `consistency`:
        `KL(q || p)` over the query, `q` the full head's distribution, `p` the softmax of eq. 7's logits, padded with
        zeros to all training classes.
    """
    classes, support_labels = support_classes.unique(return_inverse=True)
    query_labels = torch.searchsorted(classes, query_classes.contiguous())
    centroids = class_centroids(support, support_labels, len(classes))
    logits = centroid_logits(query, centroids, temperature)
    padded = logits.new_zeros(len(query), full_logits.shape[1]).index_copy(1, classes, logits)
    everyone = torch.cat([support_classes, query_classes])
    return {
        'metric': F.cross_entropy(logits, query_labels),
        'full': F.cross_entropy(full_logits, everyone, label_smoothing=label_smoothing),
        'consistency': F.kl_div(
            padded.log_softmax(1), full_logits[len(support) :].log_softmax(1), log_target=True, reduction='batchmean'
        ),
    }


class NormOutputs:
    """Gathers what the BatchNorm layers of a model give: the mean over the places of every channel's positive part.

    Such means `[n, d]` do not tell how an image is turned, as long as the kernels are turned with it.

    Args:
        model: Whose layers; hooks stay on them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.means: list[Tensor] = []
        for _, norm in batch_norms(model):
            norm.register_forward_hook(lambda _norm, _inputs, output: self.means.append(_positive_mean(output)))

    def take(self) -> list[Tensor]:
        """Those of the forward passes since the last call, in the order of the network."""
        taken = self.means.copy()
        self.means.clear()
        return taken


def _positive_mean(output: Tensor) -> Tensor:
    return output.relu().flatten(2).mean(2, dtype=torch.float32) if output.ndim > 2 else output.relu().float()


def distillation_loss(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """How far the features `[n, d]`, and what layers before them give, are from what is wanted.

    Each distance is squared, over the mean squared norm of what is wanted; that of the features, the first, counts as
    much as the mean of all others.

    Example:
        >>> distillation_loss([torch.tensor([[1.0, 0.0]])], [torch.tensor([[2.0, 0.0]])])
        tensor(0.2500)
    """
    errors = [
        (one - goal).square().sum(1).mean() / goal.square().sum(1).mean().clamp(min=1e-12)
        for one, goal in zip(found, wanted, strict=True)
    ]
    return errors[0] + torch.stack(errors[1:]).mean() if len(errors) > 1 else errors[0]


def sketch_loss(halves: Tensor, temperature: float = 0.1) -> Tensor:
    """Whether the sketches of the two halves of a group agree and differ from those of other groups.

    A sketch encoder that learns only through the weights that it steers learns too slowly to matter; this gives it a
    signal of its own, without labels. Cross-entropy of finding a half's other half among all other halves by cosine,
    over a temperature (InfoNCE).

    Args:
        halves: Sketches `[g, 2, m]`, `g` at least 2.
        temperature: Of the softmax.

    Example:
        >>> round(float(sketch_loss(torch.eye(2).repeat_interleave(2, 0).view(2, 2, 2))), 3)
        0.0
    """
    flat = F.normalize(halves.transpose(0, 1).flatten(0, 1), dim=-1)
    logits = flat @ flat.t() / temperature
    logits = logits.masked_fill(torch.eye(len(flat), dtype=torch.bool, device=flat.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(flat), device=flat.device).roll(len(halves)))
