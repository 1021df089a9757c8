"""Trains the target of a recipe, without any hypernetwork, to judge images as another network does, of any architecture.

    torchrun --nproc-per-node 2 hub/distil.py RECIPE TEACHER STEPS OUT

TEACHER is a folder of a network in timm format, without a classifier for instance. Its judgement of an image is the softmax of the cosines
between its features and the means of a few images of every seen class (eq. 7), turned by quarter turns too where the recipe has `turns`;
the target learns that by cross-entropy (Hinton et al. 2015). Both see the same changed images, half of them mixed in pairs (Beyer et al.
2022), each at its own size; every fifth time the target sees them under gamma and noise that the teacher does not see. Only the first STEPS
steps ask the teacher; then the same images, so changed, come again.

OUT/plain is what comes of it, in timm's format, for `hub/average.py --model`; the run, which goes on where it was stopped, is in
OUT/run-plain.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from timm_pudnet import save_model
from timm_pudnet.adapt import centroid_logits
from timm_pudnet.hypernet import pretrained_model, save_tensors
from timm_pudnet.target import channels_last, with_own_config
from timm_pudnet.training import Recipe, load_banks, whitening_path
from timm_pudnet.training.conditions import Condition
from timm_pudnet.training.episodes import GroupSampler
from timm_pudnet.training.meta_train import _PlainRun, classes_seen, group_sampler, seen_by
from timm_pudnet.training.run import bfloat16_slowdown, go

CENTROID_IMAGES = 16  # of a class, at most
SHARPNESS = 24.0  # of the teacher's judgement, what cosines are multiplied by: that of resnet18.mixed96 suits its labels best at 30


class _Distilling(_PlainRun):
    """An ordinary training whose goal is another network's judgement of the same images."""

    def __init__(self, recipe: Recipe, teacher: nn.Module, steps: int) -> None:
        super().__init__(recipe, load_banks(recipe, progress=True), None)
        self.teacher = channels_last(teacher.eval().requires_grad_(False).to(self.device))
        own = resolve_model_data_config(teacher)
        size, mean, std = (tuple(own[name]) for name in ('input_size', 'mean', 'std'))
        size = dataclasses.replace(recipe.hypernet.input, input_size=size, mean=mean, std=std)
        theirs = dataclasses.replace(recipe, hypernet=dataclasses.replace(recipe.hypernet, input=size))
        self.theirs = group_sampler(theirs, load_banks(theirs, progress=True))
        self.centroids = self._centroids()
        self.asked, self.known = steps * self.parts, {}  # features that the teacher gave, by number of the batch

    def _teacher(self, images: Tensor) -> Tensor:
        """The teacher's features `[n, d]`."""
        half = bfloat16_slowdown(self.device) < 1
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return self.teacher(images.to(self.device).contiguous(memory_format=torch.channels_last)).float()

    def _centroids(self) -> Tensor:
        """The teacher's mean features of every class `[k, d]`, numbered as the sampler does."""
        sampler, rows = self.theirs, []
        for bank in sampler.banks:
            for turn in range(sampler.groups.turns):
                for members in bank.members:
                    images = bank.images[members[:CENTROID_IMAGES]].float() / 255
                    images = images.rot90(turn * (4 // sampler.groups.turns), (2, 3))
                    rows.append(self._teacher((images - sampler.mean) / sampler.std).mean(0))
        return torch.stack(rows)

    def losses(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the same images in two sizes: the draws are the same, whatever the size."""
        step = number // self.parts
        number %= self.asked
        if number not in self.known:
            self.known[number] = self._teacher(self._drawn(self.theirs, number)).half()
        images = self._drawn(self.sampler, number)
        if step % 5 == 0:
            images = self._dimmed(images, self.sampler.generator('condition', step))
        wanted = centroid_logits(self.known[number].float(), self.centroids, SHARPNESS).softmax(1)
        guessed = self.head(self.features(images.to(self.device))).log_softmax(1)
        loss = F.kl_div(guessed, wanted, reduction='batchmean')
        return loss, {'distillation': loss}

    def _drawn(self, sampler: GroupSampler, number: int) -> Tensor:
        """A batch; every other one mixed in pairs, and one of four turned by quarter turns."""
        step, generator = number // self.parts, sampler.generator('mixed', number)
        sampler.groups = dataclasses.replace(self.recipe.groups, turns=1 if step % 4 else self.recipe.groups.turns)
        images, _ = sampler.batch(number, self.recipe.images_per_step // self.parts)
        order, share = torch.randperm(len(images), generator=generator), float(torch.rand((), generator=generator))
        return torch.lerp(images, images[order], share) if step % 2 else images

    def _dimmed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images under gamma and noise of a random condition."""
        drawn = Condition.draw(generator, images.shape[1])
        mild = dataclasses.replace(drawn, order=tuple(range(images.shape[1])), inverted=False, turns=0)
        mean, std = self.sampler.mean.to(images.device), self.sampler.std.to(images.device)
        return (mild.apply((images * std + mean).clamp(0, 1), generator) - mean) / std


def main() -> None:
    """Reads the arguments and writes OUT."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('recipe')
    parser.add_argument('teacher', help='folder of a network, in timm format')
    parser.add_argument('steps', type=int, help='after which the same images, so changed, come again')
    parser.add_argument('out', type=Path)
    options = parser.parse_args()
    recipe = Recipe.load(options.recipe)
    taught = seen_by(options.teacher)
    if both := sorted({name for data in recipe.data for name in data.unseen}.intersection(taught)):
        parser.error(f'{options.teacher} was trained on class {both[0]!r}: leave it out of unseen')
    teacher = pretrained_model(Path(options.teacher), {'num_classes': 0})
    run = _Distilling(recipe, teacher, options.steps)
    go(run, options.out / 'run-plain', 120.0, None, True)
    run.settle()
    if run.processes.rank:
        return
    result = save_model(with_own_config(run.target.cpu().eval(), recipe.hypernet.input), options.out / 'plain')
    names = dict.fromkeys((*taught, *classes_seen(recipe, run.sampler.banks)))
    whitening = torch.eye(run.target.num_features)
    save_tensors({'whitening': whitening}, whitening_path(result), {'classes': json.dumps(list(names))})


if __name__ == '__main__':
    main()
