"""Every bound on what crosses a wire or a disk, each with its reason."""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 1  # raised when an older program could misread a newer one
CHUNK_VALUES: Final = 65536  # values encoded together: 35 kB of int4, one write of a socket
CONTROL_BYTES_MAX: Final = 4 << 20  # a gRPC control message; rosters of 10^4 nodes fit
PEER_MESSAGE_BYTES_MAX: Final = 2 << 20  # a Begin of 64 members with 40 leases each is under 1.2 MB
BLOB_CHUNK_BYTES: Final = 1 << 18  # streamed and hashed piece of a blob: 256 KiB
BLOB_BYTES_MAX: Final = 1 << 40  # 1 TiB: more than any shard or checkpoint we would serve
MEMBERS_MAX: Final = 64  # one cell; larger swarms merge cells
PARAMETERS_MAX: Final = 10**12  # sizes are multiplied with this before anything is allocated
CONTEXT_MAX: Final = 1 << 24  # the longest published contexts are 10^7
VOCABULARY_MAX: Final = 1 << 24  # the largest published vocabularies are 10^6
TOKEN_BYTES: Final = (2, 4)  # what a token may take in a shard
RANGES_MAX: Final = 256  # data ranges in one contribution
ROLLBACKS_MAX: Final = 256  # in the life of a run: all of them fit into one message
ROSTERS_RECALLED_MAX: Final = 16  # in one message: each takes a coordinator 5 ms to check
LOG_ROSTERS_MAX: Final = 128  # in a peer's answer: the newest 64, two of each of 16 entries, those of the open round
REASON_CHARACTERS_MAX: Final = 200  # why a rollback was ordered, on one line of a terminal or two
NAME_CHARACTERS_MAX: Final = 40  # what a status line can show
ADDRESSES_MAX: Final = 8  # addresses one peer or invite may name
DISK_FREE_BYTES_MIN: Final = 1 << 30  # room that a blob store leaves to the machine's other programs
BASE_HEADER_BYTES_MAX: Final = 16 << 20  # of a base checkpoint: a million intervals of consumed data fit
VALUE_ABS_MAX: Final = 1e18  # of a parameter or its momentum: its square is still a finite float32
NUMBER_MAX: Final = 1 << 53  # of what counts up in a message: exact in every language that reads our JSON
INCARNATION_BYTES: Final = 16  # random, so that no two processes share one
