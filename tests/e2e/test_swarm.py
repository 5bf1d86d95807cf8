"""The main job end to end: real processes by the public commands train a model, through a death and a late arrival."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from coordinator.folder import RunFolder
from protocol.identity import check_roster
from protocol.log import check_certificate, check_members, check_ranges, genesis_head, next_head, ranges_of
from protocol.state import Consumed
from tests.e2e.processes import TEXT, TINY, Node, Run, gone, is_free, until

SETTINGS = {
    "model": {"config": {**TINY["model"]["config"], "intermediate_size": 576}},  # a part for each of four nodes
    "run": {**TINY["run"], "min_nodes": 3},
    "rounds": {**TINY["rounds"], "inner_steps": [[1, 12]]},
}
ROUNDS_MIN = 10


def test_a_swarm_survives_a_killed_node_takes_in_a_late_one_and_agrees_to_the_last_bit(world):
    run = Run(world, settings=SETTINGS)
    run.add(*TEXT)
    run.start()
    invite = run.invite("--uses", "4")
    ash, birch, cedar, dogwood = nodes = [Node(world, name) for name in ("ash", "birch", "cedar", "dogwood")]
    for node in (ash, birch, cedar):
        node.join(invite)
    ash.reaches(2)
    assert any(process.name().startswith("p2pd") for process in birch.tree())

    before = in_mid_round(birch)
    gone(birch.kill())
    ash.reaches(before + 2)
    birch.start()
    dogwood.join(invite)
    began = ash.status()["round"]
    until(lambda: dogwood.status().get("head"), "the late node has the state")
    came = [rejoined(run, birch), rejoined(run, dogwood)]
    assert came[1] > began, "rounds went on while the late node got ready"
    ash.reaches(max(*came, ROUNDS_MIN))

    for node in nodes:
        node.tell("pause")
    heads = until(lambda: agreed(run, nodes), "every replica is at the same head")
    measured = until(lambda: newest_evaluation(run, heads["round"]), "the last state is measured")
    for node in nodes:
        assert node.stop() == 130
    assert run.stop() == 130

    exported = world.folder / "model"
    world.call("barnraise-coordinator", "export", exported, "--run", run.folder)
    audit(run, heads)
    assert "audited" in world.log(run.name).read_text() and not run.marks(), (
        "real training is measured again, and nobody is struck for it"
    )
    assert heads["round"] >= ROUNDS_MIN
    assert abs(loss_of(exported, run) - measured) < 1e-4
    world.nothing_is_left()
    assert all(is_free(port) for port in (run.grpc, run.http, run.p2p))


def in_mid_round(node):
    """Wait until the node has trained in a round that is not decided; answers with the round."""
    found = until(lambda: (now := node.status())["round_steps"] > 0 and now, f"{node.name} is in mid-round")
    return found["round"]


def rejoined(run, node):
    """The first round from now on that holds something by this node."""
    start = len(run.entries())
    me = until(lambda: node.status().get("node"), f"{node.name} answers")

    def found():
        for entry in run.entries()[start:]:
            if any(contribution.node.startswith(me) for contribution in entry.record.contributions):
                return entry.record.round
        return None

    return until(found, f"{node.name} brings something to a round")


def agreed(run, nodes):
    """The common head of all replicas and the coordinator's log, once nothing is on its way."""
    heads = [node.status()["head"] for node in nodes]
    page = run.page("status")
    same = all(head == heads[0] for head in heads) and page["head"] == heads[0]["hash"]
    return heads[0] if same and page["run"]["round"] == heads[0]["round"] else None


def newest_evaluation(run, round_number):
    store = run.store()
    try:
        newest = store.history(1)[-1]
    finally:
        store.close()
    return newest.heldout if newest.round == round_number else None


def audit(run, heads):
    """Everything that the coordinator's folder claims, checked again from its database and archive alone."""
    from coordinator.archive import rebuild

    folder = RunFolder(run.folder)
    store = folder.open_store()
    try:
        manifest = folder.manifest(store).manifest
        rosters = {signed.roster.epoch: check_roster(folder.key().public, signed) for signed in store.rosters()}
        head, consumed, credit = genesis_head(manifest), Consumed(), {}
        for entry in store.entries():
            record = entry.record
            assert (record.run, record.round, record.previous) == (manifest.run, head.round, head.hash)
            check_certificate(entry, rosters[entry.certificate.ballot.epoch])
            check_members(record, rosters[record.epoch])
            check_ranges(record, consumed)  # no data counts twice, in this record or an earlier one
            consumed = consumed.with_ranges(ranges_of(record))
            for each in record.contributions:
                trained = sum(span.stop - span.start for span in each.ranges) * manifest.context
                assert trained == each.tokens
                credit[each.node] = credit.get(each.node, 0) + each.tokens
            head = next_head(record)
        assert {each.node: each.credit_tokens for each in store.nodes()} == credit
        state = rebuild(store, folder.open_blobs(), manifest)
    finally:
        store.close()
    assert (head.round, head.hash, state.round, state.digest()) == (
        heads["round"],
        heads["hash"],
        heads["round"],
        heads["state"],
    )


def loss_of(exported, run):
    """Held-out loss as anybody would compute it with transformers, on the coordinator's own held-out sequences."""
    folder = RunFolder(run.folder)
    store = folder.open_store()
    try:
        corpus, count = folder.corpus(store), folder.spec().evaluate.sequences
    finally:
        store.close()
    path = folder.open_blobs().path(corpus.heldout.digest)
    tokens = np.fromfile(path, f"<u{corpus.token_bytes}", count * corpus.context + 1).astype(np.int64)
    whole = (len(tokens) - 1) // corpus.context
    module = AutoModelForCausalLM.from_pretrained(exported).eval()
    losses = []
    with torch.inference_mode():
        for first in range(0, whole * corpus.context, corpus.context):
            window = torch.from_numpy(tokens[first : first + corpus.context + 1])
            logits = module(input_ids=window[None, :-1]).logits[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    return sum(losses) / len(losses)
