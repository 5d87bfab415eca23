"""The nine understanding tasks of XGLUE, and two that anybody may download: files, labels, languages, metric.

Sources: Liang et al., *XGLUE* (arXiv 2004.01401, section 2), and its authors' description of the files; Adelani and
others, *SIB-200* (arXiv 2309.07445); Universal Dependencies 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Task:
    """A task of the benchmark.

    Attributes:
        name: As in the papers' tables.
        folder: The task's folder.
        kind: What is predicted: a label for a text or a pair of texts, a label for each word, or a span of a text.
        metric: The score that counts; all are percentages, the higher the better.
        languages: Those of the test set, English first. Training is on English alone.
        train, dev, test: Paths in the folder, with `{}` for the language.
        columns: Of a row, for texts: perhaps an `id`, the texts, and the `label`.
        labels: Names of the labels, but for spans.
        aliases: Other spellings of labels.
        codes: What languages are called in the files' names, where that is not their code here.
    """

    name: str
    folder: str
    kind: Literal["classification", "tagging", "question-answering"]
    metric: str
    languages: tuple[str, ...]
    train: str
    dev: str
    test: str
    columns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict, hash=False)
    codes: dict[str, str] = field(default_factory=dict, hash=False)

    def file(self, split: Split, language: str) -> str:
        """Path of a file, relative to the folder of the benchmark."""
        return f"{self.folder}/{getattr(self, split).format(self.codes.get(language, language))}"


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _from_search_engine(name: str, languages: str, columns: tuple[str, ...], **settings: Any) -> Task:
    """A task whose files are named like `xglue.qam.de.test`."""
    stem = f"xglue.{name.lower()}"
    return Task(
        name=name,
        folder=name,
        kind="classification",
        languages=_names(languages),
        train=f"{stem}.en.train",
        dev=f"{stem}.{{}}.dev",
        test=f"{stem}.{{}}.test",
        columns=(*columns, "label"),
        **settings,
    )


def _tagging(name: str, metric: str, languages: str, labels: str, ending: str = "") -> Task:
    return Task(
        name=name,
        folder=name,
        kind="tagging",
        metric=metric,
        languages=_names(languages),
        train=f"en.train{ending}",
        dev=f"{{}}.dev{ending}",
        test=f"{{}}.test{ending}",
        labels=_names(labels),
    )


PARTS_OF_SPEECH = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X"
XGLUE: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="XNLI",
            folder="XNLI",
            kind="classification",
            metric="accuracy",
            languages=_names("en ar bg de el es fr hi ru sw th tr ur vi zh"),
            train="multinli.train.en.tsv",
            dev="{}.dev",
            test="{}.test",
            columns=("premise", "hypothesis", "label"),
            labels=("entailment", "neutral", "contradiction"),
            aliases={"contradictory": "contradiction"},  # so spelt in the training file
        ),
        _from_search_engine(
            "NC",
            "en de es fr ru",
            ("news title", "news body"),
            metric="accuracy",
            labels=_names("autos entertainment finance foodanddrink health lifestyle news sports travel video"),
        ),
        _tagging("NER", "f1", "en de es nl", "O B-LOC I-LOC B-MISC I-MISC B-ORG I-ORG B-PER I-PER"),
        Task(
            name="PAWS-X",
            folder="PAWSX",
            kind="classification",
            metric="accuracy",
            languages=_names("en de es fr"),
            train="en/train.tsv",
            dev="{}/dev_2k.tsv",
            test="{}/test_2k.tsv",
            columns=("id", "sentence1", "sentence2", "label"),
            labels=("0", "1"),
        ),
        _tagging(
            "POS",
            "accuracy",
            "en ar bg de el es fr hi it nl pl pt ru th tr ur vi zh",
            PARTS_OF_SPEECH,
        ),
        _from_search_engine("QAM", "en de fr", ("question", "answer passage"), metric="accuracy", labels=("0", "1")),
        _from_search_engine(
            "QADSM",
            "en de fr",
            ("query", "ad title", "ad description"),
            metric="accuracy",
            labels=("Bad", "Good"),
        ),
        _from_search_engine(
            "WPR",
            "en de es fr it pt zh",
            ("query", "web page title", "web page snippet"),
            metric="ndcg",
            labels=("0", "1", "2", "3", "4"),  # the gain of a page, from bad to perfect
            aliases={"Bad": "0", "Fair": "1", "Good": "2", "Excellent": "3", "Perfect": "4"},
        ),
        Task(
            name="MLQA",
            folder="MLQA",
            kind="question-answering",
            metric="f1",
            languages=_names("en ar de es hi vi zh"),
            train="squad1.1/train-v1.1.json",
            dev="MLQA_V1/dev/dev-context-{0}-question-{0}.json",
            test="MLQA_V1/test/test-context-{0}-question-{0}.json",
        ),
    )
}
"""In the order of the paper's table X (arXiv 2307.10098)."""

SIB_200 = {
    "en": "eng_Latn",
    "ar": "arb_Arab",
    "bg": "bul_Cyrl",
    "de": "deu_Latn",
    "el": "ell_Grek",
    "es": "spa_Latn",
    "fr": "fra_Latn",
    "hi": "hin_Deva",
    "ru": "rus_Cyrl",
    "sw": "swh_Latn",
    "th": "tha_Thai",
    "tr": "tur_Latn",
    "ur": "urd_Arab",
    "vi": "vie_Latn",
    "zh": "zho_Hans",
}
TASKS: dict[str, Task] = {
    **XGLUE,
    "SIB-200": Task(
        name="SIB-200",
        folder="sib200",
        kind="classification",
        metric="accuracy",
        languages=tuple(SIB_200),  # those of XNLI, of the 205 that there are
        train="eng_Latn/train.tsv",
        dev="{}/dev.tsv",
        test="{}/test.tsv",
        columns=("id", "label", "text"),
        labels=_names("entertainment geography health politics science/technology sports travel"),
        codes=SIB_200,
    ),
    "UD": replace(
        _tagging("UD", "accuracy", "en ar de es fr hi ru tr ur vi zh", PARTS_OF_SPEECH, ".conllu"), folder="ud"
    ),
}
"""All tasks: those of XGLUE, topics of sentences (SIB-200) and parts of speech (Universal Dependencies)."""
