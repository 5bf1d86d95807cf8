"""The store: real SQLite files, second connections, and a process that is killed."""

import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from coordinator.core import leases as data
from coordinator.core.leases import Leases
from coordinator.core.strikes import By, Kind, Mark
from coordinator.store import EVENTS_KEPT, SCHEMA, Evaluation, Order, OrderState, Store, StoredNode, backup_of
from protocol import identity
from protocol.errors import Code, Refused
from protocol.identity import Key, peer_id_of
from protocol.log import head_after, next_head, record_hash
from protocol.types import (
    Ballot,
    BaseCheckpoint,
    BlobRef,
    Certificate,
    Contribution,
    DataRange,
    Fault,
    Head,
    LogEntry,
    Member,
    Part,
    Pass,
    Record,
    Rollback,
    Roster,
    Shard,
)

OWNER = Key.generate()
RUN = identity.run_id(OWNER.public, "test")
SHARDS = (Shard("aa" * 32, 4096, 2048, 128), Shard("bb" * 32, 2048, 1024, 64))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "coordinator.db"


@pytest.fixture
def store(path):
    store = Store(path)
    yield store
    store.close()


def admitted(key=None, *, peer=None, name="quiet-otter", invite=None):
    key = key or Key.generate()
    peer = peer or peer_id_of(Key.generate().public_bytes)
    signed = identity.sign_pass(OWNER, Pass(RUN, key.public, peer, name, 5, 1000))
    return StoredNode(key.public, peer, name, invite, signed, 5)


def entry(number, node="cc" * 32, *, previous="00" * 32, tokens=320):
    used = DataRange(0, "aa" * 32, number * 10, number * 10 + 10)
    part = Part(0, 0, 64, f"{number:064x}", 36, node, (node,))
    record = Record(RUN, number, previous, 0, node, (Contribution(node, tokens, (used,)),), (part,), "11" * 32)
    return LogEntry(record, Certificate(record_hash(record), Ballot(0, 0), ()))


def rollback(number, to, undone):
    return identity.sign_rollback(OWNER, Rollback(RUN, number, to, undone, "the loss rose", 9))


def grown(store, rounds, previous="00" * 32):
    """So many records on the line; the heads after each, the first before them."""
    heads = [Head(store.entry_count, previous)]
    for _ in range(rounds):
        new = entry(heads[-1].round, previous=heads[-1].hash)
        store.append_entry(new, {})
        heads.append(next_head(new.record))
    return heads


def refused(act, *arguments, **options):
    with pytest.raises(Refused) as caught:
        act(*arguments, **options)
    return caught.value.reason


def test_everything_survives_closing_and_opening_again(path):
    store = Store(path)
    node = admitted()
    roster = identity.sign_roster(OWNER, Roster(RUN, 0, (Member(node.node, node.peer, (), 1000),), 7))
    base = BaseCheckpoint(0, "00" * 32, "11" * 32, BlobRef("22" * 32, 99))
    leases, _ = data.grant(Leases(SHARDS), node.node, sequences=50, largest=20, until_ms=9)
    leases = data.give_back(leases, ["1"])
    store.set("manifest", b"signed")
    store.save_node(node)
    store.save_roster(roster)
    store.append_entry(entry(0), {})
    store.save_shards(SHARDS, Shard("dd" * 32, 64, 32, 2))
    store.save_leases(leases)
    store.save_base(base)
    store.save_evaluation(Evaluation(0, 320, 5.5, None, 12, 3, 4096))
    store.say(12, "it began")
    store.close()

    again = Store(path)
    assert again.get("manifest") == b"signed"
    assert again.get("nothing") is None
    assert again.node(node.node) == node
    assert again.nodes() == (node,)
    assert again.rosters() == (roster,)
    assert again.entries() == (entry(0),)
    assert again.has_part("0" * 64)
    assert not again.has_part("1" * 64)
    assert again.shards() == SHARDS
    assert again.heldout() == Shard("dd" * 32, 64, 32, 2)
    assert again.load_leases(SHARDS) == leases
    assert again.newest_base() == base
    assert again.history() == (Evaluation(0, 320, 5.5, None, 12, 3, 4096),)
    assert again.recent(9) == ((12, "it began"),)
    again.close()


def test_leases_that_were_taken_back_are_gone_from_the_store_too(store):
    leases, granted = data.grant(Leases(SHARDS), "cc" * 32, sequences=40, largest=20, until_ms=9)
    store.save_leases(leases)
    leases = data.consume(leases, [granted[0].range])
    store.save_leases(leases)
    assert store.load_leases(SHARDS) == leases
    assert len(store.load_leases(SHARDS).held) == 1


def test_a_fresh_store_has_granted_nothing(store):
    assert store.load_leases(SHARDS) == Leases(SHARDS)
    assert store.entry_count == 0
    assert store.newest_base() is None
    assert store.heldout() is None


def test_a_record_and_its_credit_are_written_together_or_not_at_all(store, monkeypatch):
    node = admitted()
    store.save_node(node)
    store.append_entry(entry(0), {node.node: 320})
    with pytest.raises(OverflowError):  # SQLite holds 63 bits: the last statement of the transaction fails
        store.append_entry(entry(1), {node.node: 1 << 70})
    assert store.entry_count == 1
    assert not store.has_part(f"{1:064x}")
    assert store.node(node.node).credit_tokens == 320
    store.append_entry(entry(1), {node.node: 80, "ee" * 32: 7})
    assert store.node(node.node).credit_tokens == 400


def test_a_record_that_is_not_the_next_is_a_bug(store):
    store.append_entry(entry(0), {})
    for number in (0, 2):
        with pytest.raises(AssertionError):
            store.append_entry(entry(number), {})
    assert store.entries() == (entry(0),)


def test_entries_are_read_in_pages(store):
    for number in range(5):
        store.append_entry(entry(number), {})
    assert [e.record.round for e in store.entries(1, 3)] == [1, 2, 3]
    assert store.entries(5) == ()


def test_a_record_its_credit_and_the_leases_are_written_together_or_not_at_all(store):
    node = admitted()
    store.save_node(node)
    before, granted = data.grant(Leases(SHARDS), node.node, sequences=20, largest=10, until_ms=9)
    after = data.consume(before, [granted[0].range])
    store.save_leases(before)
    with pytest.raises(OverflowError):
        store.append_entry(entry(0), {node.node: 1 << 70}, after)
    assert store.load_leases(SHARDS) == before
    store.append_entry(entry(0), {node.node: 320}, after)
    assert (store.entry_count, store.load_leases(SHARDS)) == (1, after)


# rollbacks


def test_a_rollback_takes_the_line_back_and_keeps_what_it_undid_beside_it(path):
    store = Store(path)
    node = admitted()
    store.save_node(node)
    heads = grown(store, 3)
    store.append_entry(last := entry(3, previous=heads[3].hash), {node.node: 320})
    for number in range(5):
        store.save_evaluation(Evaluation(number, 320 * number, 5.0 + number, None, 12, 3, 4096))
        store.save_base(BaseCheckpoint(number, heads[min(number, 3)].hash, "11" * 32, BlobRef("22" * 32, 99)))
    leases, _ = data.grant(Leases(SHARDS), node.node, sequences=50, largest=20, until_ms=9)
    undone = store.entries(2)
    first = rollback(1, heads[2], next_head(last.record))
    store.save_rollback(first, leases)
    store.close()

    store = Store(path)
    assert store.rollbacks() == (first,)
    assert [each.record.round for each in store.entries()] == [0, 1]
    assert store.entry_count == 2
    assert store.undone() == ((1, undone[0]), (1, undone[1]))
    assert store.has_part(f"{3:064x}"), "an undone branch stays fetchable"
    assert store.node(node.node).credit_tokens == 320, "a rollback punishes nobody"
    assert [each.round for each in store.history()] == [0, 1, 2], "the state before round 2 stays as it was"
    assert [each.round for each in store.bases()] == [0, 1, 2]
    assert store.newest_base().round == 2
    assert store.load_leases(SHARDS) == leases
    store.close()


def test_the_line_goes_on_from_where_a_rollback_took_it(store):
    heads = grown(store, 4)
    first = rollback(1, heads[2], heads[4])
    store.save_rollback(first, Leases(SHARDS))
    again = entry(2, previous=head_after(first.rollback).hash)
    store.append_entry(again, {})
    store.save_evaluation(Evaluation(3, 7, 1.5, None, 12, 3, 4096))
    assert store.entries(2) == (again,)
    assert [(each.round, each.heldout) for each in store.history()] == [(3, 1.5)]
    second = rollback(2, heads[1], next_head(again.record))
    store.save_rollback(second, Leases(SHARDS))
    assert [(number, each.record.round) for number, each in store.undone()] == [(1, 2), (1, 3), (2, 1), (2, 2)]
    assert (store.rollbacks(), store.entry_count) == ((first, second), 1)


def test_a_round_has_one_record_on_the_line_whatever_writes_it(store, path):
    grown(store, 1)
    with sqlite3.connect(path) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute("INSERT INTO entries (round, hash, bytes) VALUES (0, 'another', x'00')")
    connection.close()


def test_a_rollback_out_of_turn_or_to_another_line_is_a_bug(store):
    heads = grown(store, 2)
    for wrong in (rollback(2, heads[1], heads[2]), rollback(1, Head(1, "ab" * 32), heads[2])):
        with pytest.raises(AssertionError):
            store.save_rollback(wrong, Leases(SHARDS))
    assert (store.rollbacks(), store.entry_count) == ((), 2)


def test_rollbacks_that_a_restored_database_never_followed_are_kept_with_the_one_it_follows(store):
    heads = grown(store, 3)
    forgotten = rollback(1, Head(9, "ab" * 32), Head(12, "cd" * 32))
    followed = rollback(2, heads[2], Head(10, "ef" * 32))
    store.save_rollback(followed, Leases(SHARDS), [forgotten])
    assert store.rollbacks() == (forgotten, followed)
    assert (store.entry_count, [number for number, _ in store.undone()]) == (2, [2])


def test_a_checkpoint_of_a_state_undone_while_it_was_written_is_not_kept(store):
    heads = grown(store, 4)
    store.save_rollback(rollback(1, heads[2], heads[4]), Leases(SHARDS))
    for number, branch in ((4, 0), (3, 0), (2, 0), (3, 1)):
        store.save_base(BaseCheckpoint(number, "00" * 32, "11" * 32, BlobRef("22" * 32, 99), branch))
    assert [(each.round, each.branch) for each in store.bases()] == [(2, 0), (3, 1)]
    store.drop_base(3)
    assert store.newest_base().round == 2


# lives and orders


def test_a_life_that_does_not_grow_is_a_disk_that_was_put_back(path):
    store = Store(path)
    node, other = admitted(), admitted()
    store.save_node(node)
    store.save_node(other)
    assert store.begin_life(node.node, 1, 4, b"first start") == (1, None)
    assert store.begin_life(node.node, 7, 5, b"second start") == (7, None)
    assert store.begin_life(node.node, 7, 5, b"second start") == (7, None), "only its connection was lost"
    assert store.silent() == {}
    assert store.begin_life(node.node, 7, 6, b"a clone") == (8, 6)
    assert store.begin_life(node.node, 8, 8, b"a clone") == (8, 6)
    assert store.begin_life(node.node, 2, 9, b"a backup") == (9, 9)
    assert store.begin_life(node.node, 10, 11, b"goes on") == (10, 9), "silent as before"
    assert store.begin_life(other.node, 0, 3, b"an old program") == (1, 3)
    store.close()
    store = Store(path)
    assert store.silent() == {node.node: 9, other.node: 3}
    assert refused(store.begin_life, "ff" * 32, 1, 1, b"") is Code.NOT_ADMITTED
    assert store.begin_life(node.node, 10, 12, b"another") == (11, 12)
    store.close()


def test_a_command_and_the_coordinator_speak_through_orders(store, path):
    command = Store(path)
    first = command.add_order("rollback", b"to 5")
    second = command.add_order("rollback", b"to 7")
    assert [(each.order_id, each.body) for each in store.open_orders()] == [(first, b"to 5"), (second, b"to 7")]
    store.close_order(first, answer="rolled back", done=True)
    store.close_order(second, answer="there is no round 7", done=False)
    assert store.open_orders() == ()
    assert command.order(first) == Order(first, "rollback", b"to 5", OrderState.DONE, "rolled back")
    assert command.order(second).state == "refused"
    with pytest.raises(AssertionError):
        store.close_order(first, answer="again", done=True)
    command.close()


# invites and nodes


def test_an_invite_is_spent_as_often_as_it_says_and_once_per_node(store):
    store.add_invite("t1", uses=2, expires_ms=100, note="for friends")
    store.spend_invite("t1", "n1", 50)
    store.spend_invite("t1", "n1", 50)
    assert store.invites()[0].used == 1
    store.spend_invite("t1", "n2", 50)
    assert refused(store.spend_invite, "t1", "n3", 50) is Code.INVITE_USED
    store.spend_invite("t1", "n2", 500)  # it is in already, whatever the time
    assert refused(store.spend_invite, "t1", "n3", 100) is Code.INVITE_EXPIRED
    assert refused(store.spend_invite, "t2", "n1", 50) is Code.INVITE_UNKNOWN
    store.revoke_invite("t1")
    assert refused(store.spend_invite, "t1", "n3", 50) is Code.INVITE_UNKNOWN
    assert refused(store.revoke_invite, "t2") is Code.INVITE_UNKNOWN
    assert store.invites()[0].used == 2


def test_a_single_use_invite_raced_over_many_connections_admits_one(store, path):
    store.add_invite("t1", uses=1, expires_ms=100)
    outcomes, start = [], threading.Barrier(8)

    def race(number):
        other = Store(path)
        start.wait()
        try:
            other.spend_invite("t1", f"n{number}", 50)
            outcomes.append(None)
        except Refused as refusal:
            outcomes.append(refusal.reason)
        finally:
            other.close()

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=str) == [Code.INVITE_USED] * 7 + [None]


def test_one_peer_id_belongs_to_one_node_and_stays_with_it(store):
    node = admitted()
    store.save_node(node)
    assert refused(store.save_node, admitted(peer=node.peer)) is Code.IDENTITY_TAKEN
    other_peer = StoredNode(node.node, peer_id_of(OWNER.public_bytes), "x", None, node.signed_pass, 5)
    assert refused(store.save_node, other_peer) is Code.IDENTITY_TAKEN
    assert store.nodes() == (node,)
    assert store.peer_owner(node.peer) == node.node


def test_renewing_a_node_keeps_its_credit(store):
    node = admitted()
    store.save_node(node)
    store.append_entry(entry(0), {node.node: 320})
    store.save_node(StoredNode(node.node, node.peer, "new name", None, node.signed_pass, 77))
    kept = store.node(node.node)
    assert (kept.name, kept.credit_tokens, kept.admitted_ms) == ("new name", 320, 5)


def test_the_trail_of_a_node_only_grows_and_survives(store, tmp_path):
    node = admitted()
    store.save_node(node)
    first = Mark(node.node, Kind.STRIKE, "seen", By.COORDINATOR, 5, 3, Fault.FORGED, "ab" * 32, None, 13)
    second = Mark(node.node, Kind.KICK, "because", By.RESEARCHER, 6, 3, until_ms=9)
    store.add_marks([first, second])
    store.save_node(replace(node, name="new name"))
    store.add_marks([replace(second, kind=Kind.UNBAN, until_ms=None)])
    again = Store(store.path)
    assert again.marks() == (first, second, replace(second, kind=Kind.UNBAN, until_ms=None))
    again.close()


def test_hostile_text_is_text(store):
    name = "'; DROP TABLE nodes;--"
    store.save_node(admitted(name=name))
    assert store.nodes()[0].name == name


def test_old_lines_of_history_go(store, monkeypatch):
    monkeypatch.setattr("coordinator.store.EVENTS_KEPT", 3)
    for number in range(5):
        store.say(number, f"line {number}")
    assert store.recent(10) == ((2, "line 2"), (3, "line 3"), (4, "line 4"))
    assert store.recent(1) == ((4, "line 4"),)
    assert EVENTS_KEPT > 1000


@pytest.mark.parametrize(("other", "fix"), [(SCHEMA + 1, "Upgrade"), (SCHEMA - 1, "Begin another run")])
def test_another_schema_is_refused_by_name(path, other, fix):
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (b"%d" % other,))
    connection.close()
    with pytest.raises(Refused, match=f"schema {other}, this program reads schema {SCHEMA}") as caught:
        Store(path)
    assert caught.value.reason is Code.VERSION
    assert fix in caught.value.fix


def test_a_backup_is_a_whole_database_of_its_own(store, path):
    heads = grown(store, 3)
    store.backup()
    store.append_entry(entry(3, previous=heads[3].hash), {})
    backup = backup_of(path)
    assert backup.stat().st_mode & 0o077 == 0
    assert sorted(each.name for each in path.parent.iterdir() if "backup" in each.name) == [backup.name]
    copy = path.with_name("copy.db")
    copy.write_bytes(backup.read_bytes())
    restored = Store(copy)
    assert restored.entries() == store.entries(0, 3)
    restored.append_entry(entry(3, previous=heads[3].hash), {})
    restored.close()
    store.backup()
    assert backup.read_bytes() != copy.read_bytes()


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough to be one" * 50, b"SQLite format 3\0" * 100]
)
def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    assert refused(Store, path) is Code.STORE_BAD
    assert path.read_bytes() == content


def test_another_programs_database_is_refused(path):
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (url)")
    connection.close()
    assert refused(Store, path) is Code.STORE_BAD


def test_the_file_is_private_and_written_through(store, path):
    store.set("a", b"b")
    assert path.stat().st_mode & 0o077 == 0
    with store._reading() as connection:
        pragmas = {p: connection.exec_driver_sql(f"PRAGMA {p}").scalar() for p in ("journal_mode", "synchronous")}
        assert pragmas == {"journal_mode": "wal", "synchronous": 2}
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


WRITER = """
import sys
from pathlib import Path
from coordinator.store import Store
store = Store(Path(sys.argv[1]))
number = 0
while True:
    store.say(number, f"line {number}")
    print(number, flush=True)
    number += 1
"""


def test_what_was_written_before_a_kill_is_there_after_it(path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        last = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    last = max([last, *(int(line) for line in writer.stdout.read().splitlines())])
    writer.wait()
    store = Store(path)
    lines = [text for _, text in store.recent(1 << 20)]
    store.close()
    assert lines[: last + 1] == [f"line {n}" for n in range(last + 1)]
    assert len(lines) <= last + 2
