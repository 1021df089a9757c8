"""A first number for one's own images: some are kept aside, and the predicted model is tested on them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from timm_pudnet.adapt import StreamingCentroids, centroid_logits
from timm_pudnet.evaluation.metrics import share_interval
from timm_pudnet.images import ImageSource


def split_held_out(source: ImageSource, share: float, seed: int = 0) -> tuple[ImageSource, ImageSource | None]:
    """Splits a labelled set, class by class, into the images that are used and those that are kept aside.

    A class keeps at least one image in use; a class of two or more gives at least one to the test.

    Returns:
        The two parts; the second is None where nothing is kept aside: no labels, a stream, or a share of 0.
    """
    if source.labels is None or share == 0:
        return source, None
    generator = torch.Generator().manual_seed(seed)
    used, tested = [], []
    for label in source.labels.unique().tolist():
        members = (source.labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(len(members) - 1, max(1, round(share * len(members))))
        tested += members[:count].tolist()
        used += members[count:].tolist()
    if not tested:
        return source, None
    return source.subset(sorted(used)), source.subset(sorted(tested))


@torch.inference_mode()
def held_out_accuracy(model: nn.Module, used: ImageSource, tested: ImageSource) -> Iterator[str]:
    """Lines that give the accuracy on the images kept aside, beside raw pixels and chance, with 95 % intervals."""
    device = next(model.parameters()).device
    num_classes = int(model.num_classes)  # type: ignore[arg-type]
    raw = StreamingCentroids(num_classes)
    for images, labels in used.batches():
        assert labels is not None
        raw.add(images.flatten(1), labels)
    centroids = raw.result()
    total, right, right_raw = 0, 0, 0
    for images, labels in tested.batches():
        assert labels is not None
        total += len(labels)
        right += _count(model(images.to(device)).cpu(), labels)
        right_raw += _count(centroid_logits(images.flatten(1), centroids, 1.0), labels)
    for name, count in (('Accuracy  ', right), ('Raw pixels', right_raw)):
        low, high = share_interval(count, total)
        what = 'on the images kept aside' if name.startswith('Acc') else 'by nearest class mean'
        yield f'{name} {count / total:6.1%} {what} ({count} of {total}; 95 % interval {low:.1%} to {high:.1%})'
    yield f'Chance     {1 / num_classes:6.1%}'


def _count(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())
