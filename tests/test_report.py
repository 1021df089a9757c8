"""evaluation/report.py: the page of a prediction, what gets into it and what cannot, and how browsers take it."""

import dataclasses
import html.parser
import io
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from torch.utils.data import DataLoader

import timm_pudnet
from timm_pudnet import InputConfig, NotFoundError, OutputExistsError, PudNet, PudNetWarning
from timm_pudnet.cli import main
from timm_pudnet.evaluation import (
    HeldOutTest,
    Report,
    fit_expectation,
    holdout,
    make_report,
    measure_held_out,
    read_traits,
    weights_digest,
)
from timm_pudnet.evaluation.expectation import HeldOutSet, Traits
from timm_pudnet.evaluation.holdout import raw_pixels, split_held_out
from timm_pudnet.evaluation.report import feature_map, sample_features, some_images
from timm_pudnet.files import config_sha256
from timm_pudnet.images import open_images
from timm_pudnet.predict import predict_model

NASTY = (
    '<script>alert(1)</script>',
    '"><img src=x onerror=alert(1)>',
    '${body} $title %s {0}',
    '猫と犬',
    'x' * 300,
    '&amp;',
)
VOID = {'meta', 'img'}


class Page(html.parser.HTMLParser):
    """Its elements, its text, and whether every element is closed in its place."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text = [], [], ''
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope='session')
def make():
    """Makes a report of random results: `n` images tested of `k` classes."""

    def report(n=60, names=('a', 'b', 'c'), side=32, samples=2, **changes):
        rng = torch.Generator().manual_seed(0)
        k = len(names)
        labels = torch.arange(n) % k
        guesses = torch.where(torch.rand(n, generator=rng) < 0.7, labels, torch.randint(k, (n,), generator=rng))
        wrong = (guesses != labels).nonzero().flatten().tolist()

        def noise():
            return torch.randint(256, (3, side, side), generator=rng, dtype=torch.uint8)

        test = HeldOutTest(
            labels=labels,
            guesses=guesses,
            confidences=torch.rand(n, generator=rng),
            names=[f'{names[label]}/{i}.png' for i, label in enumerate(labels.tolist())],
            mistakes=[(place, noise()) for place in wrong[:24]],
            places=torch.arange(min(n, 1000)),
            features=torch.randn(min(n, 1000), 8, generator=rng),
            num_classes=k,
            right_raw=n // 2,
            raw_head='nearest class mean',
            repeated=0,
            seconds=1.0,
        )
        told = {
            'title': 'resnet18 for photos',
            'tiles': [('Images', '240', 'so many')],
            'class_names': names,
            'samples': [(label, noise()) for label in range(min(k, 120)) for _ in range(samples)],
            'points': feature_map(test.features),
            'point_labels': test.labels[test.places],
            'point_right': (test.guesses == test.labels)[test.places],
            'test': test,
            'facts': {'Command': 'timm-pudnet predict resnet18 photos'},
        }
        return Report(**{**told, **changes})

    return report


def test_some_images_are_as_many_as_asked_for_spread_evenly_and_the_first_of_a_stream():
    images = list(zip(torch.rand(10, 3, 8, 8), torch.arange(10), strict=True))
    stream = open_images(DataLoader(images, batch_size=4), input=timm_pudnet.InputConfig())
    assert stream.is_stream
    list(stream.batches(4, keep=True))  # what is kept comes in these batches again
    found = list(some_images(stream, 6))
    assert [len(part) for part, _ in found] == [4, 2]
    assert torch.cat([part for _, part in found]).tolist() == list(range(6))
    source = open_images(*zip(*images, strict=True), input=timm_pudnet.InputConfig())
    assert torch.cat([part for _, part in some_images(source, 4)]).tolist() == [0, 3, 6, 9]
    for one in (stream, source):
        assert len(torch.cat([part for part, _ in some_images(one, 99)])) == 10


def test_the_page_needs_nothing_else_and_forbids_it(make):
    report = make(expected=(0.8, 0.7, 0.9), familiarity='unlike', expected_from='From 7 domains.', notes=['A note.'])
    page = Page(report.page())
    tags = {tag for tag, _ in page.elements}
    assert not tags & {'script', 'link', 'iframe', 'object', 'embed', 'base', 'form', 'a', 'audio', 'video'}
    for _, attributes in page.elements:
        assert not {'href', 'srcset', 'xlink:href', 'data', 'action'} & set(attributes)
        assert not any(name.startswith('on') for name in attributes)
        assert attributes.get('src', 'data:image/').startswith('data:image/')
    assert not re.search(r'url\(|@import|https?://', report.page())
    policies = [attributes['content'] for _, attributes in page.elements if 'http-equiv' in attributes]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for needle in (
        '80%',
        '70% to 90%',
        'unlike anything',
        'From 7 domains.',
        'A note.',
        'timm-pudnet predict resnet18',
    ):
        assert needle in page.text


def test_names_are_text_whatever_they_hold(make):
    report = make(names=NASTY, title=NASTY[0], facts={NASTY[1]: NASTY[0]}, notes=[NASTY[1]])
    page = Page(report.page())
    plain = Page(make(names=tuple('abcdef'), title='a', facts={'b': 'a'}, notes=['b']).page())
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    for name in (*NASTY[:2], NASTY[2], NASTY[3], NASTY[5]):
        assert name in page.text
    assert 'x' * 70 not in page.text  # cut short, whole under the pointer
    assert any(attributes.get('title') == 'x' * 300 for _, attributes in page.elements)


def test_a_name_that_is_no_unicode_does_not_stop_the_page(make, tmp_path):
    report = make(names=('a', 'b\udcff', 'c'))
    assert 'b?' in report.write(tmp_path / 'report').read_text(encoding='utf-8')


def test_its_numbers_are_those_of_the_test(make):
    report = make(n=90)
    test = report.test
    rows = {name: (right, total) for name, right, total in report._rows()}
    for label, name in enumerate(report.class_names):
        members = test.labels == label
        assert rows[name] == (int((test.guesses[members] == label).sum()), 30)
    shares = [right / total for _, right, total in report._rows()]
    assert shares == sorted(shares)
    counts = report._counts()
    assert counts.sum() == 90
    assert counts[0, 1] == int(((test.labels == 0) & (test.guesses == 1)).sum())
    bins = report._bins()
    assert sum(count for _, _, count in bins) == 90
    assert sum(right for _, right, _ in bins) == test.right
    assert all(right <= count for _, right, count in bins)
    cells = [re.sub(r'\s', '', cell) for cell in re.findall(r'<td style="--share:[^>]*>(\d*)</td>', report.page())]
    assert [int(cell or 0) for cell in cells] == counts.flatten().tolist()
    assert f'{test.right} of 90 images' in report.page()
    sure = dataclasses.replace(test, confidences=torch.ones(90))
    assert dataclasses.replace(report, test=sure)._gap() == pytest.approx(1 - test.right / 90)
    few, many = torch.arange(90) < 20, torch.arange(90) >= 20
    guesses = torch.where(many | (torch.arange(90) % 2 == 0), test.labels, (test.labels + 1) % 3)
    mixed = dataclasses.replace(test, guesses=guesses, confidences=torch.where(few, 0.95, 0.35))
    # Half of the first are right, all of the others: too sure here, too unsure there.
    assert dataclasses.replace(report, test=mixed)._gap() == pytest.approx((20 * 0.45 + 70 * 0.65) / 90)


@pytest.mark.parametrize(('n', 'k', 'side'), [(10_000, 10, 224), (10_000, 1000, 224), (3000, 3000, 32)])
def test_it_stays_under_3_megabytes(n, k, side, make):
    names = tuple(f'class {number} of many, with a name that is not short' for number in range(k))
    page = make(n=n, names=names, side=side, samples=24 if k == 10 else 2).page()
    assert 50_000 < len(page.encode()) < 3_000_000
    Page(page)


def test_the_least_there_can_be_makes_a_page(make):
    nothing = {'class_names': (), 'samples': (), 'points': torch.zeros(1, 2), 'point_labels': None, 'point_right': None}
    page = dataclasses.replace(make(), test=None, **nothing).page()
    assert 'Class by class' not in page
    assert 'map' not in Page(page).text
    one = make(n=2, names=('a', 'b'))
    right = dataclasses.replace(one.test, guesses=one.test.labels, mistakes=[])
    text = Page(dataclasses.replace(one, test=right, points=torch.zeros(2, 2)).page()).text
    assert 'There are none.' in text
    assert 'Nothing was confused.' in text


def test_it_is_written_whole_or_not_at_all(make, tmp_path, full_disk, nothing_written, one_line):
    report = make()
    with nothing_written(tmp_path):
        with full_disk(), pytest.raises(OSError, match='File too large'):
            report.write(tmp_path / 'report')
        with pytest.raises(NotFoundError) as error:
            report.write(tmp_path / 'no' / 'report')
    one_line(error, tmp_path / 'no')
    path = report.write(tmp_path / 'report')
    assert path == tmp_path / 'report' / 'index.html'
    files = sorted(file.name for file in path.parent.iterdir())
    assert files == ['classes.png', 'confusion.png', 'index.html', 'map.png', 'reliability.png']
    with nothing_written(tmp_path), pytest.raises(OutputExistsError) as error:
        report.write(tmp_path / 'report')
    one_line(error, tmp_path / 'report', 'exists')


def test_plots_are_pictures_of_any_names(make):
    plots = make(names=('$x', '猫', '_{'), facts={}).plots()
    assert set(plots) == {'map.png', 'classes.png', 'confusion.png', 'reliability.png'}
    for content in plots.values():
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert('L'))
        assert pixels.shape == (720, 840)
        assert pixels.std() > 5


def test_without_matplotlib_the_page_is_the_same(make, tmp_path, monkeypatch):
    report = make()
    page = report.page()
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert report.plots() == {}
    path = report.write(tmp_path / 'report')
    assert path.read_text(encoding='utf-8') == page
    assert len(list(path.parent.iterdir())) == 1


def test_the_map_shows_the_plane_in_which_the_centres_lie_apart():
    centres = torch.eye(3, 10)
    labels = torch.arange(60) % 3
    features = centres[labels] + 0.1 * torch.randn(60, 10)
    features[:, 5] += 0.8 * torch.randn(60)  # the widest direction tells nothing
    places = feature_map(features, centres)
    means = torch.stack([places[labels == label].mean(0) for label in range(3)])
    assert (torch.cdist(places, means).argmin(1) == labels).float().mean() > 0.9
    for features, centres in (
        (torch.ones(4, 3), None),
        (torch.randn(5, 4), torch.randn(2, 4)),
        (torch.ones(1, 2), None),
    ):
        places = feature_map(features, centres)
        assert places.shape == (len(features), 2)
        assert places.isfinite().all()


# What a model did on the images kept aside


@pytest.fixture(scope='module')
def source(tiny, pictures, write_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp('images')
    write_folder(root, *pictures(24))
    (root / 'cup' / '0000.png').write_bytes(b'')
    return open_images(root, input=tiny.config.input)


@pytest.fixture(scope='module')
def model(tiny, pictures):
    pixels, names = pictures(24, seed=1)
    return predict_model('test_resnet', pixels, names[1:] + names[:1], hypernet=tiny)  # wrong labels, so wrong answers


@pytest.mark.filterwarnings('ignore::timm_pudnet.PudNetWarning')
def test_the_test_is_the_model_s_own_answers(source, model):
    test = measure_held_out(model, source, source)
    (images, labels), *_ = source.batches()
    with torch.inference_mode():
        scores = model(images)
    assert torch.equal(test.guesses, scores.argmax(1))
    assert torch.equal(test.labels, labels)
    torch.testing.assert_close(test.confidences, scores.softmax(1).amax(1))
    assert len(test.names) == len(labels) == 23
    assert all(
        name.startswith(source.class_names[label]) for name, label in zip(test.names, labels.tolist(), strict=True)
    )
    assert 'cup/0000.png' not in test.names
    assert test.repeated == 23
    assert 'Repeated   23' in list(test.lines())[-1]
    confidences = [float(test.confidences[place]) for place, _ in test.mistakes]
    assert len(confidences) == min(24, 23 - test.right) > 0
    assert confidences == sorted(confidences, reverse=True)
    place, pixels = test.mistakes[0]
    assert test.guesses[place] != test.labels[place]
    shown = np.asarray(Image.open(f'{source._where}/{test.names[place]}').convert('RGB'))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), shown)


@pytest.mark.parametrize('count', [255, 256, 257, 259, 260, 300])
def test_images_of_any_number_are_tested_and_evenly_chosen_for_the_map(count, model, tiny, monkeypatch):
    monkeypatch.setattr('timm_pudnet.evaluation.holdout.MOST_ON_A_MAP', 2)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    many = open_images(pixels, torch.arange(count) % 3, input=tiny.config.input)
    test = measure_held_out(model, many.subset(range(9)), many)
    assert test.places.tolist() == list(range(0, count, -(-count // 2)))
    assert len(test.features) == len(test.places)
    assert len(test.labels) == count


def test_classes_that_are_numbers_are_named_though_the_map_has_none_of_the_last(model, tiny, monkeypatch):
    monkeypatch.setattr('timm_pudnet.evaluation.report.MOST_ON_A_MAP', 3)
    pixels = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    used = open_images(pixels, torch.tensor([0, 1, 1, 0, 1, 2, 0, 1, 1]), input=tiny.config.input)
    report = make_report(model, used, None, title='t', tiles=[])
    assert report.point_labels.tolist() == [0, 1, 1]
    assert report.class_names == ('0', '1', '2')
    assert report.page()


@pytest.mark.filterwarnings('ignore::timm_pudnet.PudNetWarning')
def test_copies_across_the_parts_are_counted(source, model):
    used = source.subset([1, 2, 3, 8, 9, 10, 11, 16, 17])
    test = measure_held_out(model, used, source.subset([3, 11, 12, 20]))
    assert test.repeated == 2
    assert '2 of the images kept aside' in make_report(model, used, test, title='t', tiles=[]).page()
    apart = measure_held_out(model, used, source.subset([4, 12, 20]))
    assert apart.repeated == 0
    assert 'Repeated' not in ''.join(apart.lines())


def test_what_does_not_fit_in_memory_at_once_is_tested_and_shown_in_parts(model, tiny, pictures, monkeypatch):
    """As on a GPU that has just predicted the model in parts, too."""
    used = open_images(*pictures(24), input=tiny.config.input)
    tested = open_images(*pictures(40, seed=2), input=tiny.config.input)
    references = tuple(map(tuple, torch.randn(8, 16).tolist()))
    expectation = SimpleNamespace(references=references)

    def measured():
        test = measure_held_out(model, used, tested)
        return test, sample_features(model, tested), read_traits(tiny, model, used, expectation)

    whole, forward = measured(), model.forward_features

    def scarce(images):
        if len(images) > 10:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')
        return forward(images)

    monkeypatch.setattr(model, 'forward_features', scarce)
    with pytest.warns(PudNetWarning, match=r'out of memory with \d+ images at once: going on with'):
        parts = measured()
    assert torch.equal(parts[0].guesses, whole[0].guesses)
    torch.testing.assert_close(parts[0].features, whole[0].features)
    torch.testing.assert_close(parts[1], whole[1])
    torch.testing.assert_close(parts[2].row(), whole[2].row(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def marked(tiny):
    """Makes images that a small mark tells, which a ridge regression finds and unequal light hides from class means."""
    generator = torch.Generator().manual_seed(0)

    def source(labels):
        count = len(labels)
        light = torch.randint(0, 200, (count, 1, 1, 1), generator=generator)
        pixels = torch.randint(0, 8, (count, 3, 32, 32), generator=generator) + light
        pixels[torch.arange(count), 0, 4 * labels] += 40
        return open_images(pixels.to(torch.uint8), labels, input=tiny.config.input)

    return source


def test_raw_pixels_have_the_better_of_two_heads(model, marked):
    test = measure_held_out(model, marked(torch.arange(90) % 3), marked(torch.arange(60) % 3))
    assert test.raw_head == 'ridge regression'
    assert test.right_raw > 50
    assert any('by ridge regression' in line for line in test.lines())


def test_a_ridge_of_some_of_the_pixels_has_all_classes_and_says_of_how_many_images_it_is(model, marked, monkeypatch):
    monkeypatch.setattr(holdout, 'MOST_RAW_IMAGES', 60)
    labels = torch.arange(238) % 2
    labels[[30, 31]] = 2  # at no fourth place of all
    images, found = marked(labels), []
    fit = holdout.ridge_classifier
    monkeypatch.setattr(holdout, 'ridge_classifier', lambda *args: found.append(args[:2]) or fit(*args))
    batches = type(images).batches
    monkeypatch.setattr(type(images), 'batches', lambda self: batches(self, 50))  # counts go on from batch to batch
    test = measure_held_out(model, images, marked(torch.arange(60) % 2))
    ((rows, classes),) = found
    assert classes.bincount().tolist() == [30, 30, 1]
    places = torch.cat([(labels == label).nonzero().flatten()[::4] for label in range(3)]).sort().values
    whole = raw_pixels(torch.cat([part for part, _ in images.batches()])[places], 32)
    assert torch.equal(rows, whole)
    assert test.raw_head == 'ridge regression of 61 images'
    assert any('by ridge regression of 61 images (' in line for line in test.lines())


def test_pixels_of_large_images_are_compared_at_a_smaller_size():
    images = torch.rand(2, 3, 100, 40)
    assert raw_pixels(images).shape == (2, 3 * 64 * 40)
    assert torch.equal(raw_pixels(images[..., :64, :]), images[..., :64, :].flatten(1))


# On the command line


@pytest.fixture
def predict(tiny_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*args, hypernet=tiny_folder):
        words = ['predict', 'test_resnet', *map(str, args), '--hypernet', str(hypernet), '--out', 'model']
        result = CliRunner().invoke(main, words, prog_name='timm-pudnet')
        assert result.exit_code == 0, result.output
        return result, shlex.join(['timm-pudnet', *words])

    return run


@pytest.fixture
def images(tmp_path, pictures, write_folder):
    write_folder(tmp_path / 'my images', *pictures(24))
    return tmp_path / 'my images'


def test_a_prediction_writes_its_report_beside_the_model(images, predict, tmp_path, tiny):
    result, command = predict(images)
    page = Page((tmp_path / 'model/report/index.html').read_text(encoding='utf-8'))
    assert 'model/report/index.html' in result.stdout
    accuracy = re.search(r'Accuracy +([\d.]+%)', result.stdout)[1]
    for needle in (
        command,
        accuracy,
        weights_digest(tiny),
        timm_pudnet.__version__,
        'cup',
        '18 gave the weights',
        'torch ',
    ):
        assert needle in page.text
    digest = subprocess.run(['sha256sum', 'model/model.safetensors'], capture_output=True, text=True, check=True).stdout
    assert digest.split()[0] in page.text


def test_no_report_is_written_where_none_is_wanted(images, predict, tmp_path):
    result, _ = predict(images, '--no-report')
    assert 'Report' not in result.stdout
    assert sorted(path.name for path in (tmp_path / 'model').iterdir()) == ['config.json', 'model.safetensors']


@pytest.mark.parametrize('case', ['two images', 'no labels', 'no holdout', 'many classes'])
def test_sets_of_any_kind_have_a_page(case, predict, tmp_path, pictures, write_folder):
    pixels, names = pictures(24)
    args = []
    if case == 'two images':
        pixels, names = pixels[:2], names[:2]
    elif case == 'no labels':
        names = None
    elif case == 'no holdout':
        args = ['--holdout', '0']
    else:
        pixels, names = np.concatenate([pixels] * 5), [f'<b id=x>{number // 2}' for number in range(120)]
    write_folder(tmp_path / 'set', pixels, names)
    predict(tmp_path / 'set', *args)
    page = Page((tmp_path / 'model/report/index.html').read_text(encoding='utf-8'))
    assert ('Class by class' in page.text) == (case == 'many classes')
    assert not [tag for tag, attributes in page.elements if tag == 'b' and attributes]
    assert sum(tag == 'img' for tag, _ in page.elements) >= 2
    assert 'A map of the features' in page.text


@pytest.mark.filterwarnings('default::timm_pudnet.PudNetWarning')
def test_images_of_which_the_first_cannot_be_read_have_a_page_without_them(images, predict, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_pudnet.evaluation.report.MOST_THUMBNAILS', 6)
    for name in ('cup', 'jar', 'pan'):
        for path in sorted((images / name).iterdir())[:4]:
            path.write_bytes(b'')
    predict(images, '--holdout', '0')
    assert (tmp_path / 'model' / 'model.safetensors').is_file()
    assert 'A map of the features' in (tmp_path / 'model/report/index.html').read_text(encoding='utf-8')


def test_a_report_that_cannot_be_written_leaves_the_model(images, tiny_folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Report, 'write', full)
    words = ['predict', 'test_resnet', str(images), '--hypernet', str(tiny_folder), '--out', 'model']
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0
    assert 'report could not be written' in result.stderr
    assert 'No space left' in result.stderr
    assert 'Wrote      model' in result.stdout
    assert timm.create_model('local-dir:model', pretrained=True).num_classes == 3


def test_an_interrupt_in_the_middle_leaves_nothing(images, tiny_folder, tmp_path, monkeypatch, nothing_written):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('timm_pudnet.evaluation.report.sample_images', stop)
    with nothing_written(tmp_path):
        words = ['predict', 'test_resnet', str(images), '--hypernet', str(tiny_folder), '--out', 'model']
        assert CliRunner().invoke(main, words).exit_code == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Report, 'plots', stop)
    assert CliRunner().invoke(main, words).exit_code == 1
    assert sorted(path.name for path in (tmp_path / 'model').iterdir()) == ['config.json', 'model.safetensors']


@pytest.mark.filterwarnings('default::timm_pudnet.PudNetWarning')
def test_what_to_expect_is_said_where_a_fit_is_there_and_not_where_it_is_of_other_weights(
    images, predict, tmp_path, tiny_folder, monkeypatch
):
    looked_at, tested = [], []

    def read(hypernet, model, source, expectation):
        looked_at.append([source.name(row) for row in range(len(source))])
        return read_traits(hypernet, model, source, expectation)

    def measure(model, used, kept_aside, unlabelled=None):
        tested.append([kept_aside.name(row) for row in range(len(kept_aside))])
        return measure_held_out(model, used, kept_aside, unlabelled)

    monkeypatch.setattr(timm_pudnet.evaluation, 'read_traits', read)
    monkeypatch.setattr(timm_pudnet.evaluation, 'measure_held_out', measure)
    shutil.copytree(tiny_folder, tmp_path / 'hypernet')
    sets = [
        HeldOutSet(
            domain=f'd{number % 4}',
            traits=Traits(distance=1 + number % 7, leave_one_out=0.5 + 0.01 * number, num_classes=3, images=30),
            right=50 + number,
            total=100,
        )
        for number in range(40)
    ]
    fixed = {'references': torch.randn(8, 16), 'sizes': [64], 'familiar': [(0.0, 1e-9)]}
    fit_expectation(sets, weights_digest=weights_digest(PudNet.from_pretrained(tiny_folder)), **fixed).save(
        tmp_path / 'hypernet'
    )
    result, _ = predict(images, hypernet=tmp_path / 'hypernet')
    assert re.search(r'Expected +[\d.]+% before any test \(95 % interval', result.stdout)
    assert len(looked_at[0]) == len(set(looked_at[0])) == 18
    assert len(tested[0]) == 6
    assert not {*looked_at[0]} & {*tested[0]}, 'before any test is before any look at what is tested'
    assert 'unlike anything' in result.stdout
    page = (tmp_path / 'model/report/index.html').read_text(encoding='utf-8')
    assert 'Expected before the test' in page
    assert 'unlike anything' in page
    shutil.rmtree(tmp_path / 'model')
    result, _ = predict(images, '--head', 'ridge', hypernet=tmp_path / 'hypernet')
    assert 'of the centroid head (95 %' in result.stdout
    shutil.rmtree(tmp_path / 'model')
    result, _ = predict(images / 'cup', hypernet=tmp_path / 'hypernet')  # no subfolders, so no labels
    assert 'unlike anything' in result.stdout
    assert 'Expected' not in result.stdout
    shutil.rmtree(tmp_path / 'model')
    digest, config = weights_digest(PudNet.from_pretrained(tiny_folder)), config_sha256(tiny_folder)
    fit_expectation(sets, weights_digest=digest, config_sha256=config, **fixed).save(tmp_path / 'hypernet')
    assert 'Expected' in predict(images, hypernet=tmp_path / 'hypernet')[0].stdout
    for wrong in ({'weights_digest': 'others'}, {'weights_digest': digest, 'config_sha256': 'others'}):
        shutil.rmtree(tmp_path / 'model')
        fit_expectation(sets, **wrong, **fixed).save(tmp_path / 'hypernet')
        result, _ = predict(images, hypernet=tmp_path / 'hypernet')
        assert 'Warning' in result.stderr
        assert 'expectation.json is of other weights, or of another config' in result.stderr
        assert 'Expected' not in result.stdout


# In a browser

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason='no Chromium here: apt-get install chromium')


@pytest.fixture
def browse(tmp_path):
    """Opens a page from disk in headless Chromium, with no network to be had; gives its DOM, or a picture of it."""

    def run(page, *options, width=1000):
        fixed = ['--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--proxy-server=127.0.0.1:9']
        profile = f'--user-data-dir={tmp_path / "profile"}'
        done = subprocess.run(
            [BROWSER, *fixed, profile, f'--window-size={width},1500', *options, page.as_uri()],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return done.stdout

    return run


@in_a_browser
def test_a_browser_builds_the_page_that_was_meant(make, browse, tmp_path):
    report = make(names=NASTY)
    path = report.write(tmp_path / 'report')
    seen, written = (
        [tag for tag, _ in Page(text).elements if tag != 'tbody']  # which the browser adds
        for text in (browse(path, '--dump-dom'), path.read_text(encoding='utf-8'))
    )
    assert seen == written


@in_a_browser
@pytest.mark.parametrize('width', [390, 1000])
def test_nothing_is_wider_than_the_screen(width, make, browse, tmp_path):
    path = make(names=(*NASTY, *(f'{i} {"y" * i}' for i in range(10)))).write(tmp_path / 'report')
    page = re.sub('<meta http-equiv[^>]*>', '', path.read_text(encoding='utf-8'))
    ask = '<script>document.title = document.documentElement.scrollWidth + "/" + innerWidth</script></body>'
    path.write_text(page.replace('</body>', ask), encoding='utf-8')
    wide, screen = map(int, re.search(r'<title>(\d+)/(\d+)</title>', browse(path, '--dump-dom', width=width)).groups())
    assert wide <= screen
    assert screen <= max(width, 500)  # windows can be no narrower in some versions


@in_a_browser
@pytest.mark.parametrize(('theme', 'ground'), [(0, (22, 22, 21)), (1, (252, 252, 251))], ids=['dark', 'light'])
def test_it_follows_the_theme_and_is_readable_in_both(theme, ground, make, browse, tmp_path):
    path = make().write(tmp_path / 'report')
    browse(path, f'--blink-settings=preferredColorScheme={theme}', f'--screenshot={tmp_path / "shot.png"}', width=600)
    pixels = np.asarray(Image.open(tmp_path / 'shot.png').convert('RGB')).astype(int)
    assert tuple(pixels[0, 0]) == ground
    contrast = np.abs(pixels[20:60, 16:300] - ground).sum(-1).max()  # of the title with the ground
    assert contrast > 500


def test_a_class_gives_its_share_to_the_nearest_image_and_keeps_one():
    labels = [0] * 9 + [1] * 5 + [2] * 2 + [3]
    source = open_images(torch.zeros(17, 3, 8, 8, dtype=torch.uint8), labels, input=InputConfig())
    for share, counts in ((0.2, [2, 1, 1, 0]), (0.01, [1, 1, 1, 0]), (0.99, [8, 4, 1, 0])):
        used, tested = split_held_out(source, share)
        assert tested.labels.bincount(minlength=4).tolist() == counts
        assert used.labels.bincount(minlength=4).tolist() == [a - b for a, b in zip([9, 5, 2, 1], counts, strict=True)]


def test_the_second_direction_of_a_map_of_two_classes_tells_something_new():
    labels = torch.arange(60) % 2
    features = 5 * torch.eye(2, 6)[labels] + 0.1 * torch.randn(60, 6)
    places = feature_map(features, torch.eye(2, 6))
    assert abs(float(torch.corrcoef(places.t())[0, 1])) < 0.5


def test_all_who_are_surest_are_in_the_last_tenth():
    test = SimpleNamespace(
        guesses=torch.tensor([0, 1]), labels=torch.tensor([0, 0]), confidences=torch.tensor([1.0, 0.96])
    )
    report = Report(title='x', tiles=(), class_names=('a', 'b'), samples=(), points=torch.empty(0, 2), test=test)
    assert report._bins() == [(pytest.approx(0.98), 1, 2)]
    assert report._gap() == pytest.approx(0.48)
