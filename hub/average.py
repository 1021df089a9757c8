"""Puts the mean of several networks in place of the one that a hypernetwork changes; its sketch changes nothing in that yet.

    python hub/average.py HYPERNET OUT FOLDER FOLDER ...

OUT/start is the mean itself, in timm's format: `timm-pudnet evaluate ... --control OUT/start`. Without any FOLDER it is the network that
HYPERNET changes, as it is. With `--model NAME` the networks are of another architecture than HYPERNET's: OUT is a new hypernetwork
for that, with the sketch encoder of HYPERNET, which knows images and not architectures.

Networks that ordinary training makes from one start lie so close together that the mean of their weights is a network as
well, often a better one than any of them (Wortsman et al. 2022, "Model soups").
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from timm_pudnet import PudNet
from timm_pudnet.config import PudNetError
from timm_pudnet.hypernet import pretrained_model
from timm_pudnet.target import create_feature_model, difference, with_own_config
from timm_pudnet.training import save_control
from timm_pudnet.training.meta_train import seen_by


def main() -> None:
    """Reads the arguments and writes OUT."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('hypernet', help='folder of one with the generator `residual`')
    parser.add_argument('out', type=Path, help='new folder')
    parser.add_argument('folders', nargs='*', help='of networks in timm format: of its target, or of --model')
    parser.add_argument('--model', help="timm architecture of the networks; without it HYPERNET's own")
    parser.add_argument('--norm-rank', type=int, default=0, help='of the hypernetwork for --model (default: any rank)')
    options = parser.parse_args()
    if options.model and not options.folders:
        parser.error('--model needs the folders of networks of that architecture')
    if options.norm_rank and not options.model:
        parser.error('--norm-rank is of a new hypernetwork: it needs --model')
    hypernet = PudNet.from_pretrained(options.hypernet)
    if hypernet.config.generator != 'residual':
        parser.error(f'{options.hypernet} has the generator {hypernet.config.generator!r}: only `residual` has a base')
    if options.model:
        torch.manual_seed(0)  # of what is new
        encoder = hypernet.encoder
        fields = {
            'model_name': options.model,
            'model_kwargs': {},
            'norm_rank': options.norm_rank,
            'sketch_gate': False,
            'sketch_limit': 0.0,
            'training': {},
        }
        hypernet = PudNet.for_target(**{**vars(hypernet.config), **fields})
        hypernet.encoder.load_state_dict(encoder.state_dict())
    config = hypernet.config
    classes = {folder: seen_by(folder) for folder in options.folders}
    for folder, names in classes.items():
        if not names:
            print(f'Warning: {folder} does not say which classes it has seen: see to it yourself', file=sys.stderr)
    if (options.out / 'start').exists():
        parser.error(f'{options.out / "start"} exists: choose another OUT, or take it away')
    seen = dict.fromkeys((*config.class_names, *(name for names in classes.values() for name in names)))
    kwargs = {**config.model_kwargs, 'num_classes': 0}
    networks = [pretrained_model(Path(folder), kwargs).state_dict() for folder in options.folders]
    for folder, network in zip(options.folders, networks, strict=True):
        if difference(network, networks[0]):
            parser.error(f'{folder} is another network than {options.folders[0]}')
    if networks:
        hypernet.start_from({key: torch.stack([one[key] for one in networks]).double().mean(0) for key in networks[0]})
        hypernet.whitening.copy_(torch.eye(len(hypernet.whitening)))  # that of the earlier network's features
    else:
        hypernet.start_from({key: value.detach().clone() for key, value in hypernet.base().items()})
    hypernet.config = dataclasses.replace(config, class_names=tuple(seen))
    hypernet.save_pretrained(options.out)
    # The mean itself as a control: what it classifies as well as the hypernetwork is not the sketch's merit.
    model = with_own_config(create_feature_model(hypernet.target), config.input)
    with torch.no_grad():
        model.load_state_dict(hypernet.base(), strict=False)
    save_control(options.out / 'start', model, hypernet.whitening, seen)


if __name__ == '__main__':
    try:
        main()
    except PudNetError as error:
        print(f'Error: {error}', file=sys.stderr)
        sys.exit(2)
