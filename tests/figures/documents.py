"""The documents, the sentences with figures that the results files give, and the figures that nothing gives."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "peft_sparsegrad/*/README.md", "examples/*/README.md", "docs/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
FIGURE = re.compile(
    r"""(?<![\w.,/-])(?:
        \d+\.\d+(?:e-?\d+)? | \d{1,3}(?:,\d{3})+ | \d+e-?\d+          # 0.641, 27,318, 4e-5
        | \d+(?=\ ?(?:%|×(?!\ ?\d)|±|[KMGT]i?B\b|m?s\b|seconds\b|minutes\b|times\b))  # 28%, 15 ×, 2 times
    )(?![\w.]\w|,\d)""",
    re.VERBOSE,
)
NO_MEASUREMENT = re.compile(
    r"""`[^`]*` | \]\([^)]*\) | arXiv\ \d+\.\d+ | \[\d+\.\d+\] | \d{4}\.emnlp
        | [Ss]ections?\ \d\.\d | (?:\d+\.){2}\d+ | Python\ 3\.\d+""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Claim:
    """A sentence of a document, whose figures are computed.

    Attributes:
        document: Path below the root.
        template: The sentence, with a replacement field of `str.format` for each figure.
        values: Computes the figures, in the order of the fields.
    """

    document: str
    template: str
    values: Callable[[], Iterable[object]]

    def __str__(self) -> str:
        return f"{self.document}: {self.template[:60]}"

    @property
    def sentence(self) -> str:
        """The sentence as it should be in the document."""
        return self.template.format(*self.values())

    def spans(self) -> list[tuple[int, int]]:
        """Where the figures of its first occurrence are in the document's text; none where it does not occur."""
        start = text(self.document).find(self.sentence)
        if start < 0:
            return []
        found, values = [], iter(self.values())
        for literal, _, form, _ in string.Formatter().parse(self.template):
            start += len(literal.format())
            if form is not None:
                end = start + len(format(next(values), form))
                found.append((start, end))
                start = end
        return found


@dataclass(frozen=True)
class Given:
    """Words of a document with a figure that nobody measured here.

    Attributes:
        document: Path below the root.
        words: The words, figure included.
        source: Where the figure is from: a table of a paper, "setting", or the file of the test that asserts it.
    """

    document: str
    words: str
    source: str

    def spans(self) -> list[tuple[int, int]]:
        """Where the words are in the document's text."""
        return [match.span() for match in re.finditer(re.escape(self.words), text(self.document))]


@cache
def text(document: str) -> str:
    """Return a document's text on one line, without code blocks."""
    whole = (ROOT / document).read_text("utf-8")
    without_fences = re.sub(r"^```.*?^```$", "", whole, flags=re.DOTALL | re.MULTILINE)
    return " ".join(re.sub(r"^ {4,}\S.*$", "", without_fences, flags=re.MULTILINE).split())


def figures_without_source(document: str, known: Iterable[Claim | Given]) -> list[str]:
    """Return the figures of a document, each with the words around it, that lie in none of the known spans."""
    spans = [span for each in known if each.document == document for span in each.spans()]
    words = NO_MEASUREMENT.sub(lambda match: "·" * len(match[0]), text(document))
    return [
        f"{words[max(0, found.start() - 30) : found.start()]}>{found[0]}<{words[found.end() : found.end() + 20]}"
        for found in FIGURE.finditer(words)
        if not any(start <= found.start() < end for start, end in spans)
    ]
