"""What several rooms' tests share."""

import pytest
import torch

from timm_pudnet import InputConfig, PudNet


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    """One thread: the nets are tiny, and sums then come out the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global random state and leaves the one it found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope='session')
def tiny():
    """A new hypernetwork for timm's smallest ResNet; not to be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hypernet = PudNet.for_target('test_resnet', sketch_width=16, input=InputConfig(input_size=(3, 32, 32)))
    return hypernet.eval()


@pytest.fixture(scope='session')
def random_images():
    """Makes images `[n, c, h, w]`, standard normal, and labels `[n]` of classes of unequal size, none empty."""

    def make(count=12, num_classes=3, size=(3, 32, 32), seed=0):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, *size, generator=generator)
        labels = torch.randint(num_classes, (count,), generator=generator)
        labels[:num_classes] = torch.arange(num_classes)
        return images, labels

    return make


@pytest.fixture(scope='session')
def one_line():
    """Checks that an error's text is one line and names these things."""

    def check(error, *needles):
        text = str(error.value)
        assert '\n' not in text.strip(), text
        for needle in needles:
            assert str(needle) in text, f'{needle!r} is not in: {text}'

    return check
