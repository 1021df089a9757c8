"""Puts the mean of several networks in place of the one that a hypernetwork changes; what its sketch changes is kept.

    python hub/average.py HYPERNET OUT FOLDER FOLDER ...

HYPERNET is a folder of a hypernetwork with the generator `residual`; OUT is written; each FOLDER holds a network of its
target in timm's format. Networks that ordinary training makes from one start lie so close together that the mean of
their weights is a network as well, often a better one than any of them (Wortsman et al. 2022, "Model soups").
"""

import copy
import sys

import torch

from timm_pudnet import PudNet
from timm_pudnet.hypernet import pretrained_model


def main(earlier: str, out: str, *folders: str) -> None:
    """Writes the hypernetwork `earlier` to `out`, the mean of the networks in its base."""
    hypernet = PudNet.from_pretrained(earlier)
    if hypernet.config.generator != 'residual':
        sys.exit(f'{earlier} has the generator {hypernet.config.generator!r}: only those of `residual` have a base')
    networks = []
    for folder in folders:
        one = copy.deepcopy(hypernet)
        one.start_from(pretrained_model(folder, folder, hypernet.config.model_kwargs).state_dict())
        networks.append(one.state_dict())
    with torch.no_grad():
        for key, value in hypernet.state_dict().items():
            of_network = key.endswith('.base') or key.startswith(('shared.', 'norm_statistics.'))
            if of_network and value.is_floating_point():
                value.copy_(torch.stack([network[key] for network in networks]).mean(0))
    hypernet.save_pretrained(out)


if __name__ == '__main__':
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
