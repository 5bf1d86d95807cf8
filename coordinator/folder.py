"""A run's folder: the run file, which is the researcher's, and .barnraise beside it, which is ours."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from protocol import canonical, identity, p2pd, runspec
from protocol.blobs import BlobStore, atomic_write
from protocol.errors import Code, Refused
from protocol.identity import Key
from protocol.runspec import CoordinatorSection, RunSpec

if TYPE_CHECKING:
    from coordinator.ingest import Corpus
    from coordinator.store import Store
    from protocol.model import Size
    from protocol.tls import Owner
    from protocol.types import BaseCheckpoint, RunId, SignedManifest

RUN_FILE: Final = "run.toml"
_TLS_NAMES: Final = ("localhost",)  # nodes look for none of them: the pin decides
OURS: Final = ".barnraise"

_LOCK_SECONDS: Final = 0.5  # `runs` holds it for a moment to see whether it is free
LOG_BYTES_MAX: Final = 16 << 20  # then it becomes NAME.log.1, and the one before that goes
_FIXED: Final = ("model", "data", "train", "rounds", "update")  # sections that the manifest fixes whole
_FIXED_IN_RUN: Final = ("name", "seed")
_ADDRESSES: Final = ("listen", "http", "p2p", "addresses")


@dataclass(frozen=True)
class Published:
    """What nodes were promised: it never changes."""

    manifest: SignedManifest
    base: BaseCheckpoint  # of round 0
    corpus: Corpus


@dataclass(frozen=True)
class RunFolder:
    """One run, by the names of what lies in its folder."""

    path: Path

    @classmethod
    def find(cls, given: Path | None) -> RunFolder:
        """The folder named, or the one we are in."""
        folder = cls((given or Path()).absolute())
        if folder.exists:
            return folder
        what = f"{folder.path} holds no {RUN_FILE}"
        fix = "Go to a run's folder or name one with --run; make one with: barnraise-coordinator new NAME"
        raise Refused(Code.RUN_MISSING, what, fix=fix)

    @classmethod
    def create(cls, name: str, at: Path | None = None) -> RunFolder:
        """A new folder with a run file to begin with."""
        if not re.fullmatch(identity.RUN_NAME, name):
            what = f"{canonical.shown(name)!r} is no name for a run; wanted 1 to 40 lower-case letters, digits, hyphens"
            raise Refused(Code.SPEC_VALUE, what, fix="Choose another name.")
        folder = cls((at or Path(name)).absolute())
        try:
            folder.path.mkdir(parents=True)
        except FileExistsError:
            raise Refused(Code.RUN_EXISTS, f"{folder.path} is there already") from None
        except OSError as error:
            raise Refused(Code.RUN_EXISTS, f"{folder.path} cannot be made: {error.strerror}") from None
        atomic_write(folder.run_file, runspec.template(name).encode())
        folder.run_file.chmod(0o644)
        return folder

    @property
    def exists(self) -> bool:
        try:
            return self.run_file.is_file()
        except OSError:  # a name too long, or a folder that is not ours to look into
            return False

    @property
    def run_file(self) -> Path:
        return self.path / RUN_FILE

    @property
    def ours(self) -> Path:
        return self.path / OURS

    @property
    def database(self) -> Path:
        return self.ours / "coordinator.db"

    @property
    def backup(self) -> Path:
        """The newest copy of the database."""
        from coordinator.store import backup_of

        return backup_of(self.database)

    @property
    def runtime(self) -> Path:
        """Sockets and scratch files of the running coordinator; swept at its start."""
        return self.ours / "runtime"

    @property
    def logs(self) -> Path:
        return self.ours / "logs"

    @property
    def keys(self) -> Path:
        """What cannot be made again."""
        return self.ours / "keys"

    def prepare(self) -> None:
        """Make our part of the folder where it is missing, closed to others."""
        try:
            for folder in (self.ours, self.keys, self.runtime, self.logs):
                folder.mkdir(mode=0o700, exist_ok=True)
                folder.chmod(0o700)
            ignore = self.ours / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n")  # keys do not belong in a repository
        except OSError as error:
            what = f"{self.ours} cannot be used: {error.strerror}"
            raise Refused(Code.HOME_FOREIGN, what, fix="Give this user the run's folder.") from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one process that serves the run or changes its data; the kernel gives it back in any case."""
        self.prepare()
        handle = os.open(self.ours / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _locked(handle, fcntl.LOCK_EX, _LOCK_SECONDS):
                holder = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
                what = f"another coordinator uses {self.path} (process {canonical.shown(holder)})"
                raise Refused(Code.HOME_BUSY, what, fix="Stop it first; invites, peers and runs work beside it.")
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            self._sweep()
            yield
        finally:
            os.close(handle)

    @property
    def busy(self) -> bool:
        """Whether a coordinator serves this run at the moment."""
        try:
            handle = os.open(self.ours / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return not _locked(handle, fcntl.LOCK_SH, 0)
        finally:
            os.close(handle)

    def log_file(self, name: str) -> BinaryIO:
        """Open for appending; the caller closes it."""
        self.prepare()
        return (self.logs / f"{name}.log").open("ab")

    def key(self) -> Key:
        """The coordinator's identity: it signs everything, and the run is named by it."""
        self.prepare()
        return Key.load_or_create(self.keys / "coordinator.key")

    def peer_key(self) -> Key:
        """The rendezvous's identity in libp2p."""
        self.prepare()
        return Key.load_or_create(self.keys / "p2p.key")

    def tls(self) -> tuple[Path, Path]:
        """Key and certificate, in PEM."""
        from protocol.tls import make_certificate

        self.prepare()
        make_certificate(*self._tls_pair, _TLS_NAMES, self._owner())
        return self._tls_pair

    def replace_tls(self) -> int:
        """A new pair; tells the number under which the run endorses it. Who serves now goes on with the old one."""
        from protocol.tls import replace_certificate

        self.prepare()
        return replace_certificate(*self._tls_pair, _TLS_NAMES, self._owner())

    @property
    def _tls_pair(self) -> tuple[Path, Path]:
        return self.keys / "tls.key", self.keys / "tls.crt"

    def _owner(self) -> Owner:
        from protocol.tls import Owner

        return Owner(self.key(), self.run_id(), int(time.time()))

    def fingerprint(self) -> str:
        from protocol.tls import fingerprint

        return fingerprint(self.tls()[1].read_bytes())

    def spec(self) -> RunSpec:
        return runspec.load(self.run_file)

    def run_id(self) -> RunId:
        return identity.run_id(self.key().public, self.spec().run.name)

    def open_store(self) -> Store:
        from sqlalchemy.exc import OperationalError

        from coordinator.store import Store

        self.prepare()
        try:
            return Store(self.database)
        except (OperationalError, OSError) as error:
            why = getattr(error, "orig", None) or getattr(error, "strerror", None) or error
            fix = "See that this user may write to the folder, and that the disk has room."
            raise Refused(Code.STORE_BAD, f"{self.database} cannot be opened: {why}", fix=fix) from None

    def open_blobs(self) -> BlobStore:
        self.prepare()
        return BlobStore(self.ours / "blobs", full_fix="Free some space on the disk that holds the run's folder.")

    def corpus(self, store: Store) -> Corpus:
        """What `data add` made."""
        from coordinator.ingest import Corpus

        data = store.get("corpus")
        if data is None:
            fix = "Add some with: barnraise-coordinator data add PATH"
            raise Refused(Code.DATA_EMPTY, f"the run in {self.path} has no data", fix=fix)
        return canonical.from_bytes(Corpus, data)

    def manifest(self, store: Store) -> SignedManifest | None:
        """What nodes were promised, if the run was ever started."""
        from protocol.types import SignedManifest

        data = store.get("manifest")
        if data is None:
            return None
        signed = canonical.from_bytes(SignedManifest, data)
        identity.check_manifest(self.key().public, signed)
        return signed

    def publish(self, store: Store, blobs: BlobStore) -> Published:
        """What nodes are promised: made and signed at the first call, only compared with the run file from then on."""
        spec, corpus, signed = self.spec(), self.corpus(store), self.manifest(store)
        if signed is None:
            signed = self._first(spec, corpus, store, blobs)
        check_unchanged(spec, RunSpec.from_json(signed.manifest.spec))
        first = next((base for base in store.bases() if base.round == 0), None)
        if first is None:
            raise Refused(Code.STORE_BAD, f"{self.database} has no first checkpoint")
        return Published(signed, first, corpus)

    def _first(self, spec: RunSpec, corpus: Corpus, store: Store, blobs: BlobStore) -> SignedManifest:
        from protocol import model
        from protocol.fold import outer_of
        from protocol.log import genesis_head
        from protocol.state import initial_state, write_base
        from protocol.types import BaseCheckpoint, Manifest, RoundNumber

        check_data(spec, corpus, blobs)
        config, size = model_of(spec, corpus)
        vector = model.initial_vector(config, spec.run.seed)
        state = initial_state(vector, momentum=outer_of(spec.update).keeps_momentum)
        with tempfile.TemporaryDirectory(dir=self.runtime) as scratch:
            path = Path(scratch) / "base.safetensors"
            genesis = write_base(path, state)
            blob = blobs.put_file(path)
        key = self.key()
        manifest = Manifest(
            run=identity.run_id(key.public, spec.run.name),
            name=spec.run.name,
            spec=public_spec(spec).to_json(),
            model_config=config,
            tokenizer=corpus.tokenizer,
            vocabulary=corpus.vocabulary,
            parameters=size.parameters,
            layout=size.digest,
            genesis=genesis,
            context=corpus.context,
            token_bytes=corpus.token_bytes,
            data=canonical.digest(corpus.shards),
            transformers=version("transformers"),
        )
        signed = identity.sign_manifest(key, manifest)
        store.save_shards(corpus.shards, corpus.heldout)
        store.save_base(BaseCheckpoint(RoundNumber(0), genesis_head(manifest).hash, genesis, blob))
        store.set("manifest", canonical.to_bytes(signed))  # last: a crash before it leaves a run that never started
        return signed

    def _sweep(self) -> None:
        """Throw away what a coordinator that was killed left behind; links are p2pd's own to follow."""
        for left in self.runtime.iterdir():
            if left.is_dir() and not left.is_symlink():
                p2pd.sweep(left)
                shutil.rmtree(left, ignore_errors=True)
            elif not left.is_symlink():
                left.unlink(missing_ok=True)
        for new in self.ours.rglob(".new-*"):  # a file that never took its place
            new.unlink(missing_ok=True)


def public_spec(spec: RunSpec) -> RunSpec:
    """What nodes may read: not where this machine listens, nor where its files are."""
    hidden = {name: CoordinatorSection.model_fields[name].get_default() for name in _ADDRESSES}
    return spec.model_copy(
        update={
            "coordinator": spec.coordinator.model_copy(update=hidden),
            "data": spec.data.model_copy(update={"tokenizer": "bytes"}),
        }
    )


def check_unchanged(spec: RunSpec, promised: RunSpec) -> None:
    """Refuse a run file that describes another run than the one nodes have joined."""
    now, then = _fixed(spec), _fixed(promised)
    changed = [
        f"{place} = {now.get(place)}, was {then.get(place)}"
        for place in then | now
        if now.get(place) != then.get(place)
    ]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        what = f"{RUN_FILE} has changed since the run was first started: {canonical.shown(changed[0])}{more}"
        fix = "Put the old values back, or begin another run with: barnraise-coordinator new NAME"
        raise Refused(Code.SPEC_VALUE, what, fix=fix)


def check_data(spec: RunSpec, corpus: Corpus, blobs: BlobStore) -> None:
    """Refuse data that does not fit the run file, or is not all there."""
    again = "Add the data again with: barnraise-coordinator data add PATH"
    if corpus.context != spec.data.context:
        what = f"[data] context = {spec.data.context}, but the data was added with {corpus.context}"
        raise Refused(Code.SPEC_VALUE, what, fix=f"Put the old value back. {again}")
    if corpus.sequences < spec.train.batch_sequences:
        what = f"[train] batch_sequences = {spec.train.batch_sequences}, the data has {corpus.sequences} sequences"
        raise Refused(Code.DATA_EMPTY, what)
    for wanted in (*corpus.shards, corpus.heldout, *((corpus.tokenizer,) if corpus.tokenizer else ())):
        if blobs.size(wanted.digest) != wanted.size:
            raise Refused(Code.BLOB_CORRUPT, f"blob {wanted.digest[:12]} has changed on disk", fix=again)


def model_of(spec: RunSpec, corpus: Corpus) -> tuple[str, Size]:
    """The model's whole config and its size. Loads torch."""
    from protocol import model

    config = model.model_config(
        spec.model.architecture, spec.model.config, vocabulary=corpus.vocabulary, context=corpus.context
    )
    return config, model.measure(config)


def _fixed(spec: RunSpec) -> dict[str, Any]:
    """Every value that the manifest fixes, by its place in the run file."""
    plain = public_spec(spec).model_dump(mode="json")
    run = {f"[run] {key}": plain["run"][key] for key in _FIXED_IN_RUN}
    return run | {place: value for section in _FIXED for place, value in _places(f"[{section}]", plain[section])}


def _places(section: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{section} {key}.{inner}", item) for inner, item in value.items())
        else:
            yield f"{section} {key}", value


def _locked(handle: int, kind: int, seconds: float) -> bool:
    """Take the lock, waiting so long for it at most."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        else:
            return True
