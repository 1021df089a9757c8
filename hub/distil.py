"""Trains the target of a recipe, without any hypernetwork, to judge images as another network, of any architecture, does.

    torchrun --nproc-per-node 2 hub/distil.py RECIPE TEACHER STEPS OUT

TEACHER is a folder of a network in timm's format, `START/start` of `hub/average.py HYPERNET START` for instance; a classifier is left out.
Its judgement of an image is the softmax of the cosines between its features of that image and its mean features of a few images of every
seen class (eq. 7); where the recipe has `turns`, each class turned is a further class, in every fourth step. The target learns this
judgement (Hinton et al. 2015, by the Kullback-Leibler divergence). Both see the same changed images, each network at its own size; in every
other step each image is mixed with another (Beyer et al. 2022), and in every fifth the target sees them under gamma and noise that the
teacher does not see. The teacher is asked in the first STEPS steps, in bfloat16 where that is no slower; after them the same batches come
again, with its answers kept (so STEPS had better be no multiple of five). A run that goes on asks again. Losses, label smoothing and
`fixed_statistics` of the recipe are not looked at.

OUT/plain is what comes of it, in timm's format, for `hub/average.py --model`; the run is in OUT/run-plain.
"""

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_pudnet.adapt import centroid_logits
from timm_pudnet.config import InputError, PudNetError
from timm_pudnet.hypernet import pretrained_model
from timm_pudnet.target import channels_last, input_of, with_own_config
from timm_pudnet.training import Recipe, check_control, check_start, load_banks, save_control
from timm_pudnet.training.conditions import Condition
from timm_pudnet.training.episodes import GroupSampler
from timm_pudnet.training.meta_train import _PlainRun, group_sampler, seen_by
from timm_pudnet.training.run import bfloat16_slowdown, go

CENTROID_IMAGES = 16  # of a class, at most
SHARPNESS = 24.0  # what cosines are multiplied by: a little softer than suits the labels of augmented images best, 32


class _Distilling(_PlainRun):
    """An ordinary training whose goal is another network's judgement of the same images."""

    def __init__(self, recipe: Recipe, teacher: nn.Module, steps: int) -> None:
        self.teacher, own, ours = teacher.eval().requires_grad_(False), input_of(teacher), recipe.hypernet.input
        first = os.environ.get('RANK', '0') == '0'  # of several processes the first one speaks
        super().__init__(recipe, load_banks(recipe, progress=first), None)
        channels_last(self.teacher.to(self.device))
        self.half = not self.processes.any_(bfloat16_slowdown(self.device) > 1)
        ours = dataclasses.replace(ours, input_size=own.input_size, mean=own.mean, std=own.std)
        theirs = dataclasses.replace(recipe, hypernet=dataclasses.replace(recipe.hypernet, input=ours))
        self.theirs = group_sampler(theirs, load_banks(theirs, progress=first))
        self.centroids = self._centroids()
        self.asked, self.known = steps * self.parts, {}  # the teacher's features of a batch, by its number

    def source(self) -> Iterator[Tensor | bytes]:
        """Also the teacher, and how long it is asked."""
        yield from super().source()
        yield str(self.asked).encode()
        yield from self.teacher.state_dict().values()

    def _teacher(self, images: Tensor) -> Tensor:
        """The teacher's features `[n, d]`, of norm 1."""
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            return F.normalize(self.teacher(images).float(), dim=1)

    def _centroids(self) -> Tensor:
        """The teacher's mean features of every class `[k, d]`, numbered as the sampler does."""
        sampler, rows = self.theirs, []
        for bank in sampler.banks:
            for turn in range(sampler.groups.turns):
                for members in bank.members:
                    images = bank.images[members[:CENTROID_IMAGES]].float() / 255
                    images = images.rot90(turn * (4 // sampler.groups.turns), (2, 3))
                    rows.append(self._teacher(sampler._normalised(images)).mean(0))
        return torch.stack(rows)

    def losses(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """How far the target's judgement is from the teacher's, of the same images at the size of each."""
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
        """A batch: the same draws whatever the size. Every other one is mixed, every fourth one turned."""
        step, generator = number // self.parts, sampler.generator('mixed', number)
        sampler.groups = dataclasses.replace(self.recipe.groups, turns=1 if step % 4 else self.recipe.groups.turns)
        images, _ = sampler.batch(number, self.recipe.images_per_step // self.parts)
        order, share = torch.randperm(len(images), generator=generator), float(torch.rand((), generator=generator))
        return torch.lerp(images, images[order], share) if step % 2 else images

    def _dimmed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images under gamma and noise of a random condition."""
        drawn = Condition.draw(generator, images.shape[1])
        mild = Condition(order=tuple(range(images.shape[1])), gamma=drawn.gamma, noise=drawn.noise)
        mean, std = self.sampler.mean.to(images.device), self.sampler.std.to(images.device)
        return self.sampler._normalised(images * std + mean, mild, generator)


def main() -> None:
    """Reads the arguments and writes OUT."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('recipe')
    parser.add_argument('teacher', help='folder of a network, in timm format')
    parser.add_argument('steps', type=int, help='after which the same batches come again')
    parser.add_argument('out', type=Path)
    options = parser.parse_args()
    result = options.out / 'plain'
    try:
        recipe = Recipe.load(options.recipe)
        teacher = pretrained_model(Path(options.teacher), {'num_classes': 0})
        check_start(recipe)
        # Of the teacher as of a start: it may have seen no class that is to be unseen.
        check_start(dataclasses.replace(recipe, start=options.teacher))
        if recipe.denoising or recipe.groups.conditions or recipe.augmentation.timm or recipe.augmentation.mixup:
            raise InputError(
                f'{options.recipe}: leave out denoising, conditions, augmentation.timm and augmentation.mixup'
            )
        if recipe.schedule.frozen or options.steps < 1:
            raise InputError('rate and STEPS must be above zero')
        if result.exists():
            raise InputError(f'{result} exists: choose another OUT')
        check_control(recipe.hypernet)
        run = _Distilling(recipe, teacher, options.steps)
        go(run, options.out / 'run-plain', 120.0, None, True)
    except PudNetError as error:
        parser.error(str(error))
    run.settle()
    whitening = run.whitening()
    if run.processes.rank:
        return
    model = with_own_config(run.target.cpu().eval(), recipe.hypernet.input)
    save_control(result, model, whitening, dict.fromkeys((*seen_by(options.teacher), *run.seen)))


if __name__ == '__main__':
    main()
