"""Which hypernetwork serves a name: one that ships with the package, a folder, one on the Hub; and publishing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from timm_pudnet import remote
from timm_pudnet.config import (
    DamagedFileError,
    HubError,
    InputError,
    NotFoundError,
    PudNetConfig,
    UnsupportedTargetError,
    close_names,
    first_line,
    shown,
)
from timm_pudnet.files import (
    CONFIG_NAME,
    HASHES_NAME,
    INDEX_NAME,
    SHARD,
    WEIGHTS_NAME,
    config_sha256,
    has_separator,
    local_path,
    read_config,
    read_header,
    read_json,
    sha256,
    weight_files,
    weights_sha256,
)
from timm_pudnet.hypernet import PudNet
from timm_pudnet.target import check_architecture, describe_target, is_ours

# Which of several that ship with the package serves an architecture: the one for the widest kind of images.
DEFAULTS = {'resnet18': 'resnet18.mixed56'}
# Whose repositories on the Hub have the names that stand without an organisation, resnet18.cifar100_set for instance.
HUB_ORG = 'timm-pudnet'
_TABLES = '## All results'  # of a published card, at its end
# What a folder publishes; anything else in it stays where it is.
PUBLISHED = re.compile(
    rf'README\.md|[\w-]+(\.[\w-]+)*\.toml|(results|groups|scratch)(\.[\w-]+)?\.json|(choices|classes|expectation)\.json|{re.escape(HASHES_NAME)}'
    rf'|{re.escape(CONFIG_NAME)}|{re.escape(WEIGHTS_NAME)}|{re.escape(INDEX_NAME)}|{SHARD.pattern}'
)


@dataclass(frozen=True, kw_only=True)
class HypernetInfo:
    """What is known of a hypernetwork without loading it.

    Args:
        name: `architecture.tag` of one that ships with the package, else `org/architecture.tag`, or its folder.
        where: `embedded` (ships with the package, or lies in the checkout's `hub`), `cache` (of the Hub, on this
            machine), `folder` or `hub`.
        model_name: timm architecture that it predicts.
        folder: Where its files are; None on the Hub.
        config: Its config; None on the Hub.
        accuracy: What `timm-pudnet evaluate` measured on unseen classes, in percent: `mean`, `interval`, and of what,
            `n_way`, `n_shot`, `groups`; None where nothing was measured.
        psnr: What was measured of a denoiser, in dB: `mean`, `interval`, and under which noise, `sigma` and `reading`.
        size: Bytes of its weights; 0 where it is not known.
        license: As its card has it; None where it says none.
    """

    name: str
    where: str
    model_name: str
    folder: Path | None = None
    config: PudNetConfig | None = None
    accuracy: dict[str, Any] | None = None
    psnr: dict[str, Any] | None = None
    size: int = 0
    license: str | None = None

    def __str__(self) -> str:
        measured = 'not measured'
        if self.accuracy is not None:
            measured = '{mean:.2f} ± {interval:.2f} %'.format(**self.accuracy)
            if self.accuracy.get('n_way'):
                measured += ' ({n_way}-way, {n_shot} labels)'.format(**self.accuracy)
        elif self.psnr is not None:
            measured = '{mean:.2f} ± {interval:.2f} dB (sigma {sigma:g} {reading})'.format(**self.psnr)
        size = f'{self.size / 1e6:,.0f} MB' if self.size else '-'
        line = f'{self.name:40} {self.where:9} {measured:32} {size:>8}  {self.license or "no licence"}'
        if self.config is not None:
            seen = len(self.config.class_names)
            line += f'{f", {seen} classes seen" if seen else ""}, input {self.config.input.input_size}'
        return line


def _shelves() -> list[Path]:
    """Folders that hold one hypernetwork a subfolder: the wheel's, and the checkout's of an editable install."""
    package = Path(__file__).resolve().parent
    shelves = [package / 'embedded']
    if (package.parent / 'pyproject.toml').is_file():
        shelves.append(package.parent / 'hub')
    return [shelf for shelf in shelves if shelf.is_dir()]


def embedded() -> dict[str, Path]:
    """Folder of every hypernetwork that ships with the package or lies in the checkout's `hub`, by its name."""
    found = {}
    for shelf in _shelves():
        for path in sorted(shelf.glob(f'*/{CONFIG_NAME}')):
            found.setdefault(path.parent.name, path.parent)
    return found


def _cached() -> dict[str, tuple[Path, str]]:
    """Folder and architecture of every hypernetwork in the Hub's cache, by repository; ours first."""
    found = {}
    for repo, folder in remote.cached_repos():
        with contextlib.suppress(DamagedFileError, OSError):  # other libraries' models, for the most part
            config = read_json(folder / CONFIG_NAME)
            if isinstance(config, dict) and 'format_version' in config and isinstance(config.get('model_name'), str):
                found[repo] = folder, config['model_name']
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith(f'{HUB_ORG}/'), item[0])))


def list_hypernets(*, hub: bool = False) -> dict[str, HypernetInfo]:
    """Every hypernetwork at hand by its name, with its measured accuracy, its size and licence.

    Args:
        hub: Ask the Hub too for those that are not at hand.

    Raises:
        DamagedFileError: A config that ships with the package is damaged.
        HubError: The Hub cannot be asked.

    Example:
        >>> list_hypernets()['resnet18.fashion_set'].model_name
        'resnet18'
    """
    found = {name: _describe(name, 'embedded', folder) for name, folder in embedded().items()}
    for repo, (folder, _) in _cached().items():
        with contextlib.suppress(DamagedFileError, OSError):
            found[repo] = _describe(repo, 'cache', folder)
    for row in remote.repos_of(HUB_ORG) if hub else ():
        found.setdefault(row['id'], _of_card(row))
    return found


def describe_hypernet(name: str | os.PathLike[str]) -> HypernetInfo:
    """What is known of a hypernetwork, by any name that `load_hypernet` takes, without reading its weights.

    Raises:
        NotFoundError, UnsupportedTargetError, DamagedFileError, HubError: As `load_hypernet`.

    Example:
        >>> describe_hypernet('resnet18.fashion_set').license
        'apache-2.0'
    """
    folder = _folder(name)
    for known, path in embedded().items():
        if path.resolve() == folder.resolve():
            return _describe(known, 'embedded', folder)
    for repo, (path, _) in _cached().items():
        if path == folder:
            return _describe(repo, 'cache', folder)
    return _describe(str(name), 'folder', folder)


def _describe(name: str, where: str, folder: Path) -> HypernetInfo:
    config = read_config(folder / CONFIG_NAME)
    size = 0
    with contextlib.suppress(NotFoundError):
        size = sum(path.stat().st_size for path in weight_files(folder))
    return HypernetInfo(
        name=name,
        where=where,
        model_name=config.model_name,
        folder=folder,
        config=config,
        accuracy=_accuracy(folder),
        psnr=_psnr(folder),
        size=size,
        license=_license(folder / 'README.md'),
    )


def _accuracy(folder: Path) -> dict[str, Any] | None:
    """The accuracy of the first results file, results.json where there is one."""
    for path in _results_of(folder):
        with contextlib.suppress(DamagedFileError, KeyError, TypeError, ValueError, OverflowError):
            found = read_json(path)
            row = {name: float(found['accuracy']['predicted'][name]) for name in ('mean', 'interval')}
            return {**row, **{name: shown(found[name]) for name in ('n_way', 'n_shot', 'groups')}}
    return None


def _results_of(folder: Path) -> list[Path]:
    """Its results files, results.json first, and results.NAME.json before results.NAME-more.json."""
    return sorted(folder.glob('results*.json'), key=lambda path: path.stem)


def _psnr(folder: Path) -> dict[str, Any] | None:
    """The PSNR under the first noise of the first results file of a denoiser."""
    for path in _results_of(folder):
        with contextlib.suppress(DamagedFileError, KeyError, TypeError, ValueError, IndexError, OverflowError):
            one = read_json(path)['noises'][0]
            row = {name: float(one['psnr']['predicted'][name]) for name in ('mean', 'interval')}
            return {**row, 'sigma': float(one['sigma']), 'reading': shown(one['reading'])}
    return None


def _license(card: Path) -> str | None:
    """The licence in a card's header, without parsing more of what a stranger wrote."""
    if not card.is_file():
        return None
    with card.open('rb') as file:
        head = file.read(20_000).decode('utf-8-sig', 'replace').replace('\r\n', '\n')
    said = r'---\n(?:.*\n)*?license:[ ]*(["\']?)([\w.-]{1,60})\1[ ]*(?:#.*)?\n'
    found = re.match(said, head.partition('\n---')[0] + '\n')
    return found[2] if found else None


def _of_card(row: Mapping[str, Any]) -> HypernetInfo:
    """What the card of a repository says, as the Hub gives it."""
    card = row.get('cardData')
    card = card if isinstance(card, dict) else {}
    accuracy = psnr = None
    with contextlib.suppress(KeyError, TypeError, IndexError, ValueError, OverflowError):
        metric = card['model-index'][0]['results'][0]['metrics'][0]
        about = metric.get('args') or {}
        mean = {'mean': float(metric['value']), 'interval': float(about['interval'])}
        if metric.get('type') == 'psnr':
            psnr = {**mean, 'sigma': float(about['sigma']), 'reading': shown(about['reading'])}
        else:
            accuracy = {**mean, **{name: shown(about[name]) for name in ('n_way', 'n_shot')}}
    name = row['id']
    license = card.get('license')
    return HypernetInfo(
        name=name,
        where='hub',
        model_name=name.partition('/')[2].partition('.')[0],
        accuracy=accuracy,
        psnr=psnr,
        license=shown(license, 60) if isinstance(license, str) else None,
    )


def load_hypernet(name: str | os.PathLike[str]) -> PudNet:
    """Loads a hypernetwork, ready to predict.

    Args:
        name: An architecture (`resnet18`: the hypernetwork that serves it), the name of one (`resnet18.fashion_set`), a
            folder that `PudNet.save_pretrained` wrote, or a repository on the Hub, `org/name` or `org/name@revision`.
            Names without an organisation are looked up in the package, as a folder, in the Hub's cache, and on the Hub.

    Raises:
        NotFoundError: Nothing has that name; the close ones are named.
        UnsupportedTargetError: timm knows the architecture, but no hypernetwork serves it.
        DamagedFileError: Its files are damaged.
        HubError: The Hub cannot be asked, or refuses.

    Example:
        >>> load_hypernet('resnet18').name
        'resnet18.mixed56'
    """
    return PudNet.from_pretrained(_folder(name))


def pull(name: str) -> Path:
    """Brings a hypernetwork from the Hub up to date in the cache; gives its folder.

    Args:
        name: `org/name` or `org/name@revision`, or a name without an organisation as in `load_hypernet`; of one that
            ships with the package nothing is fetched. Never a folder, be there one of that name or not.

    Raises:
        InputError: It is no name on the Hub.
        NotFoundError, UnsupportedTargetError, DamagedFileError, HubError: As `load_hypernet`.
    """
    if '/' in name:
        return remote.fetch(*remote.repo_of(name), refresh=True)
    return _shipped(name) or _without_org(name, refresh=True)


def _shipped(text: str) -> Path | None:
    """The folder of the hypernetwork that ships with the package under a name, or for an architecture."""
    at_hand = embedded()
    if text in at_hand or DEFAULTS.get(text) in at_hand:
        return at_hand[text if text in at_hand else DEFAULTS[text]]
    return next((folder for key, folder in at_hand.items() if text == key.split('.')[0]), None)


def _known() -> str:
    return f'At hand: {", ".join(embedded()) or "none"}'


def _folder(name: str | os.PathLike[str]) -> Path:
    if isinstance(name, str):
        # A name of ours goes before a folder of the same name, which ./NAME or a Path still reaches.
        if found := _shipped(name):
            return found
        prefixed = name.startswith(('local-dir:', 'hf-hub:', 'hf_hub:'))
        if not (prefixed or has_separator(name) or local_path(name).is_dir()):
            return _without_org(name)
    try:
        return remote.local_folder(name)
    except (NotFoundError, HubError) as error:
        raise type(error)(f'{error}. {_known()}') from error


def _without_org(text: str, refresh: bool = False) -> Path:
    """The folder of `architecture` or `architecture.tag`, which does not ship: from the cache, else from the Hub."""
    plain, at, revision = text.partition('@')
    if not at:
        found = [repo for repo, (_, model) in _cached().items() if text in (repo.partition('/')[2], model)]
        if len(found) > 1 and not found[0].startswith(f'{HUB_ORG}/'):
            raise InputError(f'the cache has {", ".join(found)} for {text}: say which, as {found[0]}')
        if found:
            return remote.fetch(found[0], refresh=refresh)
    if '.' in plain:
        try:
            return remote.fetch(*remote.repo_of(f'{HUB_ORG}/{text}'), refresh=refresh)
        except (NotFoundError, HubError, InputError) as error:
            close = close_names(text, embedded())
            raise NotFoundError(
                f'no hypernetwork {text!r}.{close} {_known()}; a folder will do too. On the Hub: {error}'
            ) from error
    if not timm.is_model(plain):
        close = close_names(text, [*embedded(), *timm.list_models()])
        raise NotFoundError(f'no hypernetwork {text!r}, and timm has no architecture of that name.{close} {_known()}')
    describe_target(plain)  # says what is wrong with the architecture, if anything
    try:
        names = sorted(row['id'] for row in remote.repos_of(HUB_ORG))
        reason = f'{HUB_ORG} has none on the Hub'
    except HubError as error:
        names, reason = [], f'the Hub was not asked ({error})'
    for repo in names:
        if repo.partition('/')[2].partition('.')[0] == plain:
            return remote.fetch(repo, revision or None, refresh=refresh)
    raise UnsupportedTargetError(
        f'no hypernetwork predicts {text}. {_known()}; {reason}. Train one (timm-pudnet train) or name its folder'
    )


def resolve_hypernet(model_name: str, hypernet: PudNet | str | os.PathLike[str] | None) -> PudNet:
    """The hypernetwork to use for an architecture.

    Raises:
        InputError: timm does not know the architecture.
        UnsupportedTargetError: The hypernetwork was made for another architecture.
    """
    check_architecture(model_name)
    if isinstance(hypernet, PudNet):
        found = hypernet
    elif hypernet is None:  # no folder of that name: it may be a model that an earlier prediction left
        found = PudNet.from_pretrained(_shipped(model_name) or _without_org(model_name))
    else:
        found = load_hypernet(hypernet)
    if found.config.model_name != model_name:
        raise UnsupportedTargetError(
            f'hypernetwork {found.name} predicts {found.config.model_name}, not {model_name}: '
            f'pass another hypernet, or predict {found.config.model_name}'
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push did, or in a dry run would do.

    Args:
        repo: `org/name`.
        changes: `new`, `changed` or `gone`, by file name; empty where the Hub has it all.
        address: Of the commit; empty where nothing was sent.
    """

    repo: str
    changes: dict[str, str]
    address: str = ''


def push(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    license: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    message: str = 'Upload by timm-pudnet',
) -> Pushed:
    """Publishes the folder of a hypernetwork, or of a model that `save_model` wrote, on the Hub, in one commit.

    Args:
        folder: A hypernetwork with its recipe and results, which must have been measured on these very weights; or a
            timm model.
        repo: `org/name` on the Hub; made where there is none.
        license: Of the card, where the folder has no `README.md` that says one.
        private: Whether a repository that is made is private; by default as its owner has set it.
        dry_run: Only compare.
        message: Of the commit.

    Raises:
        InputError: The folder is incomplete, its results are of other weights, the name is not one of the Hub, or
            `private` is asked for and the repository is there and public.
        DamagedFileError: Its files are damaged.
        HubError: The Hub cannot be asked, or refuses.
    """
    folder = local_path(folder)
    given, (repo, revision) = repo, remote.repo_of(repo)
    if revision:
        raise InputError(f'{shown(given)}: give org/name to push to, without a revision')
    if not (folder / CONFIG_NAME).is_file():
        raise NotFoundError(f'{folder} is neither a hypernetwork nor a timm model: it has no {CONFIG_NAME}')
    if private and remote.is_public(repo):
        raise InputError(f'{repo} is there and public: make it private on the Hub, or push without --private')
    config = read_json(folder / CONFIG_NAME)
    is_model = isinstance(config, dict) and 'architecture' in config
    files = model_files(folder, repo, license) if is_model else hypernet_files(folder, repo, license)

    # What an earlier push of a hypernetwork left goes; beside a model everything else is somebody's own.
    def ours(name: str) -> bool:
        return not is_model and PUBLISHED.fullmatch(name) is not None

    changes, address = remote.changes(repo, files, ours), ''
    if changes and not dry_run:
        changes, address = remote.commit(repo, files, ours, message, private=private)
    return Pushed(repo=repo, changes=changes, address=address)


def hypernet_files(folder: Path, repo: str, license: str | None = None) -> dict[str, bytes | Path]:
    """Everything that a hypernetwork's folder publishes, by name; checked, with card, class split and hashes.

    Raises:
        InputError: Recipe, results or licence are missing, or the results were not measured on these weights.
        DamagedFileError: The weights are not what the config says.
    """
    hypernet = PudNet.from_pretrained(folder)
    again = f'run timm-pudnet evaluate {folder} IMAGES --save'
    if not hypernet.target.classifiers:
        again = f'run hub/denoising.py {folder} IMAGES --protocol NAME'
    if not (folder / 'recipe.toml').is_file():
        raise InputError(f'{folder} has no recipe.toml: put the recipe there that it was trained by')
    try:
        tomllib.loads((folder / 'recipe.toml').read_text(encoding='utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise InputError(f'{folder / "recipe.toml"} is no recipe ({first_line(error)})') from error
    results: dict[str, dict[str, Any]] = {}
    hashes, settings = weights_sha256(folder), config_sha256(folder)
    for path in _results_of(folder):
        if not PUBLISHED.fullmatch(path.name):
            raise InputError(
                f'{path}: name it results.json or results.NAME.json, where NAME has no dot, or take it away'
            )
        found = read_json(path)
        if not isinstance(found, dict) or not _measured(found):
            raise InputError(f'{path} is no results file of timm-pudnet evaluate: {again} again')
        measured_on = found.get('weights_sha256')
        if not measured_on:
            raise InputError(f'{path} does not say which weights it was measured on: {again} again')
        if measured_on != hashes:
            raise InputError(f'{path} was measured on other weights than {folder} has: {again} again')
        if found.get('config_sha256', settings) != settings:
            raise InputError(f'{path} was measured with another {CONFIG_NAME} than {folder} has: {again} again')
        seen = sorted(set(found.get('classes', ())) & set(hypernet.config.class_names))
        if seen:
            raise InputError(f'{path} was measured on {shown(seen[0])}, a class seen in training: {again} again')
        results[path.name] = found
    if not results:
        raise InputError(f'{folder} has no results: {again} first')
    names = [path.name for path in folder.iterdir() if path.is_file() and PUBLISHED.fullmatch(path.name)]
    weights = {path.name for path in weight_files(folder)} | ({INDEX_NAME} if len(hashes) > 1 else set())
    files: dict[str, bytes | Path] = {
        name: folder / name
        for name in sorted(names)
        if name in weights or not (SHARD.fullmatch(name) or name in (WEIGHTS_NAME, INDEX_NAME))
    }
    classes = {
        'seen': list(hypernet.config.class_names),
        'unseen': {name: found['classes'] for name, found in results.items() if 'classes' in found},
    }
    files['classes.json'] = (json.dumps(classes, indent=2, ensure_ascii=False) + '\n').encode()
    files['README.md'] = hypernet_card(folder, hypernet, results, repo, license).encode()
    return _hashed(files)


def _measured(results: Mapping[str, Any]) -> bool:
    """Whether it is a results file: of a classifier its accuracies, of a denoiser its PSNR under each noise."""
    try:
        if 'noises' in results:
            numbers = [float(one['psnr']['predicted']['mean']) for one in results['noises']]
            return bool(numbers) and all(map(math.isfinite, numbers))
        rows = results['accuracy'].values()
        named = all(isinstance(name, str) for name in results['classes'])
        # Of two groups an interval may be wider than all that there is.
        in_percent = all(0 <= float(row['mean']) <= 100 and 0 <= float(row['interval']) < math.inf for row in rows)
        return named and 'predicted' in results['accuracy'] and in_percent and results['n_way'] > 0
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _hashed(files: dict[str, bytes | Path]) -> dict[str, bytes | Path]:
    digests = {name: sha256(content) for name, content in sorted(files.items()) if name != HASHES_NAME}
    return {**files, HASHES_NAME: (json.dumps(digests, indent=2) + '\n').encode()}


def hypernet_card(
    folder: Path, hypernet: PudNet, results: Mapping[str, Mapping[str, Any]], repo: str, license: str | None = None
) -> str:
    """The card of a hypernetwork: the folder's `README.md`, or a plain one, with a header that the Hub understands.

    The header gets the library, tags, the licence and the results with their intervals (`model-index`); tables of them
    stand at the end.

    Raises:
        InputError: Neither the card nor `license` says a licence.
    """
    from huggingface_hub import EvalResult, ModelCard

    own = folder / 'README.md'
    card = _own_card(own) if own.is_file() else ModelCard(_plain_card(hypernet, results, repo))
    text = re.sub(r'\[([^][]+)\]\(\.\./[^)]*\)', r'\1', card.text)  # to what lies beside the folder, and not on the Hub
    text = text.replace(f"hypernet='hub/{folder.name}'", f"hypernet='{repo}'")  # of ours, in a checkout
    text = text.partition(f'\n{_TABLES}\n')[0]  # of an earlier push
    card.text = f'{text.rstrip()}\n\n{_tables(results)}'
    data = card.data.to_dict()
    for ours in ('model-index', 'model_name'):
        data.pop(ours, None)
    data['library_name'] = 'timm-pudnet'
    denoises = any('noises' in found for found in results.values())
    task = 'image-to-image' if denoises else 'image-classification'
    tags = [*(data.get('tags') or []), 'timm', 'timm-pudnet', 'hypernetwork', task]
    data['tags'] = list(dict.fromkeys(tags))
    data['license'] = _licence(folder, data, license)
    if not data['license']:
        raise InputError(f'{folder} has no card that says its licence: add --license apache-2.0, or whichever it is')
    listed = data.get('datasets') or []
    evaluated = []
    for file, found in results.items():
        if 'noises' in found:
            evaluated += [_psnr_result(file, found, one) for one in found['noises']]
            continue
        kind = str(found.get('images') or (listed[0] if len(listed) == 1 else 'unnamed'))
        for key in ('accuracy', *(key for key in found if key.startswith('accuracy_'))):
            row = found.get(key, {}).get('predicted')
            if row is None:
                continue
            head = _head(key)
            evaluated.append(
                EvalResult(
                    task_type='image-classification',
                    dataset_type=_slug(kind),
                    dataset_name=f'{kind}, classes unseen in training ({file})',
                    dataset_config=file,  # by which huggingface_hub keeps files apart that have the same images
                    dataset_split=found.get('split'),
                    metric_type='accuracy',
                    metric_name=f'accuracy in percent, {head} head, {_budget(found)}',
                    metric_value=round(float(row['mean']), 2),
                    metric_args={
                        'interval': round(float(row['interval']), 2),
                        'interval_is': 'half-width, 95 %',
                        'n_way': found['n_way'],
                        'n_shot': found.get('n_shot'),
                        **({'n_unlabelled': found['n_unlabelled']} if found.get('n_unlabelled') else {}),
                    },
                )
            )
    card.data = type(card.data)(eval_results=evaluated, model_name=hypernet.name, **data)
    return str(card)


def _own_card(path: Path) -> Any:
    """A folder's card.

    Raises:
        InputError: It is no text, or its header is none that the Hub understands.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        return ModelCard(path.read_text(encoding='utf-8-sig'))
    except (YAMLError, ValueError, TypeError) as error:  # UnicodeDecodeError too
        reason = shown(' '.join(str(error).split()), 160)
        raise InputError(f'{path}: mend its header, the lines between ---, which cannot be read ({reason})') from error


def _budget(found: Mapping[str, Any]) -> str:
    """Classes, labels and groups of a result, in words."""
    others = f' and {found["n_unlabelled"]} images without' if found.get('n_unlabelled') else ''
    return f'{found["n_way"]}-way, {found.get("n_shot")} labels{others} a class, {found.get("groups")} groups'


def _psnr_result(file: str, found: Mapping[str, Any], condition: Mapping[str, Any]) -> Any:
    """What a card says of a denoiser under one noise."""
    from huggingface_hub import EvalResult

    row = condition['psnr']['predicted']
    noise = f'{_noise(found)}, sigma {condition["sigma"]} ({condition["reading"]}), {found.get("images")} images'
    return EvalResult(
        task_type='image-to-image',
        dataset_type=_slug(str(found.get('protocol'))),
        dataset_name=f'{found.get("protocol")} ({file}): {noise}',
        dataset_config=f'{file}, sigma {condition["sigma"]} ({condition["reading"]})',
        metric_type='psnr',
        metric_name='PSNR in dB',
        metric_value=round(float(row['mean']), 2),
        metric_args={
            'interval': round(float(row['interval']), 2),
            'interval_is': 'half-width, 95 %',
            'sigma': float(condition['sigma']),
            'reading': condition['reading'],
            'turns': found.get('turns', 1),
        },
    )


def _noise(found: Mapping[str, Any]) -> str:
    return 'noise of photons' if found.get('kind') == 'poisson' else 'Gaussian noise'


def _head(key: str) -> str:
    """The head whose accuracies stand under a key of a results file."""
    return key.removeprefix('accuracy').lstrip('_').replace('self_training', 'self-trained ridge') or 'centroid'


def _slug(text: str) -> str:
    return re.sub(r'[^\w.-]+', '-', text.split('/', maxsplit=1)[-1] if text.startswith('torch/') else text).strip('-.')


def _plain_card(hypernet: PudNet, results: Mapping[str, Mapping[str, Any]], repo: str) -> str:
    config = hypernet.config
    call = f"predict_model('{config.model_name}', 'photos/', hypernet='{repo}')"
    if any('noises' in found for found in results.values()):
        call = f"predict_denoiser('noisy/', hypernet='{repo}')"
    lines = [
        f'# {hypernet.name}\n',
        f"A PudNet hypernetwork that predicts the weights of timm's `{config.model_name}` for images that it has never "
        f'seen; input {"x".join(map(str, config.input.input_size))}.\n',
        '```python',
        'import timm_pudnet',
        '',
        f'model = timm_pudnet.{call}',
        '```\n',
    ]
    return '\n'.join(lines)


def _tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """All results for a card: in a repository on the Hub nothing else shows them."""
    lines = [
        f'{_TABLES}\n',
        'Accuracy in percent on classes never seen in training, by each head, or PSNR in dB on images never seen, with '
        'the half-width of the 95 % interval.\n',
    ]
    for file, found in results.items():
        if 'noises' in found:
            lines += [
                f'{found.get("images")} images of `{shown(found.get("protocol"))}`, {_noise(found)} (`{file}`):\n'
            ]
            lines += ['| sigma | noisy | denoised |', '|---|---|---|']
            for one in found['noises']:
                cells = [
                    f'{row["mean"]:.2f} ± {row["interval"]:.2f}' for row in map(one['psnr'].get, ('noisy', 'predicted'))
                ]
                lines.append(f'| {one["sigma"]} ({shown(one["reading"])}) | {" | ".join(cells)} |')
            lines.append('')
            continue
        heads = {_head(key): row for key, row in found.items() if key.startswith('accuracy')}
        lines += [
            f'{_budget(found)} (`{file}`):\n',
            f'| weights | {" | ".join(heads)} |',
            f'|---|{"---|" * len(heads)}',
        ]
        for name in found['accuracy']:
            cells = [row.get(name) for row in heads.values()]
            texts = ['-' if cell is None else f'{cell["mean"]:.2f} ± {cell["interval"]:.2f}' for cell in cells]
            lines.append(f'| {shown(name)} | {" | ".join(texts)} |')
        lines.append('')
    lines.append('Trained as `recipe.toml` says; classes seen and unseen are in `classes.json`.')
    return '\n'.join(lines) + '\n'


def _licence(folder: Path, card: dict[str, Any], asked: str | None) -> str | None:
    """The licence that the card of a folder says, or the one asked for where it says none."""
    own = card.get('license')
    if own and asked and own != asked:
        raise InputError(f'{folder}/README.md says licence {own}, not {asked}: leave out --license, or change the card')
    return own or asked


def model_files(folder: Path, repo: str, license: str | None = None) -> dict[str, bytes | Path]:
    """Everything that the folder of a timm model publishes, in timm's own format, with a card.

    Raises:
        InputError: It has no weights, or holds them as a pickle.
        DamagedFileError: The weights are damaged.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if not (folder / WEIGHTS_NAME).is_file():
        raise InputError(f'{folder} has no {WEIGHTS_NAME}: save the model there with timm_pudnet.save_model')
    read_header(folder / WEIGHTS_NAME)
    own = folder / 'README.md'
    if own.is_file():
        its = _own_card(own)
        card = own.read_text(encoding='utf-8-sig')
        if license:
            its.data['license'] = _licence(folder, its.data.to_dict(), license)
            card = str(its)
    else:
        architecture = shown(read_json(folder / CONFIG_NAME)['architecture'])
        task = 'image-to-image' if architecture == 'blindspot_unet' else 'image-classification'
        data = ModelCardData(library_name='timm', license=license, pipeline_tag=task, tags=[task, 'timm', 'pudnet'])
        usage = f"model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()"
        imports = 'import timm' + ('\nimport timm_pudnet' if is_ours(architecture) else '')
        card = str(
            ModelCard(
                f'---\n{data.to_yaml()}\n---\n# {repo.partition("/")[2]}\n\n'
                f'A timm `{architecture}`, made with timm-pudnet (weights by a hypernetwork, PudNet).\n\n'
                f'```python\n{imports}\n\n{usage}\n```\n'
            )
        )
    return {
        CONFIG_NAME: folder / CONFIG_NAME,
        WEIGHTS_NAME: folder / WEIGHTS_NAME,
        'README.md': card.encode(),
    }
