"""Recipes that start from a model of the target, and short tries of a recipe."""

import dataclasses
import importlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from timm_pudnet import PudNet, load_hypernet, save_model
from timm_pudnet.config import InputConfig, InputError, OutputExistsError, PudNetWarning
from timm_pudnet.devices import forked_rng
from timm_pudnet.files import save_tensors
from timm_pudnet.target import with_own_config
from timm_pudnet.training import (
    Data,
    ImageBank,
    LossWeights,
    Recipe,
    check_start,
    meta_train,
    save_control,
    train_plain,
    try_recipe,
    whitening_path,
)
from timm_pudnet.training.finetune import name_classes
from timm_pudnet.training.meta_train import seen_by

loop = importlib.import_module('timm_pudnet.training.meta_train')  # the package's name for it is the function
HUB = Path(__file__).parents[1] / 'hub'
RESIDUAL = {'generator': 'residual', 'predict_norm': True}
SLOW = {'rate': 1e-9, 'sketch_rate': 1e-9, 'optimizer': 'sgd', 'weight_decay': 0.0}


@pytest.fixture
def start(tmp_path):
    model = timm.create_model('test_resnet', num_classes=0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.rand_like(value))
    return model, save_model(model, tmp_path / 'start')


def test_hypernetwork_and_control_start_from_the_same_model(start, make_recipe, bank):
    model, folder = start
    recipe = make_recipe(1, start=str(folder), hypernet=RESIDUAL, schedule=SLOW)
    hypernet = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    plain, _ = train_plain(recipe, banks=[bank], device='cpu', progress=False)
    predicted = hypernet(torch.zeros(hypernet.config.sketch_width))
    for key, value in model.named_parameters():
        assert_close(predicted[key], value.detach(), rtol=0, atol=1e-6)
        assert_close(plain.get_parameter(key).detach(), value.detach(), rtol=0, atol=1e-6)


def test_the_paper_s_generator_starts_from_a_model_too(start, make_recipe, bank):
    model, folder = start
    hypernet = meta_train(make_recipe(1, start=str(folder), schedule=SLOW), banks=[bank], device='cpu', progress=False)
    predicted = hypernet(torch.zeros(hypernet.config.sketch_width))
    for key, value in model.named_parameters():
        assert_close(predicted[key], value.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('train', [meta_train, train_plain])
def test_a_target_of_one_size_trains_at_that_of_the_recipe(train, make_recipe, bank):
    images = bank.images.repeat_interleave(4, -1).repeat_interleave(4, -2)
    fields = {'model_name': 'visformer_tiny', 'generator': 'residual', 'input': InputConfig(input_size=(3, 64, 64))}
    bank = ImageBank(images, bank.labels, bank.class_names)
    train(make_recipe(1, hypernet=fields), banks=[bank], device='cpu', progress=False)


@pytest.mark.parametrize('train', [meta_train, train_plain])
def test_a_start_that_was_trained_on_an_unseen_class_is_refused(train, make_recipe, bank, tmp_path, one_line):
    known = PudNet.for_target(**{**vars(make_recipe(hypernet=RESIDUAL).hypernet), 'class_names': ('cup', 'jar')})
    folder = str(known.save_pretrained(tmp_path / 'known'))

    def with_unseen(*unseen):
        return make_recipe(1, start=folder, hypernet=RESIDUAL, data=(Data(images='nowhere', unseen=unseen),))

    with pytest.raises(InputError) as error:
        train(with_unseen('lid', 'jar'), banks=[bank], device='cpu', progress=False)
    one_line(error, folder, "'jar'", 'unseen')
    train(with_unseen('lid'), banks=[bank], device='cpu', progress=False)
    with pytest.raises(InputError) as error:
        check_start(with_unseen('lid', 'J-ar'))
    one_line(error, folder, "'J-ar' ('jar' there)", 'unseen')
    both = Data(images='nowhere', classes=('jar',), unseen=('JAR',))  # two classes of one set
    check_start(make_recipe(1, start=folder, hypernet=RESIDUAL, data=(both,)))


def test_a_model_says_which_classes_it_has_seen(start, make_recipe, bank, tmp_path, one_line):
    """By its labels; and by what `train --plain` writes beside it, through every further stage."""
    _, folder = start
    save_tensors({'whitening': torch.eye(2)}, loop.whitening_path(folder), {'classes': '["jar"]'})
    named = timm.create_model('test_resnet', num_classes=2)
    named.pretrained_cfg.update(label_names=['lid', 'pan'], num_classes=2)
    named = save_model(named, tmp_path / 'named')
    for model, seen in ((folder, ('jar',)), (named, ('lid', 'pan'))):
        assert loop.seen_by(str(model)) == seen

        def with_unseen(name, model=model):
            data = (Data(images='nowhere', unseen=(name,)),)
            return make_recipe(1, start=str(model), hypernet=RESIDUAL, data=data)

        with pytest.raises(InputError) as error:
            meta_train(with_unseen(seen[0]), banks=[bank], device='cpu', progress=False)
        one_line(error, model, repr(seen[0]), 'unseen')
        hypernet = meta_train(with_unseen('cup'), banks=[bank], device='cpu', progress=False)
        assert hypernet.config.class_names == tuple(dict.fromkeys((*seen, *bank.class_names)))
        assert hypernet.config.training['start'] == str(model)


def test_timm_s_own_weights_are_a_start(start, make_recipe, bank, monkeypatch):
    model, folder = start
    original = timm.create_model

    def create(name, *, pretrained=False, **kwargs):
        if pretrained and not name.startswith('local-dir:'):  # a file in place of a download
            assert name == 'test_resnet.r160_in1k'
            kwargs |= {'pretrained_cfg_overlay': {'file': str(folder / 'model.safetensors'), 'num_classes': 0}}
        return original(name, pretrained=pretrained, **kwargs)

    monkeypatch.setattr(timm, 'create_model', create)
    recipe = make_recipe(1, start='test_resnet.r160_in1k', hypernet=RESIDUAL, schedule=SLOW)
    hypernet = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    predicted = hypernet(torch.zeros(hypernet.config.sketch_width))
    for key, value in model.named_parameters():
        assert_close(predicted[key], value.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize('train', [meta_train, train_plain])
def test_a_start_that_saw_images_otherwise_is_told_of(train, start, make_recipe, bank):
    config = json.loads((start[1] / 'config.json').read_text())
    config['pretrained_cfg']['std'] = [0.25] * 3
    other = shutil.copytree(start[1], start[1].with_name('otherwise'), dirs_exist_ok=True)
    (other / 'config.json').write_text(json.dumps(config))
    with pytest.warns(PudNetWarning, match=r'otherwise saw images of mean .* std \(0\.25, 0\.25, 0\.25\)'):
        train(make_recipe(1, start=str(other), hypernet=RESIDUAL), banks=[bank], device='cpu', progress=False)


def test_the_statistics_of_the_start_can_be_kept(start, make_recipe, bank, monkeypatch):
    model, folder = start
    stay = {'fixed_statistics': True}
    first = meta_train(
        make_recipe(1, start=str(folder), hypernet=RESIDUAL, schedule=stay), banks=[bank], progress=False
    )
    free = meta_train(make_recipe(1, start=str(folder), hypernet=RESIDUAL), banks=[bank], progress=False)
    own = model.state_dict()
    for key in first.target.keys('calibrated'):
        assert_close(first.statistics(key), own[key], rtol=0, atol=0)
        assert not torch.equal(free.statistics(key), own[key]), key
    # The loss is of features by these statistics: those of the start in eval mode, before the first step.
    seen = []
    losses = loop.group_losses
    monkeypatch.setattr(loop, 'group_losses', lambda *args, **kwargs: seen.append(args) or losses(*args, **kwargs))
    recipe = make_recipe(1, start=str(folder), hypernet=RESIDUAL, schedule=stay)
    meta_train(recipe, banks=[bank], progress=False)
    group = loop.group_sampler(recipe, [bank]).draw(0)
    with torch.no_grad():
        assert_close(seen[0][1], model.eval()(group.query), rtol=1e-4, atol=1e-4)


def test_a_target_without_kept_statistics_is_told(make_recipe, bank, tmp_path):
    folder = save_model(timm.create_model('test_efficientnet_gn', num_classes=0), tmp_path / 'start')
    fields = {**RESIDUAL, 'model_name': 'test_efficientnet_gn', 'min_predicted': 0.0}
    recipe = make_recipe(1, start=str(folder), hypernet=fields, schedule={**SLOW, 'fixed_statistics': True})
    with pytest.warns(PudNetWarning, match='fixed_statistics does nothing, test_efficientnet_gn'):
        meta_train(recipe, banks=[bank], device='cpu', progress=False)


def test_kept_statistics_need_a_start(make_recipe, one_line):
    with pytest.raises(InputError) as error:
        make_recipe(schedule={'fixed_statistics': True})
    one_line(error, 'fixed_statistics', 'start')


@pytest.fixture(scope='module')
def learned(make_recipe, bank, tmp_path_factory):
    model, _ = train_plain(make_recipe(40), banks=[bank], device='cpu', progress=False)
    return model, save_model(model, tmp_path_factory.mktemp('learned') / 'start')


def frozen(start, make_recipe, steps, schedule=(), **losses):
    return make_recipe(
        steps,
        start=str(start),
        hypernet=RESIDUAL,
        groups={'conditions': 1.0, 'per_step': 4},
        losses=LossWeights(**{'metric': 0.0, 'full': 0.0, 'consistency': 0.0, 'sketch': 0.0, **losses}),
        schedule={'optimizer': 'sgd', 'rate': 0.0, 'sketch_rate': 1e-2, 'fixed_statistics': True, **dict(schedule)},
    )


def test_a_rate_of_zero_leaves_the_start_as_it_is_and_learns_the_change(learned, make_recipe, bank, tmp_path):
    model, folder = learned
    recipe = frozen(folder, make_recipe, 40, distillation=1.0)
    hypernet = meta_train(recipe, tmp_path / 'run', banks=[bank], device='cpu', progress=False)
    given, changed = dict(model.named_parameters()), []
    for name, value in hypernet.named_parameters():
        assert value.requires_grad, name  # of what is handed over, as of what is loaded
        changed += [name] if name.endswith('.steer') and value.abs().sum() > 0 else []
    assert changed
    unmoved = PudNet.for_target(**{**vars(recipe.hypernet), 'class_names': tuple('abcdef')})
    unmoved.start_from(model.state_dict())
    for name, value in unmoved.named_parameters():
        if name.startswith('shared.') or name.endswith('.base'):
            assert_close(hypernet.get_parameter(name), value, rtol=0, atol=0)
    sketches = torch.randn(2, hypernet.config.sketch_width)
    one, two = (hypernet(sketch) for sketch in sketches)
    assert any(not torch.equal(one[key], two[key]) for key in given)
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()]
    losses = [line['distillation'] for line in lines]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


@pytest.fixture
def distilled(make_recipe, bank, monkeypatch):
    """What distillation from a start finds and wants in its last part of a step, and the group."""
    seen = []
    loss = loop.distillation_loss
    monkeypatch.setattr(loop, 'distillation_loss', lambda *args: seen.append(args) or loss(*args))

    def run(folder, steps=1, **schedule):
        recipe = frozen(folder, make_recipe, steps, schedule, distillation=1.0)
        meta_train(recipe, banks=[bank], device='cpu', progress=False)
        return *seen[-1], loop.group_sampler(recipe, [bank]).draw(len(seen) - 1, plain=True)

    return run


def test_what_is_wanted_are_the_features_of_the_start_before_the_condition(learned, distilled):
    model, folder = learned
    found, wanted, group = distilled(folder)
    with torch.no_grad():
        assert_close(wanted[0], model.eval()(group.plain), rtol=1e-4, atol=1e-4)
        assert_close(found[0], model(torch.cat([group.support, group.query])), rtol=1e-4, atol=1e-4)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert [tuple(one.shape) for one in wanted[1:]] == [(len(group.plain), norm.num_features) for norm in norms]


@pytest.mark.parametrize('fixed', [True, False])
def test_the_encoder_of_an_earlier_hypernetwork_keeps_its_norm_statistics_and_can_stay_as_it_is(
    fixed, earlier, make_recipe, bank
):
    hypernet, folder = earlier
    recipe = make_recipe(
        2, start=str(folder), hypernet=RESIDUAL, schedule={**SLOW, 'sketch_rate': 1e-3, 'fixed_encoder': fixed}
    )
    after = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    state = after.encoder.state_dict()
    moved = {key for key, value in hypernet.encoder.state_dict().items() if not torch.equal(value, state[key])}
    assert moved == (set() if fixed else {key for key, _ in hypernet.encoder.named_parameters()})


def test_a_fixed_encoder_is_that_of_a_hypernetwork(learned, make_recipe, bank, one_line):
    recipe = frozen(learned[1], make_recipe, 1, {'fixed_encoder': True}, distillation=1.0)
    with pytest.raises(InputError) as error:
        meta_train(recipe, banks=[bank], device='cpu', progress=False)
    one_line(error, 'fixed_encoder', 'hypernetwork', 'start')


@pytest.fixture(scope='module')
def earlier(make_recipe, bank, tmp_path_factory):
    recipe = make_recipe(40, hypernet=RESIDUAL, schedule={'rate': 2e-2})
    hypernet = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    return hypernet, hypernet.save_pretrained(tmp_path_factory.mktemp('earlier') / 'hypernet')


def test_training_goes_on_with_a_hypernetwork(earlier, make_recipe, bank):
    hypernet, folder = earlier
    stay = {**SLOW, 'fixed_statistics': True}
    after = meta_train(
        make_recipe(1, start=str(folder), hypernet={**RESIDUAL, 'tag': 'more'}, schedule=stay),
        banks=[bank],
        device='cpu',
        progress=False,
    )
    assert after.name == 'test_resnet.more'
    for key, value in hypernet.encoder.named_parameters():
        assert_close(after.encoder.get_parameter(key), value, rtol=0, atol=1e-6)
    assert_close(after.temperature, hypernet.temperature)
    sketches = torch.randn(2, hypernet.config.sketch_width)
    assert not torch.equal(*(hypernet(sketch)['conv1.0.weight'] for sketch in sketches))
    for sketch in sketches / sketches.norm(dim=1).max() * after.config.sketch_limit:  # neither shortens them
        found, wanted = after(sketch), hypernet(sketch)
        for key in after.target.keys('calibrated'):
            assert_close(found[key], wanted[key], rtol=0, atol=0)
        for key in (*after.target.keys('predicted'), *after.target.keys('shared')):
            assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-4)


def script(monkeypatch, name, *args):
    """Runs a script of hub/."""
    path = HUB / name
    monkeypatch.setattr(sys, 'argv', [str(path), *map(str, args)])
    runpy.run_path(str(path), run_name='__main__')


def average(monkeypatch, *args):
    script(monkeypatch, 'average.py', *args)


def test_a_control_that_is_refused_leaves_the_whitening_of_the_one_that_is_there(tmp_path):
    model = timm.create_model('test_resnet', num_classes=0)
    save_control(tmp_path / 'start', model, torch.eye(4), ['cup'])
    before = whitening_path(tmp_path / 'start').read_bytes()
    with pytest.raises(OutputExistsError):
        save_control(tmp_path / 'start', model, torch.zeros(4, 4), ['jar'])
    assert whitening_path(tmp_path / 'start').read_bytes() == before


DISTIL = """
[hypernet]
model_name = "test_resnet"
input = {input_size = [3, 16, 16]}
[[data]]
images = "images"
unseen = ["pan"]
[groups]
n_way = 4
n_shot = 4
n_query = 4
[schedule]
images = 2560
optimizer = "adamw"
rate = 0.003
"""


@pytest.fixture
def distil(tmp_path, monkeypatch, pictures, write_folder):
    """Runs hub/distil.py on images of 32 pixels, with a teacher of another architecture that sees them whole."""
    monkeypatch.chdir(tmp_path)
    pixels, names = pictures(90, size=32)
    write_folder(tmp_path / 'images', pixels, names)
    Path('distil.toml').write_text(DISTIL)

    with forked_rng(torch.device('cpu')), torch.no_grad():
        torch.manual_seed(0)
        teacher = timm.create_model('test_efficientnet', num_classes=0)
        for _ in range(40):  # norm statistics that are those of images
            teacher(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    teacher = with_own_config(teacher.eval(), InputConfig(input_size=(3, 32, 32)))
    folder = save_model(teacher, tmp_path / 'teacher')

    def run(*seen):
        save_tensors({'whitening': torch.eye(2)}, whitening_path(folder), {'classes': json.dumps(seen)})
        script(monkeypatch, 'distil.py', 'distil.toml', folder, 6, 'out')

    def make(**groups):
        recipe = Recipe.load('distil.toml')
        recipe = dataclasses.replace(recipe, groups=dataclasses.replace(recipe.groups, **groups))
        return runpy.run_path(str(HUB / 'distil.py'))['_Distilling'](recipe, teacher, 6)

    run.make = make
    return run


def test_a_network_learns_what_one_of_another_architecture_sees_in_larger_images(distil, monkeypatch, capsys):
    looks, forward = [], timm.models.EfficientNet.forward_features

    def counting(model, images):
        looks.append(tuple(images.shape[1:]))
        return forward(model, images)

    monkeypatch.setattr(timm.models.EfficientNet, 'forward_features', counting)
    distil('bowl')
    # After its two classes, each of six batches once, though there were eighty steps.
    assert looks[2:] == [(3, 32, 32)] * 6
    log = [json.loads(line)['distillation'] for line in Path('out/run-plain/log.jsonl').read_text().splitlines()]
    assert len(log) == 80
    assert sum(log[-6:]) < 0.5 * sum(log[:6])
    found = timm.create_model('local-dir:out/plain', pretrained=True).eval()
    assert timm.data.resolve_model_data_config(found)['input_size'] == (3, 16, 16)
    assert loop.seen_by('out/plain') == ('bowl', 'cup', 'jar')
    width = found(torch.zeros(1, 3, 16, 16)).shape[1]
    assert load_file('out/plain.whitening.safetensors')['whitening'].shape == (width, width)
    with pytest.raises(SystemExit):
        distil('bowl')
    assert 'plain exists: choose another OUT' in capsys.readouterr().err


def test_teacher_and_target_see_the_same_images_and_classes(distil):
    run = distil.make(turns=4)
    for number in range(5):
        small, large = (run._drawn(sampler, number) for sampler in (run.sampler, run.theirs))
        small = torch.nn.functional.interpolate(small * run.sampler.std + run.sampler.mean, size=32)
        large = large * run.theirs.std + run.theirs.mean
        for both in zip(small, large, strict=True):
            assert torch.corrcoef(torch.stack([image.flatten() for image in both]))[0, 1] > 0.8
    (bank,) = run.theirs.banks
    run.theirs.augmentation, run.theirs.groups = None, dataclasses.replace(run.theirs.groups, turns=4)
    for label, found in enumerate(run.centroids):  # numbered as the classes that it draws
        picks = bank.members[label % 2][:16]
        images = run.theirs._changed(bank, picks, torch.full((16,), label), torch.Generator())
        assert_close(found, run._teacher(run.theirs._normalised(images)).mean(0), rtol=1e-4, atol=1e-5)
    assert len(run.centroids) == run.head.out_features == 8


@pytest.mark.parametrize(
    ('recipe', 'seen', 'message'),
    [
        ('', ('pan', 'bowl'), "trained on class 'pan'"),
        ('conditions = 0.5', ('bowl',), 'leave out denoising, conditions'),
    ],
)
def test_a_teacher_that_has_seen_an_unseen_class_is_refused_and_so_is_what_draws_by_size(
    distil, capsys, recipe, seen, message
):
    Path('distil.toml').write_text(DISTIL.replace('n_query = 4', f'n_query = 4\n{recipe}'))
    with pytest.raises(SystemExit):
        distil(*seen)
    assert message in capsys.readouterr().err
    assert not Path('out').exists()


def test_a_teacher_that_is_not_there_is_one_line(distil, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        script(monkeypatch, 'distil.py', 'distil.toml', 'gone', 6, 'out')
    assert 'gone: no such folder' in capsys.readouterr().err


def test_the_mean_of_networks_is_what_it_then_predicts_for_every_sketch(earlier, tmp_path, monkeypatch):
    hypernet, folder = earlier
    models = [timm.create_model('test_resnet', num_classes=0) for _ in range(3)]
    for model in models:
        for name, value in model.named_buffers():
            if name.endswith(('running_mean', 'running_var')):
                value.add_(torch.rand_like(value))
    folders = [str(save_model(model, tmp_path / str(number))) for number, model in enumerate(models)]
    average(monkeypatch, folder, tmp_path / 'out', *folders)
    found = PudNet.from_pretrained(tmp_path / 'out')
    start = timm.create_model(f'local-dir:{tmp_path / "out" / "start"}', pretrained=True)
    assert timm.data.resolve_model_data_config(start)['input_size'] == hypernet.config.input.input_size
    # Without networks its own one, in the space that it is read in; that of other networks is not known.
    average(monkeypatch, folder, tmp_path / 'itself')
    for out, wanted in (('itself', hypernet.whitening), ('out', torch.eye(len(hypernet.whitening)))):
        assert_close(load_file(tmp_path / out / 'start.whitening.safetensors')['whitening'], wanted, rtol=0, atol=0)
        assert_close(PudNet.from_pretrained(tmp_path / out).whitening, wanted, rtol=0, atol=0)
    states = [model.state_dict() for model in models]
    for sketch in torch.randn(2, hypernet.config.sketch_width):
        with torch.no_grad():
            weights = found(sketch)
        for key, value in states[0].items():
            if value.is_floating_point():
                mean = sum(state[key] for state in states) / 3
                assert_close(weights[key], mean, rtol=2e-3, atol=2e-3)  # the file may be in float16
    for key, value in hypernet.encoder.state_dict().items():
        assert_close(found.encoder.state_dict()[key], value, rtol=2e-3, atol=2e-3)


def test_its_control_starts_from_what_it_predicts_for_the_mean_sketch(earlier, make_recipe, bank):
    hypernet, folder = earlier
    recipe = make_recipe(1, start=str(folder), hypernet=RESIDUAL, schedule=SLOW)
    plain, _ = train_plain(recipe, banks=[bank], device='cpu', progress=False)
    sampler = loop.group_sampler(recipe, [bank])
    with torch.no_grad():
        sketches = [hypernet.encoder(sampler.draw(number, 'start').support).mean(0) for number in range(64)]
        wanted = hypernet(torch.stack(sketches).mean(0))
    for key, value in plain.named_parameters():
        assert_close(value.detach(), wanted[key], rtol=0, atol=1e-6)


def test_what_is_wanted_then_are_the_features_that_it_predicts_before_the_condition(earlier, distilled):
    hypernet, folder = earlier
    _, wanted, group = distilled(
        folder, 3, fixed_encoder=True
    )  # the last of three steps: it still wants those of the start
    model = timm.create_model('test_resnet', num_classes=0).eval()
    for images, same in ((group.plain, True), (group.support, False)):
        with torch.no_grad():
            weights = hypernet(hypernet.encoder(images[: len(group.support)]).mean(0))
            model.load_state_dict({key: weights[key] for key in model.state_dict()})
            assert torch.allclose(wanted[0], model(group.plain), rtol=1e-4, atol=1e-4) == same


def test_training_that_goes_on_is_resumed_like_any_other(earlier, make_recipe, bank, tmp_path):
    recipe = frozen(earlier[1], make_recipe, 4, {'fixed_encoder': True}, distillation=1.0)
    whole = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    meta_train(recipe, tmp_path / 'run', banks=[bank], device='cpu', progress=False, max_steps=2)
    resumed = meta_train(recipe, tmp_path / 'run', banks=[bank], device='cpu', progress=False)
    for key, value in whole.state_dict().items():
        assert_close(resumed.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_one_that_ships_with_the_package_goes_on_with_new_classes(make_recipe, bank):
    config = load_hypernet('resnet18.mixed56').config
    small = dataclasses.replace(config.input, input_size=(3, 16, 16))
    fresh = {'class_names': (), 'training': {}, 'sketch_limit': 0.0, 'sketch_gate': False}
    fields = dataclasses.replace(config, input=small, tag='mine', **fresh)
    recipe = make_recipe(1, start='resnet18.mixed56', hypernet=vars(fields), schedule=SLOW)
    hypernet = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    assert hypernet.name == 'resnet18.mine'
    assert hypernet.config.class_names == (*config.class_names, *bank.class_names)
    assert hypernet.config.sketch_limit >= config.sketch_limit


def test_without_a_start_a_hypernetwork_in_the_current_folder_is_none(earlier, make_recipe, bank, monkeypatch):
    recipe = make_recipe(1, hypernet=RESIDUAL, schedule=SLOW)
    elsewhere = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    monkeypatch.chdir(earlier[1])
    here = meta_train(recipe, banks=[bank], device='cpu', progress=False)
    for key, value in elsewhere.state_dict().items():
        assert_close(here.state_dict()[key], value, rtol=0, atol=0)


def test_a_start_that_keeps_its_classes_to_itself_is_told_of(start, make_recipe, bank):
    recipe = make_recipe(1, start=str(start[1]), hypernet=RESIDUAL, data=(Data(images='nowhere', unseen=('lid',)),))
    with pytest.warns(PudNetWarning, match='does not say which classes it has seen'):
        meta_train(recipe, banks=[bank], device='cpu', progress=False)


def test_a_large_hypernetwork_by_the_paper_is_told_of(make_recipe, bank, monkeypatch):
    monkeypatch.setattr(loop, 'MOST_PARAMETERS', 1000)
    with pytest.warns(PudNetWarning, match='generator = "residual"'):
        meta_train(make_recipe(1), banks=[bank], device='cpu', progress=False)


def test_a_hypernetwork_of_another_make_is_no_start(earlier, make_recipe, bank, one_line):
    fields = {'sketch_width': 8, 'generator_kwargs': {'embed_kernels': 9}}
    with pytest.raises(InputError) as error:
        meta_train(make_recipe(1, start=str(earlier[1]), hypernet=fields), banks=[bank], progress=False)
    one_line(error, 'sketch_width = 16, generator = "residual", generator_kwargs = {}, predict_norm = true')
    with pytest.raises(InputError) as error:
        train_plain(make_recipe(1, start='resnet18.mixed56'), banks=[bank], progress=False)
    one_line(error, 'model_name = "resnet18"', 'generator_kwargs = {largest = 131072}', 'mean = [0.507, 0.487, 0.441]')


@pytest.mark.parametrize(
    ('changes', 'needles'),
    [
        ({'losses': LossWeights(distillation=1.0)}, ('distillation', 'start')),
        ({'schedule': {'optimizer': 'sgd', 'rate': 0.0}, 'losses': LossWeights(full=0.0, consistency=0.0)}, ('start',)),
        ({'schedule': {'optimizer': 'sgd', 'rate': 0.0}, 'start': 'somewhere'}, ('rate of 0', 'full')),
        (
            {
                'schedule': {'optimizer': 'sgd', 'rate': 0.0},
                'losses': LossWeights(full=0.0, consistency=0.0),
                'hypernet': {'generator': 'auto'},
                'start': 'somewhere',
            },
            ('rate of 0', 'generator', 'residual'),
        ),
    ],
)
def test_what_distillation_and_a_rate_of_zero_need(changes, needles, make_recipe, one_line):
    with pytest.raises(InputError) as error:
        make_recipe(**changes)
    one_line(error, *needles)


def test_a_start_that_is_not_there_is_told_first(make_recipe, tmp_path, one_line):
    recipe = make_recipe(start=str(tmp_path / 'gone'), schedule={'fixed_encoder': True})
    with pytest.raises(InputError) as error:
        check_start(recipe)
    one_line(error, 'gone is neither the folder')


def test_a_rate_of_zero_trains_no_control(learned, make_recipe, bank, one_line):
    with pytest.raises(InputError) as error:
        train_plain(frozen(learned[1], make_recipe, 1, distillation=1.0), banks=[bank], progress=False)
    one_line(error, 'rate of 0', 'control')


def test_adamw_wants_a_rate(make_recipe, one_line):
    with pytest.raises(InputError) as error:
        make_recipe(schedule={'rate': 0.0})
    one_line(error, 'rate', 'above zero')


def test_a_start_that_does_not_fit_is_one_line(start, make_recipe, bank, tmp_path, one_line):
    with pytest.raises(InputError) as error:
        meta_train(make_recipe(1, start=str(tmp_path / 'absent'), hypernet=RESIDUAL), banks=[bank], progress=False)
    one_line(error, 'absent', 'test_resnet.TAG')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError) as error:
        meta_train(make_recipe(1, start=str(tmp_path / 'empty'), hypernet=RESIDUAL), banks=[bank], progress=False)
    one_line(error, 'empty', 'no timm model')
    folder = shutil.copytree(start[1], tmp_path / 'pickled')
    torch.save(start[0].state_dict(), folder / 'pytorch_model.bin')
    (folder / 'model.safetensors').unlink()
    with pytest.raises(InputError) as error:  # timm would read it
        meta_train(make_recipe(1, start=str(folder), hypernet=RESIDUAL), banks=[bank], progress=False)
    one_line(error, 'pickled', 'no model.safetensors')
    other = save_model(timm.create_model('test_resnet', num_classes=0, in_chans=1), tmp_path / 'grey')
    with pytest.raises(InputError) as error:
        train_plain(make_recipe(1, start=str(other)), banks=[bank], progress=False)
    one_line(error, 'grey', 'conv1.0.weight')


def test_a_short_try_tells_whether_a_recipe_learns(make_recipe, bank):
    noise = ImageBank(torch.randint(0, 256, bank.images.shape, dtype=torch.uint8), bank.labels, bank.class_names)
    found, hopeless = (
        try_recipe(make_recipe(60), banks=[one], device='cpu', seconds=8, progress=False) for one in (bank, noise)
    )
    assert found['chance'] == pytest.approx(1 / 3)
    assert 0.9 < found['after'] <= 1
    assert 0 <= hopeless['before'] < 0.6
    assert 0 <= hopeless['after'] < 0.7
    for one in (found, hopeless):
        assert one['images'] > 0
        assert one['seconds'] > 0
        assert one['images_per_second'] > 0


def test_what_is_learned_after_training_is_of_images_as_they_are(bank, make_recipe):
    room = importlib.import_module('timm_pudnet.training.meta_train')
    run = room._MetaRun(make_recipe(groups={'turns': 1}), [bank], 'cpu')
    group, *_ = next(run.tested(1, 'whitening'))
    shown = (group.support * 0.5 + 0.5).mul(255).round()
    assert (shown[:, None] == bank.images).flatten(2).all(2).any(1).all()
    assert run.sampler.augmentation is not None, 'or this shows nothing'


def test_numbers_for_names_of_classes_say_nothing_of_what_was_seen(tmp_path):
    for folder, names, said in (('numbers', ('0', '1'), ()), ('names', ('cup', 'jar'), ('cup', 'jar'))):
        model = timm.create_model('test_resnet', num_classes=2)
        name_classes(model, names)
        assert seen_by(str(save_model(model, tmp_path / folder))) == said


def test_a_control_in_the_current_folder_has_its_whitening_beside_it(tmp_path, monkeypatch):
    (tmp_path / 'control').mkdir()
    monkeypatch.chdir(tmp_path / 'control')
    assert whitening_path(Path('.')) == tmp_path / 'control.whitening.safetensors'


@pytest.mark.parametrize('left_out', ['full', 'consistency'])
def test_at_a_rate_of_zero_each_loss_of_the_full_head_is_refused(left_out, make_recipe, one_line):
    losses = LossWeights(distillation=1.0, **{left_out: 0.0})
    with pytest.raises(InputError) as error:
        make_recipe(schedule={'optimizer': 'sgd', 'rate': 0.0}, losses=losses, start='somewhere')
    one_line(error, 'rate of 0', 'full = 0.0', 'consistency = 0.0')


def test_an_encoder_that_stays_as_it_is_has_no_groups_of_its_own(make_recipe, one_line):
    with pytest.raises(InputError) as error:
        make_recipe(start='somewhere', schedule={'fixed_encoder': True}, groups={'sketch_groups': 2})
    one_line(error, 'fixed_encoder', 'sketch_groups')
