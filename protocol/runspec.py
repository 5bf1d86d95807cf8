"""The run file: everything a researcher decides about a run, as one typed value. Knows TOML, reads one file."""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from protocol import address
from protocol.canonical import shown
from protocol.errors import Code, Refused
from protocol.identity import RUN_NAME
from protocol.limits import ADDRESSES_MAX, MEMBERS_MAX, RANGES_MAX

_RUN_FILE_BYTES_MAX: Final = 1 << 16  # written by hand; it travels to every node inside the manifest
_DEPTH_MAX: Final = 8  # of tables and arrays; Hugging Face configs stay under 5
_INTEGER_BITS_MAX: Final = 63  # TOML promises no more
_HEARTBEATS_IN_A_LEASE_MIN: Final = 3  # so that two lost ones cost nobody a lease
_FROM_DATA: Final = frozenset({"vocab_size", "max_position_embeddings"})
_NEVER_FROM_A_FILE: Final = frozenset({"auto_map", "trust_remote_code", "quantization_config", "model_type"})

KeyPath = tuple[str | int, ...]  # where a value is: section, key, and indexes inside the value


def _line(text: str) -> str:
    if not text.isprintable():
        raise PydanticCustomError("text", "one line of printable characters")
    return text


def _run_name(text: str) -> str:
    if not re.fullmatch(RUN_NAME, text):
        raise PydanticCustomError("text", "1 to 40 lower-case letters, digits and hyphens")
    return text


def _architecture(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", text):
        raise PydanticCustomError("text", "a model_type of the transformers library, as in llama")
    return text


def _host_port(text: str) -> str:
    if address.parse(text) is None:
        raise PydanticCustomError("text", "host:port, as in 203.0.113.7:49300 or [2001:db8::7]:49300")
    return text


Line = Annotated[str, Field(max_length=120), AfterValidator(_line)]
HostPort = Annotated[str, Field(max_length=300), AfterValidator(_host_port)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, le=10)]
Beta = Annotated[float, Field(ge=0, lt=1)]
BatchSize = Annotated[int, Field(ge=1, le=65536)]
DaySeconds = Annotated[float, Field(gt=0, le=86400)]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(_Section):
    """Who and how long."""

    name: Annotated[str, AfterValidator(_run_name)]
    title: Line = ""
    license: Line = ""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    min_nodes: Annotated[int, Field(ge=1, le=MEMBERS_MAX)] = 1
    rounds: Annotated[int, Field(ge=0, le=1_000_000_000)] = 72  # 0: endless


class ModelSection(_Section):
    """A Hugging Face architecture that is installed locally, and the keys of its config."""

    architecture: Annotated[str, AfterValidator(_architecture)] = "llama"
    config: dict[str, Any] = Field(
        default_factory=lambda: {
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        }
    )

    @field_validator("config")
    @classmethod
    def _plain_and_ours(cls, config: dict[str, Any]) -> dict[str, Any]:
        for key in config:
            if key in _FROM_DATA:
                raise _rule(f"{key} is filled in from [data]; remove it", key)
            if key in _NEVER_FROM_A_FILE or key.startswith("_"):
                raise _rule(f"{key} cannot be set by a run file; remove it", key)
        for path, value in _leaves(config):
            if isinstance(value, float) and value - value != 0:
                raise _rule(f"{value} is not a finite number", *path)
        return config


class DataSection(_Section):
    """What a sequence is, and what is kept back to measure with."""

    context: Annotated[int, Field(ge=8, le=1_000_000)] = 256
    heldout: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    tokenizer: Annotated[Line, Field(min_length=1)] = "bytes"


class TrainSection(_Section):
    """The inner optimizer: what one node does by itself."""

    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: Rate = 0.003
    muon_learning_rate: Rate = 0.02
    muon_momentum: Beta = 0.95
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 20
    decay_to: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the learning rates when the last round ends
    clip: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    batch_sequences: BatchSize = 16
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class RoundsSection(_Section):
    """How long nodes train between two exchanges, and how long an exchange may take."""

    inner_steps: Annotated[tuple[tuple[Count, Count], ...], Field(min_length=1, max_length=64)] = (
        (25, 2),
        (20, 5),
        (15, 10),
        (12, 25),
    )
    upload_megabytes_per_hour: Annotated[float, Field(ge=0, le=1e9)] = 0  # of one node; 0: no cap
    seconds_max: DaySeconds = 1800
    gather_seconds: Annotated[float, Field(ge=0, le=86400)] = 15
    deadline_seconds: DaySeconds = 300

    @model_validator(mode="after")
    def _deadline_after_gathering(self) -> Self:
        if self.deadline_seconds <= self.gather_seconds:
            raise _rule("deadline_seconds must be more than gather_seconds", "deadline_seconds")
        return self

    def steps(self, round_number: int) -> int:
        """Inner steps in this round; the last pair goes on for ever."""
        for rounds, steps in self.inner_steps:
            if round_number < rounds:
                return steps
            round_number -= rounds
        return self.inner_steps[-1][1]

    def steps_before(self, round_number: int) -> int:
        """Inner steps of one node in all rounds before this one."""
        total = 0
        for count, steps in self.inner_steps:
            taken = min(count, round_number)
            total += taken * steps
            round_number -= taken
        return total + round_number * self.inner_steps[-1][1]


class UpdateSection(_Section):
    """How the nodes' changes are packed, and how the mean of them moves the model."""

    codec: Literal["fp16", "int8", "int4", "sparse2"] = "int4"
    mean: Literal["auto", "fp16", "int8", "int4", "sparse2"] = "auto"
    robust: Literal["clip", "mean", "trimmed", "centered"] = "clip"  # protocol/robust.py
    outer: Literal["average", "nesterov"] = "average"
    outer_learning_rate: Rate = 1.0
    outer_momentum: Beta = 0.0
    residual_decay: Annotated[float, Field(ge=0, le=1)] = 1.0
    stale_rounds: Annotated[int, Field(ge=1, le=1000)] = 8  # halved seven times by then: under 1 % is left to drop

    @property
    def mean_codec(self) -> str:
        """Of the means that reducers send: dense if not told otherwise, as members keep different values."""
        if self.mean != "auto":
            return self.mean
        return "int4" if self.codec == "sparse2" else self.codec

    @model_validator(mode="after")
    def _means_fit(self) -> Self:
        if self.mean == "sparse2" and self.codec != "sparse2":
            raise _rule('mean = "sparse2" needs codec = "sparse2"', "mean")
        return self

    @model_validator(mode="after")
    def _rule_fits(self) -> Self:
        if self.codec == "sparse2" and self.robust in ("trimmed", "centered"):
            text = f'robust = "{self.robust}" takes the middle of each value, and with codec = "sparse2" most are zeros'
            raise _rule(f"{text}; clip or mean fits", "robust")
        return self

    @model_validator(mode="after")
    def _momentum_fits(self) -> Self:
        if self.outer == "nesterov" and self.outer_momentum == 0:
            raise _rule('outer = "nesterov" needs an outer_momentum between 0 and 1', "outer_momentum")
        if self.outer == "average" and self.outer_momentum != 0:
            raise _rule('outer = "average" needs outer_momentum = 0', "outer_momentum")
        return self


class EvaluateSection(_Section):
    """When the coordinator measures the model, and when it archives a whole one."""

    every_rounds: Count = 1
    sequences: BatchSize = 64
    prompt: Line = ""
    base_every_rounds: Count = 50


class WatchSection(_Section):
    """When the coordinator takes the model back by itself (coordinator/core/watch.py)."""

    rollback: bool = True
    jump: Annotated[float, Field(gt=0, le=20)] = 0.5  # 1.6 times the perplexity; healthy runs rose by 0.07 at most
    evaluations: Annotated[int, Field(ge=1, le=8)] = 3  # one may be luck; 8 is half of the watch's window
    most: Annotated[int, Field(ge=1, le=100)] = 3


class AuditSection(_Section):
    """Whose work the coordinator measures again, and whose means it makes again (coordinator/core/audits.py, recounts.py)."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.2  # some 20 % more upload in an all-reduce, none in an all-gather


class LeasesSection(_Section):
    """How data is handed out."""

    sequences: Count = 2048
    seconds: DaySeconds = 120
    hours_ahead: Annotated[float, Field(ge=0, le=168)] = 4.0  # most outages end sooner; a shard more on the disk


class CoordinatorSection(_Section):
    """Where the coordinator listens."""

    listen: HostPort = "0.0.0.0:49300"
    http: HostPort = "127.0.0.1:49301"
    p2p: HostPort = "0.0.0.0:49302"
    addresses: Annotated[tuple[HostPort, ...], Field(max_length=ADDRESSES_MAX)] = ()
    heartbeat_seconds: Annotated[float, Field(gt=0, le=300)] = 10

    @field_validator("addresses")
    @classmethod
    def _reachable(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for text in addresses:
            found = address.parse(text)
            if found is not None and found.unspecified:
                raise PydanticCustomError("text", "addresses that others can connect to")
        return addresses

    @model_validator(mode="after")
    def _three_ports(self) -> Self:
        taken: dict[int, str] = {}
        for key in ("listen", "http", "p2p"):
            found = address.parse(getattr(self, key))
            if found is not None and found.port and taken.setdefault(found.port, key) != key:
                raise _rule(f"{key} and {taken[found.port]} must have different ports", key)
        return self


class RunSpec(_Section):
    """A checked run file."""

    run: RunSection
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    rounds: RoundsSection = RoundsSection()
    update: UpdateSection = UpdateSection()
    evaluate: EvaluateSection = EvaluateSection()
    watch: WatchSection = WatchSection()
    audit: AuditSection = AuditSection()
    leases: LeasesSection = LeasesSection()
    coordinator: CoordinatorSection = CoordinatorSection()

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.leases.seconds < _HEARTBEATS_IN_A_LEASE_MIN * self.coordinator.heartbeat_seconds:
            text = f"seconds must be at least {_HEARTBEATS_IN_A_LEASE_MIN} times [coordinator] heartbeat_seconds"
            raise _rule(text, "leases", "seconds")
        longest = max(steps for _, steps in self.rounds.inner_steps) * self.train.batch_sequences
        if self.train.decay_to < 1 and not self.run.rounds:
            raise _rule("decay_to needs an end: set [run] rounds", "train", "decay_to")
        if 2 * longest > self.leases.sequences * RANGES_MAX:  # twice: training goes on while a round is decided
            wanted = -(-2 * longest // RANGES_MAX)
            text = (
                f"sequences must be at least {wanted}: a round of {longest} sequences has to fit in {RANGES_MAX} leases"
            )
            raise _rule(text, "leases", "sequences")
        return self

    def rate_share(self, round_number: int) -> float:
        """What learning rates are multiplied with in this round: a half cosine over the run's inner steps."""
        if not self.run.rounds:
            return 1.0
        done = self.rounds.steps_before(min(round_number, self.run.rounds)) / self.rounds.steps_before(self.run.rounds)
        return cosine_share(done, self.train.decay_to)

    def to_json(self) -> str:
        """The manifest's form: every value, sorted, one spelling."""
        plain = self.model_dump(mode="json")
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        """What a manifest carries; refused as strictly as a file."""
        if len(text) > 2 * _RUN_FILE_BYTES_MAX:  # the values that a file leaves out are written here
            raise Refused(Code.SPEC_VALUE, f"the run's spec has over {2 * _RUN_FILE_BYTES_MAX} characters")
        try:
            return cls.model_validate_json(text)
        except (ValidationError, RecursionError) as error:
            raise _refusal(error, "the run's spec", "") from None


def cosine_share(done: float, end: float) -> float:
    """From 1 to `end` while `done` goes from 0 to 1 (Loshchilov and Hutter, arXiv 1608.03983, equation 5)."""
    return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2


def load(path: Path) -> RunSpec:
    """The run file at this path, checked."""
    try:
        with path.open("rb") as file:
            data = file.read(_RUN_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise Refused(Code.RUN_MISSING, f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _RUN_FILE_BYTES_MAX:
        raise Refused(Code.SPEC_SYNTAX, f"{path} is over {_RUN_FILE_BYTES_MAX} bytes, so it is not a run file")
    try:
        text = data.decode("utf-8-sig")  # Windows editors put a byte order mark first
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise Refused(Code.SPEC_SYNTAX, f"{path}:{line}:{column}: not UTF-8") from None
    return parse(text, source=str(path))


def parse(text: str, *, source: str = "run.toml") -> RunSpec:
    """The run file in this text. `source` is what its errors call it."""
    try:
        tree = tomllib.loads(text)
        for path, value in _leaves(tree):
            if isinstance(value, datetime | date | time):
                raise Refused(Code.SPEC_VALUE, f"{_place(source, text, path)}{_name(path)}: a date fits nowhere here")
            if isinstance(value, int) and value.bit_length() > _INTEGER_BITS_MAX:  # in hex, of any length
                what = f"{_name(path)}: a number of {value.bit_length()} bits fits nowhere here"
                raise Refused(Code.SPEC_VALUE, f"{_place(source, text, path)}{what}")
    except (ValueError, RecursionError) as error:
        raise _syntax(error, source, text) from None
    try:
        return RunSpec.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise _refusal(error, source, text) from None


def template(name: str) -> str:
    """A run file to begin with. It says what happens when nothing is changed."""
    return _TEMPLATE.replace("NAME", name)


def _rule(text: str, *path: str | int) -> PydanticCustomError:
    return PydanticCustomError("rule", "{text}", {"text": text, "path": path})


def _leaves(value: object, path: KeyPath = ()) -> Iterator[tuple[KeyPath, object]]:
    if len(path) > _DEPTH_MAX:
        raise RecursionError
    match value:
        case Mapping():
            for key, inner in value.items():
                yield from _leaves(inner, (*path, key))
        case list() | tuple():
            for index, inner in enumerate(value):
                yield from _leaves(inner, (*path, index))
        case _:
            yield path, value


def _syntax(error: Exception, source: str, text: str) -> Refused:
    if isinstance(error, RecursionError):
        return Refused(Code.SPEC_SYNTAX, f"{source}: tables or arrays are nested over {_DEPTH_MAX} deep")
    message = str(error)
    lines = text.split("\n")
    found = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    line, column = (int(found[1]), int(found[2])) if found else (len(lines), len(lines[-1]) + 1)
    what = message.partition(" (at ")[0]
    if what == "Cannot overwrite a value":
        what, column = "this key was given before", 1
    return Refused(Code.SPEC_SYNTAX, shown(f"{source}:{line}:{column}: {what}"))


def _refusal(error: ValidationError | RecursionError, source: str, text: str) -> Refused:
    if isinstance(error, RecursionError):
        return Refused(Code.SPEC_VALUE, f"{source}: tables or arrays are nested over {_DEPTH_MAX} deep")
    details = error.errors(include_url=False)
    detail = min(details, key=lambda detail: detail["type"] != "extra_forbidden")  # a misspelt key explains the rest
    path: KeyPath = (*detail["loc"], *detail.get("ctx", {}).get("path", ()))
    code = Code.SPEC_UNKNOWN_KEY if detail["type"] == "extra_forbidden" else Code.SPEC_VALUE
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return Refused(code, f"{_place(source, text, path)}{_name(path)}{_complaint(detail, path)}{more}")


def _complaint(detail: ErrorDetails, path: KeyPath) -> str:
    match detail["type"]:
        case "extra_forbidden":
            nearest = _nearest(path)
            return f" is not a key of a run file{f'; did you mean {nearest}?' if nearest else ''}"
        case "missing":
            return " is missing"
        case "rule":
            return f": {detail['msg']}"
    return f" = {shown(json.dumps(detail['input'], default=repr, ensure_ascii=False))}, wanted {_wanted(detail, path)}"


def _wanted(detail: ErrorDetails, path: KeyPath) -> str:
    context = detail.get("ctx", {})
    match detail["type"]:
        case "too_short":
            return f"at least {context['min_length']} of them"
        case "too_long" | "string_too_long":
            return f"at most {context['max_length']} of them"
        case "model_type" | "dict_type":
            return "a section of keys"
    return _range(path) or detail["msg"].removeprefix("Input should be ")


def _nearest(path: KeyPath) -> str:
    """The key or section that was probably meant: the same word elsewhere, then one like it here, then anywhere."""
    unknown, sections = str(path[-1]), list(RunSpec.model_fields)
    if len(path) == 1 and (close := difflib.get_close_matches(unknown, sections, 1)):
        return f"[{close[0]}]"
    own = [str(path[0])] if len(path) > 1 else []
    for likeness, names in ((1.0, sections), (0.6, own), (0.6, sections)):
        for section in names:
            if close := difflib.get_close_matches(unknown, _keys(section), 1, likeness):
                return f"[{section}] {close[0]}"
    return ""


def _keys(section: str) -> Mapping[str, FieldInfo]:
    field = RunSpec.model_fields.get(section)
    model = field.annotation if field else None
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else {}


def _range(path: KeyPath) -> str:
    """The bounds of a number, both of them, so that the second try succeeds."""
    key = _keys(str(path[0])).get(str(path[1])) if len(path) == 2 else None
    if key is None or key.annotation not in (int, float):
        return ""
    words = []
    for bound in key.metadata:
        match bound:
            case Ge(ge=low):
                words.append(f"at least {low}")
            case Gt(gt=low):
                words.append(f"more than {low}")
            case Le(le=high):
                words.append(f"at most {high}")
            case Lt(lt=high):
                words.append(f"less than {high}")
    return ("a whole number, " if key.annotation is int else "a number, ") + " and ".join(words)


def _name(path: KeyPath) -> str:
    if not path:
        return "the whole of it"
    section, *rest = path
    keys = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in rest).removeprefix(".")
    return shown(f"[{section}] {keys}" if rest else f"[{section}]")


_HEADER = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]")
_ASSIGNMENT = re.compile(r"(\s*)([A-Za-z0-9_\-.\"' ]+?)\s*=")


def _place(source: str, text: str, path: KeyPath) -> str:
    """file:line:column of the value's key, or of the nearest table that holds it."""
    best, line, column = 0, 0, 0
    table: tuple[str, ...] = ()
    wanted = tuple(step for step in path if isinstance(step, str))
    for number, content in enumerate(text.split("\n"), 1):
        here, start = table, 0
        if header := _HEADER.match(content):
            here = table = _dotted(header[1])
            start = header.start(1)
        elif assignment := _ASSIGNMENT.match(content):
            here = (*table, *_dotted(assignment[2]))
            start = len(assignment[1])
        if len(here) > best and here == wanted[: len(here)]:
            best, line, column = len(here), number, start + 1
    return f"{source}:{line}:{column}: " if line else f"{source}: "


def _dotted(key: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in key.split("."))


_TEMPLATE: Final = """\
# A run of Barnraise. Every value below is the default: delete a line and nothing changes.
# Check this file with: barnraise-coordinator check

[run]
name = "NAME"        # lower-case letters, digits and hyphens; nodes know the run by it
title = ""           # one line for volunteers: what is trained, and why
license = ""         # of the data and of the model that comes out
seed = 0             # of the first parameters and of the order of the data
min_nodes = 1        # training waits until so many have joined
rounds = 72          # the run ends after so many; 0 = endless

[model]
architecture = "llama"  # any causal language model of the transformers library, by its model_type

[model.config]          # keys of its Hugging Face config; vocabulary and context come from [data]
hidden_size = 128
intermediate_size = 344
num_hidden_layers = 4
num_attention_heads = 4

[data]               # the text itself is added with: barnraise-coordinator data add PATH
context = 256        # tokens in one sequence
heldout = 0.01       # share of the text that is never trained on, only measured with
tokenizer = "bytes"  # or the path of a tokenizer.json

[train]                    # what each node does by itself
optimizer = "muon"         # muon (matrices; the rest by AdamW) or adamw
learning_rate = 0.003      # of AdamW
muon_learning_rate = 0.02
muon_momentum = 0.95
betas = [0.9, 0.95]        # of AdamW
weight_decay = 0.01
warmup_steps = 20          # inner steps until the learning rate is whole
decay_to = 1.0             # rates fall to this share by the last round, on a half cosine; 1.0 = they stay
clip = 1.0                 # largest norm of a gradient
batch_sequences = 16       # sequences in one optimizer step, on any machine
precision = "auto"         # auto (bf16 where the machine has it), fp32 or bf16

[rounds]
# Nodes exchange what they learned once per round. Early rounds are short, late ones long:
# 25 rounds of 2 inner steps, 20 of 5, 15 of 10, then 25 for ever.
inner_steps = [[25, 2], [20, 5], [15, 10], [12, 25]]
upload_megabytes_per_hour = 0  # of one node, to its peers: rounds last longer if they need more; 0: no cap
seconds_max = 1800         # a slow node ends its round after so long, with the steps it has
gather_seconds = 15        # how long a majority waits for the others
deadline_seconds = 300     # an exchange that takes longer is tried again; more than gather_seconds

[update]
codec = "int4"             # how nodes pack their changes: fp16, int8, int4, or sparse2 (0.16 bits per parameter)
mean = "auto"              # how means of them are packed: auto (like codec; int4 for sparse2), fp16, int8, int4 or sparse2
robust = "clip"            # what spoils a mean: clip (lengths to their median), trimmed, centered; mean trusts everybody
outer = "average"          # average, or nesterov (then set outer_momentum, as in 0.9)
outer_learning_rate = 1.0  # 2.0 suits sparse2 with muon
outer_momentum = 0.0
residual_decay = 1.0       # how much of what a codec left out is kept for the next round; 0.95 suits sparse2
stale_rounds = 8           # a node whose work missed more rounds in a row drops it; until then it halves

[evaluate]
every_rounds = 1           # measure on held-out text
sequences = 64
prompt = ""                # what the samples on the page begin with; empty = the start of a document
base_every_rounds = 50     # archive the whole model, so that late joiners start there

[watch]
# The run goes back to its last good measurement when the held-out loss is not a number, or has jumped.
rollback = true            # false: only warn
jump = 0.5                 # nats above the lowest of the last 16 measurements
evaluations = 3            # so many in a row are a jump
most = 3                   # so often back to the same round; then it only warns

[audit]
share = 0.2                # about so much of what nodes bring, and of their means, is asked for again; 0: only the unreadable

[leases]
sequences = 2048           # most data handed to a node at a time
seconds = 120              # a node that is silent for so long loses it; at least 3 heartbeats
hours_ahead = 4.0          # how long nodes have data when the coordinator is away

[coordinator]
listen = "0.0.0.0:49300"   # nodes connect here; [::] in place of 0.0.0.0, here and in p2p: over IPv6 as well
http = "127.0.0.1:49301"   # the page for your browser
p2p = "0.0.0.0:49302"      # where nodes find each other
addresses = []             # what invites name, as in ["train.example.org:49300"]; empty = listen
heartbeat_seconds = 10
"""
