"""evaluation/compare.py: the arms, what they get, budget and interrupt, break-even, table and plot."""

import importlib
import json
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import timm_pudnet
from timm_pudnet import InputError, PudNetWarning
from timm_pudnet.evaluation import format_comparison, plot_comparison

room = importlib.import_module('timm_pudnet.evaluation.compare')  # the package's name `compare` is the function
TRAINED = ('fine_tuned', 'adam', 'adam_centralised')


@pytest.fixture
def compare(tiny):
    """`timm_pudnet.compare` with the tiny hypernetwork, two epochs and no pretrained weights."""

    def run(images, labels=None, **changes):
        settings = {'hypernet': tiny, 'epochs': 2, 'arms': TRAINED, 'progress': False, **changes}
        return timm_pudnet.compare('test_resnet', images, labels, **settings)

    return run


@pytest.fixture
def offline(monkeypatch):
    """No question leaves this machine; gives what would have been asked for."""
    asked = []

    class Api:
        def model_info(self, name, timeout):
            asked.append(name)
            raise ConnectionError('no network\nin this test')

    monkeypatch.setattr('huggingface_hub.HfApi', Api)
    monkeypatch.setattr('huggingface_hub.try_to_load_from_cache', lambda *args: None)
    return asked


def points(result):
    return {name: [point['epoch'] for point in rows] for name, rows in result['arms'].items()}


def test_every_arm_learns_from_the_same_images_and_is_tested_on_others(compare, pictures, monkeypatch):
    given, seen = {}, []

    def record(name, first, second):
        work = getattr(room, name)

        def recorded(*args, **kwargs):
            given[name] = args[first], args[second]
            return work(*args, **kwargs)

        monkeypatch.setattr(room, name, recorded)

    record('finetune_epochs', 1, 2)
    record('train_from_scratch', 2, 4)
    pixels, names = pictures(48)
    result = compare(pixels, names, arms=(*TRAINED, 'random'), on_result=lambda now: seen.append(json.dumps(now)))
    trained = [1, 2]
    assert points(result) == {
        'predicted': [0], 'fine_tuned': [0, *trained], 'adam': trained, 'adam_centralised': trained, 'random': trained
    }  # fmt: skip
    assert len(seen) == 1 + 4 * 2 + 1
    assert json.loads(seen[-1]) == result
    assert (result['images'], result['tested'], result['classes'], result['ended']) == (36, 12, 3, 'epochs')
    for rows in result['arms'].values():
        assert [row['seconds'] for row in rows] == sorted(row['seconds'] for row in rows)
        assert all(0 <= row['low'] <= row['accuracy'] + 1e-9 <= row['high'] + 2e-9 for row in rows)
    used, tested = given['finetune_epochs']
    assert {image.numpy().tobytes() for image in used.images}.isdisjoint(
        image.numpy().tobytes() for image in tested.images
    )
    config = timm_pudnet.InputConfig()
    for bank, tensor in zip((used, tested), given['train_from_scratch'], strict=True):
        assert torch.allclose(tensor, (bank.images / 255 - config.mean[0]) / config.std[0], atol=1e-6)


def test_fine_tuning_goes_on_with_the_predicted_head(compare, pictures, monkeypatch):
    kept, fit = [], room.fit_classifier
    monkeypatch.setattr(room, 'fit_classifier', lambda *args: kept.append(fit(*args)) or kept[-1])
    compare(*pictures(24), arms=('fine_tuned',))
    assert kept == [True]


def test_predicted_is_what_predict_model_gives(compare, tiny, pictures, monkeypatch):
    split = {}
    work = room.split_copies

    def recorded(*args, **kwargs):
        split['parts'] = work(*args, **kwargs)
        return split['parts']

    monkeypatch.setattr(room, 'split_copies', recorded)
    pixels, names = pictures(48)
    result = compare(pixels, names, arms=())
    used, tested, _ = split['parts']
    labels = torch.tensor([sorted(set(names)).index(name) for name in names])
    model = timm_pudnet.predict_model('test_resnet', pixels[used.numpy()], labels[used], hypernet=tiny)
    shown = (torch.from_numpy(pixels[tested.numpy()]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.inference_mode():
        right = (model(shown).argmax(1) == labels[tested]).float().mean()
    assert result['arms']['predicted'][0]['accuracy'] == pytest.approx(100 * float(right))


def test_pretrained_weights_are_read_by_eq_7_at_their_own_size(compare, pictures, tmp_path):
    model = timm.create_model('test_resnet', num_classes=5)
    with torch.no_grad():
        model.conv1[0].weight.mul_(2)
    timm_pudnet.save_model(model, tmp_path / 'weights')
    pixels, names = pictures(40)
    result = compare(pixels, names, arms=['pretrained'], pretrained=f'local-dir:{tmp_path / "weights"}')
    assert points(result) == {'predicted': [0], 'pretrained': [0]}
    assert result['left_out'] == {}

    loaded = timm.create_model(f'local-dir:{tmp_path / "weights"}', pretrained=True, num_classes=0).eval()
    config = timm.data.resolve_model_data_config(loaded)
    transform = timm.data.create_transform(**config)
    assert config['input_size'] == (3, 160, 160)
    with torch.inference_mode():
        features = torch.stack([loaded(transform(Image.fromarray(image))[None])[0] for image in pixels])
    labels = torch.tensor([sorted(set(names)).index(name) for name in names])
    bank = timm_pudnet.training.ImageBank(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, sorted(set(names)))
    used, tested, _ = room.split_copies(bank, 0.25)
    means = torch.stack([features[used][labels[used] == label].mean(0) for label in range(3)])
    guesses = torch.nn.functional.cosine_similarity(features[tested][:, None], means[None], dim=2).argmax(1)
    expected = 100 * float((guesses == labels[tested]).float().mean())
    assert result['arms']['pretrained'][0]['accuracy'] == pytest.approx(expected)


def test_pretrained_weights_that_cannot_be_had_are_left_out_and_that_is_said(compare, pictures, offline):
    result = compare(*pictures(24), arms=['pretrained'])
    assert offline == ['timm/test_resnet.r160_in1k']
    assert result['left_out'] == {'pretrained': 'timm/test_resnet.r160_in1k cannot be had (no network)'}
    assert "timm's pretrained weights   left out: timm/test_resnet.r160_in1k" in format_comparison(result)


def test_pretrained_weights_that_cannot_be_loaded_are_left_out(compare, pictures, tmp_path):
    result = compare(*pictures(24), arms=['pretrained'], pretrained=f'local-dir:{tmp_path}')
    assert 'can be loaded: no model.safetensors' in result['left_out']['pretrained']


def test_a_pickle_of_pretrained_weights_is_not_read(compare, pictures, tmp_path, monkeypatch):
    folder = timm_pudnet.save_model(timm.create_model('test_resnet', num_classes=0), tmp_path / 'weights')
    torch.save(load_file(folder / 'model.safetensors'), folder / 'pytorch_model.bin')
    (folder / 'model.safetensors').unlink()
    read = []
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: read.append(args))
    result = compare(*pictures(24), arms=['pretrained'], pretrained=f'local-dir:{folder}')
    assert not read
    said = f'{folder} holds no timm model that can be loaded: no model.safetensors'
    assert result['left_out'] == {'pretrained': said}


def test_a_budget_ends_it_and_what_was_measured_is_there(compare, pictures):
    result = compare(*pictures(24), epochs=500, budget=1.0)
    assert result['ended'] == 'budget'
    assert len(result['arms']['predicted']) == 1
    assert all(len(rows) < 400 for rows in result['arms'].values())
    result = compare(*pictures(24), budget=1e-6)
    assert points(result) == {'predicted': [0]}
    assert result['left_out'] == dict.fromkeys(TRAINED, 'not done within the budget of 1e-06 s')


def test_epochs_are_begun_until_the_budget_is_spent_however_long_the_first_took(compare, pictures, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(room, 'time', SimpleNamespace(perf_counter=lambda: now[0]))

    def scripted(*args, **kwargs):
        for epoch in range(1, 100):
            now[0] += 10 if epoch == 1 else 1  # the first makes the model too
            yield {'epoch': epoch, 'seconds': float(epoch), 'right': torch.ones(1), 'accuracy': 50.0}

    monkeypatch.setattr(room, 'train_from_scratch', scripted)
    result = compare(*pictures(24), epochs=99, budget=24.5, arms=('adam', 'adam_centralised'))
    assert now == [25], 'the last one was begun within it'
    assert points(result) == {'predicted': [0], 'adam': [1, 2, 3, 4], 'adam_centralised': [1, 2, 3]}
    assert result['ended'] == 'budget'


def test_fine_tuning_that_dies_in_its_first_epoch_is_left_out(compare, pictures, monkeypatch):
    def diverging(*args, **kwargs):
        raise FloatingPointError('a loss of nan')
        yield

    monkeypatch.setattr(room, 'finetune_epochs', diverging)
    result = compare(*pictures(24), arms=('fine_tuned', 'adam'))
    assert points(result) == {'predicted': [0], 'adam': [1, 2]}
    assert result['left_out'] == {'fine_tuned': 'a loss of nan'}
    assert result['break_even']['adam'].keys() == {'predicted'}
    assert 'predicted, fine-tuned       left out: a loss of nan' in format_comparison(result)


def test_an_interrupt_keeps_what_was_measured(compare, pictures):
    seen = []

    def on_result(now):
        seen.append(now)
        if len(seen) == 3:
            raise KeyboardInterrupt

    result = compare(*pictures(24), on_result=on_result)
    assert result['ended'] == 'interrupt'
    assert sum(len(rows) for rows in result['arms'].values()) == 1 + 1 + 2  # fine_tuned begins with predicted's
    assert format_comparison(result).startswith(' ')


def test_an_interrupt_before_anything_was_measured_is_one(compare, pictures, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, 'predict_model', interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(*pictures(24))


def test_the_arm_with_the_fewest_seconds_goes_next(compare, pictures, monkeypatch):
    order = []

    def scripted(name, seconds):
        for epoch in (1, 2, 3):
            order.append(name)
            yield {'epoch': epoch, 'seconds': epoch * seconds, 'right': torch.ones(1), 'accuracy': 50.0}

    monkeypatch.setattr(
        room, 'train_from_scratch', lambda *args, centralise, **kwargs: scripted(centralise, 5.0 if centralise else 2.0)
    )
    compare(*pictures(24), arms=('adam', 'adam_centralised'))
    assert order == [False, True, False, False, True, True]


def test_copies_are_said_and_never_tested(compare, pictures):
    pixels, names = pictures(24)
    pixels[3:9] = pixels[0]
    names[3:9] = [names[0]] * 6
    with pytest.warns(PudNetWarning, match='6 images are copies of others'):
        result = compare(pixels, names, arms=())
    assert result['copies'] == 6


def row(epoch, seconds, accuracy):
    return {'epoch': epoch, 'seconds': seconds, 'accuracy': accuracy, 'low': accuracy - 5, 'high': accuracy + 5}


@pytest.fixture
def measured_result():
    arms = {
        'predicted': [row(0, 0.5, 60.0)],
        'fine_tuned': [row(0, 0.5, 60.0), row(1, 2.0, 80.0)],
        'adam': [row(1, 1.0, 50.0), row(2, 2.0, 70.0), row(3, 3.0, 79.0)],
        'adam_centralised': [row(1, 1.5, 60.0), row(2, 3.0, 85.0)],
    }
    return {
        'arms': arms,
        'left_out': {'pretrained': 'no network'},
        'break_even': room._break_even(arms),
        'model_name': 'resnet18',
        'images': 100,
        'classes': 4,
        'machine': 'here',
    }


def test_break_even_is_where_a_curve_reaches_its_rival_as_it_was_by_then(measured_result):
    assert measured_result['break_even'] == {
        'adam': {'predicted': 2.0, 'fine_tuned': None},
        'adam_centralised': {'predicted': 1.5, 'fine_tuned': 1.5},  # fine-tuning had not got further by 1.5 s
    }
    text = format_comparison(measured_result)
    assert (
        'from scratch, Adam: as good as predicted after 2.0 s (4 times predicted), as fine-tuned not within 3.0 s'
        in text
    )
    assert 'predicted, fine-tuned            1      2.00    80.0 (75.0 to 85.0)' in text
    del measured_result['break_even']['adam']['fine_tuned']  # an arm that was not asked for
    assert 'from scratch, Adam: as good as predicted after 2.0 s (4 times predicted)\n' in format_comparison(
        measured_result
    )


def test_the_plot_shows_every_arm(measured_result, tmp_path, monkeypatch):
    figures = pytest.importorskip('matplotlib.figure')
    drawn, save = [], figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, 'savefig', lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    path = plot_comparison(measured_result, tmp_path / 'plot.png')
    with Image.open(path) as image:
        assert image.format == 'PNG'
    (axes,) = drawn[0].axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {'predicted', 'predicted, fine-tuned', 'from scratch, Adam', 'as predicted, 2 s'} <= set(texts)
    assert "timm's pretrained weights" not in texts


@pytest.mark.parametrize(
    ('changes', 'needles'),
    [
        ({'epochs': 0}, ['epochs', '0']),
        ({'budget': 0}, ['budget', '0']),
        ({'holdout': 0}, ['holdout', '0']),
        ({'arms': ['best']}, ['best', 'fine_tuned']),
        ({'device': 'tpu'}, ['tpu']),
        ({'pretrained': 'resnet18.a9_in1k'}, ['resnet18.a9_in1k', 'resnet18.a1_in1k', 'local-dir']),
        ({'pretrained': 'resnet81'}, ['resnet81']),
    ],
)
def test_bad_arguments_are_told_in_one_line(changes, needles, compare, pictures, one_line):
    with pytest.raises(InputError) as error:
        compare(*pictures(24), **changes)
    one_line(error, *needles)


def test_a_loader_that_shuffles_is_not_read_twice(compare, pictures, one_line):
    pixels, names = pictures(24)
    labels = torch.tensor([sorted(set(names)).index(name) for name in names])
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels)
    loader = torch.utils.data.DataLoader(dataset, 8, shuffle=True)
    with pytest.raises(InputError) as error:
        compare(loader, None, arms=['pretrained'])
    one_line(error, 'shuffle=False')
    assert set(compare(loader, None, arms=[])['arms']) == {'predicted'}


class Turning(torch.utils.data.IterableDataset):
    """Gives its images in another order each time."""

    def __init__(self, images, labels):
        self.pairs, self.times = list(zip(images, labels, strict=True)), 0

    def __iter__(self):
        self.times += 1
        yield from self.pairs[self.times :] + self.pairs[: self.times]


def test_a_stream_that_comes_in_another_order_again_is_left_out_of_the_second_reading(compare, pictures, tmp_path):
    pixels, names = pictures(24)
    labels = [sorted(set(names)).index(name) for name in names]
    timm_pudnet.save_model(timm.create_model('test_resnet', num_classes=0), tmp_path / 'weights')
    stream = Turning(list(torch.from_numpy(pixels).permute(0, 3, 1, 2)), labels)
    result = compare(stream, None, arms=['pretrained'], pretrained=f'local-dir:{tmp_path / "weights"}')
    assert 'another order' in result['left_out']['pretrained']


def test_too_few_images_are_told_in_one_line(compare, pictures, one_line):
    with pytest.raises(InputError) as error:
        compare(*pictures(3))
    one_line(error, 'kept aside', 'two')
    pixels, _ = pictures(6)
    for labels, needle in ((None, 'labelled'), (['cup'] * 6, 'one class')):
        with pytest.raises(InputError) as error:
            compare(pixels, labels)
        one_line(error, needle)


def test_a_rival_that_got_worse_again_counts_by_its_best():
    rows = {'fine_tuned': ((1.0, 60.0), (2.0, 50.0)), 'adam': ((0.5, 10.0), (3.0, 55.0))}
    arms = {name: [{'seconds': s, 'accuracy': a} for s, a in points] for name, points in rows.items()}
    assert room._break_even(arms) == {'adam': {'fine_tuned': None}}


def test_the_random_initialisation_is_trained_at_one_rate_from_the_first_epoch_on(compare, pictures, monkeypatch):
    asked, tune = [], room.finetune_epochs
    monkeypatch.setattr(room, 'finetune_epochs', lambda *args, **how: asked.append(args[3]) or tune(*args, **how))
    compare(*pictures(24), epochs=1, arms=['random'])
    assert [(how.layer_decay, how.head_first, how.epochs) for how in asked] == [(1.0, False, 1)]


def test_seconds_of_pretrained_weights_are_of_the_images_learned_from_alone(compare, pictures, tmp_path, monkeypatch):
    folder = timm_pudnet.save_model(timm.create_model('test_resnet', num_classes=0), tmp_path / 'weights')
    monkeypatch.setattr(room, 'seconds_since', lambda *_: 1.0)  # a batch
    result = compare(*pictures(24), holdout=0.25, arms=['pretrained'], pretrained=f'local-dir:{folder}')
    assert (result['images'], result['tested']) == (18, 6)
    assert result['arms']['pretrained'][0]['seconds'] == pytest.approx(18 / 24)
