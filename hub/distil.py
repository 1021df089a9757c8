"""Trains the target of a recipe, without any hypernetwork, to give the features of another network, of any architecture.

    torchrun --nproc-per-node 2 hub/distil.py RECIPE TEACHER STEPS OUT

TEACHER is a folder in timm format. Both see the same changed images, each at its own size; every fifth time the target sees them under
gamma and noise that the teacher does not see. Only the first STEPS steps ask the teacher; then the same images, so changed, come again.
No label is looked at. The loss has two terms, each in units of the spread over a batch: a linear layer, thrown away afterwards, is to give
the teacher's features (Romero et al. 2015, "FitNets"), and images are to be as like each other, by cosine, as they are to the teacher
(Tung and Mori 2019, "Similarity-preserving knowledge distillation"), which is what classification by centroids goes by.

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
from timm_pudnet.hypernet import pretrained_model, save_tensors, target_of
from timm_pudnet.target import channels_last, with_own_config
from timm_pudnet.training import Recipe, load_banks, whitening_path
from timm_pudnet.training.conditions import Condition
from timm_pudnet.training.episodes import GroupSampler
from timm_pudnet.training.meta_train import _PlainRun, classes_seen, group_sampler, seen_by
from timm_pudnet.training.run import bfloat16_slowdown, go


class _Distilling(_PlainRun):
    """An ordinary training whose goal is what another network makes of the same images."""

    def __init__(self, recipe: Recipe, teacher: nn.Module, steps: int) -> None:
        self.teacher = channels_last(teacher.eval().requires_grad_(False))
        super().__init__(recipe, load_banks(recipe, progress=True), None)
        self.teacher.to(self.device)
        own = resolve_model_data_config(teacher)
        size, mean, std = (tuple(own[name]) for name in ('input_size', 'mean', 'std'))
        size = dataclasses.replace(recipe.hypernet.input, input_size=size, mean=mean, std=std)
        theirs = dataclasses.replace(recipe, hypernet=dataclasses.replace(recipe.hypernet, input=size))
        self.theirs = group_sampler(theirs, load_banks(theirs, progress=True))
        self.asked, self.known = steps * self.parts, {}  # features that the teacher gave, by number of the batch

    def make_head(self) -> nn.Linear:
        """From the target's features to the teacher's."""
        return nn.Linear(target_of(self.recipe.hypernet).num_features, self.teacher.num_features)

    def losses(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the same images in two sizes: the draws are the same, whatever the size."""
        step = number // self.parts
        number %= self.asked
        if number not in self.known:
            half = bfloat16_slowdown(self.device) < 1
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                images = self._drawn(self.theirs, number).to(self.device)
                self.known[number] = self.teacher(images.contiguous(memory_format=torch.channels_last)).half()
        images = self._drawn(self.sampler, number)
        if step % 5 == 0:
            images = self._dimmed(images, self.sampler.generator('condition', step))
        wanted, features = self.known[number].float(), self.features(images.to(self.device))
        terms = {
            'features': (self.head(features) - wanted).square().mean() / wanted.var(0).mean(),
            'likeness': (_likeness(features) - _likeness(wanted)).square().mean() / _likeness(wanted).var(),
        }
        return torch.stack([*terms.values()]).sum(), terms

    def _drawn(self, sampler: GroupSampler, number: int) -> Tensor:
        """A batch; every other one mixed in pairs, and one of four turned by quarter turns."""
        step, generator = number // self.parts, sampler.generator('mixed', number)
        sampler.groups = dataclasses.replace(self.recipe.groups, turns=4 if step % 4 == 0 else 1)
        images, _ = sampler.batch(number, self.recipe.images_per_step // self.parts)
        order, share = torch.randperm(len(images), generator=generator), float(torch.rand((), generator=generator))
        return torch.lerp(images, images[order], share) if step % 2 else images

    def _dimmed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images under gamma and noise of a random condition."""
        drawn = Condition.draw(generator, images.shape[1])
        mild = dataclasses.replace(drawn, order=tuple(range(images.shape[1])), inverted=False, turns=0)
        mean, std = self.sampler.mean.to(images.device), self.sampler.std.to(images.device)
        return (mild.apply((images * std + mean).clamp(0, 1), generator) - mean) / std


def _likeness(features: Tensor) -> Tensor:
    """Cosines `[n, n]` of features `[n, d]`."""
    rows = F.normalize(features, dim=1)
    return rows @ rows.t()


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
