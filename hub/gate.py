"""Fits the sketch gate of a trained hypernetwork to the images of its recipe, as its training would have at its end.

    python hub/gate.py HYPERNET OUT

HYPERNET is a folder with a recipe.toml that has `sketch_gate = true`; its weights may have a gate already or none.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from timm_pudnet import PudNet
from timm_pudnet.config import PudNetError
from timm_pudnet.files import CONFIG_NAME, WEIGHTS_NAME
from timm_pudnet.training import Recipe
from timm_pudnet.training.meta_train import fit_gate, load_banks


def main() -> None:
    """Reads the arguments and writes OUT."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('hypernet', type=Path, help='folder of one, with its recipe.toml')
    parser.add_argument('out', type=Path, help='new folder')
    options = parser.parse_args()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (options.out / name).exists():
            parser.error(f'{options.out / name} exists: choose another OUT, or move it away')
    trained, recipe = PudNet.from_pretrained(options.hypernet), Recipe.load(options.hypernet / 'recipe.toml')
    if not recipe.hypernet.sketch_gate:
        parser.error(f'{options.hypernet / "recipe.toml"} has no sketch_gate = true in [hypernet]')
    training = {**trained.config.training, 'recipe_digest': recipe.digest}
    hypernet = PudNet(dataclasses.replace(trained.config, sketch_gate=True, training=training))
    hypernet.load_state_dict(trained.state_dict(), strict=False)  # all but a gate
    fit_gate(hypernet, recipe, load_banks(recipe, progress=True))
    hypernet.save_pretrained(options.out, half=True)


if __name__ == '__main__':
    try:
        main()
    except PudNetError as error:
        print(f'Error: {error}', file=sys.stderr)
        sys.exit(2)
