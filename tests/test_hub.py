"""Weight specs end in the right bytes or in one clear message; the hub is a real HTTP server on this machine."""

import hashlib
import http.server
import threading

import numpy as np
import pytest

from tl_jax.weights import formats, hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The files of one repository at its newest commit and at older ones, and the requests made for them.

    cdn: the address to which a request for a file is sent on, as the hub does with large ones, or "". form: of etags.
    """

    def __init__(self, files):
        self.files, self.requests, self.etags = dict(files), [], {}
        self.repo, self.commits, self.cdn, self.form = "owner/name", [COMMIT], "", '"{}"'

    def etag(self, name):
        content = self.files[name]
        sha256 = hashlib.sha256(content).hexdigest()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return self.etags.get(name, sha256 if name.endswith(".safetensors") else git)


def handler(served):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            served.requests.append((self.command, self.path))
            if self.path.startswith("/cdn/"):  # knows no commit, and has hashes of another kind
                return self.answer(200, {"ETag": '"of-the-cdn"'}, served.files[self.path.removeprefix("/cdn/")])
            repo, _, rest = self.path.partition("/resolve/")
            revision, _, name = rest.partition("/")
            headers = {"X-Repo-Commit": served.commits[-1] if revision == "main" else revision}
            if repo != f"/{served.repo}":
                return self.answer(404, headers | {"X-Error-Code": "RepoNotFound"})
            if revision not in ("main", *served.commits):
                return self.answer(404, headers | {"X-Error-Code": "RevisionNotFound"})
            if name not in served.files:
                return self.answer(404, headers | {"X-Error-Code": "EntryNotFound"})
            etag = served.form.format(served.etag(name))
            headers |= {"ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(len(served.files[name]))}
            if served.cdn:
                return self.answer(302, headers | {"ETag": '"of-the-redirect"', "Location": f"{served.cdn}/cdn/{name}"})
            return self.answer(200, headers, served.files[name])

        def answer(self, status, headers, content=b""):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            return content

        def do_GET(self):
            if content := self.do_HEAD():
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    return Handler


@pytest.fixture
def served(tmp_path, monkeypatch):
    formats.write_safetensors(tmp_path / "w.safetensors", {"w": np.arange(5, dtype="f4")}, {})
    content = (tmp_path / "w.safetensors").read_bytes()
    served = Hub({"model.safetensors": content, "sub/b.safetensors": content[::-1], "small.npz": b"small"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(served))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.port = server.server_port
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{served.port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_hub_file_arrives_bit_equal_and_is_downloaded_once(served, revision):
    path = hub.resolve(f"hf://owner/name@{revision}")
    assert path.read_bytes() == served.files["model.safetensors"] and path.suffix == ".safetensors"
    assert np.array_equal(formats.read(path)[0]["w"], np.arange(5))
    assert hub.resolve(f"hf://owner/name@{revision}") == path
    assert [command for command, url in served.requests if "/resolve/" in url].count("GET") == 1


def test_the_file_beside_weights_is_of_their_commit_and_absent_without_an_error(served, tmp_path, monkeypatch):
    served.files |= {"tokenizer.json": b"{}", "sub/tokenizer.json": b"[]"}
    spec = "hf://owner/name@main"
    assert hub.companion(spec, "tokenizer.json").read_bytes() == b"{}"
    assert f"/owner/name/resolve/{COMMIT}/tokenizer.json" in [url for _, url in served.requests]
    assert hub.companion("hf://owner/name/sub/b.safetensors@main", "tokenizer.json").read_bytes() == b"[]"
    assert hub.companion(spec, "vocab.txt") is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.companion(spec, "tokenizer.json").read_bytes() == b"{}" and hub.companion(spec, "other.json") is None
    assert hub.companion(tmp_path / "w.safetensors", "tokenizer.json") is None
    (tmp_path / "tokenizer.json").write_text("here")
    assert hub.companion(tmp_path / "w.safetensors", "tokenizer.json").read_text() == "here"


def test_wrong_bytes_beside_weights_are_refused(served):
    served.files["tokenizer.json"] = b"{}"
    served.etags["tokenizer.json"] = served.etag("tokenizer.json")
    served.files["tokenizer.json"] = b"[]"
    with pytest.raises(ValueError, match=r"tokenizer\.json: the bytes have hash"):
        hub.companion("hf://owner/name@main", "tokenizer.json")


@pytest.mark.parametrize("name", ["sub/b.safetensors", "small.npz"])
def test_hub_file_can_be_named_in_folders_and_small_files_are_checked_by_gits_hash(served, name):
    assert hub.resolve(f"hf://owner/name/{name}@main").read_bytes() == served.files[name]


@pytest.mark.parametrize("name", ["model.safetensors", "small.npz"])
def test_wrong_bytes_are_refused_and_never_served_from_the_cache(served, name):
    right = served.files[name]
    served.etags[name] = served.etag(name)
    served.files[name] = right[:-1] + b"!"
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"the hub says {served.etag(name)}"):
            hub.resolve(f"hf://owner/name/{name}@main")
    served.files[name] = right
    assert hub.resolve(f"hf://owner/name/{name}@main").read_bytes() == right


def test_cache_corrupted_later_is_refused_then_downloaded_again(served, monkeypatch):
    spec = "hf://owner/name@main"
    path = hub.resolve(spec)
    path.resolve().write_bytes(b"rotten")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="removed from the cache"):
        hub.resolve(spec)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        hub.resolve(spec)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert hub.resolve(spec).read_bytes() == served.files["model.safetensors"]


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_offline_uses_the_cache_and_asks_nobody(served, monkeypatch, revision):
    path = hub.resolve(f"hf://owner/name@{revision}")
    served.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.resolve(f"hf://owner/name@{revision}") == path
    with pytest.raises(FileNotFoundError, match="not in the local cache, and HF_HUB_OFFLINE is set"):
        hub.resolve(f"hf://owner/name/sub/b.safetensors@{revision}")
    assert served.requests == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf://owner/name/none.safetensors@main", "has no file 'none.safetensors' at revision 'main'"),
        ("hf://owner/name@v2", "has no revision 'v2'"),
        ("hf://owner/other@main", "no repository 'owner/other'.*HF_TOKEN"),
    ],
)
def test_what_the_hub_does_not_have_is_named(served, spec, message):
    with pytest.raises(FileNotFoundError, match=message):
        hub.resolve(spec)


@pytest.mark.parametrize(
    "spec", ["hf://owner/name", "hf://name@main", "hf://owner/name/file.npz", "hf://@main", "hf://"]
)
def test_malformed_hub_spec_and_missing_revision_say_the_form(spec):
    with pytest.raises(ValueError, match=r"expected hf://owner/name\[/file\]@revision"):
        hub.resolve(spec)


def test_hub_without_a_hash_needs_a_pin_and_the_message_gives_it(served):
    served.etags["model.safetensors"] = "weak-tag"
    sha256 = hashlib.sha256(served.files["model.safetensors"]).hexdigest()
    with pytest.raises(ValueError, match=f"append #sha256={sha256}"):
        hub.resolve("hf://owner/name@main")
    hub.resolve(f"hf://owner/name@main#sha256={sha256}")


def test_pin_is_checked_on_every_kind_of_spec(served, tmp_path):
    right, wrong = formats.sha256(tmp_path / "w.safetensors"), "0" * 64
    for spec in ("hf://owner/name@main", str(tmp_path / "w.safetensors")):
        assert formats.sha256(hub.resolve(f"{spec}#sha256={right}")) == right
        with pytest.raises(ValueError, match=f"sha256 is {right}, expected {wrong}"):
            hub.resolve(f"{spec}#sha256={wrong}")
    assert hub.resolve("hf://owner/name@main").is_file()  # a wrong pin does not cost the cached copy
    with pytest.raises(ValueError, match="64 lower-case hex digits"):
        hub.resolve(f"{tmp_path}/w.safetensors#sha256=ABC")


def test_builtin_weights_are_found_and_an_unknown_name_lists_them(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    formats.write_safetensors(tmp_path / "small.safetensors", {"w": np.ones(1)}, {})
    assert hub.resolve("builtin:small") == tmp_path / "small.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no builtin weights 'smal'; available: \['small'\]"):
        hub.resolve("builtin:smal")


def test_missing_path_names_what_is_near(tmp_path):
    (tmp_path / "resnet18.safetensors").touch()
    assert hub.resolve(tmp_path / "resnet18.safetensors") == tmp_path / "resnet18.safetensors"
    with pytest.raises(FileNotFoundError, match=r"similar names in that folder: \['resnet18.safetensors'\]"):
        hub.resolve(tmp_path / "resnet81.safetensors")
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        hub.resolve(tmp_path / "nowhere" / "w.npz")
