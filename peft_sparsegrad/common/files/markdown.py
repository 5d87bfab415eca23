"""Text from outside as Markdown and as Python: names of models and modules, which may hold any character."""

from __future__ import annotations

import json
import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_UNSAFE_IN_A_BLOCK = re.compile(r"[<`\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_UNSAFE_IN_BACKTICKS = re.compile(r"[`<>]|\\\||\\$")  # a backslash before a bar would undo the bar's own


def code(text: str) -> str:
    """Return text as code in a table's cell, in one line and with nothing in it that is read as Markdown or HTML."""
    text = _CONTROL.sub(" ", text).strip() or " "
    if not _UNSAFE_IN_BACKTICKS.search(text):
        return "`" + text.replace("|", "\\|") + "`"
    return (
        "<code>"
        + "".join(each if each.isalnum() or each in " .,/-" else f"&#{ord(each)};" for each in text)
        + "</code>"
    )


def literal(text: str) -> str:
    """Return text as a string of Python in one line, with nothing in it that ends a block of code or is HTML."""
    quoted = json.dumps(text, ensure_ascii=False)
    return _UNSAFE_IN_A_BLOCK.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
