"""The bits on which all of a swarm must agree, as digests by name: `python -m tests.bits` prints the same on every machine."""

import hashlib
import json

import numpy as np

from protocol.blobs import digest_of
from protocol.codec import NAMES, codec
from protocol.exchange import Packing
from protocol.fold import Outer, OuterKind, fold
from protocol.limits import CHUNK_VALUES
from protocol.robust import Rule, means
from protocol.state import initial_state
from protocol.types import Contribution, DataRange, Part, Record

VALUES = CHUNK_VALUES + 4096 + 777  # a chunk, a block of sparse2, and odd tails
MEMBERS = 7


def vector(seed):
    """Of all magnitudes down to what float32 hardly holds, made of whole numbers: no library's logarithm is in it."""
    luck = np.random.default_rng(seed)
    signed = luck.integers(-(1 << 24), 1 << 24, VALUES).astype(np.float32)
    return np.ldexp(signed, luck.integers(-40, -24, VALUES).astype(np.int32)).astype(np.float32)


def digests():
    vectors = [vector(seed) for seed in range(MEMBERS)]
    tokens = [1000 + 337 * member for member in range(MEMBERS)]
    for name in NAMES:
        how = codec(name)
        encoded = [how.encode(each) for each in vectors]
        yield f"{name} encoded", b"".join(encoded)
        yield f"{name} decoded", b"".join(how.decode(each, VALUES).tobytes() for each in encoded)
        yield f"{name} lengths", repr([how.squares(each, VALUES) for each in encoded]).encode()
        for rule in Rule:
            mean = np.concatenate([piece.copy() for _, piece in means(rule, how, encoded, tokens, VALUES)])
            yield f"{name} {rule.value}", mean.tobytes()
            yield f"{name} {rule.value}, encoded", how.encode(mean)
        for kind in OuterKind:
            yield f"{name} {kind.value} folded", folded(how, kind, encoded)


def folded(how, kind, encoded):
    """The state after a round for each contribution, as if it were the mean."""
    outer = Outer(kind, 0.7, 0.9 if kind is OuterKind.NESTEROV else 0.0)
    state = initial_state(vector(99), momentum=outer.keeps_momentum)
    for number, payload in enumerate(encoded):
        part = Part(0, 0, VALUES, digest_of(payload), len(payload), "n0", ("n0", "n1"))
        data = (DataRange(0, "ab" * 32, number, number + 1),)
        contributions = (Contribution("n0", 100, data), Contribution("n1", 100, ()))
        record = Record("run", number, "0" * 64, 0, "n0", contributions, (part,), "0" * 64)
        fold(state, record, {0: payload}, Packing(how, how), outer)
    return state.digest().encode()


if __name__ == "__main__":
    print(json.dumps({name: hashlib.sha256(data).hexdigest()[:16] for name, data in digests()}, indent=1))
