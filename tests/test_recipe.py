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


