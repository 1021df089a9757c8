"""What turns predicted weights into a usable model: norm calibration, and heads: centroids, ridge, blend, logistic.

Images without labels take part by self-training.

Dimension letters: `n` images, `c h w` an image, `d` features, `k` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_pudnet.config import PRIOR_IMAGES, InputError
from timm_pudnet.target import batch_norms

RIDGE_STRENGTH = 0.3
# Of the blend; chosen by groups of CIFAR-10's training images and of 67 classes of Tiny-ImageNet that are left out.
SMOOTHING = 2  # images, in which all channels are alike, that naive Bayes takes for seen of every class
EVEN_IMAGES = 2  # so many images a feature, and naive Bayes and ridge weigh the same
# Of the logistic regression; chosen on CIFAR-10's training images and 27 classes of Tiny-ImageNet (hub/heads.md).
LOGISTIC_PENALTY = 100.0  # of squared weights for features of variance 1, beside the sum of all images' losses
SPREAD_FLOOR = 0.1  # of the mean deviation of all features, added to that of each
LOGISTIC_STEPS = 200  # at most
MANY_LABELS = 40  # of a class, from which on it is the best head
# Of self-training, beginning from the ridge; chosen by groups of CIFAR-10's training images and of the 40 unseen
# classes of Tiny-ImageNet.
SELF_TRAINING_STRENGTH = 1.0
SELF_TRAINING_STEPS = 5
FIRST_GUESS = 0.3  # share that the guess from the labels alone keeps in every later one
SURE = 0.99  # probability of a class whose score is 1 where all others' are 0
MOST_UNLABELLED = 4096  # images that a head is fitted to; of more, a sample


@torch.inference_mode()
def calibrate(
    model: nn.Module,
    images: Tensor,
    prior: Mapping[str, Tensor],
    *,
    prior_images: float = PRIOR_IMAGES,
    deep_share: float = 1.0,
    forward: Callable[[Tensor], Any] | None = None,
) -> Any:
    """Sets the statistics of every BatchNorm to those of these images, in one forward pass in eval mode.

    Each layer's statistics are taken from the input that it gets from the layers before it, calibrated already, and are
    set before it normalises: what comes out is what the calibrated model gives for these images afterwards. They are
    shrunk towards the statistics of training with the weight of `prior_images` images, in mean and in second moment.

    Args:
        model: A model of the target; changed in place.
        images: `[n, c, h, w]`, normalised, all at once.
        prior: `running_mean` and `running_var` of training by state-dict key.
        prior_images: Weight of the prior; 0 for none.
        deep_share: Most that the images count in all norms but the first, in [0, 1].
        forward: What to run the images through, when not the whole model.

    Returns:
        The output for the images.

    Raises:
        InputError: No images.
    """
    if not len(images):
        raise InputError('no images to calibrate on: at least one is needed')
    first_share = len(images) / (len(images) + prior_images)
    norms = list(batch_norms(model))

    def set_statistics(key: str):
        share = first_share if key == norms[0][0] else min(first_share, deep_share)

        def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            mean, variance = _channel_statistics(inputs[0])
            prior_mean = prior[f'{key}.running_mean'].to(mean.device)
            prior_variance = prior[f'{key}.running_var'].to(mean.device)
            blend = torch.lerp(prior_mean, mean, share)
            spread = share * (variance + (mean - blend).square())
            spread += (1 - share) * (prior_variance + (prior_mean - blend).square())
            norm.running_mean.copy_(blend)  # type: ignore[union-attr, operator]
            norm.running_var.copy_(spread)  # type: ignore[union-attr, operator]

        return hook

    model.eval()
    hooks = [norm.register_forward_pre_hook(set_statistics(name)) for name, norm in norms]
    try:
        return (forward or model)(images)
    finally:
        for hook in hooks:
            hook.remove()


def _channel_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of every channel of `[n, c, ...]`, each `[c]`, float32.

    The maps of each image are summed up by themselves, which is many times faster on a CPU than `var_mean` over
    channels; and what is left is in float64, for a difference of squares.
    """
    maps = features.float().reshape(*features.shape[:2], -1)
    means = maps.mean(2)
    # With channels last in memory the norm, which needs no memory for squares, is several times slower.
    squares = torch.linalg.vector_norm(maps, dim=2).square() if maps.is_contiguous() else maps.square().sum(2)
    if maps.device.type == 'mps':  # which has no float64
        means, squares = means.cpu(), squares.cpu()
    mean = means.double().mean(0)
    square = squares.double().mean(0) / maps.shape[2]
    variance = (square - mean.square()).clamp(min=0)
    return mean.float().to(maps.device), variance.float().to(maps.device)


class StreamingCentroids:
    """Adds up features by class; `result` are the class centroids `u_k` of eq. 7.

    Args:
        num_classes: `k`.
        class_names: For the error line.
    """

    def __init__(self, num_classes: int, class_names: Sequence[str] | None = None) -> None:
        self.num_classes = num_classes
        self.class_names = class_names or [str(label) for label in range(num_classes)]
        self.counts = torch.zeros(num_classes, dtype=torch.long)
        self.sums: Tensor | None = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Takes in features `[n, d]` and labels `[n]` in `0..k-1`."""
        features, labels = features.cpu().double(), labels.cpu()
        if self.sums is None:
            self.sums = torch.zeros(self.num_classes, features.shape[1], dtype=torch.float64)
        self.sums.index_add_(0, labels, features)
        self.counts += labels.bincount(minlength=self.num_classes)

    def result(self) -> Tensor:
        """Mean feature `[k, d]` of every class, float32.

        Raises:
            InputError: A class has no image.
        """
        _refuse_empty_classes(self.counts, self.class_names)
        assert self.sums is not None
        return (self.sums / self.counts[:, None]).float()

    def classifier(self, whitening: Tensor) -> tuple[Tensor, Tensor]:
        """Weight `[k, d]` and bias `[k]` of the Linear that classifies by eq. 7, on the CPU; errors as `result`."""
        return centroid_classifier(self.result(), whitening.cpu())


class StreamingRidge:
    """Adds up features into the normal equations of a ridge regression, in memory that does not grow with their number.

    The regression is from centred features to centred one-hot classes, in closed form:
    `min |X W^T - Y|^2 + a |W|^2`, with `a` = `strength` times the mean squared norm of the centred features. So the
    result does not depend on the scale of the features; and the penalty is that of as many images of pure noise as
    suffice with few images (10 labels a class), while with thousands a class it fades against the data.

    Args:
        num_classes: `k`.
        class_names: For the error line.
        strength: Above zero. The ratio of noise to signal that a Bayesian regression would take for granted: at 1 half
            of what separates the classes is in the features, at 0.3 three quarters.
    """

    def __init__(
        self, num_classes: int, class_names: Sequence[str] | None = None, strength: float = RIDGE_STRENGTH
    ) -> None:
        self.centroids = StreamingCentroids(num_classes, class_names)  # class sums and counts
        self.strength = strength
        self.gram: Tensor | None = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Takes in features `[n, d]` and labels `[n]` in `0..k-1`."""
        features = features.cpu().double()
        self.centroids.add(features, labels)
        if self.gram is None:
            self.gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
        self.gram.addmm_(features.t(), features)

    def classifier(self, whitening: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight `[k, d]` and bias `[k]` of a Linear, float32 on the CPU; its outputs are near 0 and 1.

        Args:
            whitening: Symmetric `[d, d]`; the regression is then one of the whitened features, mapped back.

        Raises:
            InputError: A class has no image.
        """
        sums, counts = self.centroids.sums, self.centroids.counts
        _refuse_empty_classes(counts, self.centroids.class_names)
        assert sums is not None
        assert self.gram is not None
        total = int(counts.sum())
        shares, mean = counts / total, sums.sum(0) / total
        gram, cross = self.gram - total * mean.outer(mean), sums - counts[:, None] * mean
        level = mean
        if whitening is not None:
            whitening = whitening.cpu().double()
            gram, cross, level = whitening @ gram @ whitening, cross @ whitening, mean @ whitening
        penalty = _ridge_penalty(self.strength, gram.diagonal().sum() / total, level)
        weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=torch.float64), cross.t()).t()
        if whitening is not None:
            weight = weight @ whitening
        return weight.float(), (shares - weight @ mean).float()


class StreamingBlend(StreamingRidge):
    """As `StreamingRidge`, for a head that is good with few labels and with many: the scores of two, added.

    One is multinomial naive Bayes, with few labels often better than eq. 7: an image's features `f` are taken for
    counts, and class `k` scores `sum_j f_j log p_kj`, `p_k` its mean feature as shares (McCallum and Nigam 1998; like
    counts, the activations behind a ReLU vary the more the larger they are). All classes are smoothed as the smallest
    one needs it, so that none is preferred; and the scores are scaled to fit one-hot classes best. Where a feature is
    below zero, or read in a whitened space, the rows of eq. 7's classifier take their place. The other is the ridge
    regression, which needs many labels: it weighs `n / 2d` times as much, of `n` images in all.
    """

    lowest = math.inf  # of all features

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Takes in features `[n, d]` and labels `[n]` in `0..k-1`."""
        super().add(features, labels)
        if len(features):
            self.lowest = min(self.lowest, float(features.min()))

    def classifier(self, whitening: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight `[k, d]` and bias `[k]` of a Linear, float32 on the CPU; its outputs differ by about 1 at most.

        Args:
            whitening: As of `StreamingRidge`.

        Raises:
            InputError: A class has no image.
        """
        return self.blended(super().classifier(whitening), whitening)

    def blended(self, ridge: tuple[Tensor, Tensor], whitening: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same, for a caller that has the ridge regression's weight and bias already.

        Example:
            >>> stream = StreamingBlend(2)
            >>> stream.add(torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))
            >>> weight, bias = stream.classifier()
            >>> (torch.tensor([[3.0, 1.0], [1.0, 3.0]]) @ weight.t() + bias).argmax(1)
            tensor([0, 1])
        """
        weight, bias = ridge
        sums, counts = self.centroids.sums, self.centroids.counts
        assert sums is not None
        assert self.gram is not None
        means = sums / counts[:, None]
        identity = torch.eye(len(self.gram), dtype=torch.float64)
        whitening = identity if whitening is None else whitening.cpu().double()
        if self.lowest >= 0 and torch.equal(whitening, identity):
            seen = counts.min() * means + SMOOTHING * means.mean().clamp(min=1e-300)
            rows = (seen / seen.sum(1, keepdim=True)).log()
        else:
            rows = centroid_classifier(means, whitening)[0]
        rows = rows - rows.mean(0)  # what all classes have in common tells nothing
        total = int(counts.sum())
        mean = sums.sum(0) / total
        fit = (rows * (sums - counts[:, None] * mean)).sum()
        scatter = (rows @ (self.gram - total * mean.outer(mean)) * rows).sum()
        least = 1e-9 * total * mean.square().sum() * rows.square().sum()  # less is rounding, of features all alike
        scale = (fit / torch.maximum(scatter, least).clamp(min=1e-300)).clamp(min=0)
        share = total / (total + EVEN_IMAGES * weight.shape[1])
        return ((1 - share) * scale * rows + share * weight).float(), share * bias


class StreamingLogistic:
    """A multinomial logistic regression of the features: the best head with many labels.

    `min sum_i -log p(y_i | f_i) + c |W|^2`, of features divided by their deviation: convex, with one solution. It has
    no closed form and is found by L-BFGS, which takes longer. Unlike a ridge regression it does not mind images that
    are far on the right side, and so goes on gaining with labels where that one has stopped. It keeps the features,
    `4 d` bytes an image, and needs `16 d` in the end.

    Args:
        num_classes: `k`.
        class_names: For the error line.
    """

    def __init__(self, num_classes: int, class_names: Sequence[str] | None = None) -> None:
        self.centroids = StreamingCentroids(num_classes, class_names)  # class counts
        self.rows: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Takes in features `[n, d]` and labels `[n]` in `0..k-1`."""
        self.centroids.add(features, labels)
        self.rows.append(features.cpu().float())
        self.labels.append(labels.cpu())

    def classifier(self, whitening: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight `[k, d]` and bias `[k]` of a Linear, float32 on the CPU; the softmax of its outputs are probabilities.

        Args:
            whitening: Symmetric `[d, d]`; the regression is then one of the whitened features, mapped back.

        Raises:
            InputError: A class has no image.

        Example:
            >>> stream = StreamingLogistic(2)
            >>> stream.add(torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))
            >>> weight, bias = stream.classifier()
            >>> (torch.tensor([[3.0, 1.0], [1.0, 3.0]]) @ weight.t() + bias).softmax(1)[:, 0] > 2 / 3
            tensor([ True, False])
        """
        _refuse_empty_classes(self.centroids.counts, self.centroids.class_names)
        rows, labels = torch.cat(self.rows).double(), torch.cat(self.labels)
        rows = rows if whitening is None else rows @ whitening.cpu().double()
        mean, deviation = rows.mean(0), rows.std(0, correction=0)
        deviation = (deviation + SPREAD_FLOOR * deviation.mean()).clamp(min=1e-12)
        weight, bias = _logistic(rows.sub_(mean).div_(deviation), labels, self.centroids.num_classes)
        weight = weight / deviation
        bias = bias - weight @ mean
        return (weight if whitening is None else weight @ whitening.cpu().double()).float(), bias.float()


def _logistic(rows: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weight `[k, d]` and bias `[k]` of the regression of rows `[n, d]`; gradients by hand, for want of autograd."""
    count = len(rows)
    wanted = F.one_hot(labels, num_classes).to(rows)
    weight, bias = rows.new_zeros(num_classes, rows.shape[1]), (wanted.mean(0)).log()
    search = torch.optim.LBFGS(
        [weight, bias],
        max_iter=LOGISTIC_STEPS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn='strong_wolfe',
    )

    def loss() -> Tensor:
        logits = F.log_softmax(rows @ weight.t() + bias, 1)
        away = (logits.exp() - wanted) / count
        weight.grad, bias.grad = away.t() @ rows + 2 * LOGISTIC_PENALTY / count * weight, away.sum(0)
        return LOGISTIC_PENALTY / count * weight.square().sum() - (logits * wanted).sum() / count

    search.step(loss)  # type: ignore[arg-type]
    return weight, bias


def ridge_classifier(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    whitening: Tensor | None = None,
    strength: float = RIDGE_STRENGTH,
) -> tuple[Tensor, Tensor]:
    """What `StreamingRidge` gives, of features `[n, d]` and labels `[n]` at once; fast where `n` is below `d`.

    Raises:
        InputError: A class has no image.

    Example:
        >>> weight, bias = ridge_classifier(torch.tensor([[2.0], [1.0], [-3.0]]), torch.tensor([0, 0, 1]), 2)
        >>> weight.t(), bias
        (tensor([[ 0.1948, -0.1948]]), tensor([0.6667, 0.3333]))
    """
    count, width = features.shape
    if count >= width:
        stream = StreamingRidge(num_classes, strength=strength)
        stream.add(features, labels)
        return stream.classifier(whitening)
    features, labels = features.cpu().double(), labels.cpu()
    counts = labels.bincount(minlength=num_classes)
    _refuse_empty_classes(counts, [str(label) for label in range(num_classes)])
    whitened = features if whitening is None else features @ whitening.cpu().double()
    rows = whitened - whitened.mean(0)
    targets = F.one_hot(labels, num_classes).double() - counts / count
    gram = rows @ rows.t()  # [n, n]: the same solution by the push-through identity
    penalty = _ridge_penalty(strength, gram.diagonal().mean(), whitened.mean(0))
    weight = (rows.t() @ torch.linalg.solve(gram + penalty * torch.eye(count, dtype=torch.float64), targets)).t()
    if whitening is not None:
        weight = weight @ whitening.cpu().double()
    return weight.float(), (counts / count - weight @ features.mean(0)).float()


def self_training_classifier(
    labelled: StreamingRidge, unlabelled: Tensor, whitening: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A ridge head from labelled images and from others without labels, by self-training with soft labels.

    The head of the labelled images gives every other image a probability of each class; with these as labels a ridge
    is fitted on all images, and gives new ones; five times over (Yarowsky 1995; soft labels as in the EM of
    Nigam et al. 2000). The classes are taken for equally frequent among the images that will be classified, whatever
    their shares here.

    Args:
        labelled: Has taken in the labelled images' features; its own head, ridge or blend, is the first guess.
        unlabelled: Features `[n, d]` of the others, at least one.
        whitening: Symmetric `[d, d]`; the regression is then one of the whitened features, mapped back.

    Returns:
        Weight `[k, d]` and bias `[k]` of a Linear, float32 on the CPU; its outputs differ by about 1 between classes.

    Raises:
        InputError: A class has no labelled image, or there is one class only.

    Example:
        >>> ridge = StreamingRidge(2)
        >>> ridge.add(torch.tensor([[4.0], [-1.0]]), torch.tensor([0, 1]))
        >>> weight, bias = self_training_classifier(ridge, torch.tensor([[1.0], [2.0], [3.0], [-0.9], [-1.1]]))
        >>> image = torch.tensor([[1.2]])  # by the two labels alone it is nearer to class 1
        >>> (image @ weight.t() + bias).argmax(1)
        tensor([0])
    """
    centroids = labelled.centroids
    if centroids.num_classes < 2:
        raise InputError('one class only: a classifier needs two')
    weight, bias = labelled.classifier(whitening)
    sharpness = math.log(SURE / (1 - SURE) * (centroids.num_classes - 1))
    first = guess = (sharpness * (unlabelled.cpu().float() @ weight.t() + bias)).softmax(1).double()
    rows, sums, counts, gram = unlabelled.cpu().double(), centroids.sums, centroids.counts, labelled.gram
    assert sums is not None
    assert gram is not None
    if whitening is not None:
        whitening = whitening.cpu().double()
        rows, sums, gram = rows @ whitening, sums @ whitening, whitening @ gram @ whitening
    total = int(counts.sum()) + len(rows)
    mean = (sums.sum(0) + rows.sum(0)) / total
    gram = gram + rows.t() @ rows - total * mean.outer(mean)
    penalty = _ridge_penalty(SELF_TRAINING_STRENGTH, gram.diagonal().sum() / total, mean)
    factors = torch.linalg.lu_factor(gram + penalty * torch.eye(len(gram), dtype=torch.float64))
    for step in range(SELF_TRAINING_STEPS + 1):
        members = (counts + guess.sum(0))[:, None]
        class_sums = sums + guess.t() @ rows
        solution = torch.linalg.lu_solve(*factors, (class_sums - members * mean).t()).t()
        offset = -(solution @ (class_sums / members).mean(0))  # zero at the mean of the class means
        if step < SELF_TRAINING_STEPS:
            guess = torch.lerp((sharpness * (rows @ solution.t() + offset)).softmax(1), first, FIRST_GUESS)
    if whitening is not None:
        solution = solution @ whitening
    return solution.float(), offset.float()


def _ridge_penalty(strength: float, spread: Tensor, mean: Tensor) -> Tensor:
    """`strength` times the mean squared norm of the centred features, above zero where all features are alike too."""
    return strength * torch.maximum(spread, 1e-12 * mean.square().sum()).clamp(min=1e-300)


# By the name that `predict_model` takes.
HEADS = {
    'centroid': StreamingCentroids,
    'ridge': StreamingRidge,
    'blend': StreamingBlend,
    'logistic': StreamingLogistic,
}


def _refuse_empty_classes(counts: Tensor, class_names: Sequence[str]) -> None:
    empty = [name for name, count in zip(class_names, counts.tolist(), strict=True) if not count]
    if empty:
        raise InputError(f'no image of class {", ".join(empty[:5])}: every class needs at least one that can be read')


def class_centroids(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean feature `[k, d]` of every class, of features `[n, d]` and labels `[n]`; differentiable (eq. 7's `u_k`).

    Example:
        >>> class_centroids(torch.tensor([[0.0, 2.0], [2.0, 2.0], [5.0, 5.0]]), torch.tensor([0, 0, 1]), 2)
        tensor([[1., 2.],
                [5., 5.]])
    """
    members = F.one_hot(labels, num_classes).to(features)
    return (members.t() @ features) / members.sum(0).clamp(min=1)[:, None]


def centroid_logits(
    features: Tensor, centroids: Tensor, temperature: Tensor | float, whitening: Tensor | None = None
) -> Tensor:
    """Parameter-free classification (eq. 7): `tau * cos(f, u_k)`, `[n, k]`; of `W f` and `W u_k` with a whitening."""
    if whitening is not None:
        features, centroids = features @ whitening, centroids @ whitening
    return temperature * F.normalize(features, dim=-1) @ F.normalize(centroids, dim=-1).t()


def centroid_classifier(centroids: Tensor, whitening: Tensor) -> tuple[Tensor, Tensor]:
    """Weight `[k, d]` and bias `[k]` of a Linear whose top-1 is that of eq. 7.

    The rows are the normalised centroids; with a whitening `W` they are normalised after it and mapped back by it,
    since `cos(W f, W u)` ranks classes as `f . W (W u / |W u|)` does.
    """
    rows = F.normalize(centroids @ whitening, dim=-1) @ whitening
    return rows, torch.zeros(len(rows), dtype=rows.dtype, device=rows.device)


class Whitening:
    """Learns the linear map in which the features of a class spread alike in all directions.

    A network that was trained on few classes spreads the images of any class along directions that tell nothing about
    others; eq. 7 gives these the same say as the rest. The inverse root of the covariance within classes, over seen
    classes, takes it from them (linear discriminant analysis). It is learned once, after training, and is the same for
    every data set.

    Args:
        num_features: `d`.
        shrinkage: Share of the mean variance that is added to every direction.
    """

    def __init__(self, num_features: int, shrinkage: float = 0.1) -> None:
        self.shrinkage, self.count = shrinkage, 0
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Takes in features `[n, d]` of classes `[n]`, of one group."""
        features, labels = features.detach().cpu().double(), labels.cpu()
        classes, labels = labels.unique(return_inverse=True)
        spread = features - class_centroids(features, labels, len(classes))[labels]
        self.scatter += spread.t() @ spread
        self.count += len(features) - len(classes)

    def result(self) -> Tensor:
        """The symmetric matrix `W` `[d, d]`, float32, of mean eigenvalue 1; the identity where nothing was taken in."""
        size = len(self.scatter)
        if not self.count or not self.scatter.any():
            return torch.eye(size)
        values, vectors = torch.linalg.eigh(self.scatter / self.count)
        scales = (values.clamp(min=0) + self.shrinkage * values.mean()).rsqrt()
        return ((vectors * (scales / scales.mean())) @ vectors.t()).float()
