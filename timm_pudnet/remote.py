"""Files on the Hugging Face Hub: fetched into its cache, compared, committed; what can go wrong is one line.

Everything goes through huggingface_hub, so its environment holds: `HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN`,
`HF_ENDPOINT`, `HF_HUB_ETAG_TIMEOUT`, `HF_HUB_DOWNLOAD_TIMEOUT`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from timm_pudnet.config import DamagedFileError, HubError, InputError, NotFoundError, PudNetError, PudNetWarning, shown
from timm_pudnet.files import (
    CONFIG_NAME,
    FULL,
    HASHES_NAME,
    INDEX_NAME,
    SHARD,
    WEIGHTS_NAME,
    folder_path,
    has_all_bytes,
    has_separator,
    local_path,
    read_json,
    sha256,
    weight_files,
)

T = TypeVar('T')

REPO = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', re.ASCII)
REVISION = re.compile(r'[A-Za-z0-9_][\w./+-]*', re.ASCII)
COMMIT = re.compile(r'[0-9a-f]{40}')
# What a published hypernetwork has beside config and weights. Whatever else a repository holds is left there.
BESIDE = re.compile(r'README\.md|recipe\.toml|classes\.json|expectation\.json|sha256\.json|results(\.[\w-]+)?\.json')
TRIES = 4
SILENCE = 3  # times HF_HUB_DOWNLOAD_TIMEOUT that the Hub may say nothing, where huggingface_hub has no limit of its own


def local_folder(name: str | os.PathLike[str]) -> Path:
    """The folder of a hypernetwork: the one that is named, or what the Hub has under that name, in its cache.

    Args:
        name: A folder, or `org/name` or `org/name@revision` on the Hub; with `local-dir:` or `hf-hub:` before it, it is
            never taken for the other.

    Raises:
        NotFoundError: There is no such folder or repository, or no hypernetwork in it.
        HubError: The Hub cannot be asked, or refuses.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise InputError(f'hypernet must be a PudNet, a folder or a name, not a {type(name).__name__}')
    text = os.fspath(name)
    if isinstance(name, str) and (found := split_repo(text)):
        try:
            return fetch(*found)
        except (NotFoundError, HubError) as error:
            if text.startswith(('hf-hub:', 'hf_hub:')):
                raise
            raise type(error)(f'{error}; nor is there a folder {text}') from error
    folder = folder_path(name)
    if not folder.is_dir():
        raise NotFoundError(
            f'{shown(str(folder), 200)}: no such folder of a hypernetwork'
            + ('' if has_separator(text) else '; timm_pudnet.load_hypernet takes the names of those that ship with it')
        )
    if not (folder / CONFIG_NAME).is_file():
        raise NotFoundError(f'{folder} is no hypernetwork: it has no {CONFIG_NAME}')
    return folder


def split_repo(name: str) -> tuple[str, str | None] | None:
    """Repository and revision that a name means, or None where it means a folder or neither.

    Raises:
        InputError: It has the prefix of the Hub but is no name there.

    Example:
        >>> split_repo('hf-hub:org/resnet18.cifar100_set@v2'), split_repo('local-dir:org/name'), split_repo('resnet18')
        (('org/resnet18.cifar100_set', 'v2'), None, None)
    """
    text = re.sub('^hf[-_]hub:', '', name)
    repo, at, revision = text.partition('@')
    good = REPO.fullmatch(repo) and (REVISION.fullmatch(revision) if at else True)
    if good and not any(part in repo + revision for part in ('..', '--', '//')) and len(name) < 300:
        return (repo, revision or None) if text != name or not local_path(name).is_dir() else None
    if text != name:
        raise InputError(f'{shown(name)} is no name on the Hub: hf-hub:org/name or hf-hub:org/name@revision')
    return None


def repo_of(name: str) -> tuple[str, str | None]:
    """Repository and revision that a name on the Hub means, with its prefix or without; never a folder.

    Raises:
        InputError: It is no name there.
    """
    found = split_repo(f'hf-hub:{re.sub("^hf[-_]hub:", "", name)}')
    assert found is not None
    return found


def fetch(repo: str, revision: str | None = None, *, refresh: bool = False) -> Path:
    """The folder in the Hub's cache with the files of a hypernetwork: from the cache, else from the Hub.

    Files that no hypernetwork has are not fetched. The revision of the cache moves only when all files are there.

    Args:
        repo: `org/name`.
        revision: Branch, tag or commit; by default `main`.
        refresh: Ask the Hub for a newer commit even if the cache has this revision.

    Raises:
        NotFoundError: The Hub has no such repository, revision or file.
        DamagedFileError: The cache is damaged and the Hub cannot be asked; or what was sent is damaged.
        HubError: The Hub cannot be asked, or refuses.
    """
    from huggingface_hub import constants

    revision = revision or 'main'
    folder = cached(repo, revision)
    damaged, lacking = _check(folder) if folder else ([], True)
    whole = folder is not None and not damaged and not lacking
    if folder and whole and not (refresh and not COMMIT.fullmatch(revision)):
        return folder
    if constants.HF_HUB_OFFLINE:
        if damaged:
            raise DamagedFileError(f'{damaged[0]} in the cache is damaged: unset HF_HUB_OFFLINE to fetch it again')
        if not folder or lacking:
            part = 'no' if not folder else 'only a part of'
            raise NotFoundError(f'{constants.HF_HUB_CACHE} has {part} {repo}@{revision}, and HF_HUB_OFFLINE is set')
        warnings.warn(
            f'HF_HUB_OFFLINE is set, so {repo} was not asked for. Using what the cache has: {folder.name}',
            PudNetWarning,
            stacklevel=2,
        )
        return folder
    if folder and damaged:
        warnings.warn(f'{damaged[0]} in the cache is damaged; fetching it again', PudNetWarning, stacklevel=2)
        _forget(damaged)
    try:
        return _again(lambda: _download(repo, revision), f'{repo}@{revision}')
    except HubError as error:
        if not folder or not whole or any(_check(folder)):  # what was damaged in it is gone
            raise
        warnings.warn(f'{error}. Using what the cache has: {folder.name}', PudNetWarning, stacklevel=2)
        return folder


def cached(repo: str, revision: str) -> Path | None:
    """Folder of a revision in the Hub's cache, whole or not, or None."""
    from huggingface_hub import constants

    store = Path(constants.HF_HUB_CACHE) / f'models--{repo.replace("/", "--")}'
    commit = revision
    if not COMMIT.fullmatch(revision):
        try:
            commit = (store / 'refs' / revision).read_text(encoding='ascii').strip()
        except (OSError, ValueError):
            return None
    folder = store / 'snapshots' / commit
    return folder if COMMIT.fullmatch(commit) and (folder / CONFIG_NAME).is_file() else None


def cached_repos() -> Iterator[tuple[str, Path]]:
    """Every repository of models in the Hub's cache whose `main` is there, with that folder."""
    from huggingface_hub import constants

    for store in sorted(Path(constants.HF_HUB_CACHE).glob('models--*--*')):
        repo = store.name.removeprefix('models--').replace('--', '/')
        folder = cached(repo, 'main') if REPO.fullmatch(repo) else None
        if folder is not None:
            yield repo, folder


def _check(folder: Path) -> tuple[list[Path], bool]:
    """Damaged files of a folder of the cache, and whether it lacks any; by sizes, and hashes of small files."""
    damaged = []
    hashes: Any = {}
    for name in (HASHES_NAME, CONFIG_NAME, INDEX_NAME):
        path = folder / name
        try:
            found = read_json(path) if path.is_file() else None
            if name == HASHES_NAME:
                hashes = found if isinstance(found, dict) else {}
            elif found is not None and hashes.get(name, digest := sha256(path)) != digest:
                damaged.append(path)
        except DamagedFileError:
            damaged.append(path)
    try:
        paths = weight_files(folder)
    except (NotFoundError, DamagedFileError):
        return damaged, True
    damaged += [path for path in paths if not has_all_bytes(path)]
    return damaged, False


def _forget(paths: Iterable[Path]) -> None:
    """Takes files of a snapshot out of the cache, and what they point to unless it is whole: others may point there."""
    from huggingface_hub import constants

    for path in paths:
        blob = _blob(path)
        if blob.parent.resolve() == (path.parents[2] / 'blobs').resolve() and not _is_whole(blob):
            stored = blob.resolve()  # it may be a link itself, into the store of all repositories
            blob.unlink(missing_ok=True)
            if stored.is_relative_to(Path(constants.HF_HUB_CACHE).resolve() / 'blobs'):
                stored.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _blob(path: Path) -> Path:
    """What a file of a snapshot points to, whose name is the hash of its content; itself where there are no links."""
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path


def _is_whole(blob: Path) -> bool:
    """Whether a blob has the content that its name is the hash of: git's for small files, else SHA-256."""
    if not blob.is_file():
        return False
    return blob.name == (sha256(blob) if len(blob.name) == 64 else _git_hash(blob.read_bytes()))


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def _download(repo: str, revision: str) -> Path:
    from huggingface_hub import constants, hf_hub_download

    about = _api().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    commit = about.sha or ''
    if not COMMIT.fullmatch(commit):
        raise HubError(f'{constants.ENDPOINT} gives {shown(commit)} as the commit of {repo}: is it a Hub?')
    there = {file.rfilename for file in about.siblings or ()}
    if CONFIG_NAME not in there:
        raise NotFoundError(f'{repo}@{revision} is no hypernetwork: it has no {CONFIG_NAME}')

    def get(name: str, at: str = commit) -> Path:
        return Path(hf_hub_download(repo, name, revision=at, library_name='timm-pudnet'))

    config = read_json(get(CONFIG_NAME))  # before anything large is fetched
    if not isinstance(config, dict) or 'format_version' not in config:
        known = isinstance(config, dict) and 'architecture' in config
        what = f"but a timm model, for timm.create_model('hf-hub:{repo}')" if known else f'by its {CONFIG_NAME}'
        raise NotFoundError(f'{repo}@{revision} is no hypernetwork, {what}')
    if WEIGHTS_NAME in there:
        wanted = [WEIGHTS_NAME]
    elif INDEX_NAME in there:
        wanted = [INDEX_NAME, *(name for name in there if SHARD.fullmatch(name))]
    else:
        raise NotFoundError(f'{repo}@{revision} is no hypernetwork: it has no {WEIGHTS_NAME}')
    for name in sorted(name for name in there if BESIDE.fullmatch(name)) + wanted:
        path = get(name)
        if not _is_as_announced(path):  # of an earlier download, maybe
            _forget([path])
            path = get(name)
            if not _is_as_announced(path):
                _forget([path])
                raise HubError(f'{repo}: {name} arrived damaged (its hash is not the one announced): try again')
    damaged, lacking = _check(path.parent)
    if damaged or lacking:
        _forget(damaged)
        names = ', '.join(path.name for path in damaged) or f'a shard that {INDEX_NAME} names is missing'
        raise DamagedFileError(f'{repo}@{revision} was published damaged ({names}): tell whoever did')
    folder = get(CONFIG_NAME, revision).parent  # last, since this is what moves the revision of the cache
    return folder if folder.name == commit else _download(repo, revision)


def _is_as_announced(path: Path) -> bool:
    """Whether a large file of the cache has the hash that it was announced by; of small ones none is announced."""
    blob = _blob(path)
    return not re.fullmatch(r'[0-9a-f]{64}', blob.name) or _is_whole(blob)


def repos_of(org: str) -> list[dict[str, Any]]:
    """What the Hub says of every hypernetwork that an organisation has published, cards included.

    Raises:
        HubError: The Hub cannot be asked, or refuses.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    def ask() -> Any:
        params = {'author': org, 'filter': 'timm-pudnet', 'limit': '1000', 'cardData': 'true'}
        answer = get_session().get(
            f'{constants.ENDPOINT}/api/models',
            params=params,
            headers=build_hf_headers(),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        hf_raise_for_status(answer)
        return answer.json()

    if constants.HF_HUB_OFFLINE:
        raise HubError('HF_HUB_OFFLINE is set')
    found = _again(ask, org, tries=1)
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return [row for row in rows if isinstance(row.get('id'), str) and REPO.fullmatch(row['id'])]


def is_public(repo: str) -> bool:
    """Whether a repository is there and everybody can read it.

    Raises:
        HubError: The Hub cannot be asked, or refuses.
    """
    try:
        return not _again(lambda: _api().model_info(repo).private, repo)
    except NotFoundError:
        return False


def changes(repo: str, files: Mapping[str, bytes | Path], ours: Callable[[str], bool]) -> dict[str, str]:
    """What a commit of these files would do to a repository: `new`, `changed` or `gone`, by file name.

    Args:
        repo: `org/name`; one that is not there yet is empty.
        files: Content of every file, or the path that has it.
        ours: Whether a file there would be taken away where `files` lacks it.

    Raises:
        HubError: The Hub cannot be asked, or refuses.
    """
    try:
        return _again(lambda: _compare(repo, files, ours), repo)[1]
    except NotFoundError:
        return dict.fromkeys(files, 'new')


def _compare(
    repo: str, files: Mapping[str, bytes | Path], ours: Callable[[str], bool]
) -> tuple[str | None, dict[str, str]]:
    """The newest commit of a repository, and the `changes` to it."""
    head = _api().model_info(repo).sha
    there = {file.path: file for file in _api().list_repo_tree(repo, revision=head) if hasattr(file, 'blob_id')}
    found = {}
    for name, content in files.items():
        if name not in there:
            found[name] = 'new'
        elif not _same(content, there[name]):
            found[name] = 'changed'
    return head, {**found, **{name: 'gone' for name in there if name not in files and ours(name)}}


def _same(content: bytes | Path, file: Any) -> bool:
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    if size != file.size:
        return False
    if file.lfs is not None:
        return sha256(content) == file.lfs.sha256
    return _git_hash(content.read_bytes() if isinstance(content, Path) else content) == file.blob_id


def commit(
    repo: str, files: Mapping[str, bytes | Path], ours: Callable[[str], bool], message: str, *, private: bool = False
) -> tuple[dict[str, str], str]:
    """Makes the `changes` in one commit, in a repository that is made where there is none; gives them and its address.

    Where somebody else was faster the Hub takes nothing, and it is compared anew: never a mixture of two pushes.

    Raises:
        HubError: The Hub cannot be asked, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants

    sent: dict[str, str] = {}

    def send() -> tuple[dict[str, str], str]:
        head, done = _compare(repo, files, ours)
        if not done:  # by another, or by a try before this one whose answer was lost
            return dict(sent), f'{constants.ENDPOINT}/{repo}/commit/{head}' if sent else ''
        sent.update(done)
        operations: list[Any] = [CommitOperationDelete(name) for name, what in done.items() if what == 'gone']
        for name, what in done.items():
            if what != 'gone':
                content = files[name]
                source = str(content) if isinstance(content, Path) else content
                operations.append(CommitOperationAdd(name, source))
        made = _api().create_commit(repo, operations, commit_message=message, parent_commit=head)
        return done, str(made.commit_url)

    # None: as its owner has set it. One that is there stays as it is, whatever is asked for.
    _again(lambda: _api().create_repo(repo, private=private or None, exist_ok=True), repo)
    return _again(send, repo)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name='timm-pudnet')


@contextmanager
def _not_forever() -> Iterator[None]:
    """Lets the Hub be silent for a while only, in requests for which huggingface_hub itself would wait without end."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    def limit(request: Any) -> None:
        limits = request.extensions.get('timeout') or dict.fromkeys(('connect', 'read', 'write', 'pool'))
        most = SILENCE * constants.HF_HUB_DOWNLOAD_TIMEOUT
        request.extensions['timeout'] = {what: most if seconds is None else seconds for what, seconds in limits.items()}

    # None in huggingface_hub before 1.0, whose sessions are those of requests: these wait on.
    hooks: Any = getattr(get_session(), 'event_hooks', None)
    if hooks is None:
        yield
        return
    hooks['request'].append(limit)
    try:
        yield
    finally:
        hooks['request'].remove(limit)


def _again(call: Callable[[], T], what: str, tries: int = TRIES) -> T:
    """Calls until it works, if it fails in a way that passes; the last failure becomes one line."""
    for number in range(1, tries + 1):
        try:
            with _explained(what), _not_forever():
                return call()
        except HubError as error:
            if number == tries or not error.passing:
                raise
            time.sleep(2**number / 2)
    raise AssertionError


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what huggingface_hub raises about a repository into an error of ours."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    host = constants.ENDPOINT
    try:
        yield
    except PudNetError:
        raise
    except hub.OfflineModeIsEnabled as error:
        raise HubError(f'{what}: the Hub is not asked while HF_HUB_OFFLINE is set') from error
    except hub.GatedRepoError as error:
        raise HubError(
            f'{what} is gated: ask for access on {host}/{what.partition("@")[0]}, then set HF_TOKEN'
        ) from error
    except hub.RevisionNotFoundError as error:
        raise NotFoundError(f'{what}: {host} has no such revision of it') from error
    except hub.RepositoryNotFoundError as error:
        raise NotFoundError(
            f'{what}: {host} has no such repository; if it is private, set HF_TOKEN to a token that may read it'
        ) from error
    except hub.LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, hub.HfHubHTTPError):
            raise _of_status(what, host, cause, passing=False) from error  # it was tried five times
        raise _unreachable(what, host, cause or error, passing=False) from error
    except hub.EntryNotFoundError as error:
        raise NotFoundError(f'{what}: a file that it lists is not there: {_reason(error)}') from error
    except hub.HFValidationError as error:
        raise InputError(f'{shown(what)} is no name of a repository: {_reason(error)}') from error
    except hub.HfHubHTTPError as error:
        raise _of_status(what, host, error) from error
    except OSError as error:
        if error.errno in FULL or 'No space left' in str(error):  # hf_xet's
            reason = error.strerror or _reason(error)
            raise HubError(f'{what}: the disk of {constants.HF_HUB_CACHE} is full ({reason})') from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise HubError(
                f'{what}: {constants.HF_HUB_CACHE} cannot be written ({error.strerror}): set HF_HOME to another folder'
            ) from error
        raise _unreachable(what, host, error) from error
    except RuntimeError as error:  # of an upload; what went wrong stands behind it
        if not isinstance(error.__cause__, Exception):
            if not any('xet' in frame.name for frame in traceback.extract_tb(error.__traceback__)):
                raise
            raise _unreachable(what, host, error, passing=False) from error  # of hf_xet, whatever went wrong
        with _explained(what):
            raise error.__cause__ from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f'{what}: {host} answers what no Hub does ({_reason(error)}): check HF_ENDPOINT') from error
    except Exception as error:
        if type(error).__module__.split('.')[0] not in ('httpx', 'httpx2', 'httpcore', 'httpcore2', 'requests'):
            raise
        raise _unreachable(what, host, error) from error


def _of_status(what: str, host: str, error: Any, passing: bool = True) -> HubError:
    status = error.response.status_code
    meaning = {
        401: 'the token is missing or not valid: set HF_TOKEN',
        403: 'the token may not do that: use one with the right to',
        409: 'the repository was changed by someone else meanwhile: try again',
        412: 'the repository was changed by someone else meanwhile: try again',
        413: 'the upload is too large',
        429: 'too many requests: wait a while, or set HF_TOKEN',
    }.get(status, 'try again later' if status >= 500 else _reason(error))
    found = HubError(f'{what}: {host} answers {status}: {meaning}')
    found.passing = passing and (status >= 500 or status in (409, 412))
    return found


def _unreachable(what: str, host: str, error: BaseException, passing: bool = True) -> HubError:
    found = HubError(
        f'{what}: {host} cannot be reached, or broke off ({_reason(error)}): check the network, or HF_ENDPOINT'
    )
    name = type(error).__name__
    found.passing = passing and not name.startswith(('Connect', 'Proxy')) and 'Timeout' not in name  # broken off
    return found


def _reason(error: BaseException) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    return ''.join(letter if letter.isprintable() else '?' for letter in text)[:200]
