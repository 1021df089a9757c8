"""training/finetune.py: the head first, then all; what is kept aside; when it stops; what it refuses."""

import copy
import importlib
import math

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import timm_pudnet
from timm_pudnet import InputError, NotFoundError, PudNet, PudNetWarning
from timm_pudnet.config import InputConfig
from timm_pudnet.target import batch_norms, keep_arguments
from timm_pudnet.training import FineTuning, ImageBank, finetune, finetune_epochs
from timm_pudnet.training.finetune import MODES, fit_classifier, measured, name_classes, split_copies, tuning_for

room = importlib.import_module('timm_pudnet.training.finetune')  # the package's name `finetune` is the function
SIZE = {'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.25,) * 3, 'crop_pct': 1.0}


@pytest.fixture
def model():
    return timm.create_model('test_resnet', num_classes=7, pretrained_cfg_overlay=SIZE)


@pytest.fixture
def small(pictures):
    """24 pictures of three classes, and 12 others."""
    pixels, names = pictures(24)
    bank = to_bank(pixels, names)
    return bank, to_bank(*pictures(12, seed=1))


def to_bank(pixels, names):
    classes = sorted(set(names))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageBank(images, torch.tensor([classes.index(name) for name in names]), classes)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def short(mode='full', **changes):
    return room.dataclasses.replace(MODES[mode], **{'epochs': 2, 'batch_size': 8, **changes})


# finetune


def test_a_tuned_model_is_timm_s_and_the_given_one_stays(model, pictures, tmp_path):
    before = state(model)
    tuned = finetune(model, *pictures(36), epochs=6, batch_size=9, rate=3e-3, mode='full', progress=False)
    assert_close(state(model), before, rtol=0, atol=0)
    assert model.num_classes == 7
    assert not tuned.training
    assert tuned.pretrained_cfg['label_names'] == ('cup', 'jar', 'pan')
    timm_pudnet.save_model(tuned, tmp_path / 'model')
    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    fresh = to_bank(*pictures(30, seed=2))
    assert_close(state(loaded), state(tuned), rtol=0, atol=0)
    assert loaded.pretrained_cfg['label_names'] == ['cup', 'jar', 'pan']
    assert measured(loaded, fresh)['accuracy'] > 80


def test_a_model_in_another_precision_or_wrapped_by_a_compiler_is_tuned_as_it_is(model, pictures, one_line):
    images = pictures(24)
    expected = finetune(model, *images, epochs=np.int64(2), progress=False)
    same = copy.deepcopy(model)
    for given in (torch.compile(same), same.double()):
        tuned = finetune(given, *images, epochs=2, progress=False)
        assert type(tuned) is type(model)
        assert_close(state(tuned), state(expected))
    with pytest.raises(InputError) as error:
        finetune(model.requires_grad_(False), *images, epochs=2, progress=False)
    one_line(error, 'no weight of this model can be trained', 'requires_grad_(True)')


def test_a_folder_may_be_named_as_timm_names_it(model, pictures, tmp_path):
    folder = timm_pudnet.save_model(model, tmp_path / 'model')
    found = state(FineTuning(f'local-dir:{folder}', *pictures(24), epochs=1).model)
    wanted = state(FineTuning(folder, *pictures(24), epochs=1).model)
    assert_close(found, wanted, rtol=0, atol=0)
    with pytest.raises(InputError, match=r'hf-hub:org/m is no folder .* timm\.create_model, save_model it'):
        finetune('hf-hub:org/m', *pictures(24))
    with pytest.raises(NotFoundError, match='nowhere: no such folder of a timm model'):
        finetune('local-dir:nowhere', *pictures(24))


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_whatever_the_caller_has_set(mode, model, pictures):
    wanted = state(finetune(model, *pictures(24), epochs=2, progress=False))
    with mode():
        found = finetune(model, *pictures(24), epochs=2, progress=False)
    assert_close(state(found), wanted, rtol=0, atol=0)


class Labelled(torch.utils.data.TensorDataset):
    """Images whose labels are known only by reading them."""


class Named(Labelled):
    classes = ('a', 'b')


@pytest.mark.parametrize(
    ('kind', 'labels', 'reason'),
    [
        (Named, [5, 6, 7, 5], 'label 7 where there are names of 2 classes'),
        (Labelled, [1, 2, 3, 1], 'labels up to 3, but only 3 different ones: make them 0 to 2'),
        (Labelled, [3, 10**9 + 3, 3, 3], 'labels up to 1000000003, but only 2 different ones'),
    ],
)
def test_labels_that_are_no_numbers_of_classes_are_told(kind, labels, reason, model):
    with pytest.raises(InputError, match=reason):
        finetune(model, kind(torch.rand(4, 3, 32, 32), torch.tensor(labels)))


def test_two_classes_of_one_name_stay_two():
    twins = Named(torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8) / 4, torch.tensor([0, 1, 0, 1]))
    twins.classes = ('crane', 'crane')
    input = InputConfig(input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    bank = ImageBank.from_source(timm_pudnet.open_images(twins, input=input))
    assert (bank.labels.tolist(), [len(rows) for rows in bank.members]) == ([0, 1, 0, 1], [2, 2])
    named = ImageBank.from_source(timm_pudnet.open_images(twins, input=input), ['crane', 'crane'])
    assert (named.labels.tolist(), named.class_names) == ([0, 1, 0, 1], bank.class_names)
    for classes, needle in ((['crane'], 'named 1 times, and 2'), (['crane'] * 3, 'named 3 times, and 2')):
        with pytest.raises(InputError, match=needle):
            bank.select(classes)


def normalised_pixels(bank, net):
    mean, std = (torch.tensor(values)[:, None, None] for values in (net.config.input.mean, net.config.input.std))
    return (bank.images.float() / 255 - mean) / std


def test_images_are_cropped_once(pictures, write_folder, tmp_path):
    """Whoever predicts from files sees a quarter of them; so does whoever fine-tunes or compares."""
    net = PudNet.for_target('test_resnet', sketch_width=16, input=InputConfig(input_size=(3, 32, 32), crop_pct=0.5))
    write_folder(tmp_path, *pictures(24))
    wanted = state(timm_pudnet.predict_model('test_resnet', tmp_path, hypernet=net))
    found = state(FineTuning('test_resnet', tmp_path, hypernet=net, epochs=1, holdout=0).model)
    assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_an_architecture_s_weights_are_predicted_from_the_part_that_is_trained_on(tiny, pictures, monkeypatch):
    given = []
    predict = room.predict_model
    monkeypatch.setattr(
        room, 'predict_model', lambda *args, **kwargs: given.append(args[1]) or predict(*args, **kwargs)
    )
    run = FineTuning('test_resnet', *pictures(24), hypernet=tiny, epochs=2)
    assert_close(torch.cat([images for images, _ in given[0].batches()]), normalised_pixels(run.images, tiny))
    assert (len(run.images.labels), len(run.held.labels)) == (18, 6)
    assert run.before is not None
    assert run.model.pretrained_cfg['label_names'] == ('cup', 'jar', 'pan')


def test_a_predicted_head_for_numbered_classes_is_kept(tiny, small):
    bank, _ = small
    predicted = timm_pudnet.predict_model('test_resnet', bank.images, bank.labels, hypernet=tiny)
    head = predicted.get_classifier().weight.detach().clone()
    run = FineTuning(predicted, bank.images, bank.labels, epochs=2)
    assert run.before is not None
    assert_close(run.model.get_classifier().weight.detach(), head, rtol=0, atol=0)


def test_the_first_epoch_fits_the_head_alone_and_the_next_all(model, small):
    bank, tested = small
    fit_classifier(model, bank.class_names)
    start = state(model)
    after = [(point, state(model)) for point in finetune_epochs(model, bank, tested, short())]
    assert [point['phase'] for point, _ in after] == ['head', 'all']
    moved = [{key for key in start if not torch.equal(start[key], values[key])} for _, values in after]
    assert moved[0] == {'fc.weight', 'fc.bias'}
    assert moved[1] == set(start)


def test_the_first_step_is_no_loss_of_time(model, small):
    bank, _ = small
    fit_classifier(model, bank.class_names)
    start = state(model)
    one_a_epoch = short(batch_size=len(bank.labels), head_first=False, warmup=0.5)
    next(iter(finetune_epochs(model, bank, None, one_a_epoch)))
    assert not torch.equal(start['fc.weight'], model.state_dict()['fc.weight'])


def test_lower_layers_move_less_by_the_decay(model, small):
    bank, _ = small
    fit_classifier(model, bank.class_names)

    def moved(decay):
        tuned = timm.create_model('test_resnet', num_classes=3, pretrained_cfg_overlay=SIZE)
        tuned.load_state_dict(model.state_dict())
        list(finetune_epochs(tuned, bank, None, short(layer_decay=decay, head_first=False, warmup=0.0)))
        return [
            float((tuned.state_dict()[key] - model.state_dict()[key]).abs().mean())
            for key in ('conv1.0.weight', 'layer4.0.conv1.weight')
        ]

    (low, high), (even_low, even_high) = moved(0.5), moved(1.0)
    assert low < 0.1 * even_low
    assert low / high < 0.2 * even_low / even_high
    assert moved(1.0) == [even_low, even_high]  # and the same again


@pytest.mark.parametrize('mode', ['few', 'full'])
def test_norm_statistics_stay_with_few_images(mode, model, small):
    bank, _ = small
    fit_classifier(model, bank.class_names)
    start = state(model)
    list(finetune_epochs(model, bank, None, short(mode)))
    keys = [f'{name}.running_mean' for name, _ in batch_norms(model)]
    assert keys
    assert all(torch.equal(start[key], model.state_dict()[key]) == (mode == 'few') for key in keys)


def test_the_mode_follows_the_number_of_images(small):
    bank, _ = small
    many = ImageBank(bank.images, bank.labels, bank.class_names)
    assert tuning_for('auto', many) == ('few', MODES['few'])
    picks = torch.arange(150) % 24
    assert tuning_for('auto', many.part(picks)) == ('full', MODES['full'])
    assert tuning_for('full', many, epochs=4)[1].epochs == 4


def test_the_same_seed_gives_the_same_bits_and_the_global_state_stays(model, pictures):
    def run(seed):
        return state(finetune(model, *pictures(24), epochs=2, seed=seed, progress=False))

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = run(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(run(0), first, rtol=0, atol=0)
    assert not torch.equal(run(1)['fc.weight'], first['fc.weight'])


# the head


def test_the_head_is_the_optimum_of_its_objective(model, small):
    bank, _ = small
    fit_classifier(model, bank.class_names)
    device = torch.device('cpu')
    with torch.no_grad():
        x = torch.cat(
            [
                model.eval().forward_head(model.forward_features(part), pre_logits=True)
                for part in room.normalised_batches(bank, room.input_of(model), device)
            ]
        ).double()
    loss = room._fit_head(model, bank, room.input_of(model), 0.1, device)
    y, mean = bank.labels, x.mean(0)
    scale = (x - mean).square().sum(1).mean().sqrt()
    rows = (x - mean) / scale
    centroids = F.normalize(torch.stack([x[y == label].mean(0) for label in range(3)]), dim=1)
    old = rows @ centroids.t()
    old = old / old.std()
    logits = x @ model.fc.weight.double().t() + model.fc.bias.double()
    assert float(F.cross_entropy(logits, y, label_smoothing=0.1).detach()) == pytest.approx(loss, abs=1e-4)

    # The same problem in float64.
    weight, bias, factor = (torch.zeros(shape, dtype=torch.double) for shape in ((3, x.shape[1]), 3, ()))
    for tensor in (weight, bias, factor):
        tensor.requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias, factor], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14)

    def objective():
        optimizer.zero_grad()
        error = F.cross_entropy(factor * old + rows @ weight.t() + bias, y, label_smoothing=0.1)
        (error + room.HEAD_STRENGTH / len(rows) * weight.square().sum()).backward()
        return error.detach()

    optimizer.step(objective)
    assert loss == pytest.approx(float(objective()), abs=2e-3)


def test_a_head_for_these_classes_is_where_its_fit_begins(small, tiny):
    bank, tested = small
    model = timm_pudnet.predict_model('test_resnet', bank.images, bank.labels, hypernet=tiny)
    assert not fit_classifier(model, bank.class_names)  # these were not named: a new head
    assert not model.fc.weight.any()
    names = [bank.class_names[label] for label in bank.labels]
    model = timm_pudnet.predict_model('test_resnet', bank.images, names, hypernet=tiny)
    weight = model.fc.weight.clone()
    assert fit_classifier(model, bank.class_names)
    assert torch.equal(model.fc.weight, weight)
    next(finetune_epochs(model, bank, tested, short('few')))
    cosine = F.cosine_similarity(model.fc.weight - model.fc.weight.mean(0), weight - weight.mean(0))
    assert cosine.min() > 0.5


# what is kept aside, and when it stops


def test_copies_stay_in_one_part(small):
    bank, _ = small
    doubled = ImageBank(torch.cat([bank.images] * 3), torch.cat([bank.labels] * 3), bank.class_names)
    used, aside, copies = split_copies(doubled, 0.25)
    assert copies == 48
    assert sorted([*used.tolist(), *aside.tolist()]) == list(range(72))
    assert {int(number) % 24 for number in used}.isdisjoint(int(number) % 24 for number in aside)
    assert doubled.labels[aside].bincount().tolist() == [6, 6, 6]
    assert [part.tolist() for part in split_copies(doubled, 0.25)[:2]] == [used.tolist(), aside.tolist()]
    assert split_copies(doubled, 0.25, seed=1)[1].tolist() != aside.tolist()


def test_copies_are_said(model, pictures):
    pixels, names = pictures(24)
    pixels[3] = pixels[0]
    with pytest.warns(PudNetWarning, match='1 image is a copy of others, pixel for pixel at 32x32'):
        FineTuning(model, pixels, names, epochs=1)


def test_a_class_whose_images_are_all_another_s_is_named(small, one_line):
    bank, _ = small
    images = torch.where((bank.labels == 2)[:, None, None, None], bank.images[0], bank.images)
    with pytest.raises(InputError) as error:
        split_copies(ImageBank(images, bank.labels, bank.class_names), 0.2)
    one_line(error, "'pan'", 'copy')


@pytest.mark.parametrize('count', [2, 3, 6])
def test_a_handful_of_images_is_tuned_through_all_epochs_and_that_is_said(count, model, pictures):
    with pytest.warns(PudNetWarning, match='no image is kept aside'):
        run = FineTuning(model, *pictures(count), epochs=3)
    run.run(progress=False)
    assert run.mode == 'few'
    assert [point['epoch'] for point in run.history] == [1, 2, 3]
    assert run.best_epoch == 3
    assert all(math.isfinite(point['loss']) for point in run.history)


@pytest.fixture
def scripted(monkeypatch):
    """Sets what the tests after each epoch (and the one before) find, as numbers of images right."""

    def use(*counts):
        left = list(counts)

        def give(model, tested):
            found = left.pop(0)
            if isinstance(found, BaseException):
                raise found
            return {'right': found, 'accuracy': 10.0 * found, 'test_loss': 1.0}

        monkeypatch.setattr(room, 'measured', give)

    return use


def test_training_stops_when_nothing_gets_better_and_the_best_model_is_kept(model, pictures, scripted):
    scripted(2, 4, 3, 4, 1)
    run = FineTuning(model, *pictures(24), epochs=9, patience=3)
    run.run(progress=False)
    assert (len(run.history), run.best_epoch) == (5, 2)
    assert run.best is run.history[1]
    assert run.before is None
    kept = state(run.result())
    scripted(2, 4)
    again = FineTuning(model, *pictures(24), epochs=9, patience=3)
    epochs = finetune_epochs(again.model, again.images, again.held, again.tuning)
    next(epochs), next(epochs)
    assert_close(kept, state(again.model), rtol=0, atol=0)


def test_a_model_that_was_better_before_stays_as_it_was(tiny, pictures, scripted):
    scripted(6, 5, 5, 5)
    run = FineTuning('test_resnet', *pictures(24), hypernet=tiny, epochs=3)
    start = state(run.model)
    run.run(progress=False)
    assert run.best_epoch == 0
    assert run.best is run.before
    assert_close(state(run.result()), start, rtol=0, atol=0)


def test_an_interrupt_leaves_the_best_so_far(model, pictures, scripted):
    scripted(2, 5, KeyboardInterrupt())
    run = FineTuning(model, *pictures(24), epochs=9)
    with pytest.raises(KeyboardInterrupt):
        run.run(progress=False)
    at_three = state(run.model)
    assert run.best_epoch == 2
    kept = state(run.result())
    assert not torch.equal(kept['fc.weight'], at_three['fc.weight'])


# what it takes and what it refuses


@pytest.mark.parametrize('name', ['test_efficientnet', 'test_convnext', 'test_nfnet', 'test_vit', 'convnet3'])
def test_other_architectures_are_tuned(name, pictures):
    model = timm.create_model(name)
    tuned = finetune(model, *pictures(6), epochs=2, holdout=0, progress=False)
    assert tuned(torch.zeros(1, 3, 160, 160)).shape == (1, 3)


@pytest.mark.parametrize('pool', ['max', 'catavgmax'])
def test_a_model_keeps_its_pooling(pool, pictures, tmp_path, monkeypatch):
    model = timm.create_model('test_resnet', global_pool=pool, pretrained_cfg_overlay=SIZE)
    keep_arguments(model, {'global_pool': pool})
    reset = type(model).reset_classifier  # before timm 1.0.31 its default is another pool than the model's
    monkeypatch.setattr(
        type(model), 'reset_classifier', lambda self, count, global_pool='avg': reset(self, count, global_pool)
    )
    tuned = finetune(model, *pictures(12), epochs=2, progress=False)
    assert tuned.global_pool.pool_type == pool
    loaded = timm.create_model(f'local-dir:{timm_pudnet.save_model(tuned, tmp_path / "model")}', pretrained=True).eval()
    images = torch.rand(4, 3, 32, 32)
    assert_close(loaded(images), tuned(images))


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_mambaout', 'test_vit', 'convnet3'])
def test_a_model_that_does_not_pool_is_refused(name, pictures, one_line):
    model = timm.create_model(name, global_pool='', num_classes=0)
    with pytest.raises(InputError) as error:
        finetune(model, *pictures(6), epochs=2, holdout=0, progress=False)
    one_line(error, type(model).__name__, "global_pool=''", "global_pool='avg'")


@pytest.mark.parametrize('name', ['dla46_c', 'test_mambaout'])
def test_a_head_that_is_no_plain_linear_layer_learns_too(name, pictures):
    model = timm.create_model(name)
    if name == 'dla46_c':
        assert isinstance(model.get_classifier(), torch.nn.Conv2d)
    pixels, names = pictures(60, size=64)
    tuned = finetune(model, pixels, names, epochs=1, holdout=0, progress=False)  # the head alone
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    config = timm.data.resolve_model_data_config(tuned)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    side = config['input_size'][1:]
    with torch.inference_mode():
        guesses = tuned((torch.nn.functional.interpolate(images, side, mode='bicubic') - mean) / std).argmax(1)
    labels = torch.tensor([tuned.pretrained_cfg['label_names'].index(name) for name in names])
    assert (guesses == labels).float().mean() > 0.9


def test_numbers_for_classes_and_grey_images(small):
    bank, _ = small
    model = timm.create_model(
        'test_resnet', in_chans=1, pretrained_cfg_overlay={'input_size': (1, 32, 32), 'mean': (0.5,), 'std': (0.2,)}
    )
    tuned = finetune(model, bank.images[:, :1], bank.labels, epochs=2, progress=False)
    assert tuned.pretrained_cfg['label_names'] == ('0', '1', '2')


@pytest.mark.parametrize('chans', [1, 4])
def test_channels_are_those_of_the_first_conv(chans):
    # timm's config goes on saying 3
    model = timm.create_model('test_resnet', in_chans=chans, num_classes=2, pretrained_cfg_overlay=SIZE)
    images = torch.randint(256, (12, chans, 32, 32), dtype=torch.uint8)
    assert finetune(model, images, [0, 1] * 6, epochs=1, progress=False)(torch.rand(1, chans, 32, 32)).shape == (1, 2)
    assert PudNet.for_target('test_resnet', model_kwargs={'in_chans': chans}).config.input.input_size[0] == chans


@pytest.mark.parametrize('form', ['dataset', 'loader'])
def test_labels_that_come_with_the_images(form, small, model):
    bank, _ = small
    images = torch.utils.data.TensorDataset(bank.images, bank.labels)
    if form == 'loader':
        images = torch.utils.data.DataLoader(images, 5, shuffle=True)
    tuned = finetune(model, images, epochs=2, progress=False)
    assert tuned.pretrained_cfg['label_names'] == ('0', '1', '2')


def test_no_batch_of_a_single_image_has_statistics_of_its_own(model, small):
    bank, _ = small
    for size in (1, 2):
        for _ in finetune_epochs(model, bank.part(torch.arange(9)), None, short(batch_size=size, head_first=False)):
            pass
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    ('changes', 'needles'),
    [
        ({'mode': 'some'}, ['some', 'few', 'full']),
        ({'holdout': 1.0}, ['holdout', '1.0']),
        ({'epochs': 0}, ['epochs', '0']),
        ({'batch_size': 0}, ['batch_size']),
        ({'rate': -1.0}, ['rate', '-1.0']),
        ({'rate': math.nan}, ['rate', 'nan']),
        ({'layer_decay': 1.5}, ['layer_decay', '1.5']),
        ({'hypernet': 'resnet18'}, ['hypernet', 'has weights']),
        ({'augmentation': {'hflop': 1}}, ['hflop', 'create_transform']),
        ({'device': 'tpu'}, ['tpu']),
        ({'seed': None}, ['seed', 'whole number', 'None']),
    ],
)
def test_bad_arguments_are_told_in_one_line(changes, needles, model, pictures, one_line):
    with pytest.raises(InputError) as error:
        finetune(model, *pictures(24), **{'epochs': 2, 'progress': False, **changes})
    one_line(error, *needles)


def with_parametrized_head():
    made = timm.create_model('test_resnet', num_classes=3)
    torch.nn.utils.parametrizations.weight_norm(made.fc)
    name_classes(made, ('cup', 'jar', 'pan'))
    return made


def test_a_head_of_another_width_is_replaced_though_its_names_are_these_classes(model, pictures):
    tuned = finetune(model, *pictures(24), epochs=1, progress=False)
    tuned.reset_classifier(7)
    again = finetune(tuned, *pictures(24), epochs=1, progress=False)
    assert again.num_classes == again.fc.out_features == len(again.pretrained_cfg['label_names']) == 3


def test_bad_models_and_images_are_told_in_one_line(model, pictures, tiny_folder, tmp_path, one_line):
    pixels, names = pictures(24)
    (tmp_path / 'empty').mkdir()
    for wrong, needles in (
        (7, ['int', 'timm model']),
        (torch.nn.Conv2d(3, 3, 1), ['Conv2d']),
        (timm.create_model('test_resnet', device='meta'), ['meta device', 'load weights']),
        (with_parametrized_head(), ['parametrized', 'remove_parametrizations']),
        (tiny_folder, [tiny_folder, 'no timm model']),
        (tmp_path / 'empty', ['empty', 'no timm model']),
        ('resnet81', ['resnet81', 'resnet18']),
    ):
        with pytest.raises(InputError) as error:
            finetune(wrong, pixels, names, progress=False)
        one_line(error, *needles)
    with pytest.raises(NotFoundError) as missing:
        finetune(tmp_path / 'nowhere', pixels, names, progress=False)
    one_line(missing, 'nowhere', 'predict --out')
    for labels, needles in ((None, ['labelled']), (['cup'] * 24, ['one class', 'cup'])):
        with pytest.raises(InputError) as error:
            finetune(model, pixels, labels, progress=False)
        one_line(error, *needles)


@pytest.mark.parametrize(
    ('holdout', 'epochs', 'batch_size'),
    [(0.2, 8, 64), (0, 8, 8), (0, 8, 64), (0, 3, 64)],  # by 64 an epoch is one step: its loss is of those before it
)
def test_a_rate_that_diverges_leaves_the_best_model_before(holdout, epochs, batch_size, pictures):
    model = timm.create_model('test_resnet', layers=(6, 6, 6, 6), num_classes=7, pretrained_cfg_overlay=SIZE)
    how = {'mode': 'few', 'rate': 1.0, 'layer_decay': 1.0, 'batch_size': batch_size}
    tuning = FineTuning(model, *pictures(24), epochs=epochs, holdout=holdout, **how)
    with pytest.warns(PudNetWarning, match='the loss is (nan|inf) in epoch .*; stopped, the best model before is kept'):
        tuning.run(progress=False)
    assert len(tuning.history) < epochs
    kept = tuning.result()
    for part in room.normalised_batches(tuning.images, room.input_of(kept), torch.device('cpu')):
        assert kept(part).isfinite().all()


def test_a_loss_that_is_not_finite_ends_it(model, pictures, one_line):
    with torch.no_grad():
        model.conv1[0].weight.fill_(np.nan)
    with pytest.raises(FloatingPointError) as error:
        finetune(model, *pictures(24), epochs=2, progress=False)
    one_line(error, 'epoch 1', 'features')


def test_a_frozen_head_stays_as_it_is(model, small):
    model = copy.deepcopy(model)
    model.get_classifier().requires_grad_(False)
    before = copy.deepcopy(model.get_classifier().state_dict())
    for _ in finetune_epochs(model, small[0], None, MODES['few']):
        break
    assert_close(dict(model.get_classifier().state_dict()), dict(before), rtol=0, atol=0)
    parametrized = with_parametrized_head()
    parametrized.fc.requires_grad_(False)
    assert fit_classifier(parametrized, ('cup', 'jar', 'pan'))


def test_an_answer_that_is_no_number_is_wrong(model, small):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_classifier().weight.fill_(math.nan)
    assert measured(model, small[0])['right'] == 0


def test_of_epochs_with_as_many_right_the_one_of_least_loss_is_kept(model, pictures, monkeypatch):
    left = [(2, 0.1), (3, 0.9), (3, 0.7), (3, 0.8)]
    monkeypatch.setattr(room, 'measured', lambda *args: dict(zip(('right', 'test_loss'), left.pop(0), strict=True)))
    run = FineTuning(model, *pictures(24), epochs=4)
    run.run(progress=False)
    assert (run.best_epoch, run.best['test_loss']) == (3, 0.7)


def test_a_class_keeps_an_image_whatever_share_is_kept_aside(small):
    bank, _ = small
    used, aside, _ = split_copies(bank, 0.99)
    assert bank.labels[used].bincount().tolist() == [1, 1, 1]
    assert len(aside) == 21


def test_every_epoch_has_an_order_of_its_own(model, small, monkeypatch):
    bank, _ = small
    fit_classifier(model, bank.class_names)
    shown, work = [], room.timm_augmented
    monkeypatch.setattr(room, 'timm_augmented', lambda images, *rest: shown.append(images) or work(images, *rest))
    list(finetune_epochs(model, bank, None, short(epochs=3, batch_size=24)))
    assert len(shown) == 2
    assert not torch.equal(*shown)


def test_what_dropout_draws_differs_by_epoch(model, small, monkeypatch):
    bank, _ = small
    fit_classifier(model, bank.class_names)
    drawn, work = [], room.timm_augmented
    monkeypatch.setattr(room, 'timm_augmented', lambda *args: drawn.append(float(torch.rand(()))) or work(*args))
    list(finetune_epochs(model, bank, None, short(epochs=3)))
    assert len(set(drawn)) == len(drawn) == 6


def test_the_rate_rises_then_falls_to_nearly_zero(model, small, monkeypatch):
    bank, _ = small
    fit_classifier(model, bank.class_names)
    made, rates, work = [], [], room.create_optimizer_v2
    monkeypatch.setattr(room, 'create_optimizer_v2', lambda *args, **how: made.append(work(*args, **how)) or made[0])
    for _ in finetune_epochs(model, bank, None, short(epochs=21, batch_size=24, layer_decay=1.0, warmup=0.5)):
        rates.append(made[0].param_groups[0]['lr'] / MODES['full'].rate)
    rates = rates[1:]  # the first epoch is the head's
    top = rates.index(max(rates))
    assert (top, rates[top]) == (10, 1.0)
    assert rates == [*sorted(rates[:top]), *sorted(rates[top:], reverse=True)]
    assert 0 < rates[0] < 0.2
    assert 0 < rates[-1] < 0.05


def test_few_images_are_fewer_than_fifty_a_class(small):
    bank, _ = small
    for count, mode in ((149, 'few'), (150, 'full')):
        assert tuning_for('auto', bank.part(torch.arange(count) % 24))[0] == mode


@pytest.mark.parametrize('augmentation', ['rand-m9', ['rand-m9']])
def test_an_augmentation_without_names_is_refused_before_any_work(augmentation, model, one_line):
    with pytest.raises(InputError) as error:
        FineTuning(model, 'nowhere', augmentation=augmentation)
    one_line(error, 'augmentation', type(augmentation).__name__, 'create_transform')


def test_a_tuning_runs_once(model, pictures, one_line):
    tuning = FineTuning(model, *pictures(12), epochs=1, holdout=0.0)
    tuning.run(progress=False)
    with pytest.raises(InputError) as error:
        tuning.run(progress=False)
    one_line(error, 'has run', 'new one')


def test_a_model_of_timm_s_class_without_a_config_is_tuned(pictures, tmp_path):
    made = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3, channels=(8, 8, 8, 8))
    assert not hasattr(made, 'pretrained_cfg')
    tuned = finetune(made, *pictures(12), epochs=1, holdout=0.0, progress=False)
    assert len(tuned.pretrained_cfg['label_names']) == 3
    with pytest.raises(InputError, match='ResNet cannot be saved'):
        timm_pudnet.save_model(tuned, tmp_path / 'model')
