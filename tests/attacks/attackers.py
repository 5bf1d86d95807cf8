"""What attackers bring. They know everything: the others' contributions of this very round too, and act as one."""

from __future__ import annotations

from statistics import NormalDist
from typing import Final

import numpy as np

from protocol.codec import Floats
from tests.attacks.swarm import VOCABULARY, Attack, Scene

NAN_HALF: Final = np.float16(np.nan).tobytes()


def _encoded(scene: Scene, values: Floats) -> bytes:
    return scene.setting.packing.up.encode(np.ascontiguousarray(values, np.float32))


def sign_flip(scene: Scene) -> bytes:
    assert scene.own is not None
    return _encoded(scene, -scene.own)


def times_100(scene: Scene) -> bytes:
    assert scene.own is not None
    return _encoded(scene, 100 * scene.own)


def noise(scene: Scene) -> bytes:
    """As long as the others', in a direction of its own."""
    like = scene.honest[0]
    values = scene.luck.standard_normal(like.size).astype(np.float32)
    return _encoded(scene, values * np.float32(np.linalg.norm(like) / np.linalg.norm(values)))


def alie(scene: Scene) -> bytes:
    """As far from the mean as a majority still hides (Baruch et al., arXiv 1902.06156): mean - z * deviation.

    Their z is 0 for two of eight; then it is 1, where an honest contribution is as often as not."""
    members = len(scene.honest) + scene.attackers
    supporters = members // 2 + 1 - scene.attackers
    z = max(1.0, NormalDist().inv_cdf(max(0.5, (len(scene.honest) - supporters) / len(scene.honest))))
    table = np.stack(scene.honest)
    return _encoded(scene, table.mean(axis=0) - np.float32(z) * table.std(axis=0))


def inner_product(scene: Scene) -> bytes:
    """The others' mean turned round (Xie et al., arXiv 1903.03936), as long as it is."""
    return _encoded(scene, -np.stack(scene.honest).mean(axis=0))


def honestly(scene: Scene) -> bytes:
    """With what its trainer made of it."""
    assert scene.own is not None
    return _encoded(scene, scene.own)


def not_a_number(scene: Scene) -> bytes:
    """The first scale is NaN; the rest is as the others'."""
    return NAN_HALF + _encoded(scene, scene.honest[0])[2:]


def zeros(scene: Scene) -> bytes:
    return _encoded(scene, np.zeros_like(scene.honest[0]))


def copy(scene: Scene) -> bytes | None:
    """Another's contribution of the last round, as its own."""
    return scene.before[scene.attackers % len(scene.before)] if scene.before else None


def stale(scene: Scene) -> bytes:
    """Its own first contribution, again and again."""
    assert scene.own is not None
    return scene.memory.setdefault("first", _encoded(scene, scene.own))


def stale_disguised(scene: Scene) -> bytes:
    """The same by other bytes in each round."""
    assert scene.own is not None
    first = scene.setting.packing.up.decode(
        scene.memory.setdefault("first", _encoded(scene, scene.own)), scene.own.size
    )
    return _encoded(scene, first * np.float32(1 + scene.round / 1000))


ATTACKS: Final = (
    Attack("sign flip", sign_flip, trains=True),
    Attack("times 100", times_100, trains=True),
    Attack("random", noise),
    Attack("ALIE", alie),
    Attack("IPM", inner_product),
    Attack("label flip", honestly, trains=True, spoil=lambda targets: VOCABULARY - 1 - targets),
    Attack("NaN", not_a_number),
    Attack("NaN, not shown", not_a_number, shows=False),
    Attack("zeros", zeros),
    Attack("copies", copy),
    Attack("stale", stale, trains=True),
    Attack("stale, disguised", stale_disguised, trains=True),
)
