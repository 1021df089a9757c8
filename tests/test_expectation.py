"""evaluation/expectation.py: what accuracy to expect, how familiar images are, and how honestly that is checked."""

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from timm_pudnet import DamagedFileError, InputConfig, InputError, PudNet, load_hypernet
from timm_pudnet.cli.predict import _expectation_of
from timm_pudnet.evaluation import Expectation, fit_expectation, rank_correlation, read_traits
from timm_pudnet.evaluation.expectation import (
    HeldOutSet,
    Traits,
    _left_out_guesses,
    leave_one_out,
    measure_traits,
    sketch_distance,
)
from timm_pudnet.images import open_images
from timm_pudnet.predict import predict_model
from timm_pudnet.training import bank_input

HUB = Path(__file__).parents[1] / 'hub'
FIXED = {
    'weights_digest': 'x',
    'references': torch.randn(8, 3, generator=torch.Generator().manual_seed(0)),
    'sizes': (4, 64),
    'familiar': ((4.0, 8.0), (2.0, 4.0)),
}


@pytest.fixture(scope='module')
def held_out():
    """Sets whose accuracy falls with their distance and number of classes, and whose left-out images are a sample."""

    def make(count=40, domains=5, seed=0):
        generator = torch.Generator().manual_seed(seed)
        sets = []
        for number in range(count * domains):
            k = (2, 5, 10, 20)[number % 4]
            shot = int(torch.randint(3, 20, (), generator=generator))
            distance = float(torch.rand((), generator=generator) * 10 + 1)
            accuracy = torch.tensor(3 - math.log(distance) - 0.5 * math.log(k)).sigmoid()
            found = torch.bernoulli(accuracy.expand(k * shot), generator=generator).mean()
            right = torch.bernoulli(accuracy.expand(300), generator=generator).sum()
            traits = Traits(distance=distance, leave_one_out=float(found), num_classes=k, images=k * shot)
            sets.append(HeldOutSet(domain=f'd{number // count}', traits=traits, right=int(right), total=300))
        return sets

    return make


@pytest.fixture(scope='module')
def fitted(held_out):
    return fit_expectation(held_out(), **FIXED)


def test_rank_correlation_is_pearson_s_of_the_ranks():
    first, second = torch.randn(30).tolist(), torch.randn(30).tolist()
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (first, second)])
    assert rank_correlation(first, second) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))
    assert rank_correlation([1, 1, 2], [1, 1, 5]) == pytest.approx(1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_leaving_one_out_is_what_doing_it_image_by_image_gives():
    features, labels = torch.randn(30, 5).double(), torch.arange(30) % 4
    labels[0] = 4  # alone in its class: nothing is left of it when it is left out
    root = torch.randn(5, 5).double()
    whitening = root @ root.t()
    expected = []
    for i in range(1, 30):
        rest = torch.arange(30) != i
        centroids = torch.stack([features[rest & (labels == c)].mean(0) for c in range(5)])
        cosines = F.cosine_similarity(features[i] @ whitening, centroids @ whitening)
        expected.append(int(cosines.argmax()) == labels[i])
    found = leave_one_out(features, labels, whitening)
    assert found.tolist() == expected
    assert 0 < found.float().mean() < 1
    with pytest.raises(InputError, match='two images'):
        leave_one_out(features[:3], torch.arange(3), whitening)


def test_distance_is_in_standard_deviations_of_the_references():
    references = FIXED['references']
    near, far = references.mean(0), references.mean(0) + 100
    assert sketch_distance(near, references) < sketch_distance(far, references)
    stretched = torch.tensor([1.0, 100.0, 0.01])
    assert sketch_distance(near * stretched, references * stretched) == pytest.approx(sketch_distance(near, references))


def test_the_fit_ranks_held_out_domains_and_its_interval_holds(fitted):
    check = fitted.check
    assert check['sets'] == 200
    assert check['rank_correlation'] > 0.9
    assert check['rank_correlation_of_sketch'] > 0.8
    assert 0.6 < check['rank_correlation_at_equal_classes'] < check['rank_correlation']
    assert check['mean_error'] < 0.08
    assert 0.88 <= check['coverage'] <= 1
    assert set(check['domains']) == {f'd{number}' for number in range(5)}


def test_where_nothing_tells_the_accuracy_the_check_says_so(held_out):
    sets = held_out()
    order = torch.randperm(len(sets)).tolist()
    shuffled = [dataclasses.replace(one, right=sets[place].right) for one, place in zip(sets, order, strict=True)]
    assert abs(fit_expectation(shuffled, **FIXED).check['rank_correlation']) < 0.3


def test_sets_that_are_all_as_accurate_rank_nothing_and_are_saved(held_out, tmp_path):
    found = fit_expectation([dataclasses.replace(one, right=300) for one in held_out()], **FIXED)
    assert found.check['rank_correlation'] == found.check['rank_correlation_at_equal_classes'] == 0
    found.save(tmp_path)
    assert Expectation.load(tmp_path) == found


def test_a_domain_is_expected_by_a_fit_that_did_not_see_it(held_out):
    sets = held_out()
    changed = [dataclasses.replace(one, right=0) if one.domain == 'd2' else one for one in sets]
    before, after = ({id(one.traits): guess for one, guess in _left_out_guesses(part)} for part in (sets, changed))
    for one in sets:
        same = before[id(one.traits)] == after[id(one.traits)]
        assert same == (one.domain == 'd2')


def test_few_domains_are_refused(held_out, one_line):
    with pytest.raises(InputError) as error:
        fit_expectation(held_out(domains=3), **FIXED)
    one_line(error, 'at least 4 domains', '3')


def test_the_more_images_the_more_their_own_word_counts_and_the_narrower_the_interval(fitted):
    traits = [Traits(distance=9, leave_one_out=0.99, num_classes=5, images=images) for images in (10, 100, 10_000)]
    found = [fitted.expect(one) for one in traits]
    accuracies, widths = [row[0] for row in found], [row[2] - row[1] for row in found]
    assert accuracies == sorted(accuracies)
    assert accuracies[-1] == pytest.approx(0.99, abs=0.01)
    assert widths == sorted(widths, reverse=True)
    assert all(0 < low < accuracy < high < 1 for accuracy, low, high in found)
    nearer = Traits(distance=1, leave_one_out=0.5, num_classes=5, images=10)
    assert fitted.expect(nearer)[0] > fitted.expect(dataclasses.replace(nearer, distance=10))[0]


@pytest.mark.parametrize(
    ('distance', 'images', 'said'),
    [
        (2, 64, 'like'),
        (3, 64, 'edge'),
        (5, 64, 'unlike'),
        (5, 4, 'edge'),
        (9, 1, 'unlike'),
        (2.9, 16, 'like'),
        (3.1, 16, 'edge'),
    ],
)
def test_what_is_familiar_depends_on_the_number_of_images(distance, images, said, fitted):
    assert fitted.familiarity(distance, images) == said


@pytest.mark.parametrize(
    ('changes', 'needle'),
    [
        ({'noise': (-1.0, 0.5)}, 'noise'),
        ({'worth': 0.0}, 'worth'),
        ({'width': -2.0}, 'width'),
        ({'sizes': (0,), 'familiar': ((1.0, 2.0),)}, 'sizes'),
        ({'sizes': (8, 4), 'familiar': ((1.0, 2.0),) * 2}, 'sizes'),
    ],
)
def test_numbers_that_nothing_can_be_expected_by_are_refused(changes, needle, fitted, one_line):
    with pytest.raises(InputError) as error:
        dataclasses.replace(fitted, **changes)
    one_line(error, 'expectation', needle)


def test_an_interval_of_any_width_is_between_none_and_all(fitted):
    wide = dataclasses.replace(fitted, width=1e9)
    found = wide.expect(Traits(distance=1, leave_one_out=0.5, num_classes=5, images=10))
    assert found[1:] == (0.0, 1.0)


def test_an_expectation_survives_its_file(fitted, tmp_path):
    assert Expectation.load(tmp_path) is None
    fitted.save(tmp_path)
    again = Expectation.load(tmp_path)
    assert again == fitted
    assert '0.9' in again.in_words()
    assert 'held-out sets of 5 domains' in again.in_words()


@pytest.mark.parametrize(
    'change',
    [
        {'check': {'a': 1}},
        {'check': [1]},
        {'check': 'good'},
        {'check': {'sets': 'many', 'domains': {}, 'rank_correlation': 1, 'mean_error': 1, 'coverage': 1}},
        {'references': [[1.0, 2.0]] * 8 + [[1.0]]},
        {'references': [['a', 'b']] * 9},
        {'worth': 10**400},
    ],
    ids=str,
)
def test_a_file_that_a_stranger_bent_is_one_line(change, fitted, tmp_path, one_line):
    path = fitted.save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DamagedFileError) as error:
        Expectation.load(tmp_path)
    one_line(error, path, 'fit it again')
    path.write_text('[' * 100_000)
    with pytest.raises(DamagedFileError) as error:
        Expectation.load(tmp_path)
    one_line(error, path, 'deeply')


@pytest.mark.parametrize(
    'text', ['', '[]', '{}', '{"a": 1}', None], ids=['empty', 'list', 'no keys', 'other keys', 'not finite']
)
def test_a_damaged_file_is_one_line(text, fitted, tmp_path, one_line):
    path = fitted.save(tmp_path)
    if text is None:
        text = json.dumps({**json.loads(path.read_text()), 'worth': math.inf})
    path.write_text(text)
    with pytest.raises(DamagedFileError) as error:
        Expectation.load(tmp_path)
    one_line(error, path, 'fit it again')


def test_traits_of_a_folder_are_those_of_its_images(tiny, fitted, pictures, monkeypatch):
    pixels, names = pictures(24)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    fitted = dataclasses.replace(fitted, references=tuple(map(tuple, torch.randn(8, 16).tolist())))
    model = predict_model('test_resnet', images, names, hypernet=tiny)
    source = open_images(images, names, input=tiny.config.input)
    (batch, labels), *_ = source.batches()
    features = model.forward_head(model.forward_features(batch), pre_logits=True).detach()
    expected = measure_traits(tiny.sketch(source), features, labels, tiny.whitening, torch.tensor(fitted.references))
    found = read_traits(tiny, model, source, fitted)
    assert found == dataclasses.replace(expected, sketch_images=pytest.approx(24))
    fewer = [row for row, name in enumerate(names) if name != names[0]] + [names.index(names[0])]
    unequal = read_traits(tiny, model, source.subset(fewer), fitted)
    assert unequal.sketch_images == pytest.approx(9 / (1 + 1 / 8 + 1 / 8)), 'the one image weighs as much as eight'
    assert found.leave_one_out > 0.6  # a pattern each
    copies = open_images(images.repeat(3, 1, 1, 1), list(names) * 3, input=tiny.config.input)
    copied = read_traits(tiny, model, copies, fitted)
    assert (copied.images, copied.leave_one_out) == (24, found.leave_one_out), 'a copy does not find its original'
    assert (found.num_classes, found.images) == (3, 24)
    assert read_traits(tiny, model, open_images(images, input=tiny.config.input), fitted) is None
    monkeypatch.setattr('timm_pudnet.evaluation.expectation.MOST_IMAGES', 1)  # of a large set, 20 of each class
    pixels, names = pictures(90)
    large = open_images(torch.from_numpy(pixels).permute(0, 3, 1, 2), names, input=tiny.config.input)
    assert read_traits(tiny, model, large, fitted).images == 60
    alone = open_images(images[:3], names[:3], input=tiny.config.input)
    assert read_traits(tiny, model, alone, fitted) is None


@pytest.fixture
def script(monkeypatch):
    """hub/expectation.py, of few images, groups and sets."""
    pytest.importorskip('matplotlib')
    spec = importlib.util.spec_from_file_location('hub_expectation', HUB / 'expectation.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {'EACH': 8, 'REFERENCES': 6, 'SIZES': {4: (2, 2), 64: (2, 4)}}.items():
        monkeypatch.setattr(module, name, value)

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['expectation.py', *map(str, args)])
        module.main()

    module.run = run
    return module


@pytest.fixture
def trained(tmp_path, pictures, write_folder):
    """The folder of a hypernetwork for images of 40 pixels and, with a recipe, of what it was trained on."""
    hypernet = PudNet.for_target(
        'test_resnet', sketch_width=16, input=InputConfig(input_size=(3, 40, 40)), class_names=('cup', 'jar')
    )
    folder = hypernet.save_pretrained(tmp_path / 'test_resnet.small')
    recipe = '[hypernet]\nmodel_name = "test_resnet"\n[groups]\nn_way = 2\n'
    for seed, split in enumerate(('one', 'two')):
        write_folder(tmp_path / 'images' / split, *pictures(40, ('bowl', 'cup', 'jar', 'pan'), seed=seed))
        recipe += f'[[data]]\nimages = "torch/image_folder"\ndata_dir = "{tmp_path / "images"}"\nsplit = "{split}"\n'
    (folder / 'recipe.toml').write_text(recipe)
    return folder


@pytest.mark.parametrize('size', [(3, 40, 40), (1, 28, 28), (1, 32, 32)], ids=str)
@pytest.mark.parametrize('domain', ['letters', 'textures', 'cells'])
def test_images_that_the_script_makes_are_seen_as_a_prediction_sees_them(domain, size, script):
    config = bank_input(InputConfig(input_size=size, mean=(0.4,) * size[0], std=(0.2,) * size[0]))
    make = getattr(script, domain)
    bank, drawn = make(config), make(bank_input(InputConfig(input_size=(3, 32, 32))))
    bank.check_size(config)
    ((seen, _),) = open_images(drawn.images, input=config).batches(len(drawn.labels))
    assert torch.equal(bank.images, (seen * 255).round().to(torch.uint8))
    assert torch.equal(bank.labels, torch.arange(len(bank.class_names)).repeat_interleave(8))


def test_the_script_fits_what_its_recipe_and_the_made_domains_show(trained, script, monkeypatch, capsys):
    seen, held_out = [], script._held_out
    monkeypatch.setattr(script, '_held_out', lambda *args: seen.append(args[2:4]) or held_out(*args))
    script.run(trained, '--sets', 3)
    found = Expectation.load(trained)
    assert set(found.check['domains']) == {'torch/image_folder', 'letters', 'textures', 'cells'}
    assert found.check['sets'] == len(seen) == 5 * 3, 'two splits of one data set are two banks of one domain'
    assert {tuple(bank.images.shape[1:]) for _, bank in seen} == {(3, 40, 40)}
    splits = {id(bank): bank for domain, bank in seen if domain == 'torch/image_folder'}.values()
    assert [bank.class_names for bank in splits] == [('bowl', 'pan')] * 2
    assert not torch.equal(*(bank.images for bank in splits))
    assert _expectation_of(load_hypernet(trained)) == found


def test_a_domain_at_another_size_than_the_hypernetwork_s_is_refused(trained, script, monkeypatch, one_line):
    small = script.cells(bank_input(InputConfig(input_size=(3, 32, 32))))
    monkeypatch.setattr(script, 'cells', lambda config: small)
    with pytest.raises(InputError) as error:
        script.run(trained)
    one_line(error, '3x32x32', '3x40x40')


@pytest.mark.parametrize('where', ['recipe', 'domain'])
def test_a_domain_with_too_few_images_of_a_class_is_told(where, trained, script, pictures, write_folder, tmp_path):
    few = tmp_path / 'images' / 'two' if where == 'recipe' else tmp_path / 'few'
    if where == 'domain':
        write_folder(few, *pictures(40, ('lid', 'pan'), seed=3))
    for path in sorted((few / 'pan').iterdir())[3:]:
        path.unlink()
    with pytest.raises(SystemExit, match='4 images or more') as stopped:
        script.run(trained, *(['--domain', few] if where == 'domain' else []))
    assert str(stopped.value).startswith('torch/image_folder' if where == 'recipe' else str(few))


@pytest.mark.parametrize(
    'folder', [path.parent for path in sorted(HUB.glob('*/expectation.json'))], ids=lambda x: x.name
)
def test_a_published_expectation_is_of_the_published_weights_and_ranks_domains_that_it_did_not_see(folder):
    found = _expectation_of(load_hypernet(folder))  # which warns of other weights, or of another config
    assert found.check['sets'] >= 100
    assert len(found.check['domains']) >= 5
    assert found.check['rank_correlation'] >= 0.8


def test_equal_values_share_the_mean_of_their_ranks():
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9**0.5)  # of the ranks 1, 2.5, 2.5, 4


def test_the_interval_is_of_what_is_wrong_with_so_many_images(fitted):
    noisy = dataclasses.replace(fitted, noise=(0.01, 4.0), width=2.0)
    for images in (10, 1000):
        _, low, high = noisy.expect(Traits(distance=3, leave_one_out=0.5, num_classes=5, images=images))
        half = (torch.tensor(high).double().logit() - torch.tensor(low).double().logit()) / 2
        assert float(half) == pytest.approx(2 * math.sqrt(0.01 + 4 / images), rel=1e-4)


def test_traits_of_a_large_set_are_of_images_spread_over_each_class(tiny, fitted, pictures, monkeypatch):
    monkeypatch.setattr('timm_pudnet.evaluation.expectation.MOST_IMAGES', 1)  # then 20 of each class
    pixels, names = pictures(90)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    fitted = dataclasses.replace(fitted, references=tuple(map(tuple, torch.randn(8, 16).tolist())))
    model, source = (
        predict_model('test_resnet', images, names, hypernet=tiny),
        open_images(images, names, input=tiny.config.input),
    )
    spread = torch.linspace(0, 29, 20).long() * 3
    some = source.subset(torch.cat([spread, spread + 1, spread + 2]).sort().values)
    assert read_traits(tiny, model, source, fitted) == read_traits(tiny, model, some, fitted)
