"""Thinking signatures: they bind a thinking block to its model, its organization and the conversation before it.

Docs "preserved thinking": on Fable 5.1+, Opus 5.5 and Sonnet 5.5 a block that comes back after an edited history is a
400; a block of another model or organization is silently dropped. On every thinking model a signature that was never
issued, or a changed block in the latest assistant message, is a 400. Real signatures are encrypted; these are
readable and only checked for authenticity.
"""

import base64
import binascii
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from headgate.simulator.errors import Rejected, invalid
from headgate.simulator.jsonvalue import JsonObject, content_blocks, list_in, object_in, text_in
from headgate.simulator.models import Model
from headgate.simulator.prompt import conversation_hash

CONTROLS_BETA = "thinking-binding-controls-2026-08-01"
MAC_KEY = b"headgate-simulator"
MAC_BYTES = 8


@dataclass(frozen=True, slots=True)
class Signature:
    """What a signature says."""

    model: str
    organization: str
    conversation: str
    """Hash, in hex, of tools, system and all messages before the block's own."""
    thinking: str
    """Hash, in hex, of the thinking text as it was sent out."""


def sign(model: Model, organization: str, conversation: bytes, thinking: str) -> str:
    """The signature of a new block."""
    payload = msgspec.json.encode([model.id, organization, conversation.hex(), _hash(thinking)])
    return base64.b64encode(_mac(payload) + payload).decode()


def read(signature: str) -> Signature | None:
    """What a signature says, or None if the simulator never issued it."""
    try:
        raw = base64.b64decode(signature, validate=True)
        if _mac(raw[MAC_BYTES:]) != raw[:MAC_BYTES]:
            return None
        return Signature(*msgspec.json.decode(raw[MAC_BYTES:], type=tuple[str, str, str, str]))
    except (binascii.Error, ValueError, msgspec.DecodeError):
        return None


def check_thinking_blocks(body: JsonObject, model: Model, organization: str, betas: frozenset[str]) -> None:
    """Raises Rejected for a thinking block the API would not take back."""
    messages = [object_in(message) for message in list_in(body.get("messages"))]
    latest = max((i for i, message in enumerate(messages) if message.get("role") == "assistant"), default=-1)
    drop = (
        object_in(object_in(body.get("thinking")).get("block_binding")).get("prefix_mismatch_behavior") == "drop_block"
    )
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        for j, block in enumerate(content_blocks(message.get("content"))):
            if block.get("type") != "thinking":
                continue
            where = f"messages.{i}.content.{j}"
            signature = read(text_in(block.get("signature")))
            if signature is None:
                raise Rejected(invalid(f"{where}: Invalid `signature` in `thinking` block"))
            if signature.thinking != _hash(text_in(block.get("thinking"))) and i == latest:
                raise Rejected(
                    invalid(
                        f"{where}: `thinking` or `redacted_thinking` blocks in the latest assistant message cannot be "
                        "modified. These blocks must remain as they were in the original response."
                    )
                )
            if not model.binding or signature.model != model.id or signature.organization != organization:
                continue
            if signature.conversation != conversation_hash(body, i).hex() and not (drop and CONTROLS_BETA in betas):
                raise Rejected(
                    invalid(
                        f"{where}: Invalid signature in thinking block. The block is bound to a different "
                        "conversation. Remove the block, or set thinking.block_binding.prefix_mismatch_behavior to "
                        '"drop_block".'
                    )
                )


def _hash(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _mac(payload: bytes) -> bytes:
    return blake2b(payload, key=MAC_KEY, digest_size=MAC_BYTES).digest()
