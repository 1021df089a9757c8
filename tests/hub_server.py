"""A loopback server that speaks the Hugging Face Hub's protocol, as far as a client needs it to push and to pull.

Files of weights go the way of LFS: the batch call names an address on another host name to PUT them to, and `resolve`
redirects there. `faults` says what is wrong with a repository, by its name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = 'hf_loopback'


def blob_id(content):
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def is_lfs(name):
    return name.endswith(('.safetensors', '.bin', '.pt'))


class LoopbackHub(ThreadingHTTPServer):
    """Repositories, their commits and what was asked for; a context manager that serves while it is open."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.endpoint = f'http://127.0.0.1:{self.server_port}'
        self.storage = f'http://localhost:{self.server_port}'  # another host name, as the Hub's CDN has
        self.commits = {}  # repo -> {sha: {path: content}}
        self.refs = {}  # repo -> {revision: sha}
        self.cards = {}
        self.private = set()
        self.messages = []  # of the commits
        self.lfs = {}  # sha256 -> content
        self.faults = {}  # repo -> kind
        self.asked = []  # (method, path)
        self.count = Counter()
        self.leaked = []  # paths on the other host that a token was sent to
        self.controls = {}  # what /control/NAME does, so that a client can have something happen between two steps
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass  # a client that hung up

    def commit(self, repo, files):
        """A new commit of a repository with exactly these files; gives its sha."""
        with self.lock:
            text = json.dumps(
                [repo, len(self.commits.get(repo, {}))] + [[n, blob_id(c)] for n, c in sorted(files.items())]
            )
            sha = hashlib.sha1(text.encode()).hexdigest()
            self.commits.setdefault(repo, {})[sha] = dict(files)
            self.refs.setdefault(repo, {})['main'] = sha
            for name, content in files.items():
                if is_lfs(name):
                    self.lfs[hashlib.sha256(content).hexdigest()] = content
        return sha

    def files(self, repo, revision='main'):
        """The files of a revision."""
        return self.commits[repo][self.refs[repo].get(revision, revision)]

    def gets(self, part):
        """How often a path with this part was fetched."""
        return sum(method == 'GET' and part in path for method, path in self.asked)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = 'HTTP/1.1'
    server: LoopbackHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer_request('HEAD')

    def do_GET(self):
        self.answer_request('GET')

    def do_POST(self):
        self.answer_request('POST')

    def do_PUT(self):
        self.answer_request('PUT')

    def answer(self, status, content=b'', headers=None, length=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(content) if length is None else length))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def refuse(self, status, code=None, message=None):
        headers = {'X-Error-Code': code} if code else {}
        self.answer(status, {'error': message or code or 'no'}, {**headers, 'X-Error-Message': message or code or 'no'})

    def answer_request(self, method):
        hub = self.server
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        hub.asked.append((method, path))
        if path.startswith('/storage/'):
            return self.store(method, path.rpartition('/')[2], body)
        if path.startswith('/control/'):
            return self.answer(200, hub.controls[path.removeprefix('/control/')]())
        if path == '/api/repos/create':
            asked = json.loads(body)
            return self.create(f'{asked["organization"]}/{asked["name"]}', asked)
        if path == '/api/validate-yaml':
            return self.answer(200, {'errors': [], 'warnings': []})
        if path == '/api/models':
            author = parse_qs(url.query)['author'][0]
            rows = [
                {'id': repo, 'cardData': hub.cards.get(repo, {})} for repo in hub.refs if repo.startswith(f'{author}/')
            ]
            return self.answer(200, rows)
        found = re.fullmatch(r'(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(/.*)?', path)
        return self.of_repo(method, found[1], found[2] or '', body)

    def create(self, repo, asked):
        if self.headers.get('Authorization') != f'Bearer {TOKEN}':
            return self.refuse(401, None, 'Invalid username or password.')
        if repo in self.server.refs:
            return self.answer(
                409, {'url': f'{self.server.endpoint}/{repo}', 'error': 'You already created this model repo'}
            )
        if 'private' in (asked.get('visibility'), asked.get('private') and 'private'):
            self.server.private.add(repo)
        self.server.commit(repo, {'.gitattributes': b'*.safetensors filter=lfs\n'})
        return self.answer(200, {'url': f'{self.server.endpoint}/{repo}'})

    def of_repo(self, method, repo, rest, body):
        hub = self.server
        hub.count[repo] += 1
        fault = hub.faults.get(repo)
        if fault in ('slow', 'silent'):
            time.sleep(3 if fault == 'slow' else 5)
        if fault == 'down' or (fault == 'flaky' and hub.count[repo] in (1, 2, 4, 5)):
            return self.refuse(500)
        if fault in (403, 429):
            return self.refuse(fault)
        if fault == 401:
            return self.refuse(401, None, 'Invalid credentials in Authorization header')
        if fault == 'gated':
            return self.refuse(403, 'GatedRepo')
        if fault == 'html':
            return self.answer(200, b'<html>Welcome to the hotel</html>')
        if repo not in hub.refs:
            return self.refuse(404, 'RepoNotFound')
        if rest.startswith('/preupload/'):
            rows = [
                {
                    'path': file['path'],
                    'uploadMode': 'lfs' if is_lfs(file['path']) else 'regular',
                    'shouldIgnore': False,
                }
                for file in json.loads(body)['files']
            ]
            return self.answer(200, {'files': rows})
        if rest == '/info/lfs/objects/batch':
            return self.batch(repo, json.loads(body))
        if rest.startswith('/commit/'):
            return self.take(repo, body, fault)
        kind, _, tail = rest.strip('/').partition('/')
        revision, _, name = (tail or 'main').partition('/')
        commit = hub.refs[repo].get(revision, revision)
        if commit not in hub.commits[repo]:
            return self.refuse(404, 'RevisionNotFound')
        files = hub.commits[repo][commit]
        if kind in ('', 'revision'):
            siblings = [{'rfilename': name} for name in files]
            about = {'id': repo, 'sha': commit, 'private': repo in hub.private, 'siblings': siblings}
            return self.answer(200, about)
        if kind == 'tree':
            return self.answer(200, [self.row(path, content) for path, content in files.items()])
        assert kind == 'resolve', rest
        return self.resolve(commit, files, name, fault)

    def row(self, path, content):
        row = {'type': 'file', 'path': path, 'size': len(content), 'oid': blob_id(content)}
        if is_lfs(path):
            row['lfs'] = {'oid': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 130}
        return row

    def resolve(self, commit, files, name, fault):
        if name not in files or (fault == 'no file' and is_lfs(name)):
            return self.refuse(404, 'EntryNotFound')
        content = files[name]
        headers = {'X-Repo-Commit': commit, 'ETag': f'"{blob_id(content)}"'}
        if not is_lfs(name):
            return self.answer(200, content, headers)
        oid = hashlib.sha256(content).hexdigest()
        headers.update({'X-Linked-ETag': f'"{oid}"', 'X-Linked-Size': str(len(content))})
        headers['Location'] = f'{self.server.storage}/storage/{fault or "fine"}/{oid}'
        if fault == 'xet':  # which has a hash of its own
            headers |= {'X-Xet-Hash': (xet := hashlib.sha256(oid.encode()).hexdigest()), 'X-Xet-Refresh-Route': '/xet'}
            self.server.lfs[xet] = content
        return self.answer(302, b'', headers)

    def store(self, method, oid, body):
        hub = self.server
        if self.headers.get('Authorization'):
            hub.leaked.append(self.path)
        if method == 'PUT':
            assert hashlib.sha256(body).hexdigest() == oid
            hub.lfs[oid] = body
            return self.answer(200)
        content, fault = hub.lfs[oid], self.path.split('/')[2]
        hub.count[self.path] += 1
        if fault == 'wrong':
            content = content[:-9] + bytes(9)
        if fault == 'waiting':
            time.sleep(0.5)
        start = int((self.headers.get('Range') or 'bytes=0-')[6:].partition('-')[0])
        if fault == 'cut' and hub.count[self.path] <= 2:  # twice: more comes each time, then the line is dead
            middle = start + (len(content) - start) // 2
            self.answer(206 if start else 200, content[start:middle], length=len(content) - start)
            self.close_connection = True
            return None
        return self.answer(206 if start else 200, content[start:])

    def batch(self, repo, asked):
        rows = []
        for item in asked['objects']:
            row = {'oid': item['oid'], 'size': item['size']}
            if item['oid'] not in self.server.lfs:
                row['actions'] = {'upload': {'href': f'{self.server.storage}/storage/put/{item["oid"]}', 'header': {}}}
            rows.append(row)
        self.answer(200, {'transfer': 'basic', 'objects': rows})

    def take(self, repo, body, fault):
        hub = self.server
        hub.count[f'{repo} commit'] += 1
        if fault == 'conflict' or (fault == 'conflict once' and hub.count[f'{repo} commit'] == 1):
            return self.refuse(409, None, 'The repository was changed')
        if fault == 'overtaken' and hub.count[f'{repo} commit'] == 2:
            hub.commit(repo, {**hub.files(repo), 'recipe.toml': b'theirs'})
        files = dict(hub.files(repo))
        parent = json.loads(body.splitlines()[0])['value'].get('parentCommit')
        if parent is not None and parent != hub.refs[repo]['main']:
            return self.refuse(412, None, 'The repository was changed')
        for line in body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'header':
                hub.messages.append(value['summary'])
            elif item['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile':
                files[value['path']] = hub.lfs[value['oid']]
            elif item['key'] == 'deletedFile':
                del files[value['path']]
        sha = hub.commit(repo, files)
        if fault == 'answer lost' and hub.count[f'{repo} commit'] == 1:
            return self.refuse(504)
        return self.answer(200, {'commitUrl': f'{hub.endpoint}/{repo}/commit/{sha}', 'commitOid': sha})
