"""The last line of a card, by which a card that nobody has edited is known."""

import hashlib
import re

_SEAL = re.compile(r"<!-- ema-timm card, sha256 of the text above: ([0-9a-f]{64}) -->\n\Z")


def seal(text: str) -> str:
    """``text`` with a last line by which `is_generated` knows it again."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- ema-timm card, sha256 of the text above: {digest} -->\n"


def is_generated(text: str) -> bool:
    """Whether a card is as it was generated, at whatever time, and nobody has edited it."""
    sealed = _SEAL.search(text)
    return bool(sealed) and text == seal(text[: sealed.start() - 1])
