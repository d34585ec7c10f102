"""Where weights come from: `builtin:NAME`, `timm:NAME`, `hf://owner/name[/file]@revision`, a path; and their hashes."""

import difflib
import hashlib
import os
import pathlib
import re
from collections.abc import Mapping

from tl_jax.weights import formats, published

WHOLE = "model.safetensors"  # the whole network, as a finished run leaves it
ASSETS = pathlib.Path(__file__).parents[1] / "assets"
_HF = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(/(?P<file>[^@]+))?(@(?P<revision>.+))?")


class Missing(FileNotFoundError):
    """The repository has no such file."""


class NotCached(FileNotFoundError):
    """The cache has no such file, and nobody can be asked."""


def resolve(spec: str | os.PathLike) -> pathlib.Path:
    """Turns a weight spec into a local file whose bytes are the expected ones.

    `builtin:NAME` ships with the package. `hf://owner/name[/file]@revision` comes from the Hugging Face hub or cache
    (file defaults to model.safetensors; the revision is required, best a commit) and is compared with the hub's hash on
    every call; HF_ENDPOINT, HF_HUB_CACHE, HF_HOME and HF_HUB_OFFLINE are honoured. `timm:NAME[@revision]` is a file of
    the table in published.py, from the hub too. Its commit and sha256 are recorded beside the cache when it is first
    used; the hub is asked only for what is not in the cache, and another commit or sha256 is an error from then on.
    Anything else is a path of a file or of a folder with model.safetensors. A suffix `#sha256=HEX` pins the bytes of
    any of them, and takes the place of the record. Raises FileNotFoundError, ConnectionError, or ValueError for a
    malformed spec, a name that is not in the table, or wrong bytes.
    """
    spec, _, pin = os.fspath(spec).partition("#sha256=")
    if pin and not re.fullmatch("[0-9a-f]{64}", pin):
        raise ValueError(f"{spec}: the pin after '#sha256=' must be 64 lower-case hex digits, found {pin!r}")
    if spec.startswith("hf://"):
        path = _from_hub(spec, pinned=bool(pin))
    elif row := published.find(spec):
        path = _from_table(spec, row, pinned=bool(pin))
    else:
        path = _builtin(spec.removeprefix("builtin:")) if spec.startswith("builtin:") else _local(pathlib.Path(spec))
    if pin and (found := formats.sha256(path)) != pin:
        raise ValueError(f"{spec}: sha256 is {found}, expected {pin}; the file changed or the pin is of another one")
    return path


def companion(spec: str | os.PathLike, name: str) -> pathlib.Path | None:
    """The file `name` in the folder of a weight file, in the hub's repository at the same commit; None: there is none.

    Raises what `resolve` does. Where nobody can be asked, only the cache counts.
    """
    path, spec = resolve(spec), os.fspath(spec).partition("#sha256=")[0]
    if not (match := _HF.fullmatch(spec)):
        own = (path if path.is_dir() else path.parent) / name
        return own if own.is_file() else None
    commit = path.parts[path.parts.index("snapshots") + 1]  # a branch may have moved on meanwhile
    place = pathlib.PurePosixPath(match["file"] or WHOLE).with_name(name)
    try:
        found = pathlib.Path(_ask(spec, match["repo"], os.fspath(place), commit))
    except (Missing, NotCached):
        return None
    _verify(f"{spec}: {name}", found)
    return found


def check(expected: Mapping[str, tuple[str, str]]) -> None:
    """Raises one ValueError for all files of `{option: (weight spec, sha256)}` whose bytes have another sha256."""
    found = {key: formats.sha256(resolve(spec)) for key, (spec, _) in expected.items()}
    wrong = [
        f"{key}: {spec} has sha256 {found[key]}, expected {pin}"
        for key, (spec, pin) in expected.items()
        if found[key] != pin
    ]
    if wrong:
        fix = "bring back the file that was meant; if these bytes are, set the option to ''"
        raise ValueError("\n  ".join([f"weight files that are not the expected ones; {fix}:", *wrong]))


def check_name(path: pathlib.Path) -> str:
    """The sha256 of a file; ValueError where its name ends in the beginning of another, as torch.hub's names do.

    Such an end is 8 to 64 hex digits behind - or _, digits and letters, of a file of torch.save: a converted file has
    other bytes under the same name, and 20210101 is a date.
    """
    found, name = formats.sha256(path), re.fullmatch(r".*[-_]([0-9a-f]{8,64})", path.stem)
    hashed = name and path.suffix in formats.TORCH and not name[1].isdigit() and not name[1].isalpha()
    if hashed and not found.startswith(name[1]):
        fix = "download it again; if these bytes are meant, rename the file"
        raise ValueError(f"{path} has sha256 {found}, expected one that begins with {name[1]}, as its name says; {fix}")
    return found


def _builtin(name):
    own = {file.stem: file for file in ASSETS.glob("*.safetensors")}
    own |= {file.parent.name: file for file in ASSETS.glob(f"*/{WHOLE}")}  # with a tokenizer
    if name not in own:
        raise FileNotFoundError(f"no builtin weights {name!r}; available: {sorted(own)}")
    return own[name]


def _local(path):
    if path.exists():
        return path / WHOLE if (path / WHOLE).is_file() else path
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no weights at {path}: the folder {path.parent} does not exist")
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), cutoff=0.5)
    raise FileNotFoundError(f"no weights at {path}; similar names in that folder: {near or 'none'}")


def _from_hub(spec, pinned):
    match = _HF.fullmatch(spec)
    if not match or not match["revision"]:
        why = "the revision is required: a branch such as @main, a tag, or a commit, which makes the run reproducible"
        raise ValueError(f"{spec}: expected hf://owner/name[/file]@revision; {why}")
    path = pathlib.Path(_ask(spec, match["repo"], match["file"] or WHOLE, match["revision"]))
    if not _verify(spec, path) and not pinned:
        raise ValueError(f"{spec}: the hub gave no hash to check; pin the file: append #sha256={formats.sha256(path)}")
    return path


def _from_table(spec, row, pinned):
    import huggingface_hub

    cache = _cache()
    records, where = cache.parent / published.RECORDS, (row.repo, row.file)
    known = None if pinned else published.recorded(spec, records)
    revision = known.revision if known else spec.partition("@")[2] or "main"
    missing = f"; {row.bring(revision, cache)}"
    cached = known and huggingface_hub.try_to_load_from_cache(*where, cache_dir=cache, revision=revision)
    if known and not isinstance(cached, str):
        found = _ask(spec, *where, spec.partition("@")[2] or "main", missing, dry_run=True).commit_hash
        if found != revision:  # before it is downloaded
            raise published.changed(spec, known, f"revision {found}", records)
    path = pathlib.Path(_ask(spec, *where, revision, missing))
    sha256 = _verify(spec, path) or formats.sha256(path)
    if not pinned:
        published.check(spec, published.Record(path.parent.name, sha256), records)
    return path


def _cache():
    """The folder of the hub's cache. The library reads its environment at import; a later setting counts here too."""
    from huggingface_hub import constants

    home = os.environ.get("HF_HOME")
    cache = os.environ.get("HF_HUB_CACHE") or (os.path.join(home, "hub") if home else constants.HF_HUB_CACHE)
    return pathlib.Path(cache).expanduser()


def _ask(spec, repo, file, revision, missing="", **options):
    """What hf_hub_download returns, with one message for what it raises; missing: added where the file is not there."""
    import huggingface_hub  # here, as only this needs it, and it takes its time
    from huggingface_hub import errors

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    options |= {"endpoint": os.environ.get("HF_ENDPOINT"), "cache_dir": _cache(), "local_files_only": offline}
    try:
        return huggingface_hub.hf_hub_download(repo, file, revision=revision, **options)
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached (see HF_ENDPOINT)"
        raise NotCached(f"{spec}: not in the local cache, and {why}{missing}") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(f"{spec}: no repository {repo!r}, or a private or gated one: set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{spec}: {repo!r} has no revision {revision!r}") from None
    except errors.EntryNotFoundError:
        raise Missing(f"{spec}: {repo!r} has no file {file!r} at revision {revision!r}") from None
    except errors.HFValidationError as error:
        raise ValueError(f"{spec}: {error}") from None
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"{spec}: the hub answered {error}") from None


def _verify(spec, path):
    """Compares the bytes with the hub's hash, which is the name of the cached blob; removes what does not match.

    Returns the sha256, or "" where the hub gave no hash.
    """
    blob = path.parent / os.readlink(path) if path.is_symlink() else path
    if re.fullmatch("[0-9a-f]{64}", blob.name):  # large file: sha256 of the contents
        found = sha256 = formats.sha256(path)
    elif re.fullmatch("[0-9a-f]{40}", blob.name):  # small file: git's hash of the blob
        found, sha256 = hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest(), ""
    else:
        return ""
    if found != blob.name:
        path.unlink()
        blob.unlink()
        wrong = f"the bytes have hash {found}, but the hub says {blob.name}"
        raise ValueError(f"{spec}: {wrong}; the copy was removed from the cache, so the next call downloads it again")
    return sha256 or formats.sha256(path)
