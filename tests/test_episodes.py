import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from timm_pudnet.config import InputConfig, InputError
from timm_pudnet.images import open_images
from timm_pudnet.training import Augmentation, Data, Groups, GroupSampler, ImageBank, load_banks
from timm_pudnet.training.episodes import augment, bank_input, quarter_turns, timm_augmented

PIXELS = InputConfig(input_size=(3, 12, 12), mean=(0.0,) * 3, std=(1.0,) * 3)
SMALL = InputConfig(input_size=(3, 16, 16))


def unique_bank(per_class=12, num_classes=3, size=12):
    """Noise images, every one different, also from the others' turns."""
    count = per_class * num_classes
    rng = torch.Generator().manual_seed(6)
    images = torch.randint(0, 256, (count, 3, size, size), generator=rng).to(torch.uint8)
    return ImageBank(images, torch.arange(count) % num_classes, [f'class {k}' for k in range(num_classes)])


def origins(images, bank):
    """Place in the bank and quarter turns of every image of a group that is neither augmented nor normalised."""
    known = {bank.images[k].rot90(turn, (1, 2)).numpy().tobytes(): (k, turn) for k in range(36) for turn in range(4)}
    return [known[(image * 255).round().to(torch.uint8).numpy().tobytes()] for image in images]


def test_a_bank_holds_the_pixels_of_a_folder_by_class(tmp_path, one_line):
    pixels = {}
    for label, name in enumerate(['cup', 'jar', 'pan']):
        (tmp_path / name).mkdir()
        for number in range(2 + label):
            value = np.random.default_rng(10 * label + number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(value).save(tmp_path / name / f'{number}.png')
            pixels.setdefault(name, []).append(torch.from_numpy(value).permute(2, 0, 1))
    source = open_images(tmp_path, input=bank_input(SMALL))
    bank = ImageBank.from_source(source)
    assert (bank.class_names, [len(members) for members in bank.members]) == (('cup', 'jar', 'pan'), [2, 3, 4])
    bank = ImageBank.from_source(source, ['pan', 'cup'])
    assert bank.class_names == ('pan', 'cup')
    assert bank.images.dtype == torch.uint8
    for label, name in enumerate(bank.class_names):
        assert_close(bank.images[bank.members[label]], torch.stack(pixels[name]), rtol=0, atol=0)
    with pytest.raises(InputError) as error:
        ImageBank.from_source(source, ['cups'])
    one_line(error, "'cups'", 'cup, jar, pan')
    with pytest.raises(InputError, match='labelled'):
        ImageBank.from_source(open_images(tmp_path / 'pan', input=bank_input(SMALL)))
    data = Data(images=str(tmp_path), classes=('jar',))
    assert_close(load_bank(make_recipe(data=data)).images, torch.stack(pixels['jar']), rtol=0, atol=0)


def test_a_selection_of_classes_is_numbered_anew():
    bank = unique_bank()
    part = bank.select(['class 2', 'class 0'])
    assert part.class_names == ('class 2', 'class 0')
    for label, name in enumerate(part.class_names):
        expected = bank.images[bank.members[bank.class_names.index(name)]]
        assert_close(part.images[part.members[label]], expected, rtol=0, atol=0)
    assert len(part.images) == 24


def test_a_group_has_the_right_classes_and_no_image_twice():
    bank = unique_bank()
    sampler = GroupSampler(bank, PIXELS, n_way=2, n_shot=3, n_query=4)
    seen = set()
    for _ in range(20):
        group = sampler.draw()
        assert group.support_classes.unique_consecutive(return_counts=True)[1].tolist() == [3, 3]
        assert group.query_classes.unique_consecutive(return_counts=True)[1].tolist() == [4, 4]
        assert group.support_classes.unique().tolist() == group.query_classes.unique().tolist()
        classes = torch.cat([group.support_classes, group.query_classes]).tolist()
        found = origins(torch.cat([group.support, group.query]), bank)
        assert [int(bank.labels[k]) for k, _ in found] == classes
        assert len({k for k, _ in found}) == 14
        seen |= {k for k, _ in found}
    assert len(seen) == 36


@pytest.mark.parametrize('turns', [2, 4])
def test_turned_classes_are_further_classes(turns):
    bank = unique_bank()
    sampler = GroupSampler(bank, PIXELS, n_way=3 * turns, n_shot=2, n_query=1, turns=turns)
    assert sampler.num_classes == 3 * turns
    group = sampler.draw()
    images, labels = torch.cat([group.support, group.query]), torch.cat([group.support_classes, group.query_classes])
    assert sorted(group.query_classes.tolist()) == list(range(3 * turns))
    for (place, turn), label in zip(origins(images, bank), labels.tolist(), strict=True):
        assert (int(bank.labels[place]), turn) == (label % 3, label // 3 * (4 // turns))  # two turns are half turns
    images, labels = sampler.batch(200)
    found = [int(bank.labels[place]) + 3 * turn * turns // 4 for place, turn in origins(images, bank)]
    assert found == labels.tolist()
    assert len(set(found)) == 3 * turns


def test_quarter_turns_turn_each_image_by_its_own_number():
    images = torch.randn(5, 3, 6, 6)
    turned = quarter_turns(images, torch.tensor([0, 1, 2, 3, 1]))
    for image, result, turn in zip(images, turned, [0, 1, 2, 3, 1], strict=True):
        assert_close(result, image.rot90(turn, (1, 2)), rtol=0, atol=0)


def test_groups_follow_the_seed_and_the_saved_state():
    def sampler(seed):
        return GroupSampler(
            unique_bank(), SMALL, n_way=2, n_shot=2, n_query=2, turns=4, augmentation=Augmentation(), seed=seed
        )

    def draws(source, count=3):
        return torch.stack([source.draw().query for _ in range(count)])

    first = sampler(1)
    assert_close(draws(first), draws(sampler(1)), rtol=0, atol=0)
    assert not torch.equal(draws(sampler(1)), draws(sampler(2)))
    state = first.generator.get_state()
    later = draws(first)
    other = sampler(9)
    other.generator.set_state(state)
    assert_close(draws(other), later, rtol=0, atol=0)


def test_groups_are_normalised_by_mean_and_std():
    config = InputConfig(input_size=(3, 12, 12), mean=(0.1, 0.5, 0.7), std=(0.2, 0.4, 0.5))
    kwargs = {'n_way': 2, 'n_shot': 2, 'n_query': 1}
    plain = GroupSampler(unique_bank(), PIXELS, **kwargs).draw().support
    found = GroupSampler(unique_bank(), config, **kwargs).draw().support
    expected = torch.stack([(plain[:, c] - config.mean[c]) / config.std[c] for c in range(3)], 1)
    assert_close(found, expected)


def test_augmentation_of_nothing_changes_nothing_and_of_something_stays_in_range():
    images, generator = torch.rand(20, 3, 12, 12), torch.Generator()
    nothing = Augmentation(flip=False, shift=0, rotation=0, scale=0, brightness=0)
    assert_close(augment(images, nothing, generator), images, rtol=1e-4, atol=1e-4)
    flipped = augment(images, Augmentation(flip=True, shift=0, rotation=0, scale=0, brightness=0), generator)
    mirrored = [bool((a - b.flip(-1)).abs().max() < 1e-3) for a, b in zip(flipped, images, strict=True)]
    same = [bool((a - b).abs().max() < 1e-3) for a, b in zip(flipped, images, strict=True)]
    assert [a != b for a, b in zip(mirrored, same, strict=True)] == [True] * 20
    assert 2 <= sum(mirrored) <= 18
    changed = augment(images, Augmentation(), generator)
    assert 0 <= changed.min() <= changed.max() <= 1
    assert (changed - images).abs().flatten(1).amax(1).min() > 0.05
    with pytest.raises(InputError, match='shift must be in 0-1'):
        Augmentation(shift=1.5)


@pytest.mark.parametrize(
    ('changes', 'needles'),
    [
        ({'n_shot': 10, 'n_query': 3}, ["'class 0'", '12', '13']),
        ({'n_way': 4}, ['n_way is 4', '3 classes']),
        ({'n_way': 1}, ['n_way is 1']),
        ({'turns': 3}, ['turns', '3']),
    ],
)
def test_impossible_groups_are_refused(changes, needles, one_line):
    with pytest.raises(InputError) as error:
        GroupSampler(unique_bank(), PIXELS, **{'n_way': 2, 'n_shot': 2, 'n_query': 2, **changes})
    one_line(error, *needles)


def test_quarter_turns_of_oblong_images_are_refused():
    bank = ImageBank(torch.zeros(20, 3, 12, 16, dtype=torch.uint8), torch.arange(20) % 2, ['a', 'b'])
    config = InputConfig(input_size=(3, 12, 16))
    with pytest.raises(InputError, match='square'):
        GroupSampler(bank, config, n_way=4, n_shot=2, n_query=2, turns=4)
    group = GroupSampler(bank, config, n_way=4, n_shot=2, n_query=2, turns=2).draw()
    assert group.support.shape == (8, 3, 12, 16)


