"""Refusals: what went wrong, why, and what to type next. Each has a stable code and an exit code."""

from __future__ import annotations

import math
from enum import Enum


class Exit(Enum):
    """Process exit codes; scripts and service managers branch on them."""

    OK = 0
    USAGE = 2
    BAD_INPUT = 3
    INTEGRITY = 4
    RESOURCE = 5
    NETWORK = 6
    REFUSED = 7
    VERSION = 8
    INTERNAL = 70
    INTERRUPTED = 130


class Code(Enum):
    """Every refusal by name: (stable code, exit code, what to do next)."""

    USAGE = ("E-USAGE-001", Exit.USAGE, "Run the command with --help.")
    INVITE_MALFORMED = ("E-INVITE-001", Exit.BAD_INPUT, "Paste the whole invite; it starts with barnraise:")
    INVITE_MISTYPED = ("E-INVITE-002", Exit.BAD_INPUT, "Copy the invite again; a character changed on its way.")
    INVITE_EXPIRED = ("E-INVITE-003", Exit.REFUSED, "Ask the researcher for a new invite.")
    INVITE_USED = ("E-INVITE-004", Exit.REFUSED, "Ask the researcher for a new invite.")
    INVITE_UNKNOWN = ("E-INVITE-005", Exit.REFUSED, "Ask the researcher for a new invite.")
    INVITE_FORGED = ("E-INVITE-006", Exit.INTEGRITY, "Do not use this invite; ask the researcher for a new one.")
    PIN_MISMATCH = (
        "E-TLS-001",
        Exit.INTEGRITY,
        "This is not the coordinator that issued your invite, or a proxy or a scanner on this network opens what you send."
        " Try another network, or ask the researcher for a new invite.",
    )
    SPEC_SYNTAX = ("E-SPEC-001", Exit.BAD_INPUT, "Mend the run file at the place named.")
    SPEC_UNKNOWN_KEY = ("E-SPEC-002", Exit.BAD_INPUT, "Rename or remove the key.")
    SPEC_VALUE = ("E-SPEC-003", Exit.BAD_INPUT, "Choose a value in the range named.")
    KEY_UNUSABLE = (
        "E-KEY-001",
        Exit.BAD_INPUT,
        "Restore the key file from a backup, or move it away to get a new identity.",
    )
    KEY_READABLE = ("E-KEY-002", Exit.BAD_INPUT, "Run chmod 600 on the key file.")
    SIGNATURE = ("E-SIGN-001", Exit.INTEGRITY, "Nothing was changed. If it happens again, tell the researcher.")
    EXPIRED = ("E-SIGN-002", Exit.REFUSED, "Check this machine's clock.")
    BLOB_CORRUPT = ("E-BLOB-001", Exit.INTEGRITY, "It will be fetched again; nothing was kept.")
    BLOB_TOO_LARGE = ("E-BLOB-002", Exit.RESOURCE, "Raise --max-disk or choose a smaller run.")
    BLOB_MISSING = ("E-BLOB-003", Exit.INTEGRITY, "It will be fetched again.")
    CHECKPOINT_BAD = (
        "E-BLOB-004",
        Exit.INTEGRITY,
        "It was refused; nothing was changed. Fetch another base checkpoint.",
    )
    DISK_CAP = ("E-DISK-001", Exit.RESOURCE, "Free some space or raise --max-disk.")
    DISK_BAD = ("E-DISK-002", Exit.RESOURCE, "See that the disk is in order and may be written to.")
    DATA_BAD = ("E-DATA-001", Exit.BAD_INPUT, "Mend the place named, or go on with --skip-bad.")
    DATA_EMPTY = ("E-DATA-002", Exit.BAD_INPUT, "Add more text with: barnraise-coordinator data add PATH")
    DATA_FORMAT = ("E-DATA-003", Exit.BAD_INPUT, "Use txt, md, source files, jsonl, jsonl.gz, jsonl.zst or parquet.")
    TOKEN_RANGE = ("E-DATA-004", Exit.INTEGRITY, "Ingest the data again with this run's tokenizer.")
    TOKENIZER_BAD = ("E-DATA-005", Exit.BAD_INPUT, "Give a Hugging Face tokenizer.json.")
    MODEL_BAD = ("E-MODEL-001", Exit.BAD_INPUT, "Mend [model] in the run file, then run: barnraise-coordinator check")
    MODEL_TOO_LARGE = ("E-MODEL-002", Exit.RESOURCE, "Choose a run with a smaller model, or a larger machine.")
    DEVICE_MISSING = ("E-DEVICE-001", Exit.BAD_INPUT, "Use --device auto, or a device that is present.")
    MEMORY = ("E-DEVICE-002", Exit.RESOURCE, "Use --batch with a smaller number.")
    SANDBOX = ("E-SANDBOX-001", Exit.BAD_INPUT, 'Use another kernel, or sandbox = "auto".')
    UPDATE_BAD = ("E-UPDATE-001", Exit.INTEGRITY, "The part was dropped; the round goes on without it.")
    RECORD_BAD = ("E-LOG-001", Exit.INTEGRITY, "The record was refused; nothing was changed.")
    STATE_MISMATCH = ("E-LOG-002", Exit.INTEGRITY, "Run barnraise leave --purge and join again; tell the researcher.")
    UNREACHABLE = ("E-NET-001", Exit.NETWORK, "Check the connection; a node that is in the run keeps trying.")
    PORT_IN_USE = ("E-NET-002", Exit.NETWORK, "Use another port, or stop the program that holds it.")
    NOBODY_CALLABLE = (
        "E-NET-003",
        Exit.NETWORK,
        "Where the coordinator is, run: barnraise join INVITE --no-training --listen 0.0.0.0:49303, and open that port.",
    )
    NOT_ADMITTED = ("E-AUTH-001", Exit.REFUSED, "Join with an invite: barnraise join INVITE")
    SESSION = ("E-AUTH-002", Exit.REFUSED, "The node opens a new session by itself.")
    LIMIT = ("E-LIMIT-001", Exit.REFUSED, "Send less at a time.")
    BUSY = ("E-LIMIT-002", Exit.NETWORK, "Too much was asked for lately; try again in a minute.")
    FIELD = ("E-FIELD-001", Exit.REFUSED, "Upgrade this program: pip install --upgrade barnraise")
    LEASE = ("E-LEASE-001", Exit.REFUSED, "The node asks for other data by itself.")
    VERSION = ("E-VERSION-001", Exit.VERSION, "Upgrade this program: pip install --upgrade barnraise")
    HOME_BUSY = ("E-HOME-001", Exit.BAD_INPUT, "Use barnraise status, or another --home for a second node.")
    HOME_FOREIGN = ("E-HOME-002", Exit.BAD_INPUT, "Choose an empty folder with --home.")
    NO_DAEMON = ("E-HOME-003", Exit.USAGE, "Start one with: barnraise join INVITE")
    RUN_MISSING = ("E-RUN-001", Exit.BAD_INPUT, "Make one with: barnraise-coordinator new NAME")
    RUN_EXISTS = ("E-RUN-002", Exit.BAD_INPUT, "Choose another name or folder.")
    CHILD_DIED = ("E-PROC-001", Exit.INTERNAL, "See the log named; the node restarts the process by itself.")
    DIVERGED = ("E-TRAIN-001", Exit.INTERNAL, "The node starts again from the shared state by itself.")
    BUG = ("E-BUG-001", Exit.INTERNAL, "Run it again with --debug and report what it prints.")
    IDENTITY_TAKEN = ("E-AUTH-003", Exit.REFUSED, "Give every node its own folder: barnraise join --home FOLDER INVITE")
    BANNED = (
        "E-AUTH-004",
        Exit.REFUSED,
        "Ask the researcher who invited you. To remove what is kept here: barnraise leave --purge",
    )
    CHALLENGE = ("E-AUTH-005", Exit.REFUSED, "The node asks for a new challenge by itself.")
    KICKED = ("E-AUTH-006", Exit.REFUSED, "Start the node again when that time is over: barnraise join")
    PEER_UNKNOWN = ("E-PEER-001", Exit.USAGE, "See the nodes with: barnraise-coordinator peers")
    UNPROVED = ("E-REPORT-001", Exit.REFUSED, "Nothing was changed; whoever was accused stays as it was.")
    STORE_BAD = ("E-STORE-001", Exit.INTEGRITY, "Restore the run's database from a backup.")
    INTERNAL = ("E-INTERNAL-001", Exit.INTERNAL, "Nothing was changed. Tell the researcher the id.")
    TWO_STORIES = (
        "E-LOG-003",
        Exit.INTEGRITY,
        "Nothing was changed. Compare what is named here with another volunteer's, and tell the researcher.",
    )
    LEDGER = ("E-LEDGER-001", Exit.INTEGRITY, "Keep a copy of the run's folder as it is, then restore a backup of it.")
    ORDER_REFUSED = ("E-ORDER-001", Exit.REFUSED, "Nothing was changed.")
    DATA_FIXED = ("E-DATA-006", Exit.REFUSED, "Begin another run with: barnraise-coordinator new NAME")

    @property
    def code(self) -> str:
        return self.value[0]

    @property
    def exit(self) -> Exit:
        return self.value[1]

    @property
    def fix(self) -> str:
        return self.value[2]


DISK_CODES = frozenset({Code.DISK_CAP, Code.DISK_BAD})  # of a disk that takes nothing
_BY_CODE = {member.code: member for member in Code}


class Refused(Exception):
    """Outside did something wrong, or a limit was met: refused by name, with what came and what was wanted."""

    def __init__(self, reason: Code, what: str, *, fix: str | None = None, retry_seconds: float = 0.0) -> None:
        super().__init__(f"{reason.code} · {what}")
        self.reason = reason
        self.what = what
        self.fix = fix if fix is not None else reason.fix
        self.retry_seconds = retry_seconds  # after which the same may be asked again; 0: nothing is known of that

    @classmethod
    def from_wire(cls, code: str, what: str, retry_seconds: float = 0.0) -> Refused:
        """Rebuild a refusal that another machine named; an unknown code becomes a refusal of its own kind."""
        reason, fix = _BY_CODE.get(code, Code.FIELD), None
        if reason is Code.UNREACHABLE and retry_seconds:
            fix = f"Try again in {math.ceil(retry_seconds)} s; a node that is in the run does so by itself."
        return cls(reason, what, fix=fix, retry_seconds=retry_seconds)
