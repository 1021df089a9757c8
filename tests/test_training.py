import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.testing import assert_close

from timm_pudnet.config import DamagedFileError, InputConfig, InputError, NotFoundError, PudNetConfig
from timm_pudnet.images import open_images
from timm_pudnet.training import (
    Augmentation,
    Data,
    Groups,
    GroupSampler,
    ImageBank,
    Recipe,
    Schedule,
    load_bank,
    meta_train,
    train_plain,
)
from timm_pudnet.training.episodes import augment, bank_input, quarter_turns

loop = importlib.import_module('timm_pudnet.training.meta_train')  # the package's name for it is the function

PIXELS = InputConfig(input_size=(3, 12, 12), mean=(0.0,) * 3, std=(1.0,) * 3)
SMALL = InputConfig(input_size=(3, 16, 16))


@pytest.fixture(scope='module')
def bank():
    """Six classes that can be learned: a pattern each, under noise."""
    rng = torch.Generator().manual_seed(5)
    patterns = torch.randint(0, 256, (6, 1, 3, 4, 4), generator=rng).float()
    noise = torch.randint(-40, 41, (6, 10, 3, 16, 16), generator=rng)
    images = patterns.repeat_interleave(4, -1).repeat_interleave(4, -2) + noise
    labels = torch.arange(6).repeat_interleave(10)
    return ImageBank(images.clamp(0, 255).to(torch.uint8).flatten(0, 1), labels, list('abcdef'))


def make_recipe(steps=6, seed=0, **changes):
    groups = Groups(n_way=3, n_shot=2, n_query=2, per_step=2, turns=4)
    values = {
        'hypernet': PudNetConfig(model_name='test_resnet', sketch_width=16, sketch_channels=(4, 8), input=SMALL),
        'data': Data(images='nowhere'),
        'groups': groups,
        'schedule': Schedule(images=steps * groups.images_per_step, rate=2e-3),
        'seed': seed,
    }
    return Recipe(**{**values, **changes})


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


RECIPE = """
seed = 3

[hypernet]
model_name = "test_resnet"
sketch_width = 16
sketch_channels = [4, 8]
generator_kwargs = {basis_kernels = 12}
input = {input_size = [3, 16, 16], mean = [0.4, 0.5, 0.6]}

[data]
images = "torch/fashion_mnist"
classes = ["0", "1"]

[groups]
n_way = 3

[augmentation]
flip = false

[schedule]
images = 5000
rate = 1e-3
"""


def load(tmp_path, text):
    path = tmp_path / 'recipe.toml'
    path.write_text(text)
    return Recipe.load(path)


def test_a_recipe_says_everything(tmp_path):
    recipe = load(tmp_path, RECIPE)
    assert recipe == Recipe(
        hypernet=PudNetConfig(
            model_name='test_resnet',
            sketch_width=16,
            sketch_channels=(4, 8),
            generator_kwargs={'basis_kernels': 12},
            input=InputConfig(input_size=(3, 16, 16), mean=(0.4, 0.5, 0.6)),
        ),
        data=Data(images='torch/fashion_mnist', classes=('0', '1')),
        groups=Groups(n_way=3),
        augmentation=Augmentation(flip=False),
        schedule=Schedule(images=5000, rate=1e-3),
        seed=3,
    )
    assert Recipe.from_dict(recipe.to_dict()).digest == recipe.digest
    assert load(tmp_path, RECIPE.replace('rate = 1e-3', 'rate = 2e-3')).digest != recipe.digest


@pytest.mark.parametrize(
    ('old', 'new', 'needles'),
    [
        ('n_way = 3', 'n_ways = 3', ['[groups]', "'n_ways'", 'Did you mean n_way']),
        ('[schedule]', '[shedule]', ["'shedule'", 'Did you mean schedule']),
        ('mean = [0.4', 'means = [0.4', ['[hypernet.input]', "'means'", 'mean']),
        ('[data]', '[augmentation.data]', ['[data]', 'missing']),
        ('rate = 1e-3', 'rate = -1', ['[schedule]', 'rate']),
        ('flip = false', 'shift = 7', ['[augmentation]', 'shift', '7']),
        ('seed = 3', 'seed = ', ['no recipe']),
        ('seed = 3', 'groups = 3', ['groups', 'table']),
        ('model_name = "test_resnet"', '', ['[hypernet]', 'model_name']),
        ('images = 5000', 'images = "many"', ['[schedule]']),
        ('n_way = 3', 'n_way = "3"', ['[groups]', 'n_way']),
        ('n_way = 3', 'per_step = 0', ['[groups]', 'per_step']),
        ('n_way = 3', 'n_shot = -1', ['[groups]', 'n_shot']),
        ('seed = 3', 'seed = "x"', ['seed']),
        ('input = {input_size = [3, 16, 16], mean = [0.4, 0.5, 0.6]}', 'input = 32', ['input']),
        ('classes = ["0", "1"]', 'classes = "0"', ['[data]', 'classes']),
    ],
)
def test_a_wrong_recipe_is_told_in_one_line(old, new, needles, tmp_path, one_line):
    text = RECIPE.replace('[groups]\nn_way = 3', '') if new == 'groups = 3' else RECIPE
    assert old in text
    with pytest.raises(InputError) as error:
        load(tmp_path, text.replace(old, new))
    one_line(error, tmp_path / 'recipe.toml', *needles)


def test_an_absent_recipe_is_named(tmp_path, one_line):
    with pytest.raises(NotFoundError) as error:
        Recipe.load(tmp_path / 'none.toml')
    one_line(error, tmp_path / 'none.toml')


def test_the_rate_rises_then_falls_to_nearly_zero():
    recipe = make_recipe(schedule=Schedule(rate=1.0, warmup=0.2))
    rates = [loop.rate_at(step, 100, recipe) for step in range(100)]
    assert_close(rates[:20], [(step + 1) / 20 for step in range(20)])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert_close(rates[60], 0.5, rtol=0, atol=1e-6)
    assert 0 < rates[-1] < 0.001


def log_of(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def easy_recipe():
    groups = Groups(n_way=4, n_shot=3, n_query=3, per_step=1)
    schedule = Schedule(images=40 * groups.images_per_step, rate=5e-3)
    return make_recipe(groups=groups, schedule=schedule, augmentation=Augmentation(flip=False, rotation=0))


def test_meta_training_learns(bank, tmp_path):
    recipe = easy_recipe()
    hypernet = meta_train(recipe, tmp_path, bank=bank, device='cpu', progress=False)
    log = log_of(tmp_path)
    assert [entry['step'] for entry in log] == list(range(1, 41))

    def mean(entries, name):
        return sum(entry[name] for entry in entries) / len(entries)

    for name in ('metric', 'full'):
        assert mean(log[-8:], name) < 0.7 * mean(log[:8], name), name
    assert not hypernet.training
    assert hypernet.config.class_names == tuple('abcdef')
    with torch.no_grad():
        weights = hypernet(hypernet.sketch(torch.rand(4, 3, 16, 16)))
    assert all(value.isfinite().all() for value in weights.values())
    assert (weights['bn1.running_var'] - 1).abs().max() > 1e-2  # the prior of calibration was gathered


TRAINERS = pytest.mark.parametrize('train', [meta_train, train_plain])


def run(train, recipe, folder, bank, **kwargs):
    found = train(recipe, folder, bank=bank, device='cpu', progress=False, **kwargs)
    module, whitening = found if isinstance(found, tuple) else (found, found.whitening)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    return {**state, 'the whitening': whitening.clone()}


def assert_same_run(folder, weights, other_folder, other_weights):
    assert_close(weights, other_weights, rtol=0, atol=0)
    assert (folder / 'log.jsonl').read_text() == (other_folder / 'log.jsonl').read_text()
    tensors, others = (safetensors.torch.load_file(path / loop.CHECKPOINT_NAME) for path in (folder, other_folder))
    assert_close(tensors, others, rtol=0, atol=0)


@TRAINERS
def test_a_resumed_run_ends_as_if_it_had_never_stopped(train, bank, tmp_path):
    recipe = make_recipe()
    straight = run(train, recipe, tmp_path / 'straight', bank)
    run(train, recipe, tmp_path / 'resumed', bank, max_steps=3)
    assert len(log_of(tmp_path / 'resumed')) == 3
    torch.manual_seed(99)  # another process has another global state
    resumed = run(train, recipe, tmp_path / 'resumed', bank)
    assert len(log_of(tmp_path / 'resumed')) == 6
    assert_same_run(tmp_path / 'straight', straight, tmp_path / 'resumed', resumed)
    other = run(train, make_recipe(seed=1), None, bank)
    assert any(not torch.equal(other[key], straight[key]) for key in straight)


@TRAINERS
def test_a_killed_run_goes_on_from_its_last_checkpoint(train, bank, tmp_path, monkeypatch):
    recipe = make_recipe()
    straight = run(train, recipe, tmp_path / 'straight', bank)
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return clip(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, 'clip_grad_norm_', killed)
        with pytest.raises(KeyboardInterrupt):
            run(train, recipe, tmp_path / 'killed', bank, checkpoint_seconds=0)
    assert len(log_of(tmp_path / 'killed')) == 4
    assert_same_run(tmp_path / 'straight', straight, tmp_path / 'killed', run(train, recipe, tmp_path / 'killed', bank))


def test_a_run_of_a_target_with_dropout_resumes_too(bank, tmp_path):
    hypernet = PudNetConfig(
        model_name='test_resnet', model_kwargs={'drop_rate': 0.3}, sketch_width=16, sketch_channels=(4, 8), input=SMALL
    )
    recipe = make_recipe(steps=3, hypernet=hypernet)
    straight = run(meta_train, recipe, tmp_path / 'straight', bank)
    torch.manual_seed(5)
    run(meta_train, recipe, tmp_path / 'resumed', bank, max_steps=2)
    torch.manual_seed(7)
    resumed = run(meta_train, recipe, tmp_path / 'resumed', bank)
    assert_same_run(tmp_path / 'straight', straight, tmp_path / 'resumed', resumed)


def test_training_leaves_the_global_random_state_alone(bank):
    before = torch.get_rng_state()
    run(meta_train, make_recipe(), None, bank, max_steps=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_of_another_recipe_or_kind_is_refused(bank, tmp_path, one_line):
    run(meta_train, make_recipe(), tmp_path, bank, max_steps=1)
    for train, recipe in ((meta_train, make_recipe(seed=1)), (train_plain, make_recipe())):
        with pytest.raises(InputError) as error:
            run(train, recipe, tmp_path, bank)
        one_line(error, tmp_path / loop.CHECKPOINT_NAME, 'another recipe')


@pytest.mark.parametrize('keep', [0.0, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused_in_one_line(keep, bank, tmp_path, one_line):
    run(meta_train, make_recipe(), tmp_path, bank, max_steps=1)
    path = tmp_path / loop.CHECKPOINT_NAME
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(DamagedFileError) as error:
        run(meta_train, make_recipe(), tmp_path, bank)
    one_line(error, path, 'damaged')


def test_a_save_that_fails_midway_leaves_the_earlier_checkpoint(bank, tmp_path, monkeypatch):
    run(meta_train, make_recipe(), tmp_path, bank, max_steps=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def disk_full(tensors, path, metadata=None):
        Path(path).write_bytes(safetensors.torch.save(tensors, metadata)[:1000])
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, 'save_file', disk_full)
        with pytest.raises(OSError, match='No space left'):
            run(meta_train, make_recipe(), tmp_path, bank, max_steps=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run(meta_train, make_recipe(), tmp_path, bank, max_steps=2)
    assert len(log_of(tmp_path)) == 2


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(bank, tmp_path, monkeypatch):
    run(meta_train, make_recipe(), tmp_path, bank, max_steps=2)
    before = (tmp_path / loop.CHECKPOINT_NAME).read_bytes()
    losses = loop.group_losses

    def broken(*args, **kwargs):
        found = losses(*args, **kwargs)
        return type(found)(found.metric * math.nan, found.full, found.consistency)

    monkeypatch.setattr(loop, 'group_losses', broken)
    with pytest.raises(FloatingPointError, match='step 2: the loss'):
        run(meta_train, make_recipe(), tmp_path, bank, checkpoint_seconds=0)
    assert (tmp_path / loop.CHECKPOINT_NAME).read_bytes() == before


def test_a_gradient_that_is_not_finite_never_gets_into_a_checkpoint(bank, tmp_path, monkeypatch):
    run(meta_train, make_recipe(), tmp_path, bank, max_steps=1)
    losses = loop.group_losses

    def broken(*args, **kwargs):
        found = losses(*args, **kwargs)
        return type(found)(
            found.metric + (found.metric * 0).sqrt(), found.full, found.consistency
        )  # slope 0 * infinity

    monkeypatch.setattr(loop, 'group_losses', broken)
    with pytest.raises(FloatingPointError):
        run(meta_train, make_recipe(), tmp_path, bank, checkpoint_seconds=0)
    tensors = safetensors.torch.load_file(tmp_path / loop.CHECKPOINT_NAME)
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())


def test_the_hypernetwork_says_what_its_training_cost(bank):
    recipe = make_recipe()
    training = meta_train(recipe, None, bank=bank, device='cpu', progress=False, max_steps=2).config.training
    assert training['images'] == 2 * recipe.groups.images_per_step == 48
    assert training['recipe_digest'] == recipe.digest
    assert training['seconds'] >= 0


def test_plain_training_gives_a_feature_model_that_learned(bank, tmp_path):
    recipe = easy_recipe()
    model, whitening = train_plain(recipe, tmp_path, bank=bank, device='cpu', progress=False)
    assert whitening.shape == (model.num_features, model.num_features)
    losses = [entry['full'] for entry in log_of(tmp_path)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert not model.training
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, model.num_features)
