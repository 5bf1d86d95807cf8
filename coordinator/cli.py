"""`barnraise-coordinator`, the researcher's command. Turns words into one run's folder, and outcomes into exit codes.

Only `check`, `start` and `export` load the model; every other word answers at once.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from coordinator.accounts import SHORT_ID, ledger_facts, ledger_text, rollback_facts, rollback_text, verdict_text
from coordinator.check import corpus_facts, corpus_rows, examine, plan_rows
from coordinator.core.strikes import Kind, by_node
from coordinator.output import loss_text, rows_text, table_text, to_json, when_text
from coordinator.reach import helper_command, listening, reachable
from coordinator.serving import configure_log, serve
from protocol import console
from protocol.errors import Code, Exit, Refused

if TYPE_CHECKING:
    from coordinator.folder import RunFolder
    from coordinator.ingest import Progress
    from coordinator.store import Order, Store
    from coordinator.tokenizer import Tokenizer
    from protocol.runspec import RunSpec

RUNS_DEPTH: Final = 3  # folders below the one that `runs` is asked about
ANSWER_SECONDS: Final = 30.0  # a coordinator that runs looks for orders twice a second
ASK_SECONDS: Final = 0.2

_SHORT_HELP: Final = """\
barnraise-coordinator: have volunteers train a language model together.

  barnraise-coordinator new NAME         make a run: a folder with a run file to edit
  barnraise-coordinator data add PATH    give it text
  barnraise-coordinator check            see what it will take
  barnraise-coordinator start            serve it
  barnraise-coordinator invite create    let others in
  barnraise-coordinator --help           everything else"""

_SETTINGS: Final[dict[str, Any]] = {"pretty_exceptions_enable": False, "add_completion": False}
_HELP: Final = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="barnraise-coordinator",
    help="Have volunteers train a language model together.",
    epilog="Try it without any of this: barnraise demo",
    context_settings=_HELP,
    **_SETTINGS,
)
data_app = typer.Typer(name="data", help="The text that the model learns from.", context_settings=_HELP, **_SETTINGS)
invite_app = typer.Typer(name="invite", help="Who may join.", context_settings=_HELP, **_SETTINGS)

peers_app = typer.Typer(
    name="peers", invoke_without_command=True, context_settings=_HELP, rich_help_panel="Watch", **_SETTINGS
)
ledger_app = typer.Typer(
    name="ledger", invoke_without_command=True, context_settings=_HELP, rich_help_panel="Watch", **_SETTINGS
)

RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="The run's folder. [this one]", show_default=False)
]
NodeArgument = Annotated[
    str, typer.Argument(metavar="NODE", help="Its name, or the first digits of its id.", show_default=False)
]
ReasonOption = Annotated[str, typer.Option("--reason", metavar="TEXT", help="One line; its volunteer reads it.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]


@app.callback()
def _before(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something breaks.")] = False,
) -> None:
    if version:
        import importlib.metadata

        print(f"barnraise-coordinator {importlib.metadata.version('barnraise')}")
        raise typer.Exit


@app.command(rich_help_panel="Prepare")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    at: Annotated[Path | None, typer.Option("--dir", metavar="DIR", help="Where. [./NAME]", show_default=False)] = None,
) -> None:
    """Make a run: a new folder with a commented run file."""
    from coordinator.folder import RunFolder

    RunFolder.create(name, at)
    where = console.printable(str(at or name))
    print(f"Made {where}/run.toml. Edit it, then:\n  cd {where}\n  barnraise-coordinator data add PATH")


@data_app.command("add")
def data_add(
    paths: Annotated[list[Path] | None, typer.Argument(metavar="PATH…", show_default=False)] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json.", show_default=False)
    ] = None,
    train_tokenizer: Annotated[
        int | None,
        typer.Option("--train-tokenizer", metavar="N", help="Make a tokenizer of N entries.", show_default=False),
    ] = None,
    field: Annotated[
        str | None, typer.Option("--field", metavar="NAME", help="Where rows have the text.", show_default=False)
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over bad documents.")] = False,
    lossy: Annotated[bool, typer.Option("--lossy", help="Replace bytes that are not UTF-8.")] = False,
    run: RunOption = None,
) -> None:
    """Read text files, jsonl(.gz/.zst) and parquet; what was added before is replaced.

    Example: barnraise-coordinator data add corpus/*.jsonl.zst notes/
    """
    if not paths:
        raise Refused(Code.USAGE, "data add needs a file or a folder", fix="Run: barnraise-coordinator data add PATH")
    if tokenizer is not None and train_tokenizer is not None:
        what = "--tokenizer and --train-tokenizer exclude each other"
        raise Refused(Code.USAGE, what, fix="Give one of them.")
    folder, spec = _run(run)
    from coordinator import ingest
    from protocol import canonical

    with closing(folder.open_store()) as store:
        _refuse_published(store)
        with folder.lock():
            _refuse_published(store)  # whoever had the lock may have started the run
            blobs = folder.open_blobs()
            chosen = _tokenizer(folder, spec, paths, tokenizer, train_tokenizer, field=field, lossy=lossy)
            with _progress() as show:
                corpus = ingest.ingest(
                    paths,
                    store=blobs,
                    work=folder.runtime,
                    tokenizer=chosen,
                    context=spec.data.context,
                    heldout=spec.data.heldout,
                    batch_sequences=spec.train.batch_sequences,
                    seed=spec.run.seed,
                    field=field,
                    skip_bad=skip_bad,
                    lossy=lossy,
                    on_progress=show,
                )
            store.set("corpus", canonical.to_bytes(corpus))
            kept = {ref.digest for ref in (*corpus.shards, corpus.heldout)}
            kept |= {corpus.tokenizer.digest} if corpus.tokenizer else set()
            blobs.keep_only(kept)
    print(rows_text(corpus_rows(corpus)))


@data_app.command("show")
def data_show(run: RunOption = None, as_json: JsonOption = False) -> None:
    """What was added."""
    folder, _ = _run(run)
    with closing(folder.open_store()) as store:
        corpus = folder.corpus(store)
    print(to_json(corpus_facts(corpus)) if as_json else rows_text(corpus_rows(corpus)))


@app.command(rich_help_panel="Prepare")
def check(run: RunOption = None, as_json: JsonOption = False) -> int:
    """Read run file, data and model, and say what the run will take."""
    folder, spec = _run(run)
    facts, problems, notes = examine(folder, spec)
    if as_json:
        listed = [{"code": p.reason.code, "what": p.what, "fix": p.fix} for p in problems]
        print(to_json({**facts, "problems": listed, "notes": notes}))
    else:
        print(rows_text(plan_rows(facts)))
        for note in notes:
            print(f"! {note}")
        for problem in problems:
            console.complain(f"✗ {console.printable(str(problem))}\n  Fix: {console.printable(problem.fix)}")
        if not problems:
            print("✓ Ready. Serve it with: barnraise-coordinator start")
    return problems[0].reason.exit.value if problems else Exit.OK.value


@app.command(rich_help_panel="Serve")
def start(
    run: RunOption = None,
    json_log: Annotated[bool, typer.Option("--json-log", help="One JSON object a line on stderr.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Serve the run until Ctrl-C; started again, it goes on where it was."""
    folder, spec = _run(run)
    configure_log(as_json=json_log)
    with closing(folder.open_store()) as store:
        folder.corpus(store)  # what is missing is said before seconds go into loading
    with console.crash_log(folder.logs / "crash.log"):
        return asyncio.run(serve(folder, spec, as_json=as_json, named=run))


@app.command(rich_help_panel="Serve")
def certificate(
    new: Annotated[bool, typer.Option("--new", help="Make another, in place of one whose key may be stolen.")] = False,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """The TLS certificate by which nodes know this coordinator.

    Invites name it. With a new one they stay good: the run's key endorses it, and nodes refuse the old one from the
    moment when they have seen the new.
    """
    folder, _ = _run(run)
    if new:
        folder.replace_tls()
        if folder.busy:
            console.complain("Restart the coordinator: it goes on with the old one until then.")
    shown = {"fingerprint": folder.fingerprint()}
    print(to_json(shown) if as_json else rows_text([("fingerprint", shown["fingerprint"])]))


@invite_app.command("create")
def invite_create(
    uses: Annotated[int, typer.Option("--uses", metavar="N", min=1, max=65535, help="How many nodes may use it.")] = 1,
    expires: Annotated[str, typer.Option("--expires", metavar="TIME", help="How long it is good.")] = "7d",
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="For you: who it is for.")] = "",
    addresses: Annotated[
        list[str] | None, typer.Option("--address", metavar="HOST:PORT", help="Where nodes reach you.")
    ] = None,
    run: RunOption = None,
) -> None:
    """Print an invite, one line, on stdout. Works beside a running coordinator.

    Example: barnraise-coordinator invite create --uses 50 --expires 7d > invite.txt
    """
    seconds = console.parse_duration(expires)
    if len(note) > 120 or not note.isprintable():
        raise Refused(Code.USAGE, "--note is one line of at most 120 characters")
    folder, spec = _run(run)
    from protocol import invite

    with closing(folder.open_store()) as store:
        reached = tuple(addresses or ()) or spec.coordinator.addresses or (listening(spec, store),)
        expires_ms = _now_ms() + int(seconds * 1000)
        token = secrets.token_bytes(16)
        issued = invite.issue(
            folder.key(),
            addresses=reachable(reached),
            fingerprint=folder.fingerprint(),
            name=spec.run.name,
            token=token,
            uses=uses,
            expires_ms=expires_ms,
        )
        store.add_invite(token.hex(), uses=uses, expires_ms=expires_ms, note=note)
    nodes = "one node" if uses == 1 else f"{uses:,} nodes"
    console.complain(
        f"Good for {nodes} until {when_text(expires_ms)}; it leads to {', '.join(issued.addresses)}.\n"
        f"They run: barnraise join INVITE"
    )
    print(invite.encode(issued))


@invite_app.command("list")
def invite_list(run: RunOption = None, as_json: JsonOption = False) -> None:
    """The invites that were made, and who came with them."""
    from coordinator.peers import came_text, nodes_by_invite

    folder, _ = _run(run)
    now_ms = _now_ms()
    with closing(folder.open_store()) as store:
        found, came = store.invites(), nodes_by_invite(store, now_ms)
    if as_json:
        print(to_json([dict(vars(each)) | {"nodes": came.get(each.token_id, [])} for each in found]))
        return
    rows = []
    for each in found:
        state = "revoked" if each.revoked else "expired" if each.expires_ms <= now_ms else "open"
        state = "used up" if state == "open" and each.used >= each.uses else state
        used = f"{each.used:,} of {each.uses:,}"
        when, note = when_text(each.expires_ms), console.printable(each.note)
        rows.append((each.token_id[:SHORT_ID], state, used, when, came_text(came.get(each.token_id, [])), note))
    print(table_text(("ID", "STATE", "USED", "EXPIRES", "WHO CAME", "NOTE"), rows) if rows else "No invites yet.")


@invite_app.command("revoke")
def invite_revoke(
    which: Annotated[str, typer.Argument(metavar="ID", help="As in `invite list`, or the invite.", show_default=False)],
    run: RunOption = None,
) -> None:
    """Take an invite back; nodes that have joined with it stay."""
    folder, _ = _run(run)
    token = which.strip().lower()
    if not token.isalnum():
        from protocol import invite

        token = invite.decode(which).token
    with closing(folder.open_store()) as store:
        fitting = [each.token_id for each in store.invites() if each.token_id.startswith(token)]
        if len(fitting) != 1:
            what = f"{len(fitting) or 'no'} invites begin with {console.printable(token[:40])}"
            raise Refused(Code.INVITE_UNKNOWN, what, fix="See them with: barnraise-coordinator invite list")
        store.revoke_invite(fitting[0])
    print(f"Took back invite {fitting[0][:SHORT_ID]}.")


@app.command(rich_help_panel="Watch")
def runs(
    path: Annotated[Path | None, typer.Argument(metavar="PATH", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """The runs in this folder and below, and how far they are."""
    above = (path or Path()).absolute()
    try:
        next(above.iterdir(), None)
    except OSError as error:
        raise Refused(Code.RUN_MISSING, f"{above} cannot be read: {error.strerror}", fix="Name a folder.") from None
    found = [_run_facts(folder) for folder in _run_folders(above, RUNS_DEPTH)]
    if as_json:
        print(to_json(found))
        return
    rows = [
        (
            console.printable(each["name"]),
            console.printable(each["state"]),
            f"{each['round']:,}" + (f" of {each['rounds']:,}" if each["rounds"] else ""),
            f"{each['nodes']:,}",
            loss_text(each["heldout_loss"]),
            console.printable(os.path.relpath(each["path"])),
        )
        for each in found
    ]
    print(table_text(("NAME", "STATE", "ROUND", "NODES", "LOSS", "FOLDER"), rows) if rows else "No runs here.")


@peers_app.callback()
def peers(context: typer.Context, run: RunOption = None, as_json: JsonOption = False) -> None:
    """The nodes that were admitted: their credit, and what is held against them. Shut them out, let them in again."""
    context.obj = run
    if context.invoked_subcommand is None:
        peers_ls(context, run, as_json)


@peers_app.command("ls")
def peers_ls(context: typer.Context, run: RunOption = None, as_json: JsonOption = False) -> None:
    """List them; with --json, who was struck, banned or let in again, when, by whom and why."""
    from coordinator.peers import none_is_callable, peers_facts, peers_text

    folder, _ = _run(run or context.obj)
    with closing(folder.open_store()) as store:
        found = peers_facts(store, _now_ms())
    print(to_json(found) if as_json else peers_text(found))
    if none_is_callable(found):
        code = Code.NOBODY_CALLABLE
        console.complain(f"{code.code} · no rostered node can be called. Run: {helper_command(folder.path)}")


@peers_app.command("ban")
def peers_ban(
    context: typer.Context,
    which: NodeArgument,
    reason: ReasonOption = "",
    revoke_invite: Annotated[
        bool, typer.Option("--revoke-invite", help="Also take back the invite that it came with.")
    ] = False,
    yes: YesOption = False,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> int:
    """Shut a node out for good: it is off the roster, and its leases are others', within two seconds.

    What it brought into certified records stays; to undo it, see rollback.

    Example: barnraise-coordinator peers ban brave-otter --reason "sends noise"
    """
    order = _Judgement(which, Kind.BAN, reason, revoke_invite=revoke_invite)
    return _judge(run or context.obj, order, yes=yes, as_json=as_json)


@peers_app.command("kick")
def peers_kick(
    context: typer.Context,
    which: NodeArgument,
    reason: ReasonOption = "",
    lasts: Annotated[str, typer.Option("--for", metavar="TIME", help="How long it stays out.")] = "10m",
    yes: YesOption = False,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> int:
    """Send a node away for a while: its session and its leases end, and it may come back later."""
    seconds = math.ceil(console.parse_duration(lasts))
    return _judge(run or context.obj, _Judgement(which, Kind.KICK, reason, seconds=seconds), yes=yes, as_json=as_json)


@peers_app.command("unban")
def peers_unban(
    context: typer.Context,
    which: NodeArgument,
    reason: ReasonOption = "",
    run: RunOption = None,
    as_json: JsonOption = False,
) -> int:
    """Let a node in again that was banned, sent away or left out; its strikes count no more, and stay in the list."""
    return _judge(run or context.obj, _Judgement(which, Kind.UNBAN, reason), yes=True, as_json=as_json)


@ledger_app.callback()
def ledger(context: typer.Context, run: RunOption = None, as_json: JsonOption = False) -> None:
    """Who contributed what, as the certified records say. `ledger verify` checks every row."""
    context.obj = run
    if context.invoked_subcommand is not None:
        return
    folder, _ = _run(run)
    from coordinator.core.ledger import Wrong
    from coordinator.ledger import read

    try:
        books = read(folder)
    except Wrong as wrong:
        raise Refused(Code.LEDGER, str(wrong)) from None
    if as_json:
        print(to_json(ledger_facts(books, _now_ms())))
    else:
        print(ledger_text(books, _now_ms()))


@ledger_app.command("verify")
def ledger_verify(
    context: typer.Context,
    deep: Annotated[bool, typer.Option("--deep", help="Read the archive again too, and fold every record.")] = False,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> int:
    """Recompute every row from the log, and name the first that is wrong (exit code 4). Works beside a coordinator."""
    folder, _ = _run(run or context.obj)
    from coordinator.ledger import verify

    verdict = verify(folder, deep=deep)
    if as_json:
        finding = None if verdict.finding is None else dict(vars(verdict.finding))
        print(to_json({"ok": finding is None, **vars(verdict), "finding": finding}))
        return Exit.OK.value if finding is None else Exit.INTEGRITY.value
    if verdict.finding is not None:
        raise Refused(Code.LEDGER, str(verdict.finding))
    print(verdict_text(verdict))
    return Exit.OK.value


@app.command(rich_help_panel="Serve")
def rollback(
    to: Annotated[int, typer.Option("--to", metavar="ROUND", min=0, help="How many rounds stay.", show_default=False)],
    folder_named: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="The run's folder. [this one]", show_default=False)
    ] = None,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="One line; volunteers read it.")] = "",
    yes: YesOption = False,
    run: RunOption = None,
    as_json: JsonOption = False,
) -> int:
    """Go back to the state after an earlier round; every node follows.

    Rounds after it are undone: their data is trained on again, credit for them stays. With --to at the newest round
    nothing is undone and the run gets a new roster: the way out when most rostered nodes are gone for good.

    Example: barnraise-coordinator rollback --to 40 --reason "learning rate too high"
    """
    from coordinator.orders import ROLLBACK, RollbackOrder

    if folder_named is not None and run is not None and folder_named.absolute() != run.absolute():
        raise Refused(Code.USAGE, "two folders were named", fix="Name the run's folder once.")
    _check_reason(reason)
    folder, _ = _run(folder_named or run)
    with closing(folder.open_store()) as store:
        facts = rollback_facts(folder, store, to)
        console.complain(rollback_text(facts))
        if not yes and not _agreed("Go back?" if facts["undone_rounds"] else "Begin a new roster?"):
            console.complain("Nothing was changed.")
            return Exit.INTERRUPTED.value
        body = RollbackOrder(to, reason or "ordered by the researcher").to_bytes()
        order = _ordered(folder, store, ROLLBACK, body)
    facts |= {"order": order.order_id, "state": order.state, "answer": order.answer}
    waits = "No coordinator serves this run at the moment; it goes back at the next barnraise-coordinator start."
    return _said(folder, order, facts, waits, as_json=as_json)


@app.command(rich_help_panel="Take the result")
def export(
    to: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    round_number: Annotated[
        int | None, typer.Option("--round", metavar="R", min=0, help="After so many rounds. [all]", show_default=False)
    ] = None,
    run: RunOption = None,
) -> None:
    """Write the model as a directory that Hugging Face transformers loads.

    Example: barnraise-coordinator export ./model
    """
    folder, spec = _run(run)
    with closing(folder.open_store()) as store:
        done, digest = _export(folder, spec, store, to.absolute(), round_number)
    where = console.printable(str(to))
    print(f"Wrote {where}: the model after {done:,} rounds, state {digest[:16]}.")
    print(f'  AutoModelForCausalLM.from_pretrained("{where}")')


app.add_typer(data_app, rich_help_panel="Prepare")
app.add_typer(invite_app, rich_help_panel="Serve")
app.add_typer(peers_app, rich_help_panel="Watch")
app.add_typer(ledger_app, rich_help_panel="Watch")


def main() -> NoReturn:
    raise SystemExit(console.main(app, program="barnraise-coordinator", short_help=_SHORT_HELP))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _run(given: Path | None) -> tuple[RunFolder, RunSpec]:
    from coordinator.folder import RunFolder

    folder = RunFolder.find(given)
    return folder, folder.spec()


# data


def _refuse_published(store: Store) -> None:
    if store.get("manifest") is not None:
        raise Refused(Code.DATA_FIXED, "the run was started: its data is what nodes were promised, and stays")


def _tokenizer(
    folder: RunFolder,
    spec: RunSpec,
    paths: Sequence[Path],
    file: Path | None,
    entries: int | None,
    *,
    field: str | None,
    lossy: bool,
) -> Tokenizer:
    """The command line's, or the run file's, whose path is relative to it."""
    from coordinator import ingest, tokenizer

    if entries is not None:
        console.complain(f"Making a tokenizer of {entries:,} entries …")
        return tokenizer.train_tokenizer(ingest.sample(paths, field=field, lossy=lossy), entries=entries)
    if file is None and spec.data.tokenizer == "bytes":
        return tokenizer.byte_tokenizer()
    return tokenizer.load_tokenizer(file or folder.path / spec.data.tokenizer)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None] | None]:
    """A bar on stderr for a person, nothing for a script."""
    if not (sys.stderr is not None and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")

        def show(now: Progress) -> None:
            done = f"{now.documents:,} documents, {console.number_text(now.tokens)} tokens"
            bar.update(task, total=now.bytes_total, completed=now.bytes_done, description=done)

        yield show


# runs


def _run_folders(path: Path, depth: int) -> Iterator[RunFolder]:
    """This folder and those below it that hold a run file."""
    from coordinator.folder import RunFolder

    folder = RunFolder(path)
    if folder.exists:
        yield folder
        return
    if not depth:
        return
    try:
        below = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink())
    except OSError:
        return
    for entry in below:
        if not entry.name.startswith("."):
            yield from _run_folders(entry, depth - 1)


def _run_facts(folder: RunFolder) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": folder.path.name, "path": str(folder.path), "state": "new"}
    facts |= {"round": 0, "rounds": 0, "nodes": 0, "heldout_loss": None, "train_loss": None, "tokens": 0}
    try:
        spec = folder.spec()
        facts |= {"name": spec.run.name, "rounds": spec.run.rounds}
        if not folder.database.exists():
            return facts
        with closing(folder.open_store()) as store:
            measured = store.history()
            heldout = [row.heldout for row in measured if row.heldout is not None and math.isfinite(row.heldout)]
            facts["round"] = store.entry_count
            facts["nodes"] = len(store.nodes())
            facts["heldout_loss"] = heldout[-1] if heldout else None
            if measured:
                train = measured[-1].train  # what nodes said of themselves
                facts["train_loss"] = train if train is not None and math.isfinite(train) else None
                facts["tokens"] = measured[-1].tokens
            facts["state"] = _run_state(folder, spec, store)
    except Refused as refused:
        facts["state"] = f"broken: {refused}"
    return facts


def _run_state(folder: RunFolder, spec: RunSpec, store: Store) -> str:
    if folder.busy:
        return "running"
    if store.get("manifest") is None:
        return "new" if store.get("corpus") is None else "ready"
    return "finished" if 0 < spec.run.rounds <= store.entry_count else "stopped"


# orders


def _agreed(question: str) -> bool:
    """Asks only a person: without a terminal on both ends the command itself is the consent."""
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    agreed: bool = typer.confirm(question, err=True)
    return agreed


def _check_reason(reason: str) -> None:
    from protocol.limits import REASON_CHARACTERS_MAX

    if len(reason) > REASON_CHARACTERS_MAX or not reason.isprintable():
        raise Refused(Code.USAGE, f"--reason is one line of at most {REASON_CHARACTERS_MAX} characters")


@dataclass(frozen=True)
class _Judgement:
    """A ban, a kick or an unban, as it was typed."""

    which: str
    kind: Kind
    reason: str
    seconds: int = 0
    revoke_invite: bool = False


def _judge(run: Path | None, asked: _Judgement, *, yes: bool, as_json: bool) -> int:
    from coordinator.orders import JUDGE, JudgeOrder
    from coordinator.peers import find, origin_text, peers_facts

    _check_reason(asked.reason)
    folder, _ = _run(run)
    with closing(folder.open_store()) as store:
        found = peers_facts(store, _now_ms())
        node = find(found, asked.which)
        console.complain(origin_text(found, node))
        if not yes and not _agreed("Ban it?" if asked.kind is Kind.BAN else "Send it away?"):
            console.complain("Nothing was changed.")
            return Exit.INTERRUPTED.value
        body = JudgeOrder(node["node"], asked.kind, asked.reason, asked.seconds, asked.revoke_invite).to_bytes()
        order = _ordered(folder, store, JUDGE, body)
    facts = {"node": node["node"], "name": node["name"], "kind": asked.kind.value, "reason": asked.reason}
    facts |= {"order": order.order_id, "state": order.state, "answer": order.answer}
    waits = "No coordinator serves this run at the moment; this is done at the next barnraise-coordinator start."
    return _said(folder, order, facts, waits, as_json=as_json)


def _said(folder: RunFolder, order: Order, facts: dict[str, Any], waits: str, *, as_json: bool) -> int:
    """What came of an order."""
    refusal = _unanswered(folder, order)
    if as_json:
        print(to_json(facts))
        return Exit.OK.value if refusal is None else refusal.reason.exit.value
    if refusal is not None:
        raise refusal
    print(f"✓ {console.printable(order.answer)}" if order.state == "done" else waits)
    return Exit.OK.value


def _ordered(folder: RunFolder, store: Store, kind: str, body: bytes) -> Order:
    """Place the order, and wait for the answer of a coordinator that runs."""
    order_id = store.add_order(kind, body)
    until = time.monotonic() + ANSWER_SECONDS
    while (order := store.order(order_id)).state == "open" and folder.busy and time.monotonic() < until:
        time.sleep(ASK_SECONDS)
    return order


def _unanswered(folder: RunFolder, order: Order) -> Refused | None:
    """Why the order was not carried out; none when it was, or will be at the next start."""
    if order.state == "refused":
        return Refused(Code.ORDER_REFUSED, order.answer)
    if order.state == "open" and folder.busy:
        what = f"the coordinator has not answered for {ANSWER_SECONDS:.0f} s"
        return Refused(Code.UNREACHABLE, what, fix="See its log. The order waits, and is carried out when it can be.")
    return None


# export


def _export(folder: RunFolder, spec: RunSpec, store: Store, to: Path, round_number: int | None) -> tuple[int, str]:
    signed = folder.manifest(store)
    if signed is None:
        what = f"the run in {folder.path} was never started, so it has no model"
        raise Refused(Code.RUN_MISSING, what, fix="Run: barnraise-coordinator start")
    from coordinator.archive import rebuild
    from coordinator.core.ledger import credited
    from coordinator.export import Contributor, Facts
    from coordinator.export import export as write
    from coordinator.tokenizer import Tokenizer, byte_tokenizer

    manifest, blobs, corpus = signed.manifest, folder.open_blobs(), folder.corpus(store)
    state = rebuild(store, blobs, manifest, round_number)
    digest = state.digest()
    credit = credited(store.entries(0, state.round), by_node(store.marks()))
    names = store.names()
    ranked = sorted(credit.items(), key=lambda item: (-item[1], item[0]))
    measured = {row.round: row.heldout for row in store.history()}
    write(
        to,
        model_config=manifest.model_config,
        parameters=state.params,
        tokenizer=Tokenizer(blobs.read(manifest.tokenizer.digest)) if manifest.tokenizer else byte_tokenizer(),
        context=manifest.context,
        facts=Facts(
            title=spec.run.title or manifest.name,
            run=manifest.run,
            round=state.round,
            state=digest,
            tokens=sum(credit.values()),
            corpus_documents=corpus.documents,
            corpus_tokens=corpus.tokens,
            heldout_loss=measured.get(state.round),
            contributors=tuple(Contributor(names.get(node, node[:SHORT_ID]), tokens) for node, tokens in ranked),
            license=spec.run.license,
            command=f"barnraise-coordinator export {to.name} --round {state.round}",
        ),
    )
    return state.round, digest


if __name__ == "__main__":
    main()
