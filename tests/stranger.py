"""As much of libp2p as a stranger needs to flood p2pd: TCP, Noise XX and yamux. Answers nothing, reads what it must."""

import asyncio
import hashlib
import hmac
import itertools
from contextlib import suppress

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

NOISE = b"Noise_XX_25519_ChaChaPoly_SHA256"
MULTISTREAM = b"\x13/multistream/1.0.0\n"
FRAME_BYTES_MAX = 65535 - 16  # of a Noise message
# Most of the name of a protocol: a stream is kept until all of it has come.
WAITING = MULTISTREAM + b"\xe8\x07/".ljust(900, b"x")
DATA, SYN = 0, 1


class Stranger:
    """One connection by one who has a key of its own and no more."""

    @classmethod
    async def connect(cls, host, port):
        self = cls()
        self._reader, self._writer = await asyncio.open_connection(host, port)
        self._streams = itertools.count(1, 2)
        self._writer.write(MULTISTREAM + b"\x07/noise\n")
        await self._reader.readexactly(len(MULTISTREAM) + 8)
        await self._shake_hands()
        await self._send(MULTISTREAM + b"\x0d/yamux/1.0.0\n")
        answer = b""
        while not answer.endswith(b"/yamux/1.0.0\n"):
            answer += self._receiving.decrypt(next(self._received), await self._read(), None)
        return self

    async def open_streams(self, count):
        """That never say which protocol they want."""
        for _ in range(count):
            length = len(WAITING).to_bytes(4)
            await self._send(bytes([0, DATA]) + SYN.to_bytes(2) + next(self._streams).to_bytes(4) + length + WAITING)

    def close(self):
        self._writer.close()

    async def ended(self):
        with suppress(ConnectionError):
            while await self._reader.read(1 << 16):
                pass

    async def _send(self, data):
        for at in range(0, len(data), FRAME_BYTES_MAX):
            sealed = self._sending.encrypt(next(self._sent), data[at : at + FRAME_BYTES_MAX], None)
            self._writer.write(len(sealed).to_bytes(2) + sealed)
        await self._writer.drain()

    async def _read(self):
        return await self._reader.readexactly(int.from_bytes(await self._reader.readexactly(2)))

    async def _shake_hands(self):
        """-> e, <- e ee s es, -> s se: section 7.5 of the Noise specification. We believe whoever answers."""
        ephemeral, static = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        identity = Ed25519PrivateKey.generate()
        chaining = mixed = NOISE
        mixed = hashlib.sha256(mixed).digest()
        public = ephemeral.public_key().public_bytes_raw()
        mixed = hashlib.sha256(mixed + public).digest()
        mixed = hashlib.sha256(mixed).digest()  # an empty payload
        self._writer.write(len(public).to_bytes(2) + public)
        answer = await self._read()
        theirs, sealed, rest = answer[:32], answer[32:80], answer[80:]
        mixed = hashlib.sha256(mixed + theirs).digest()
        chaining, key = derived(chaining, ephemeral.exchange(X25519PublicKey.from_public_bytes(theirs)))
        their_static = ChaCha20Poly1305(key).decrypt(nonce(0), sealed, mixed)
        mixed = hashlib.sha256(mixed + sealed).digest()
        chaining, key = derived(chaining, ephemeral.exchange(X25519PublicKey.from_public_bytes(their_static)))
        mixed = hashlib.sha256(mixed + rest).digest()
        own = static.public_key().public_bytes_raw()
        # the key of es goes on with its next nonce: 0 was their payload's
        sealed_own = ChaCha20Poly1305(key).encrypt(nonce(1), own, mixed)
        mixed = hashlib.sha256(mixed + sealed_own).digest()
        chaining, key = derived(chaining, static.exchange(X25519PublicKey.from_public_bytes(theirs)))
        signed = identity.sign(b"noise-libp2p-static-key:" + own)
        public = b"\x08\x01\x12\x20" + identity.public_key().public_bytes_raw()
        payload = b"\x0a" + bytes([len(public)]) + public + b"\x12" + bytes([len(signed)]) + signed
        sealed = sealed_own + ChaCha20Poly1305(key).encrypt(nonce(0), payload, mixed)
        self._writer.write(len(sealed).to_bytes(2) + sealed)
        ours, theirs = derived(chaining, b"")
        self._sending, self._receiving = ChaCha20Poly1305(ours), ChaCha20Poly1305(theirs)
        self._sent, self._received = map(nonce, itertools.count()), map(nonce, itertools.count())


def derived(chaining, secret):
    """HKDF, two of them."""
    temporary = hmac.digest(chaining, secret, "sha256")
    first = hmac.digest(temporary, b"\x01", "sha256")
    return first, hmac.digest(temporary, first + b"\x02", "sha256")


def nonce(count):
    return bytes(4) + count.to_bytes(8, "little")
