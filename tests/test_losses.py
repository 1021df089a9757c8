import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from timm_pudnet.training.losses import NormOutputs, distillation_loss, group_losses, sketch_loss

SUPPORT_CLASSES = torch.tensor([7, 7, 2, 2, 5, 5])  # of 9 training classes, in no order
QUERY_CLASSES = torch.tensor([2, 5, 7, 7])


def make(width=6, num_classes=9):
    support, query = 2 * torch.randn(6, width), 2 * torch.randn(4, width)
    return support, query, torch.randn(10, num_classes), torch.tensor(4.0)


def softmax(values):
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def plain_losses(support, query, full_logits, temperature, smoothing=0.0):
    """Eq. 8-11, rewritten with Python's floats."""
    support, query, full = support.double().tolist(), query.double().tolist(), full_logits.double().tolist()
    centroids = {}
    for label in (2, 5, 7):
        rows = [row for row, y in zip(support, SUPPORT_CLASSES.tolist(), strict=True) if y == label]
        centroids[label] = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    metric = consistency = 0.0
    for place, (feature, label) in enumerate(zip(query, QUERY_CLASSES.tolist(), strict=True)):
        logits = {k: temperature * cosine(feature, u) for k, u in centroids.items()}
        metric -= math.log(softmax(list(logits.values()))[list(logits).index(label)])
        p = softmax([logits.get(k, 0.0) for k in range(9)])
        q = softmax(full[len(support) + place])
        consistency += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    cross = 0.0
    for row, label in zip(full, [*SUPPORT_CLASSES.tolist(), *QUERY_CLASSES.tolist()], strict=True):
        wanted = [smoothing / 9 + (1 - smoothing) * (k == label) for k in range(9)]
        cross -= sum(w * math.log(s) for w, s in zip(wanted, softmax(row), strict=True))
    return metric / len(query), cross / len(full), consistency / len(query)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_losses_are_those_of_a_plain_rewrite(smoothing):
    support, query, full_logits, temperature = make()
    found = group_losses(
        support, query, SUPPORT_CLASSES, QUERY_CLASSES, full_logits, temperature, label_smoothing=smoothing
    )
    metric, full, consistency = plain_losses(support, query, full_logits, 4.0, smoothing)
    assert_close(float(found['metric']), metric, rtol=1e-4, atol=1e-5)
    assert_close(float(found['full']), full, rtol=1e-4, atol=1e-5)
    assert_close(float(found['consistency']), consistency, rtol=1e-4, atol=1e-5)


def test_logits_are_padded_with_zeros_to_all_classes():
    support, query, _, temperature = make()
    centroids = torch.stack([support[SUPPORT_CLASSES.eq(label)].mean(0) for label in (2, 5, 7)])
    logits = torch.zeros(4, 9)
    logits[:, [2, 5, 7]] = temperature * torch.cosine_similarity(query[:, None], centroids[None], dim=-1)
    full_logits = torch.cat([torch.randn(6, 9), logits])
    found = group_losses(support, query, SUPPORT_CLASSES, QUERY_CLASSES, full_logits, temperature)
    assert_close(found['consistency'], torch.tensor(0.0), rtol=0, atol=1e-5)
    full_logits[6:, 0] += 1.0  # a class outside the group counts
    found = group_losses(support, query, SUPPORT_CLASSES, QUERY_CLASSES, full_logits, temperature)
    assert found['consistency'] > 1e-3


@pytest.mark.parametrize('term', ['metric', 'full', 'consistency'])
def test_gradients_reach_what_each_loss_teaches(term):
    support, query, _, temperature = make()
    head = nn.Linear(6, 9)
    tensors = {'support': support, 'query': query, 'temperature': temperature}
    for tensor in tensors.values():
        tensor.requires_grad_()
    full_logits = head(torch.cat([support, query]))
    losses = group_losses(support, query, SUPPORT_CLASSES, QUERY_CLASSES, full_logits, temperature)
    losses[term].backward()
    reached = {name for name, tensor in tensors.items() if tensor.grad is not None and tensor.grad.abs().sum() > 0}
    reached |= {'head'} if head.weight.grad is not None and head.weight.grad.abs().sum() > 0 else set()
    everything = {'support', 'query', 'temperature', 'head'}
    assert reached == {'metric': everything - {'head'}, 'full': everything - {'temperature'}}.get(term, everything)


def plain_sketch_loss(halves, temperature):
    """InfoNCE, rewritten with Python's floats: every half looks for its other half among all others."""
    rows = [(group, half, row) for group, pair in enumerate(halves.double().tolist()) for half, row in enumerate(pair)]
    total = 0.0
    for group, half, row in rows:
        others = [(g, cosine(row, other) / temperature) for g, h, other in rows if (g, h) != (group, half)]
        chances = softmax([value for _, value in others])
        total -= math.log(next(chance for chance, (g, _) in zip(chances, others, strict=True) if g == group))
    return total / len(rows)


@pytest.mark.parametrize('temperature', [0.1, 0.7])
@pytest.mark.parametrize('groups', [2, 5])
def test_the_sketch_loss_is_that_of_a_plain_rewrite(groups, temperature):
    halves = 3 * torch.randn(groups, 2, 7)
    halves[:, 1] += halves[:, 0]
    found = sketch_loss(halves, temperature)
    assert_close(float(found), plain_sketch_loss(halves, temperature), rtol=1e-4, atol=1e-5)


def test_the_sketch_loss_is_low_where_halves_agree_and_that_of_chance_where_all_sketches_are_one():
    groups = torch.eye(6)
    agreeing = torch.stack([groups, groups + 0.1 * torch.randn(6, 6)], 1)
    crossed = torch.stack([groups, groups.roll(1, 0)], 1)
    constant = torch.ones(6, 2, 6)
    assert sketch_loss(agreeing) < 0.05
    assert sketch_loss(crossed) > 5
    assert_close(float(sketch_loss(constant)), math.log(11))


def test_the_sketch_loss_teaches_every_half_and_not_its_length():
    halves = torch.randn(4, 2, 6, requires_grad=True)
    sketch_loss(halves).backward()
    assert halves.grad.abs().sum(-1).min() > 1e-4
    assert_close((halves.grad * halves).sum(-1), torch.zeros(4, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize('layers', [0, 1, 3])
def test_the_distillation_loss_is_that_of_a_plain_rewrite(layers):
    found, wanted = ([torch.randn(4, 5 + place) for place in range(layers + 1)] for _ in range(2))
    errors = []
    for one, goal in zip(found, wanted, strict=True):
        away = sum((a - b) ** 2 for a, b in zip(one.flatten().tolist(), goal.flatten().tolist(), strict=True))
        errors.append(away / sum(b**2 for b in goal.flatten().tolist()))
    expected = errors[0] + (sum(errors[1:]) / layers if layers else 0.0)
    assert_close(float(distillation_loss(found, wanted)), expected, rtol=1e-4, atol=1e-5)


def test_norm_outputs_are_the_means_of_positive_parts_in_order_and_turn_with_the_kernels():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    ).eval()
    with torch.no_grad():
        model[1].bias.copy_(torch.randn(4))
    outputs, images = NormOutputs(model), torch.randn(6, 3, 8, 8)
    model(images)
    first, second = outputs.take()
    hidden = model[:2](images)
    assert_close(first, hidden.clamp(min=0).mean((2, 3)))
    assert_close(second, model(images).clamp(min=0).mean((2, 3)))
    assert len(outputs.take()) == 3  # of the two passes above
    assert outputs.take() == []
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.rot90(1, (2, 3)).clone())
    model(images.rot90(1, (2, 3)))
    assert_close(outputs.take(), [first, second], rtol=1e-4, atol=1e-5)


def test_a_network_without_batchnorm_has_norm_outputs_of_none():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    outputs = NormOutputs(model)
    model(torch.randn(2, 3, 8, 8))
    assert outputs.take() == []
