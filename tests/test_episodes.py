import importlib
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import IterableDataset

from timm_pudnet.config import InputConfig, InputError, same_names
from timm_pudnet.images import open_images
from timm_pudnet.training import Augmentation, Data, Groups, GroupSampler, ImageBank, load_banks
from timm_pudnet.training.episodes import augment, bank_input, mixed, quarter_turns, timm_augmented

meta_train_room = importlib.import_module('timm_pudnet.training.meta_train')  # the package's name is the function

PIXELS = InputConfig(input_size=(3, 12, 12), mean=(0.0,) * 3, std=(1.0,) * 3)
SMALL = InputConfig(input_size=(3, 16, 16))


def unique_bank(per_class=12, num_classes=3, size=12, seed=6):
    """Noise images, every one different, also from the others' turns."""
    count = per_class * num_classes
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=rng).to(torch.uint8)
    return ImageBank(images, torch.arange(count) % num_classes, [f'class {k}' for k in range(num_classes)])


def make_sampler(banks=None, config=PIXELS, *, shares=None, augmentation=None, seed=0, **groups):
    groups = Groups(**{'n_way': 2, 'n_shot': 2, 'n_query': 2, **groups})
    banks = banks or [unique_bank()]
    return GroupSampler(banks, config, groups, shares=shares, augmentation=augmentation, seed=seed)


def origins(images, *banks):
    """Bank, place in it and quarter turns of every image that is neither augmented nor normalised."""
    known = {
        image.rot90(turn, (1, 2)).numpy().tobytes(): (number, place, turn)
        for number, bank in enumerate(banks)
        for place, image in enumerate(bank.images)
        for turn in range(4)
    }
    return [known[(image * 255).round().to(torch.uint8).numpy().tobytes()] for image in images]


def together(group):
    return torch.cat([group.support, group.query]), torch.cat([group.support_classes, group.query_classes])


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


def banks_of(make_recipe, *data):
    return load_banks(make_recipe(data=tuple(data)))


def test_a_bank_is_read_for_each_set_of_a_recipe(tmp_path, make_recipe, pictures, write_folder, one_line):
    first, second = str(tmp_path / 'first'), str(tmp_path / 'second')
    write_folder(tmp_path / 'first', *pictures(12, size=16))
    write_folder(tmp_path / 'second', *pictures(10, names=('lid', 'mug'), size=16, seed=1))
    banks = banks_of(make_recipe, Data(images=first, classes=('jar',)), Data(images=second))
    assert [bank.class_names for bank in banks] == [('jar',), ('lid', 'mug')]
    assert [len(bank.images) for bank in banks] == [4, 10]
    (everything,) = banks_of(make_recipe, Data(images=first))
    assert_close(banks[0].images, everything.images[everything.members[1]], rtol=0, atol=0)
    (left,) = banks_of(make_recipe, Data(images=first, unseen=('jar',)))
    assert left.class_names == ('cup', 'pan')
    assert_close(left.images[left.members[1]], everything.images[everything.members[2]], rtol=0, atol=0)
    (left,) = banks_of(make_recipe, Data(images=first, classes=('pan',), unseen=('jar',)))
    assert left.class_names == ('pan',)
    for data, needles in (
        (Data(images=first, unseen=('jra',)), ["'jra'", 'unseen']),
        (Data(images=first, classes=('jra',)), ["'jra'", 'cup, jar, pan']),
        (Data(images=first, unseen=('cup', 'jar', 'pan')), ['unseen']),  # no class is left, and not: all are
        (Data(images=first, split='val'), ['split is of a timm dataset']),
        (Data(images=first, data_dir='nowhere'), ['data_dir is of a timm dataset']),
    ):
        with pytest.raises(InputError) as error:
            banks_of(make_recipe, data)
        one_line(error, first, *needles)


def test_a_class_that_another_set_spells_otherwise_is_the_same(tmp_path, make_recipe, pictures, write_folder, one_line):
    for place, names in enumerate((('T-shirt', 'bag', 'b-ag'), ('t_shirt', 'bag'))):
        write_folder(tmp_path / str(place), *pictures(6, names=names, size=16, seed=place))
    first, second = str(tmp_path / '0'), str(tmp_path / '1')
    with pytest.raises(InputError) as error:
        banks_of(make_recipe, Data(images=first, unseen=('T-shirt',)), Data(images=second))
    one_line(error, "'T-shirt' ('t_shirt' there)", 'unseen in', 'seen in')
    # Beside a `bag` of the same set, `b-ag` is another class.
    banks = banks_of(make_recipe, Data(images=first, unseen=('b-ag',)), Data(images=second))
    assert [{*bank.class_names} for bank in banks] == [{'T-shirt', 'bag'}, {'t_shirt', 'bag'}]


def test_classes_without_names_go_by_their_numbers(make_recipe, monkeypatch, one_line):
    """As those of a web dataset."""
    rows = [(np.full((16, 16, 3), 50 * label, np.uint8), label) for label in (0, 1, 2, 0, 1, 2)]

    class Numbers(IterableDataset):
        def __iter__(self):
            return iter(rows)

    opened = open_images
    monkeypatch.setattr(meta_train_room, 'open_images', lambda name, **kwargs: opened(Numbers(), input=kwargs['input']))
    (bank,) = banks_of(make_recipe, Data(images='wds/numbers', unseen=('1',)))
    assert bank.class_names == ('0', '2')
    assert bank.images[bank.members[1]].float().mean() == 100
    (bank,) = banks_of(make_recipe, Data(images='wds/numbers', classes=('2', '1')))
    assert bank.class_names == ('2', '1')
    (bank,) = banks_of(make_recipe, Data(images='wds/numbers', classes=('2',), unseen=('1',)))
    assert bank.class_names == ('2',)
    assert bank.images.float().mean() == 100
    for data, needles in (
        ((Data(images='wds/numbers', unseen=('7',)),), ["'7'", 'unseen']),
        ((Data(images='wds/numbers', unseen=('1',)), Data(images='wds/numbers')), ["'1'", 'unseen in', 'seen in']),
    ):
        with pytest.raises(InputError) as error:
            banks_of(make_recipe, *data)
        one_line(error, *needles)


def test_a_bank_takes_pixels_as_they_are_alone(pictures, one_line):
    with pytest.raises(InputError) as error:
        ImageBank.from_source(open_images(*pictures(12), input=SMALL))
    one_line(error, 'mean and std', 'bank_input')


def test_images_of_another_size_than_the_target_takes_are_refused(one_line):
    with pytest.raises(InputError) as error:
        make_sampler([unique_bank(size=16)])
    one_line(error, '3x16x16', '3x12x12')


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
    sampler = make_sampler([bank], n_shot=3, n_query=4)
    seen = set()
    for number in range(20):
        group = sampler.draw(number)
        assert group.support_classes.unique_consecutive(return_counts=True)[1].tolist() == [3, 3]
        assert group.query_classes.unique_consecutive(return_counts=True)[1].tolist() == [4, 4]
        assert group.support_classes.unique().tolist() == group.query_classes.unique().tolist()
        images, classes = together(group)
        found = origins(images, bank)
        assert [int(bank.labels[k]) for _, k, _ in found] == classes.tolist()
        assert len({k for _, k, _ in found}) == 14
        seen |= {k for _, k, _ in found}
    assert len(seen) == 36


@pytest.mark.parametrize('turns', [2, 4])
def test_turned_classes_are_further_classes(turns):
    bank = unique_bank()
    sampler = make_sampler([bank], n_way=3 * turns, n_shot=2, n_query=1, turns=turns)
    assert sampler.num_classes == 3 * turns
    group = sampler.draw(0)
    images, labels = together(group)
    assert sorted(group.query_classes.tolist()) == list(range(3 * turns))
    for (_, place, turn), label in zip(origins(images, bank), labels.tolist(), strict=True):
        assert (int(bank.labels[place]), turn) == (label % 3, label // 3 * (4 // turns))  # two turns are half turns
    images, labels = sampler.batch(0, 200)
    found = [int(bank.labels[place]) + 3 * turn * turns // 4 for _, place, turn in origins(images, bank)]
    assert found == labels.tolist()
    assert len(set(found)) == 3 * turns


def three_banks():
    return [unique_bank(num_classes=3), unique_bank(num_classes=2, seed=7), unique_bank(num_classes=4, seed=8)]


@pytest.mark.parametrize('turns', [1, 2])
def test_classes_are_numbered_through_all_banks_and_a_group_is_of_one(turns):
    banks = three_banks()
    sampler = make_sampler(banks, turns=turns)
    first = [0, 3 * turns, 5 * turns]
    assert (sampler.num_classes, sampler.first) == (9 * turns, first)
    seen = set()
    for number in range(80):
        images, labels = together(sampler.draw(number))
        found = origins(images, *banks)
        assert len({bank for bank, _, _ in found}) == 1
        for (bank, place, turn), label in zip(found, labels.tolist(), strict=True):
            own = int(banks[bank].labels[place]) + len(banks[bank].class_names) * (turn // 2)
            assert label == first[bank] + own
        seen |= set(labels.tolist())
    assert seen == set(range(9 * turns))
    images, labels = sampler.batch(0, 300)
    for (bank, place, turn), label in zip(origins(images, *banks), labels.tolist(), strict=True):
        assert label == first[bank] + int(banks[bank].labels[place]) + len(banks[bank].class_names) * (turn // 2)
    assert set(labels.tolist()) == seen
    halves = make_sampler(banks, turns=turns, sketch_groups=10).draw_halves(0)
    groups = [{bank for bank, _, _ in origins(half.flatten(0, 1), *banks)} for half in halves]
    assert all(len(group) == 1 for group in groups)
    assert set.union(*groups) == {0, 1, 2}


@pytest.mark.parametrize('shares', [None, (1.0, 1.0, 8.0), (30.0, 10.0, 0.001)])
def test_banks_are_drawn_by_their_shares(shares):
    banks = three_banks()
    sampler = make_sampler(banks, shares=shares, n_shot=1, n_query=1, sketch_groups=300, sketch_images=1)
    wanted = torch.tensor(shares or (1.0, 1.0, 1.0))
    groups = torch.cat([sampler.draw(number).support_classes[:1] for number in range(300)])
    labels = sampler.batch(0, 600)[1]
    halves = sampler.draw_halves(0)[:, 0]
    halves = torch.tensor([bank for bank, _, _ in origins(halves.flatten(0, 1), *banks)])
    first = torch.tensor(sampler.first)
    for found in (torch.searchsorted(first, groups, right=True) - 1, torch.searchsorted(first, labels, right=True) - 1):
        assert_close(found.bincount(minlength=3) / len(found), wanted / wanted.sum(), rtol=0, atol=0.08)
    assert_close(halves.bincount(minlength=3) / 300, wanted / wanted.sum(), rtol=0, atol=0.08)


@pytest.mark.parametrize('augmentation', [None, Augmentation()])
@pytest.mark.parametrize('conditions', [0.0, 1.0])
def test_a_batch_without_an_image_of_some_bank_is_no_error(augmentation, conditions):
    banks = [unique_bank(), unique_bank(seed=7)]
    sampler = make_sampler(banks, shares=(1.0, 1e-9), augmentation=augmentation, conditions=conditions)
    images, labels = sampler.batch(0, 5)
    assert len(images) == len(labels) == 5
    assert labels.max() < 3


def test_shares_are_one_a_bank(one_line):
    for shares in ((1.0,), (1.0, 2.0, 3.0)):
        with pytest.raises(InputError) as error:
            make_sampler([unique_bank(), unique_bank(seed=7)], shares=shares)
        one_line(error, '2', len(shares))


def test_a_bank_of_fewer_classes_gives_groups_of_all_of_them_with_more_images_each():
    banks = [unique_bank(num_classes=8, per_class=6), unique_bank(num_classes=3, seed=7), unique_bank(num_classes=2)]
    sampler, seen = make_sampler(banks, n_way=7, n_shot=2, n_query=1), {}
    for number in range(30):
        group = sampler.draw(number)
        images, labels = together(group)
        found = origins(images, *banks)
        assert len(set(found)) == len(found)
        shots, queries = (c.unique(return_counts=True)[1] for c in (group.support_classes, group.query_classes))
        assert len(labels.unique()) == len(shots) == len(queries)
        seen[found[0][0]] = (len(shots), set(shots.tolist()), set(queries.tolist()))
    assert seen == {0: (7, {2}, {1}), 1: (3, {4}, {2}), 2: (2, {6}, {3})}
    with pytest.raises(InputError, match='12 images, a group needs 15'):  # five times as many as of seven classes
        make_sampler([unique_bank()], n_way=15, n_shot=2, n_query=1)


def test_the_halves_of_a_group_have_its_classes():
    bank = unique_bank(num_classes=6, per_class=8)
    halves = make_sampler([bank], n_way=2, sketch_groups=5, sketch_images=20).draw_halves(3)
    assert halves.shape == (5, 2, 20, 3, 12, 12)
    groups = []
    for pair in halves:
        first, second = ({int(bank.labels[place]) for _, place, _ in origins(half, bank)} for half in pair)
        assert first == second
        assert len(first) == 2
        groups.append(tuple(first))
    assert len(set(groups)) > 1
    assert not torch.equal(halves[:, 0], halves[:, 1])


def test_quarter_turns_turn_each_image_by_its_own_number():
    images = torch.randn(5, 3, 6, 6)
    turned = quarter_turns(images, torch.tensor([0, 1, 2, 3, 1]))
    for image, result, turn in zip(images, turned, [0, 1, 2, 3, 1], strict=True):
        assert_close(result, image.rot90(turn, (1, 2)), rtol=0, atol=0)


DRAWS = {
    'draw': lambda sampler, number: together(sampler.draw(number)),
    'draw of another series': lambda sampler, number: together(sampler.draw(number, 'whitening')),
    'halves': lambda sampler, number: sampler.draw_halves(number),
    'batch': lambda sampler, number: sampler.batch(number, 9),
}


@pytest.mark.parametrize('what', DRAWS)
def test_a_draw_depends_on_its_number_and_the_seed_alone(what):
    def make(seed=1):
        return make_sampler(
            [unique_bank(), unique_bank(seed=7)],
            augmentation=Augmentation(),
            seed=seed,
            turns=4,
            conditions=1.0,
            sketch_groups=2,
        )

    draw, sampler = DRAWS[what], make()
    numbers = [0, 1, 2, 77, 10**9]
    first = [draw(sampler, number) for number in numbers]
    for other in DRAWS.values():  # other draws in between, in another order, under another global random state
        other(sampler, 5)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for number, expected in reversed(list(zip(numbers, first, strict=True))):
        assert_close(draw(sampler, number), expected, rtol=0, atol=0)
        assert_close(draw(make(), number), expected, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)

    def images(found):
        return found if isinstance(found, torch.Tensor) else found[0]

    drawn = [images(found) for found in first] + [images(draw(make(seed=2), 0))]
    assert len({image.numpy().tobytes() for image in drawn}) == len(drawn)


def test_series_of_draws_differ():
    sampler = make_sampler(n_shot=4)
    assert not torch.equal(sampler.draw(0).support, sampler.draw(0, 'whitening').support)


def test_groups_are_normalised_by_mean_and_std():
    config = InputConfig(input_size=(3, 12, 12), mean=(0.1, 0.5, 0.7), std=(0.2, 0.4, 0.5))
    plain, found = (make_sampler(config=c, sketch_groups=2) for c in (PIXELS, config))
    for draw in DRAWS.values():
        before, after = draw(plain, 0), draw(found, 0)
        before, after = (one if isinstance(one, torch.Tensor) else one[0] for one in (before, after))
        expected = torch.stack([(before[..., c, :, :] - config.mean[c]) / config.std[c] for c in range(3)], -3)
        assert_close(after, expected)


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


def test_oblong_images_are_turned_not_sheared():
    """A spot goes where a turn by the angle takes it, in pixels."""
    rows, columns = torch.meshgrid(torch.arange(32.0) - 15.5, torch.arange(96.0) - 47.5, indexing='ij')
    spot = torch.exp(-((rows + 2) ** 2 + (columns - 10) ** 2) / 8).expand(8, 3, -1, -1)
    how = Augmentation(flip=False, shift=0, rotation=60, scale=0, brightness=0)
    moved = augment(spot, how, torch.Generator().manual_seed(1))[:, 0]
    angles = (torch.rand(8, generator=torch.Generator().manual_seed(1)) * 2 - 1) * math.radians(60)
    found = torch.stack([(moved * axis).sum((1, 2)) / moved.sum((1, 2)) for axis in (columns, rows)], 1)
    wanted = torch.stack([angles.cos() * 10 + angles.sin() * -2, angles.cos() * -2 - angles.sin() * 10], 1)
    assert_close(found, wanted, rtol=0, atol=0.2)


# timm's augmentation


STRONG = {'auto_augment': 'rand-m5', 're_prob': 0.3, 'color_jitter': 0.3}


def global_states():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def test_timm_s_augmentation_is_reproducible_and_leaves_the_global_random_states_alone():
    def make(seed=1):
        return make_sampler(config=PIXELS, augmentation=Augmentation(timm=STRONG), seed=seed)

    before = global_states()
    first = make().draw(4)
    assert global_states() == before
    random.seed(8), np.random.seed(8), torch.manual_seed(8)
    assert_close(together(make().draw(4)), together(first), rtol=0, atol=0)
    assert not torch.equal(make().draw(5).support, first.support)
    assert not torch.equal(make(seed=2).draw(4).support, first.support)
    assert first.support.shape == (4, 3, 12, 12)
    assert first.support.isfinite().all()


def test_timm_s_augmentation_takes_the_place_of_ours_and_its_arguments_count():
    nothing = {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'hflip': 0.0, 'color_jitter': None}
    images = unique_bank().images
    rng = torch.Generator().manual_seed(0)
    assert_close(timm_augmented(images, nothing, rng), images / 255, rtol=0, atol=1e-6)
    flipped = timm_augmented(images, {**nothing, 'hflip': 1.0}, rng)
    assert_close(flipped, images.flip(-1) / 255, rtol=0, atol=1e-6)
    erased = timm_augmented(images, {**nothing, 're_prob': 1.0, 're_mode': 'const'}, rng)
    assert ((erased == 0).flatten(1).float().mean(1) > 0.01).all()
    changed = timm_augmented(images, STRONG, rng)
    assert (changed - images / 255).abs().flatten(1).amax(1).min() > 0.05
    again = timm_augmented(images, STRONG, rng)
    assert not torch.equal(changed, again)
    grey = timm_augmented(images[:, :1], {'auto_augment': 'rand-m5', 're_prob': 0.3}, rng)
    assert grey.shape == (36, 1, 12, 12)


def test_an_erased_image_under_a_condition_is_finite():
    """Pixels that timm erases hold noise below zero, which has no power."""
    how = Augmentation(timm={'re_prob': 1.0, 're_mode': 'pixel'})
    sampler = make_sampler(augmentation=how, conditions=1.0)
    for number in range(5):
        assert sampler.draw(number).support.isfinite().all()


@pytest.mark.parametrize(
    ('kwargs', 'needle'),
    [
        ({'auto_augmnt': 'rand-m5'}, 'auto_augmnt'),
        ({'auto_augment': 'rind-m5'}, 'rind'),
        ({'auto_augment': 'rand-zz5'}, 'rand-zz5'),
        ({'interpolation': 'cubical'}, 'cubical'),
        ({'re_mode': 'blue', 're_prob': 0.5}, 'blue'),
        ({'color_jitter': 'much'}, 'much'),
        ({'scale': 7}, 'scale'),
        ({'scale': [0.5]}, 'scale'),
        ({'use_prefetcher': True}, 'use_prefetcher'),
        ({'separate': True}, 'separate'),
    ],
)
def test_what_timm_refuses_is_one_line(kwargs, needle, one_line):
    sampler = make_sampler(augmentation=Augmentation(timm=kwargs))
    before = global_states()
    with pytest.raises(InputError) as error:
        sampler.draw(0)
    one_line(error, 'augmentation', needle)
    assert global_states() == before


# timm's Mixup


def test_mixed_images_are_pairs_in_the_shares_that_their_classes_have():
    """Every image is constant, its class's number: any mixture then tells its shares by its mean."""
    labels = torch.arange(8)
    images = labels.float()[:, None, None, None].expand(8, 3, 16, 16).contiguous()
    for kwargs in ({'mixup_alpha': 1.0}, {'mixup_alpha': 0.0, 'cutmix_alpha': 1.0}):
        found, shares = mixed(images, labels, 8, kwargs, torch.Generator().manual_seed(3))
        assert_close(shares.sum(1), torch.ones(8))
        assert_close(found.mean((1, 2, 3)), shares @ torch.arange(8.0), rtol=1e-4, atol=1e-4)
        assert ((shares > 0).sum(1) <= 2).all()
        assert (shares.amax(1) < 1).any()
        assert_close(shares.sum(0), torch.ones(8))  # every image in as many as any other
    assert sorted(mixed(images, labels, 8, {'prob': 0.0}, torch.Generator())[1].argmax(1).tolist()) == list(range(8))


def test_mixing_is_reproducible_and_leaves_the_global_random_states_alone():
    images, labels = torch.rand(16, 3, 12, 12), torch.arange(16)

    def mix(seed):
        return mixed(images, labels, 16, {'cutmix_alpha': 1.0}, torch.Generator().manual_seed(seed))

    before = global_states()
    first = mix(1)
    assert global_states() == before
    random.seed(8), np.random.seed(8), torch.manual_seed(8)
    assert_close(mix(1), first, rtol=0, atol=0)
    assert not torch.equal(mix(2)[0], first[0])


@pytest.mark.parametrize(
    ('kwargs', 'count', 'needle'),
    [({'mixup_alfa': 1.0}, 4, 'mixup_alfa'), ({}, 5, 'odd'), ({'mixup_alpha': 0.0}, 4, 'Mixup')],
)
def test_what_mixup_refuses_is_one_line(kwargs, count, needle, one_line):
    images, before = torch.rand(count, 3, 8, 8), global_states()
    with pytest.raises(InputError) as error:
        mixed(images, torch.arange(count), 5, kwargs, torch.Generator())
    one_line(error, 'augmentation', needle)
    assert global_states() == before


# What cannot be


@pytest.mark.parametrize(
    ('changes', 'needles'),
    [
        ({'n_shot': 10, 'n_query': 3}, ["'class 0'", '12', '13']),
        ({'n_way': 1}, ['n_way', '1']),
        ({'n_query': 0}, ['n_query', '0']),
        ({'turns': 3}, ['turns', '3']),
        ({'sketch_groups': 1}, ['sketch_groups', '1']),
        ({'sketch_groups': -2}, ['sketch_groups', '-2']),
        ({'sketch_groups': 2, 'sketch_images': 0}, ['sketch_images', '0']),
        ({'per_step': 0}, ['per_step', '0']),
    ],
)
def test_impossible_groups_are_refused(changes, needles, one_line):
    with pytest.raises(InputError) as error:
        make_sampler(**changes)
    one_line(error, *needles)


def test_every_bank_must_suffice():
    with pytest.raises(InputError, match=r'2 classes, but set 2 has 1 to draw from \(class 0\)'):
        make_sampler([unique_bank(), unique_bank(num_classes=1)])
    make_sampler([unique_bank(num_classes=1)], turns=2)
    with pytest.raises(InputError, match='has 3 images'):
        make_sampler([unique_bank(), unique_bank(per_class=3)])


@pytest.mark.parametrize(
    ('groups', 'needed', 'most'),
    [
        ({'n_way': 8, 'n_shot': 2, 'n_query': 2}, 16, 6),  # of 2 classes four times as many, of which 3 times are there
        ({'n_way': 8, 'n_shot': 2, 'n_query': 2, 'turns': 2}, 8, 4),
        ({'n_way': 8, 'n_shot': 9, 'n_query': 7}, 64, None),
        ({'n_way': 2, 'n_shot': 9, 'n_query': 7}, 16, None),
    ],
)
def test_a_class_that_is_too_small_is_told_with_what_would_do(groups, needed, most, one_line):
    bank = unique_bank(num_classes=2, per_class=7 if groups.get('turns') else 15)
    with pytest.raises(InputError) as error:
        make_sampler([bank], **groups)
    remedy = 'lower n_shot and n_query' if most is None else f'lower n_way to {most}, or n_shot and n_query'
    one_line(error, "'class 0'", f'a group needs {needed}: {remedy}')
    if most is not None:
        make_sampler([bank], **{**groups, 'n_way': most})


def test_quarter_turns_of_oblong_images_are_refused_and_conditions_leave_them_out():
    bank = ImageBank(torch.zeros(20, 3, 12, 16, dtype=torch.uint8), torch.arange(20) % 2, ['a', 'b'])
    config = InputConfig(input_size=(3, 12, 16))
    with pytest.raises(InputError, match='square'):
        make_sampler([bank], config, n_way=4, turns=4)
    shown = [make_sampler([bank], config, conditions=1.0).draw(number) for number in range(20)]
    assert {group.support.shape[1:] for group in shown} == {(3, 12, 16)}
    assert {group.condition.turns for group in shown} == {0, 2}
    group = make_sampler([bank], config, n_way=4, turns=2).draw(0)
    assert group.support.shape == (8, 3, 12, 16)


def test_a_class_that_is_not_there_is_told_also_where_labels_come_with_the_images(one_line):
    dataset = torch.utils.data.TensorDataset(torch.rand(6, 3, 32, 32), torch.tensor([0, 2, 1, 2, 0, 1]))
    source = open_images(torch.utils.data.DataLoader(dataset, 4), input=bank_input(InputConfig()))
    bank = ImageBank.from_source(source, ['2', '0'])
    assert (bank.class_names, bank.labels.tolist()) == (('2', '0'), [0, 0, 1, 1])
    with pytest.raises(InputError) as error:
        ImageBank.from_source(source, ['3'])
    one_line(error, "'3'", '0, 1, 2')


def test_images_are_shifted_by_up_to_a_share_of_their_side_and_scaled_by_up_to_a_share():
    off = {'flip': False, 'shift': 0, 'rotation': 0, 'scale': 0, 'brightness': 0}
    rows, columns = torch.meshgrid(torch.arange(48.0) - 23.5, torch.arange(48.0) - 23.5, indexing='ij')
    spot = torch.exp(-(rows**2 + columns**2) / 18).expand(100, 1, -1, -1)

    def moment(of, **change):
        """Mean of something by place, with the spot's brightness for weights, of each of 100 changed copies."""
        weight = augment(spot, Augmentation(**off | change), torch.Generator().manual_seed(1))[:, 0]
        return (weight * of).sum((1, 2)) / weight.sum((1, 2))

    for axis in (rows, columns):
        assert 0.23 * 48 < moment(axis, shift=0.25).abs().max() < 0.25 * 48
        assert_close(moment(axis, scale=0.25), torch.zeros(100), rtol=0, atol=0.01)
    spreads = (moment(rows**2 + columns**2, scale=0.25) / 18).sqrt()
    assert 1 / 1.26 < spreads.min() < 1 / 1.2
    assert 1 / 0.8 < spreads.max() < 1 / 0.74


def test_each_image_has_a_brightness_of_its_own():
    how = Augmentation(flip=False, shift=0, rotation=0, scale=0, brightness=0.25)
    light = augment(torch.full((100, 3, 4, 4), 0.5), how, torch.Generator()).flatten(1)
    assert_close(light, light[:, :1].expand_as(light))
    assert len(light[:, 0].unique()) > 90
    assert 0.375 <= light.min() < 0.39
    assert 0.61 < light.max() <= 0.625


def test_images_of_one_set_are_mixed_with_those_of_the_others():
    """timm pairs the first image with the last: the halves of a batch of two sets, which lie one after the other."""
    labels = torch.arange(16)
    _, shares = mixed(torch.rand(16, 3, 8, 8), labels, 16, {'mixup_alpha': 1.0}, torch.Generator().manual_seed(3))
    pairs = {tuple(row.nonzero().flatten().tolist()) for row in shares}
    assert any(max(pair) < 8 or min(pair) >= 8 for pair in pairs if len(pair) == 2)


def test_a_bank_rounds_pixels_between_two_values_to_the_nearest():
    pixels = torch.tensor([0.2, 0.6, 0.9])[:, None, None, None].expand(3, 3, 8, 8) / 255 + 100 / 255
    input = bank_input(InputConfig(input_size=(3, 8, 8)))
    bank = ImageBank.from_source(open_images(pixels, ['a', 'b', 'b'], input=input))
    assert bank.images.flatten(1).unique(dim=1).flatten().tolist() == [100, 101, 101]


def test_names_without_letters_and_digits_are_the_same_only_as_they_stand():
    assert same_names(['+', '!', 'ü', '三'], ['-', '!', 'Ü', '二']) == {'!': '!', 'ü': 'Ü'}
