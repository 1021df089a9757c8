import math

import pytest

from timm_pudnet.config import InputConfig, InputError, NotFoundError, PudNetConfig
from timm_pudnet.training import Augmentation, Data, Groups, LossWeights, Recipe, Schedule

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
        data=(Data(images='torch/fashion_mnist', classes=('0', '1')),),
        groups=Groups(n_way=3),
        augmentation=Augmentation(flip=False),
        schedule=Schedule(images=5000, rate=1e-3),
        seed=3,
    )
    assert recipe.groups.per_step == 1
    assert recipe.losses == LossWeights()
    again = Recipe.from_dict(recipe.to_dict())
    assert (again, again.digest) == (recipe, recipe.digest)
    assert load(tmp_path, RECIPE.replace('rate = 1e-3', 'rate = 2e-3')).digest != recipe.digest


SETS = RECIPE.replace('[data]', '[[data]]').replace(
    '[groups]',
    """[[data]]
images = "photos"
data_dir = "/data"
split = "all"
unseen = ["cup"]
share = 3

[losses]
metric = 2
sketch = 0.5

[augmentation.timm]
auto_augment = "rand-m5"
re_prob = 0.3

[augmentation.mixup]
cutmix_alpha = 1.0

[groups]
conditions = 1
sketch_groups = 4
turns = 2
""",
)


def test_a_recipe_may_have_several_sets_and_every_table(tmp_path):
    recipe = load(tmp_path, SETS.replace('images = 5000', 'images = 5000\noptimizer = "sgd"\nema = 0.99'))
    assert recipe.data == (
        Data(images='torch/fashion_mnist', classes=('0', '1')),
        Data(images='photos', data_dir='/data', split='all', unseen=('cup',), share=3.0),
    )
    assert recipe.losses == LossWeights(metric=2.0, sketch=0.5)
    assert recipe.augmentation == Augmentation(
        flip=False, timm={'auto_augment': 'rand-m5', 're_prob': 0.3}, mixup={'cutmix_alpha': 1.0}
    )
    assert recipe.groups == Groups(n_way=3, conditions=1.0, sketch_groups=4, turns=2)
    assert recipe.schedule == Schedule(images=5000, rate=1e-3, optimizer='sgd', ema=0.99)
    again = Recipe.from_dict(recipe.to_dict())
    assert (again, again.digest) == (recipe, recipe.digest)


def test_classes_may_be_written_as_numbers():
    data = Data(images='digits', classes=(1, 2), unseen=(3,))
    assert (data.classes, data.unseen) == (('1', '2'), ('3',))
    with pytest.raises(InputError, match='2 cannot be both'):
        Data(images='digits', classes=(1, 2), unseen=('2',))


def test_one_set_is_the_same_as_a_list_of_one(tmp_path):
    assert load(tmp_path, RECIPE) == load(tmp_path, RECIPE.replace('[data]', '[[data]]'))


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
        ('classes = ["0", "1"]', 'classes = ["0", "1"]\nunseen = ["2", "1"]', ['[data]', 'both', ' 1 ']),
        ('classes = ["0", "1"]', 'unseen = "1"', ['[data]', 'unseen', 'list']),
        ('classes = ["0", "1"]', 'share = 0', ['[data]', 'share', '0']),
        ('classes = ["0", "1"]', 'share = -1.5', ['[data]', 'share', '-1.5']),
        ('classes = ["0", "1"]', 'share = nan', ['[data]', 'share', 'nan']),
        ('classes = ["0", "1"]', 'share = "half"', ['[data]', 'share', 'number']),
        ('[data]\nimages = "torch/fashion_mnist"\nclasses = ["0", "1"]', 'data = []', ['data']),
        ('[data]\nimages = "torch/fashion_mnist"\nclasses = ["0", "1"]', 'data = ["photos"]', ['[data]', 'table']),
        ('[schedule]', '[losses]\nmetrics = 1\n[schedule]', ['[losses]', "'metrics'", 'Did you mean metric']),
        ('[schedule]', '[losses]\nfull = -1\n[schedule]', ['[losses]', 'below zero']),
        (
            '[schedule]',
            '[losses]\nmetric = 0\nfull = 0\nconsistency = 0\nsketch = 0\n[schedule]',
            ['[losses]', 'above'],
        ),
        ('rate = 1e-3', 'fixed_encoder = true', ['schedule', 'fixed_encoder', 'needs start']),
        ('[schedule]', '[losses]\nundoing = 1\n[schedule]', ['losses', 'undoing', 'needs start', 'fixed_statistics']),
        ('[schedule]', '[losses]\ndistillation = 1\n[schedule]', ['losses', 'distillation', 'needs start']),
        ('[data]', 'sketch_gate = true\n[data]', ['hypernet', 'sketch_gate', 'rate', 'got 0.001', 'got 0)']),
        ('[data]', 'class_names = ["0"]\n[data]', ['[hypernet]', 'class_names', '[data] classes']),
        ('[data]', 'training = {images = 5}\n[data]', ['[hypernet]', 'training', 'leave it out']),
        ('[data]', 'library_versions = {timm = "1"}\n[data]', ['[hypernet]', 'library_versions', 'leave it out']),
        ('n_way = 3', 'conditions = true', ['[groups]', 'conditions', 'number']),
        ('n_way = 3', 'conditions = 1.5', ['[groups]', 'conditions', '1.5']),
        ('n_way = 3', 'conditions = -0.5', ['[groups]', 'conditions', '-0.5']),
        ('n_way = 3', 'sketch_groups = 1', ['[groups]', 'sketch_groups', '1']),
        ('flip = false', 'timm = "rand-m5"', ['[augmentation]', 'timm', 'table']),
        ('rate = 1e-3', 'optimizer = "adam"', ['[schedule]', "'adam'", 'adamw']),
        ('rate = 1e-3', 'sketch_rate = 0', ['schedule', 'sketch_rate', '0.0']),
        ('rate = 1e-3', 'ema = 1', ['[schedule]', 'ema', '1']),
        ('rate = 1e-3', 'clip = 0.0', ['schedule', 'clip', '0.0']),
        ('rate = 1e-3', 'weight_decay = -1', ['schedule', 'weight_decay', '-1']),
        ('rate = 1e-3', 'label_smoothing = 1.5', ['schedule', 'label_smoothing', '1.5']),
        ('[schedule]', '[hypernet.model_kwargs]\nexportable = true\n[schedule]', ['model_kwargs', 'exportable']),
        ('mean = [0.4, 0.5, 0.6]', 'mean = ["a", "b", "c"]', ['input', "'a'"]),
        ('rate = 1e-3', 'precision = "float16"', ['[schedule]', "'float16'", 'bfloat16']),
        ('rate = 1e-3', 'whitening = 1', ['[schedule]', 'whitening', 'true or false']),
        ('[schedule]', '[losses]\nmetric = nan\n[schedule]', ['[losses] metric', 'finite', 'nan']),
        ('n_way = 3', 'conditions = nan', ['[groups] conditions', 'finite', 'nan']),
        ('rate = 1e-3', 'rate = inf', ['[schedule] rate', 'finite', 'inf']),
        ('rate = 1e-3', 'weight_decay = inf', ['[schedule] weight_decay', 'finite', 'inf']),
        ('rate = 1e-3', f'rate = {"9" * 400}', ['[schedule] rate', '2**63', '999...']),
        ('rate = 1e-3', f'rate = {"9" * 5000}', ['no recipe', 'digits']),
        ('seed = 3', f'seed = {10**30}', ['seed', '2**63']),
        ('seed = 3', 'seed = -1', ['seed', '-1']),
        ('n_way = 3', f'per_step = {10**20}', ['[groups] per_step', '2**63']),
        ('n_way = 3', f'per_step = {10**18}', ['[groups]', 'per_step', '1,000,000']),
    ],
)
def test_a_wrong_recipe_is_told_in_one_line(old, new, needles, tmp_path, one_line):
    text = RECIPE.replace('[groups]\nn_way = 3', '') if new == 'groups = 3' else RECIPE
    assert old in text
    text = text.replace(old, new)
    if new.startswith('data'):  # a bare key stands before all tables
        text = new + text.replace(new, '')
    with pytest.raises(InputError) as error:
        load(tmp_path, text)
    one_line(error, tmp_path / 'recipe.toml', *needles)


@pytest.mark.parametrize(
    ('make', 'field'),
    [(LossWeights, 'full'), (Groups, 'conditions'), (Schedule, 'rate'), (Schedule, 'weight_decay')],
)
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_finite_is_refused_in_python_too(make, field, value):
    with pytest.raises(InputError):
        make(**{field: value})


def test_a_gradient_may_be_left_as_it_is(tmp_path):
    assert load(tmp_path, RECIPE.replace('rate = 1e-3', 'clip = inf')).schedule.clip == math.inf


def test_a_target_of_one_size_is_made_for_that_of_the_recipe(one_line):
    def made(**hypernet):
        return Recipe.from_dict({'hypernet': {'model_name': 'visformer_tiny', **hypernet}, 'data': {'images': 'x'}})

    by_input = made(input={'input_size': [3, 64, 64]})
    assert by_input.hypernet.model_kwargs == {'img_size': [64, 64]}
    assert Recipe.from_dict(by_input.to_dict()).digest == by_input.digest
    assert made(model_kwargs={'img_size': 64}).hypernet.input.input_size == (3, 64, 64)
    assert made(input={'input_size': [3, 224, 224]}).hypernet.model_kwargs == {}
    with pytest.raises(InputError) as error:
        made(model_kwargs={'img_size': 64}, input={'input_size': [3, 96, 96]})
    one_line(error, 'recipe', 'visformer_tiny', 'img_size 64', '96x96')


def test_an_absent_recipe_is_named(tmp_path, one_line):
    with pytest.raises(NotFoundError) as error:
        Recipe.load(tmp_path / 'none.toml')
    one_line(error, tmp_path / 'none.toml')


@pytest.mark.parametrize(('old', 'field'), [('images = 5000', 'images'), ('seed = 3', 'seed')])
def test_true_is_no_number_of_a_recipe(old, field, tmp_path, one_line):
    assert old in RECIPE
    with pytest.raises(InputError) as error:
        load(tmp_path, RECIPE.replace(old, f'{field} = true'))
    one_line(error, field, 'a whole number', 'True')
