"""The form of an error message: what is wrong and where, then how to fix it, on one line."""

import re

from mea_jax.errors import UserError

_PLACE = re.compile(
    r"--\w|config\b|\w[.=/]\S|'[^']+'|\"[^\"]+\"|`[^`]+`|\b(line|layer|step|process|cell|row|port)\b"
)
_FIX = re.compile(
    r"\b(must|needs?|known: |did you mean|expected|known here: |set|give|choose|use|remove|delete|"
    r"run|start|take|leave|make|free|check|add|pass|install|pip|fetch|download|copy|restore|see|"
    r"wait|stop|raise|lower|increase|reduce|shorten|save|write|convert|export|repeat|correct|"
    r"continue|close|rename|move|name|train|compress|measure|supported: |try|replace|list|"
    r"change|pick|prepare|keep|point|instead|requires?)\b|known: |supported: |expected "
)


def flaws(message: str) -> list[str]:
    """Return what is wrong with the form of a `UserError`'s `message`; empty if nothing is."""
    found = []
    if "\n" in message:
        found.append("has several lines")
    if message.rstrip().endswith((".", ",", ":", ";")):
        found.append("ends with punctuation")
    if re.match(r"(The|This|A|An|There|It|No|Not|Cannot)\b", message):
        found.append("starts with a capital letter")
    if not _PLACE.search(message):
        found.append("names no option, file or value")
    if not _FIX.search(message):
        found.append("does not say how to fix it")
    return found


def record(messages: list[str]) -> None:
    """Append the message of each `UserError` that is made from now on to `messages`."""
    made = UserError.__init__

    def init(self: UserError, *args: object) -> None:
        made(self, *args)
        messages.append(str(self))

    UserError.__init__ = init  # type: ignore[method-assign, assignment]
