"""The first layers of a target as they undo what a condition did to the channels of an image.

In training the condition is known, and with it the kernel that is right for it: so the hypernetwork is told, and need
not find out through all layers behind it, by which it hardly learns this. What it has to learn is to read the condition
off the sketch.

Dimension letters: `b` sketches, `n` images of one, `m` width of the sketch, `o i h w` a kernel tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_pudnet.config import InputError
from timm_pudnet.hypernet import PudNet
from timm_pudnet.target import batch_norms
from timm_pudnet.training.conditions import Condition

BATCH = 64  # sketches a step of `learn`
MOST_STEPS = 4000
RATE = 1e-2  # AdamW's largest
LEAST_SHARE = 0.3  # of a group's images that a sketch is of


class ChannelUndoing:
    """What kernel and norm bias give, of images under a condition, what `weights` give of them without it.

    Under a condition that takes channel `i` from channel `j` the kernel is `W'[:, i] = +-std_i / std_j W[:, j]`, minus
    where it inverts, and what that leaves over is the same everywhere: the norm's bias takes it. So order and
    inversion are undone exactly where the norm works by the statistics in `weights`, but at the edge, where an image is
    padded with zeros. Gamma, noise and turns stay.

    Args:
        hypernet: What is to predict such weights.
        model: Its target.
        weights: The target's state dict for images without a condition.

    Raises:
        InputError: The first predicted kernel does not see the channels of an image, or no BatchNorm follows it.
    """

    def __init__(self, hypernet: PudNet, model: nn.Module, weights: dict[str, Tensor]) -> None:
        keys = [layer.key for layer in hypernet.target.layers]
        self.hypernet, self.kernel = hypernet, weights[keys[0]]
        name, norm = next(iter(batch_norms(model)), ('', None))
        if (
            self.kernel.ndim != 4
            or self.kernel.shape[1] != hypernet.target.in_chans
            or norm is None
            or norm.num_features != len(self.kernel)
        ):
            raise InputError(
                'losses: undoing needs a target whose first conv sees the channels of an image, and a BatchNorm behind '
                f'it, unlike {hypernet.config.model_name}'
            )
        if f'{name}.bias' not in keys:
            raise InputError('losses: undoing needs predict_norm = true in [hypernet]')
        self.places = (0, keys.index(f'{name}.bias'))
        self.bias, self.gain = (weights[f'{name}.{one}'] for one in ('bias', 'weight'))
        self.slope = self.gain / (weights[f'{name}.running_var'] + norm.eps).sqrt()
        self.mean, self.std = (torch.tensor(one) for one in (hypernet.config.input.mean, hypernet.config.input.std))
        self._made: dict[tuple[tuple[int, ...], bool] | None, tuple[Tensor, Tensor]] = {None: (self.kernel, self.bias)}

    def wanted(self, condition: Condition | None) -> tuple[Tensor, Tensor]:
        """The kernel `[o, i, h, w]` and the norm's bias `[o]` that are right under a condition."""
        known = None if condition is None else (condition.order, condition.inverted)
        if condition is None or known in self._made:
            return self._made[known]
        order = list(condition.order)
        sign = -1.0 if condition.inverted else 1.0
        # A normalised pixel x of channel i was sign * std_i / std_j * x + left over, in channel j = order[i].
        scale = sign * self.std / self.std[order]
        over = (float(condition.inverted) + sign * self.mean - self.mean[order]) / self.std[order]
        moved, device = self.kernel[:, order], self.kernel.device
        bias = self.bias + self.slope * (moved.sum((2, 3)) @ over.to(device))
        self._made[known] = moved * scale.to(device)[:, None, None], bias
        return self._made[known]

    def loss(self, sketches: Tensor, wanted: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """How far what is predicted for sketches `[b, m]` is from what is wanted for each.

        Both distances are squared; the kernel's over the squared norm of `weights`' kernel, the bias's over that of the
        norm's gain.
        """
        codes = self.hypernet.codes(sketches, self.places[1] + 1)
        errors = []
        for place, goals, size in zip(self.places, zip(*wanted, strict=True), (self.kernel, self.gain), strict=True):
            found = torch.vmap(self.hypernet.generators[place])(codes[:, place])
            errors.append((found - torch.stack(goals)).square().flatten(1).sum(1).mean() / size.square().sum())
        return torch.stack(errors).sum()

    def learn(
        self,
        images: Sequence[Tensor],
        conditions: Sequence[Condition | None],
        generator: torch.Generator,
        progress: bool = False,
    ) -> list[nn.Parameter]:
        """Teaches the hypernetwork, but not its encoder, to read conditions off sketches.

        That takes thousands of steps, each of which costs as little as a few of its smallest layers do. The AHRU learns
        too, and with it the codes of all layers change: what a sketch changed behind the first ones has to learn again.
        In every step a sketch is of another random part of its group's images: else the groups are learned by heart.

        Args:
            images: What the encoder gives for the images of each group, `[n, m]`; a sketch is the mean of such rows.
            conditions: That the groups are seen under.
            generator: Of what is drawn, on the CPU.
            progress: Show a progress bar.

        Returns:
            The parameters that have learned.
        """
        kernel, bias = (self.hypernet.generators[place] for place in self.places)
        # Of a residual generator's steering only what mixes channels: the rest of it is in the way.
        rows: slice | None = getattr(kernel, 'channel_rows', None)
        trained = [
            value for name, value in kernel.named_parameters() if name == 'steer' or (not rows and name != 'base')
        ]
        mixing = torch.ones_like(trained[0])
        if rows:
            mixing.zero_()[rows] = 1
        trained += [value for name, value in bias.named_parameters() if name != 'base']
        trained += [] if self.hypernet.ahru is None else list(self.hypernet.ahru.parameters())
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        steps = min(MOST_STEPS, 20 * len(images))
        wanted = [self.wanted(condition) for condition in conditions]
        seen = nn.utils.rnn.pad_sequence([*images], batch_first=True)
        counts, places = torch.tensor([[len(one)] for one in images]), torch.arange(seen.shape[1])
        for step in tqdm(range(steps), 'undoing', disable=not progress, delay=2, leave=False):
            for group in optimizer.param_groups:
                group['lr'] = RATE * min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
            picks = torch.randint(len(images), (BATCH,), generator=generator)
            shares = torch.rand(BATCH, 1, generator=generator).mul_(1 - LEAST_SHARE).add_(LEAST_SHARE)
            there = places < counts[picks]
            taken = there & (torch.rand(there.shape, generator=generator) < shares)
            taken = torch.where(taken.any(1, keepdim=True), taken, there)
            weights = (taken / taken.sum(1, keepdim=True)).to(seen.device)
            sketches = torch.einsum('bn,bnm->bm', weights, seen[picks])
            loss = self.loss(sketches, [wanted[pick] for pick in picks.tolist()])
            gradients = torch.autograd.grad(loss, trained)
            gradients[0].mul_(mixing)
            for value, gradient in zip(trained, gradients, strict=True):
                value.grad = gradient
            nn.utils.clip_grad_norm_(trained, 5.0)
            optimizer.step()
        for value in trained:
            value.grad = None
        return trained
