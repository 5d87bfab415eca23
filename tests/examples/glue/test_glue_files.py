"""A task's rows: GLUE's own files, plain files, the hub's layout, and what is wrong with a file."""

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value, config

from examples.glue.dataset import load_task, take_rows
from examples.glue.files import find_file, read_columns
from examples.glue.tasks import TASKS
from peft_sparsegrad.cli.errors import InputError

# A row of each of GLUE's own files, its folder, its file, and what it is here: sentences and label.
ARCHIVE = {
    "cola": ("CoLA/dev.tsv", None, 'gj04\t0\t*\tThe "sailors rode', ['The "sailors rode', 0]),
    "sst2": ("SST-2/dev.tsv", "sentence\tlabel", "a fine film\t1", ["a fine film", 1]),
    "mrpc": (
        "MRPC/dev.tsv",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "1\t7\t8\tone\ttwo",
        ["one", "two", 1],
    ),
    "stsb": (
        "STS-B/dev.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tg\tf\t2012\t1\ta\tb\tone\ttwo\t3.8",
        ["one", "two", 3.8],
    ),
    "qqp": (
        "QQP/dev.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "1\t2\t3\twho?\twhat?\t0",
        ["who?", "what?", 0],
    ),
    "mnli": (
        "MNLI/dev_matched.tsv",
        "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tfiction\tone\ttwo\tneutral\tcontradiction",
        ["one", "two", 2],
    ),
    "qnli": ("QNLI/dev.tsv", "index\tquestion\tsentence\tlabel", "0\twho?\tthey\tnot_entailment", ["who?", "they", 1]),
    "rte": ("RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel", "0\tone\ttwo\tentailment", ["one", "two", 0]),
    "wnli": ("WNLI/dev.tsv", "index\tsentence1\tsentence2\tlabel", "0\tone\ttwo\t1", ["one", "two", 1]),
}


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(task: str, path: Path) -> list[list]:
    """The rows: sentences, then the label."""
    columns = read_columns(path, TASKS[task])
    assert list(columns) == [*TASKS[task].columns, "label"]
    return [list(row) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize("task", TASKS)
def test_files_of_glues_own_archive(tmp_path, task):
    name, header, row, expected = ARCHIVE[task]
    write(tmp_path / name, *([] if header is None else [header]), row)
    assert read(task, find_file(tmp_path, TASKS[task], "dev")) == [expected]


@pytest.mark.parametrize("task", TASKS)
def test_json_lines_with_the_hubs_columns(tmp_path, task):
    expected = ARCHIVE[task][-1]
    row = dict(zip((*TASKS[task].columns, "label"), expected, strict=True))
    path = write(tmp_path / task / f"{task}_validation.jsonl", json.dumps(row), "", json.dumps(row))
    assert find_file(tmp_path, TASKS[task], "dev") == path
    assert read(task, path) == [expected] * 2


def test_comma_separated_files_are_quoted(tmp_path):
    plain = write(tmp_path / "stsb.csv", '"A man, a plan","A ""canal""",4.5')
    assert read("stsb", plain) == [["A man, a plan", 'A "canal"', 4.5]]
    named = write(tmp_path / "sst2.csv", "label,sentence", 'positive,"good, bad"')
    assert read("sst2", named) == [["good, bad", 1]]


@pytest.mark.parametrize(
    ("task", "lines", "reason"),
    [
        ("cola", ["a\t1\t\tFine.", "b\t1\tFine."], "line 2: 3 columns, not the 4 of source, label, star, sentence"),
        (
            "cola",
            ["a\t1\t\tFine.", "", "b\t2\t\tFine."],
            "line 3: the label '2' is neither of unacceptable, acceptable",
        ),
        ("rte", ["sentence1\tsentence2\tlabel", "a\tb\t-1"], "line 2: the label '-1' is neither"),
        ("rte", ["a\tb\t1"], "line 1 is no header with the columns sentence1, sentence2 and label"),
        ("stsb", ["sentence1\tsentence2\tscore", "a\tb\t5.5"], "line 2: the label 5.5 is not between 0 and 5"),
        ("stsb", ["sentence1\tsentence2\tscore", "a\tb\tnan"], "line 2: the label nan is not between 0 and 5"),
        ("stsb", ["sentence1\tsentence2\tscore", "a\tb\tsame"], "line 2: could not convert"),
        ("rte", ["sentence1\tsentence2\tlabel"], "holds no rows"),
        ("rte", [], "holds no rows"),
    ],
)
def test_what_is_wrong_with_a_table(tmp_path, task, lines, reason):
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=reason) as error:
        read_columns(path, TASKS[task])
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: this is not JSON"),
        ("[1]", "line 2: this is not a JSON object"),
        ('{"sentence": "a"}', "line 2: the label 'None'"),
        ('{"label": 1, "sentence": 3}', "line 2: there is no text in the column sentence"),
    ],
)
def test_what_is_wrong_with_json_lines(tmp_path, line, reason):
    path = write(tmp_path / "train.jsonl", '{"label": 1, "sentence": "fine"}', line)
    with pytest.raises(InputError, match=reason):
        read_columns(path, TASKS["cola"])


def test_files_that_are_not_there_or_there_twice(tmp_path):
    with pytest.raises(InputError, match=r"nowhere is no folder; --data is the folder above"):
        find_file(tmp_path / "nowhere", TASKS["rte"], "train")
    with pytest.raises(InputError, match="there is no train file of rte: looked for"):
        find_file(tmp_path, TASKS["rte"], "train")
    write(tmp_path / "rte" / "train.tsv", "")
    write(tmp_path / "rte" / "rte_train.jsonl", "")
    with pytest.raises(InputError, match=r"are both the train file of rte: leave one"):
        find_file(tmp_path, TASKS["rte"], "train")


def test_the_hubs_layout(tmp_path, monkeypatch):
    """`datasets` takes a folder of that name in the working directory for the repository on the hub."""
    folder = tmp_path / "nyu-mll" / "glue"
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "idx": Value("int32")})
    features["label"] = ClassLabel(names=["entailment", "neutral", "contradiction"])
    for split, label in {"train": 1, "validation_matched": 2}.items():
        rows = {"premise": ["a"], "hypothesis": ["b"], "idx": [0], "label": [label]}
        (folder / "mnli").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(folder / "mnli" / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {s}\n    path: mnli/{s}-*\n" for s in ("train", "validation_matched"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: mnli\n  data_files:\n{files}---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = load_task(TASKS["mnli"], None)
    assert splits.train[:] == {"premise": ["a"], "hypothesis": ["b"], "label": [1]}
    assert splits.dev["label"] == [2]
    with pytest.raises(InputError, match=r"rte of nyu-mll/glue cannot be had .* --data reads local files"):
        load_task(TASKS["rte"], None)


def test_rows_drawn_at_random():
    rows = Dataset.from_dict({"label": list(range(50))})
    drawn = [take_rows(rows, 10, seed)["label"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert take_rows(rows, None, 0) is rows
    with pytest.raises(InputError, match="--train-rows asks for 51 rows, and there are 50"):
        take_rows(rows, 51, 0)
