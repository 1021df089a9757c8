import dataclasses
import json
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from timm_pudnet.config import InputConfig, InputError
from timm_pudnet.training import Condition, Groups, GroupSampler, ImageBank

SAME = (0, 1, 2)
SMALL = torch.tensor([[[[0.0, 0.25], [0.5, 1.0]], [[0.1, 0.2], [0.3, 0.4]], [[0.9, 0.8], [0.7, 0.6]]]])  # [1, 3, 2, 2]


def test_a_condition_of_nothing_changes_nothing():
    assert_close(Condition(order=SAME).apply(SMALL), SMALL, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('parts', 'expected'),
    [
        (
            {'order': (2, 0, 1)},
            [[[0.9, 0.8], [0.7, 0.6]], [[0.0, 0.25], [0.5, 1.0]], [[0.1, 0.2], [0.3, 0.4]]],
        ),
        (
            {'inverted': True},
            [[[1.0, 0.75], [0.5, 0.0]], [[0.9, 0.8], [0.7, 0.6]], [[0.1, 0.2], [0.3, 0.4]]],
        ),
        (
            {'turns': 1},  # against the clock, as `rot90`
            [[[0.25, 1.0], [0.0, 0.5]], [[0.2, 0.4], [0.1, 0.3]], [[0.8, 0.6], [0.9, 0.7]]],
        ),
        (
            {'turns': 2},
            [[[1.0, 0.5], [0.25, 0.0]], [[0.4, 0.3], [0.2, 0.1]], [[0.6, 0.7], [0.8, 0.9]]],
        ),
        (
            {'turns': 3},
            [[[0.5, 0.0], [1.0, 0.25]], [[0.3, 0.1], [0.4, 0.2]], [[0.7, 0.9], [0.6, 0.8]]],
        ),
        (
            {'gamma': 2.0},
            [[[0.0, 0.0625], [0.25, 1.0]], [[0.01, 0.04], [0.09, 0.16]], [[0.81, 0.64], [0.49, 0.36]]],
        ),
        (  # gamma is of the scene, before bright becomes dark
            {'gamma': 2.0, 'inverted': True, 'order': (1, 0, 2)},
            [[[0.99, 0.96], [0.91, 0.84]], [[1.0, 0.9375], [0.75, 0.0]], [[0.19, 0.36], [0.51, 0.64]]],
        ),
    ],
)
def test_each_part_does_what_it_says(parts, expected):
    before = SMALL.clone()
    assert_close(Condition(**{'order': SAME, **parts}).apply(SMALL), torch.tensor([expected]))
    assert_close(SMALL, before, rtol=0, atol=0)  # the images handed over stay as they are


def test_noise_has_its_spread_differs_by_image_and_follows_the_generator():
    condition, grey = Condition(order=(0,), noise=0.05), torch.full((4, 1, 64, 64), 0.5)
    found = condition.apply(grey, torch.Generator().manual_seed(3))
    noise = found - grey
    assert_close(noise.std(dim=(1, 2, 3)), torch.full((4,), 0.05), rtol=0.05, atol=0)
    assert noise.mean().abs() < 0.002
    assert (noise[0] - noise[1]).std() > 0.06
    state = torch.get_rng_state()
    assert_close(condition.apply(grey, torch.Generator().manual_seed(3)), found, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(condition.apply(grey, torch.Generator().manual_seed(4)), found)
    dark = condition.apply(torch.zeros(1, 1, 64, 64), torch.Generator().manual_seed(3))
    assert (dark.min(), dark.max() > 0.1) == (0, True)  # pixels stay in 0-1


def test_draws_cover_everything():
    rng = torch.Generator().manual_seed(0)
    drawn = [Condition.draw(rng) for _ in range(600)]
    assert len({condition.order for condition in drawn}) == 6
    assert len({(c.inverted, c.turns) for c in drawn}) == 8
    inverted, turned, orders = (Counter(getattr(c, name) for c in drawn) for name in ('inverted', 'turns', 'order'))
    assert min(inverted.values()) > 250
    assert min(turned.values()) > 110
    assert min(orders.values()) > 60
    gammas, noises = sorted(c.gamma for c in drawn), sorted(c.noise for c in drawn)
    assert 0.5 <= gammas[0] < 0.51
    assert 1.96 < gammas[-1] <= 2
    assert abs(gammas[300] - 1) < 0.1  # darker as often as brighter
    assert 0 <= noises[0] < 0.001
    assert 0.099 < noises[-1] <= 0.1
    oblong = [Condition.draw(rng, 1, square=False) for _ in range(50)]
    assert {c.turns for c in oblong} == {0, 2}
    assert {c.order for c in oblong} == {(0,)}
    assert Condition.draw(torch.Generator().manual_seed(7)) == Condition.draw(torch.Generator().manual_seed(7))


def test_a_condition_survives_json():
    for number in range(20):
        condition = Condition.draw(torch.Generator().manual_seed(number))
        assert Condition(**json.loads(json.dumps(dataclasses.asdict(condition)))) == condition


@pytest.mark.parametrize(
    ('parts', 'needle'),
    [
        ({'order': (0, 0, 1)}, 'permutation'),
        ({'order': (1, 2, 3)}, 'permutation'),
        ({'turns': 4}, 'turns'),
        ({'turns': -1}, 'turns'),
        ({'gamma': 0.0}, 'gamma'),
        ({'gamma': float('nan')}, 'gamma'),
        ({'noise': -0.1}, 'noise'),
        ({'noise': float('nan')}, 'noise'),
    ],
)
def test_a_condition_out_of_range_is_refused(parts, needle, one_line):
    with pytest.raises(InputError) as error:
        Condition(**{'order': SAME, **parts})
    one_line(error, needle)


# In groups


GREYS = (40, 90, 160)  # the three channels of every image of the bank below
PIXELS = InputConfig(input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)


def flat_sampler(**changes):
    """Groups of one flat picture with one bright corner, so that its condition can be read off an image."""
    image = torch.tensor(GREYS, dtype=torch.uint8)[:, None, None].repeat(1, 8, 8)
    image[:, 0, 0] = 0
    bank = ImageBank(image.repeat(40, 1, 1, 1), torch.arange(40) % 2, ['a', 'b'])
    groups = Groups(**{'n_way': 2, 'n_shot': 3, 'n_query': 2, 'conditions': 1.0, **changes})
    return GroupSampler([bank], PIXELS, groups)


def seen_condition(image):
    """Order, inversion, turns and gamma of a picture of the bank under at most 0.1 of noise; gamma roughly."""
    levels = image[:, 2:6, 2:6].mean((1, 2))  # the corner is elsewhere
    corners = torch.stack([image[:, r, c].mean() for r, c in ((0, 0), (7, 0), (7, 7), (0, 7))])
    away = (corners - levels.mean()).abs()
    inverted = bool(corners[away.argmax()] > levels.mean())
    levels = 1 - levels if inverted else levels
    order = levels.argsort().argsort().tolist()  # GREYS rise
    gamma = float(levels[order.index(2)].log() / torch.tensor(GREYS[2] / 255).log())
    return tuple(order), inverted, int(away.argmax()), round(gamma, 1)


def alike(first, second):
    return first[:3] == second[:3] and abs(first[3] - second[3]) < 0.45


def test_all_images_of_a_group_share_one_condition_and_groups_differ():
    sampler, found = flat_sampler(), []
    for number in range(40):
        group = sampler.draw(number)
        seen = [seen_condition(image) for image in torch.cat([group.support, group.query])]
        assert all(alike(seen[0], other) for other in seen), seen
        found.append(seen[0])
    assert len({condition[:3] for condition in found}) > 20
    assert max(c[3] for c in found) - min(c[3] for c in found) > 0.8


def test_a_share_of_the_groups_has_a_condition():
    plain = flat_sampler(conditions=0.0).draw(0).support[0]
    sampler = flat_sampler(conditions=0.25, sketch_groups=200, sketch_images=1)
    groups = [sampler.draw(number) for number in range(200)]
    bare = [all(torch.equal(image, plain) for image in torch.cat([g.support, g.query])) for g in groups]
    touched = [any(torch.equal(image, plain) for image in torch.cat([g.support, g.query])) for g in groups]
    assert bare == touched  # a whole group or none of it
    assert 0.65 < sum(bare) / 200 < 0.85
    halves = [torch.equal(pair[0, 0], plain) for pair in sampler.draw_halves(0)]
    assert halves == [True] + 199 * [False]  # two plain groups of the same classes could not be told apart


def test_without_conditions_images_are_as_they_are():
    image = torch.tensor(GREYS)[:, None, None].repeat(1, 8, 8) / 255
    image[:, 0, 0] = 0
    group = flat_sampler(conditions=0.0).draw(0)
    assert_close(torch.cat([group.support, group.query]), image.repeat(10, 1, 1, 1))


def test_a_group_comes_without_its_condition_too_but_turned():
    image = torch.tensor(GREYS)[:, None, None].repeat(1, 8, 8) / 255
    image[:, 0, 0] = 0
    turns = set()
    for number in range(20):
        group = flat_sampler(conditions=0.8).draw(number, plain=True)
        same = flat_sampler(conditions=0.8).draw(number)
        assert same.plain is None
        assert_close((group.support, group.query), (same.support, same.query), rtol=0, atol=0)
        turns.add(turn := seen_condition(group.support[0])[2])
        assert_close(group.plain, image.rot90(turn, (1, 2)).repeat(10, 1, 1, 1))
    assert turns == {0, 1, 2, 3}


def test_the_halves_of_a_group_share_a_condition_and_other_groups_have_others():
    halves = flat_sampler(sketch_groups=12, sketch_images=4).draw_halves(0)
    assert halves.shape == (12, 2, 4, 3, 8, 8)
    found = []
    for pair in halves.flatten(1, 2):
        seen = [seen_condition(image) for image in pair]
        assert all(alike(seen[0], other) for other in seen), seen
        found.append(seen[0][:3])
    assert len(set(found)) > 8


def test_only_the_condition_tells_the_halves_of_groups_apart():
    # Four square rings: which of the inner three are brighter tells the class, how bright the outer one is the image.
    near = torch.minimum(torch.arange(8), torch.arange(8).flip(0))
    ring, numbers = torch.minimum(near[:, None], near), torch.arange(24)
    marked = (numbers % 6 + 1)[:, None, None] * 2 >> ring & 1
    images = (40 + 2 * numbers)[:, None, None] + 120 * marked
    bank = ImageBank(images[:, None].repeat(1, 3, 1, 1).byte(), numbers % 6, [f'class {label}' for label in range(6)])
    groups = Groups(n_way=2, n_shot=2, n_query=2, conditions=0.5, sketch_groups=3, sketch_images=50)
    halves = GroupSampler([bank], PIXELS, groups).draw_halves(0)
    plain = ((halves[0, :, :, 0, 0, 0] * 255).round().long() - 40) // 2
    first, second = ({number % 6 for number in half} for half in plain.tolist())
    assert len(first) == len(second) == 2
    assert not first & second
    assert len(plain.unique()) == 16

    def classes(half):
        levels = torch.stack([half.mean(1)[:, ring == number].mean(1) for number in range(4)], 1)
        seen = (levels[:, 1:] - levels[:, :1]).abs() > 0.15  # under any condition
        return {int(code) - 1 for code in seen.long() @ torch.tensor([1, 2, 4])}

    assert [[classes(half) for half in pair] for pair in halves] == 3 * [[first, second]]


def test_a_batch_is_of_several_conditions():
    sampler = flat_sampler()
    images, labels = sampler.batch(0, 100)
    assert len(images) == len(labels) == 100
    seen = [seen_condition(image) for image in images]
    for start in range(0, 100, 16):
        part = seen[start : start + 16]
        assert all(alike(part[0], other) for other in part)
    assert len({condition[:3] for condition in seen}) >= 5
    assert not torch.equal(sampler.batch(1, 100)[0], images)


def test_where_turned_classes_are_told_apart_no_condition_turns():
    bank = ImageBank(torch.zeros(12, 3, 8, 8, dtype=torch.uint8), torch.arange(12) % 3, ('a', 'b', 'c'))
    for turns, wanted in ((1, {0, 1, 2, 3}), (2, {0}), (4, {0})):
        groups = Groups(n_way=2, n_shot=1, n_query=1, turns=turns, conditions=1.0)
        sampler = GroupSampler([bank], InputConfig(input_size=(3, 8, 8)), groups)
        assert {sampler.draw(number).condition.turns for number in range(30)} == wanted


def test_where_all_groups_have_conditions_the_first_one_s_halves_have_one_too():
    sampler = flat_sampler(sketch_groups=2, sketch_images=1)
    assert len({seen_condition(sampler.draw_halves(number)[0, 0, 0])[:3] for number in range(20)}) > 8
