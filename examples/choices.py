"""What fashion_choices.py and cifar100_splits.py share: a file of results by choice of classes."""

import json

from timm_pudnet.files import written_whole


def read(out, settings):
    """The choices that are in the file `out` already; it ends the program where they are of other settings."""
    if not out.parent.is_dir():
        raise SystemExit(f'{out}: there is no folder {out.parent}')
    if not out.exists():
        return {}
    found = json.loads(out.read_text())
    if any(found[name] != value for name, value in settings.items()):
        raise SystemExit(f'{out} is of other numbers of images or groups: choose another --out')
    return found['choices']


def has(out, settings, key):
    """Whether the file has that choice already, which is said."""
    found = key in read(out, settings)
    if found:
        print(f'{key} is in {out} already: move that away to train anew')
    return found


def add(out, settings, key, result, summary):
    """Adds what `evaluate` found of a choice, and the `summary` of all choices; says what it was."""
    row = {name: result[name] for name in ('classes', 'accuracy', 'conditioning_gain', 'training')}
    done = {**read(out, settings), key: row}
    with written_whole(out) as beside:
        beside.write_text(json.dumps(settings | summary(done), indent=2) + '\n')
    print(key, {name: round(row['mean'], 2) for name, row in result['accuracy'].items()}, flush=True)
