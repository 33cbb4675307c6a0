"""Random damage to bytes, for the other strategies."""

from hypothesis import strategies as st

_FRAGMENTS = (
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b"\0",
    b"\xed\xa0\x80",  # half of a surrogate pair, encoded like UTF-8
    rb"\ud800",
    b"NaN",
    b"-Infinity",
    b"1" * 5000,
    b"1e999999",
    b"[" * 50,
    b"{",
    b'"',
    b"\\",
)
# A flipped bit passes more checks than other damage, so it is more frequent.
_KINDS = ("flip", "flip", "flip", "cut", "remove", "double", "replace", "insert")


@st.composite
def mutated(draw, whole: bytes) -> bytes:
    """Flip bits of `whole`, cut it short, and remove, double, replace or insert bytes."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 5))):
        if not content:
            break
        at = draw(st.integers(0, len(content) - 1))
        end = at + draw(st.integers(1, 40))
        kind = draw(st.sampled_from(_KINDS))
        if kind == "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:]
        elif kind == "remove":
            del content[at:end]
        elif kind == "double":
            content[at:at] = content[at:end]
        else:
            new = draw(st.binary(max_size=20) | st.sampled_from(_FRAGMENTS))
            content[at : end if kind == "replace" else at] = new
    return bytes(content)
