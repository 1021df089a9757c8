"""Trains the target of a recipe, without any hypernetwork, to give the features of another network that sees larger images.

    torchrun --nproc-per-node 2 hub/distil.py RECIPE TEACHER SIDE STEPS OUT

Both see the same changed images, TEACHER at SIDE x SIDE and the other at the recipe's size; `start` of the recipe is a network of the same
architecture, TEACHER itself for instance. No class is looked at. OUT/plain is what comes of it, in timm's format, its run is in OUT/run-plain.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from timm_pudnet import save_model
from timm_pudnet.hypernet import pretrained_model, save_tensors
from timm_pudnet.target import channels_last, with_own_config
from timm_pudnet.training import Recipe, load_banks, whitening_path
from timm_pudnet.training.conditions import Condition
from timm_pudnet.training.episodes import GroupSampler
from timm_pudnet.training.meta_train import _PlainRun, group_sampler
from timm_pudnet.training.run import go


class _Distilling(_PlainRun):
    """An ordinary training whose goal is another network's features, in units of their spread over a batch."""

    def __init__(self, recipe: Recipe, teacher: nn.Module, side: int, steps: int) -> None:
        self.teacher = channels_last(teacher.eval().requires_grad_(False))
        super().__init__(recipe, load_banks(recipe, progress=True), 'cpu')
        size = (recipe.hypernet.input.input_size[0], side, side)
        larger = dataclasses.replace(recipe.hypernet, input=dataclasses.replace(recipe.hypernet.input, input_size=size))
        larger_recipe = dataclasses.replace(recipe, hypernet=larger)
        self.larger = group_sampler(larger_recipe, load_banks(larger_recipe, progress=True))
        self.steps_of_views, self.known = steps, {}  # features that the teacher gave, by number

    def build(self) -> dict[str, nn.Module]:
        """The target alone."""
        return {'target': super().build()['target']}

    def losses(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the same images in two sizes: the draws are the same, whatever the size."""
        number %= self.steps_of_views * self.parts
        if number not in self.known:
            with torch.no_grad():
                self.known[number] = self.features(self._drawn(self.larger, number), model=self.teacher).half()
        wanted, images, step = self.known[number].float(), self._drawn(self.sampler, number), number // self.parts
        if step % 5 == 0:
            images = self._dimmed(images, number)
        loss = (self.features(images) - wanted).square().mean() / wanted.var(0).mean()
        return loss, {'distillation': loss}

    def _drawn(self, sampler: GroupSampler, number: int) -> Tensor:
        """A batch; every other one upright, the next turned by quarter turns too; of each two such two mixed in pairs."""
        step, generator = number // self.parts, self.sampler.generator('mixed', number)
        sampler.groups = dataclasses.replace(sampler.groups, turns=1 + step % 2 * (self.recipe.groups.turns - 1))
        images, _ = sampler.batch(number, self.recipe.images_per_step // self.parts)
        order, share = torch.randperm(len(images), generator=generator), float(torch.rand((), generator=generator))
        return torch.lerp(images, images[order], share) if step // 2 % 2 else images

    def _dimmed(self, images: Tensor, number: int) -> Tensor:
        """Images under gamma and noise of a random condition, which the teacher does not see."""
        generator = self.sampler.generator('condition', number)
        drawn = Condition.draw(generator)
        mild = dataclasses.replace(drawn, order=(0, 1, 2), inverted=False, turns=0)
        mean, std = self.sampler.mean, self.sampler.std
        return (mild.apply((images * std + mean).clamp(0, 1), generator) - mean) / std


def main() -> None:
    """Reads the arguments and writes OUT."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('recipe')
    parser.add_argument('teacher', help='folder of a network, in timm format')
    parser.add_argument('side', type=int, help='of the images that it sees, in pixels')
    parser.add_argument('steps', type=int, help='after which the same images, so changed, come again')
    parser.add_argument('out', type=Path)
    options = parser.parse_args()
    recipe = Recipe.load(options.recipe)
    teacher = pretrained_model(Path(options.teacher), {**recipe.hypernet.model_kwargs, 'num_classes': 0})
    run = _Distilling(recipe, teacher, options.side, options.steps)
    go(run, options.out / 'run-plain', 120.0, None, True)
    run.settle()
    if run.processes.rank:
        return
    result = save_model(with_own_config(run.target.eval(), recipe.hypernet.input), options.out / 'plain')
    width = run.target.num_features
    save_tensors({'whitening': torch.eye(width)}, whitening_path(result), {'classes': json.dumps(list(run.seen))})


if __name__ == '__main__':
    main()
