"""State and fold: the same bits everywhere, all or nothing, and base checkpoints that refuse hostile headers."""

import json
import struct
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from protocol import blobs
from protocol.blobs import digest_of
from protocol.codec import NAMES, codec
from protocol.errors import Code, Refused
from protocol.exchange import Packing
from protocol.fold import Outer, OuterKind, fold
from protocol.limits import CHUNK_VALUES as CHUNK
from protocol.state import Consumed, State, initial_state, read_base, write_base
from protocol.types import Contribution, DataRange, Part, Record

P = 3 * CHUNK + 100
SHARD = "ab" * 32
AVERAGE = Outer(OuterKind.AVERAGE, 0.7)
NESTEROV = Outer(OuterKind.NESTEROV, 0.7, 0.9)
INT4 = Packing(codec("int4"), codec("int4"))


def vector(seed, scale=1e-3, size=P):
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def update(means, chosen, *, round_number=0, data=(0, 10), cuts=(0, 2 * CHUNK, P), leave_out=()):
    """A record over the mean cut in parts, and the parts' bytes."""
    parts, listed = {}, []
    for index, (start, stop) in enumerate(pairwise(cuts)):
        if index in leave_out:
            continue
        parts[index] = chosen.encode(means[start:stop])
        listed.append(Part(index, start, stop, digest_of(parts[index]), len(parts[index]), "n0", ("n0", "n1")))
    contributions = (
        Contribution("n0", 100, (DataRange(0, SHARD, *data),)),
        Contribution("n1", 100, (DataRange(1, SHARD, *data),)),
    )
    return Record("run", round_number, "0" * 64, 0, "n0", contributions, tuple(listed), "0" * 64), parts


def first_part(record, **fields):
    """The record with its first part changed."""
    return replace(record, parts=(replace(record.parts[0], **fields), *record.parts[1:]))


def copy(state):
    momentum = None if state.momentum is None else state.momentum.copy()
    return State(state.round, state.params.copy(), momentum, state.consumed)


def same(one, other):
    return one.digest() == other.digest() and one.round == other.round and one.consumed == other.consumed


@pytest.mark.parametrize("name", NAMES)
def test_average_moves_against_the_decoded_mean_in_float32(name):
    params, mean, chosen = vector(0, 1), vector(1), codec(name)
    state = initial_state(params.copy(), momentum=False)
    record, parts = update(mean, chosen)
    fold(state, record, parts, Packing(chosen, chosen), AVERAGE)
    decoded = chosen.decode(chosen.encode(mean), P)
    assert state.params.tobytes() == (params - np.float32(0.7) * decoded).tobytes()
    assert state.round == 1


def test_nesterov_is_the_sgd_of_torch():
    params, chosen = vector(0, 1), codec("fp16")
    state = initial_state(params.copy(), momentum=True)
    theirs = torch.nn.Parameter(torch.from_numpy(params.copy()))
    optimizer = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    for round_number in range(4):
        mean = vector(10 + round_number)
        record, parts = update(mean, chosen, round_number=round_number, data=(round_number, round_number + 1))
        fold(state, record, parts, Packing(chosen, chosen), NESTEROV)
        theirs.grad = torch.from_numpy(chosen.decode(chosen.encode(mean), P))
        optimizer.step()
    np.testing.assert_allclose(state.params, theirs.detach().numpy(), rtol=0, atol=1e-6)
    assert np.abs(state.params - params).max() > 1e-3


def test_the_bits_are_those_of_this_recipe():
    """A digest computed once; another machine, numpy or compiler that rounds otherwise fails here."""
    ramp = np.arange(P, dtype=np.float32)
    state = initial_state(ramp / np.float32(7777), momentum=True)
    for round_number in range(3):
        mean = (ramp % np.float32(1013) - np.float32(500)) / np.float32(3e5 * (round_number + 1))
        record, parts = update(mean, codec("int4"), round_number=round_number, data=(round_number, round_number + 1))
        fold(state, record, parts, INT4, NESTEROV)
    assert state.digest() == "7abf0e30d759cafedcfb546d7c129d2244d717e6c0d581cc16f6c3bf4c8bf683"


def test_how_the_mean_is_cut_into_parts_does_not_change_the_bits():
    mean = vector(1)
    digests = set()
    for cuts in ((0, P), (0, CHUNK, P), (0, CHUNK, 2 * CHUNK, 3 * CHUNK, P)):
        state = initial_state(vector(0, 1), momentum=True)
        record, parts = update(mean, codec("int4"), cuts=cuts)
        fold(state, record, parts, INT4, NESTEROV)
        digests.add(state.digest())
    assert len(digests) == 1


@pytest.mark.parametrize("outer", [AVERAGE, NESTEROV])
def test_where_a_part_is_missing_neither_parameters_nor_momentum_change(outer):
    state = initial_state(vector(0, 1), momentum=outer.keeps_momentum)
    record, parts = update(vector(1), codec("int4"))
    fold(state, record, parts, INT4, outer)
    before = copy(state)
    record, parts = update(vector(2), codec("int4"), round_number=1, data=(10, 11), leave_out=(0,))
    fold(state, record, parts, INT4, outer)
    missing, present = slice(0, 2 * CHUNK), slice(2 * CHUNK, P)
    assert state.params[missing].tobytes() == before.params[missing].tobytes()
    assert (state.params[present] != before.params[present]).mean() > 0.5
    if outer.keeps_momentum:
        assert state.momentum[missing].tobytes() == before.momentum[missing].tobytes()
        assert (state.momentum[present] != before.momentum[present]).mean() > 0.5


def test_fold_consumes_the_data_of_every_contribution():
    state = initial_state(vector(0), momentum=False)
    record, parts = update(vector(1), codec("int4"), data=(5, 9))
    fold(state, record, parts, INT4, AVERAGE)
    assert state.consumed == Consumed().with_ranges((DataRange(0, SHARD, 5, 9), DataRange(1, SHARD, 5, 9)))
    record, parts = update(vector(1), codec("int4"), round_number=1, data=(8, 12))
    with pytest.raises(Refused, match="counts twice"):
        fold(state, record, parts, INT4, AVERAGE)


def bad_updates():
    chosen = codec("int4")
    record, parts = update(vector(1), chosen)
    first_scale = np.float16(np.nan).tobytes() + parts[1][2:]
    yield "part missing", record, {0: parts[0]}
    yield "part short", record, {**parts, 1: parts[1][:-1]}
    yield "part long", record, {**parts, 1: parts[1] + b"\0"}
    yield "part empty", record, {**parts, 1: b""}
    yield "scale not finite in the last part", record, {**parts, 1: first_scale}
    yield "size that lies", first_part(record, size=record.parts[0].size + 1), parts
    yield "span off the chunks", first_part(record, stop=CHUNK + 1), parts
    yield "span past the end", first_part(record, start=0, stop=4 * CHUNK), parts
    yield "span reversed", first_part(record, start=2 * CHUNK, stop=CHUNK), parts
    yield "spans that overlap", first_part(record, stop=3 * CHUNK, size=chosen.encoded_bytes(3 * CHUNK)), parts
    yield "index twice", first_part(record, index=1), parts
    later, later_parts = update(vector(1), chosen, round_number=1)
    yield "record of another round", later, later_parts


@pytest.mark.parametrize(("what", "record", "parts"), [pytest.param(*each, id=each[0]) for each in bad_updates()])
def test_a_bad_update_is_refused_and_changes_nothing(what, record, parts):
    state = initial_state(vector(0), momentum=True)
    before = copy(state)
    with pytest.raises(Refused) as refused:
        fold(state, record, parts, INT4, NESTEROV)
    assert refused.value.reason in (Code.UPDATE_BAD, Code.RECORD_BAD)
    assert same(state, before)


def test_every_part_of_the_state_is_in_its_digest():
    base = initial_state(vector(0), momentum=True)
    others = [copy(base) for _ in range(5)]
    others[0].round = 1
    others[1].params[-1] = np.nextafter(others[1].params[-1], np.float32(1))
    others[2].momentum[0] = -0.0
    others[3].consumed = others[3].consumed.with_ranges((DataRange(0, SHARD, 0, 1),))
    others[4].momentum = None
    assert len({state.digest() for state in (base, *others)}) == 6
    assert copy(base).digest() == base.digest()


ranges = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30), st.integers(1, 8)), max_size=12)


@given(ranges, st.randoms())
def test_consumed_is_a_set_however_it_grew(spans, luck):
    spans = [DataRange(shard, SHARD, start, start + length) for shard, start, length in spans]
    one = Consumed().with_ranges(spans)
    luck.shuffle(spans)
    other = Consumed()
    for span in spans:
        other = other.with_ranges((span,))
    assert one == other and one.digest == other.digest
    points = {(span.pass_number, point) for span in spans for point in range(span.start, span.stop)}
    for shard in (0, 1, 2):
        for start in range(40):
            for length in (1, 3):
                hit = any((shard, point) in points for point in range(start, start + length))
                assert one.overlaps(DataRange(shard, SHARD, start, start + length)) == hit
    if one != Consumed():
        assert one.digest != Consumed().digest


def advanced(momentum):
    state = initial_state(vector(0, 1), momentum=momentum)
    record, parts = update(vector(1), codec("int4"))
    fold(state, record, parts, INT4, NESTEROV if momentum else AVERAGE)
    return state


@pytest.mark.parametrize("momentum", [False, True])
def test_a_base_checkpoint_gives_the_same_state_and_is_a_safetensors_file(tmp_path, momentum):
    state = advanced(momentum)
    digest = write_base(tmp_path / "base", state)
    again = read_base(tmp_path / "base", parameters=P, momentum=momentum, digest=digest)
    assert same(state, again)
    tensors = load_file(tmp_path / "base")
    assert tensors.keys() == ({"params", "momentum"} if momentum else {"params"})
    assert tensors["params"].tobytes() == state.params.tobytes()


def test_a_base_checkpoint_of_another_state_or_shape_is_refused(tmp_path):
    digest = write_base(tmp_path / "base", advanced(True))
    for options, code in (
        ({"parameters": P - 1}, Code.CHECKPOINT_BAD),
        ({"parameters": 10**12}, Code.CHECKPOINT_BAD),
        ({"momentum": False}, Code.CHECKPOINT_BAD),
        ({"digest": "0" * 64}, Code.STATE_MISMATCH),
    ):
        with pytest.raises(Refused) as refused:
            read_base(tmp_path / "base", **{"parameters": P, "momentum": True, "digest": digest} | options)
        assert refused.value.reason is code


N = 4


def small_base(tmp_path):
    path = tmp_path / "base"
    state = State(3, np.arange(N, dtype=np.float32), np.ones(N, np.float32), Consumed())
    digest = write_base(path, state)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return path, digest, json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit(header, *keys, to):
    *steps, last = keys
    target = header
    for step in steps:
        target = target[step]
    if to is None:
        del target[last]
    else:
        target[last] = to


@pytest.mark.parametrize(
    ("keys", "to"),
    [
        (("params", "dtype"), "F64"),
        (("params", "dtype"), "f32"),
        (("params", "dtype"), None),
        (("params", "shape"), [2**32, 2**32]),
        (("params", "shape"), [-N]),
        (("params", "shape"), []),
        (("params", "shape"), [1] * 65),
        (("params", "shape"), [N + 1]),
        (("params", "data_offsets"), [4, 20]),
        (("params", "data_offsets"), [16, 0]),
        (("params", "data_offsets"), [0, 15]),
        (("momentum", "data_offsets"), [0, 16]),
        (("momentum", "data_offsets"), [17, 33]),
        (("momentum", "data_offsets"), [16, 2**63]),
        (("momentum",), None),
        (("extra",), {"dtype": "F32", "shape": [0], "data_offsets": [32, 32]}),
        (("params",), [1]),
        (("__metadata__",), None),
        (("__metadata__",), "text"),
        (("__metadata__", "round"), "-1"),
        (("__metadata__", "round"), "9" * 400),
        (("__metadata__", "round"), 3),
        (("__metadata__", "format"), "other"),
        (("__metadata__", "more"), "x"),
        (("__metadata__", "consumed"), '{"shards":[{"bounds":[2,1],"pass_number":0,"shard":"a"}]}'),
        (("__metadata__", "consumed"), '{"shards":[{"bounds":[1],"pass_number":0,"shard":"a"}]}'),
        (("__metadata__", "consumed"), "{}"),
        (("__metadata__", "consumed"), "\ud800"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path, keys, to):
    path, digest, header, data = small_base(tmp_path)
    read_base(path, parameters=N, momentum=True, digest=digest)
    edit(header, *keys, to=to)
    with_header(path, header, data)
    with pytest.raises(Refused) as refused:
        read_base(path, parameters=N, momentum=True, digest=digest)
    assert refused.value.reason in (Code.CHECKPOINT_BAD, Code.FIELD)


def test_what_is_not_a_header_is_refused(tmp_path):
    path, digest, header, data = small_base(tmp_path)
    text = json.dumps(header).encode()
    for bad in (
        b"\xff" + text,
        text[:-1],
        text + b"x",
        b'{"params":1,' + text[1:],  # a key twice
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
        b"[]",
        b"",
    ):
        with_header(path, bad, data)
        with pytest.raises(Refused):
            read_base(path, parameters=N, momentum=True, digest=digest)
    for raw in (b"", b"\x80\x04abc", b"PK\x03\x04" + bytes(100), struct.pack("<Q", 2**63) + text, b"\xff" * 8 + text):
        path.write_bytes(raw)
        with pytest.raises(Refused):
            read_base(path, parameters=N, momentum=True, digest=digest)


def test_trailing_or_missing_bytes_are_refused(tmp_path):
    path, digest, header, data = small_base(tmp_path)
    for bad in (data + b"\0", data[:-1], b""):
        with_header(path, header, bad)
        with pytest.raises(Refused, match="expected"):
            read_base(path, parameters=N, momentum=True, digest=digest)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
@pytest.mark.parametrize("place", [0, 5])
def test_a_checkpoint_with_a_value_beyond_the_limit_is_refused(tmp_path, value, place):
    path = tmp_path / "base"
    values = np.ones(2 * N, np.float32)
    values[place] = value
    digest = write_base(path, State(0, values[:N].copy(), values[N:].copy()))
    with pytest.raises(Refused, match="NaN or a value beyond"):
        read_base(path, parameters=N, momentum=True, digest=digest)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, digest, _, _ = small_base(tmp_path)
    monkeypatch.setattr(blobs.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "ENOSPC")))
    with pytest.raises(Refused, match="no room to write"):
        write_base(path, State(4, np.zeros(N, np.float32), np.zeros(N, np.float32)))
    read_base(path, parameters=N, momentum=True, digest=digest)
    assert [each.name for each in tmp_path.iterdir()] == ["base"]
