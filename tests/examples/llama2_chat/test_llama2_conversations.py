"""The data of finetune.py: rows in several forms, OpenAssistant's trees, and what cannot be used."""

from __future__ import annotations

import pytest
from llama2_chat_runs import conversations, write_lines

from examples.llama2_chat.conversations import read_conversations, split_conversations
from peft_sparsegrad.cli.errors import InputError


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": turns("a", "b", "c", "d")}, turns("a", "b", "c", "d")),
        ({"messages": turns("a", "b", "c")}, turns("a", "b")),
        ({"messages": [{"role": "system", "content": "s"}, *turns("a", "b")]},
         [{"role": "system", "content": "s"}, *turns("a", "b")]),
        ({"instruction": "a", "output": "b"}, turns("a", "b")),
        ({"instruction": "a", "input": "x", "output": "b"}, turns("a\n\nx", "b")),
        ({"instruction": "a", "instances": [{"input": "x", "output": "b"}, {"input": "y", "output": "c"}]},
         turns("a\n\nx", "b")),
    ],
    ids=["messages", "unanswered", "system", "instruction", "input", "instances"],
)  # fmt: skip
def test_forms(tmp_path, row, expected):
    assert read_conversations(str(write_lines(tmp_path / "d.jsonl", [row])), "en") == [expected]


@pytest.mark.parametrize(
    "bad",
    [
        '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}',
        '{"instruction": "a"}',
        '{"instruction": "a", "instances": []}',
        "[1]",
        "{",
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path, bad):
    path = tmp_path / "d.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n\n' + bad + "\n")
    with pytest.raises(InputError, match=r"d\.jsonl, line 3: "):
        read_conversations(str(path), None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "cannot read .*missing.jsonl"),
        ("empty.jsonl", "is empty"),
        ("data.csv", "must be a .jsonl file or the id"),
        ("folder", "must be a .jsonl file or the id"),
    ],
)
def test_unusable_source(tmp_path, name, message):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=message):
        read_conversations(str(tmp_path / name), None)


def test_dataset_that_the_hub_does_not_give():
    with pytest.raises(InputError, match=r"cannot load nobody/nothing, which is no \.jsonl file, from the hub"):
        read_conversations("nobody/nothing", "en")


def message(name, parent, role, lang="en", rank=None):
    return {"message_id": name, "parent_id": parent, "text": name, "role": role, "lang": lang, "rank": rank}


TREES = [
    # The best answer comes last, and so does the best question after it, which nobody answered.
    message("q1", None, "prompter"),
    message("q1.bad", "q1", "assistant", rank=1),
    message("q1.unranked", "q1", "assistant"),
    message("q1.good", "q1", "assistant", rank=0),
    message("q1.bad.more", "q1.bad", "prompter"),
    message("q1.good.second", "q1.good", "prompter", rank=1),
    message("q1.good.first", "q1.good", "prompter", rank=0),
    message("q1.good.second.answer", "q1.good.second", "assistant", rank=0),
    # Four messages deep.
    message("q2", None, "prompter"),
    message("q2.a", "q2", "assistant"),
    message("q2.a.q", "q2.a", "prompter"),
    message("q2.a.q.a", "q2.a.q", "assistant"),
    # Another language, and a question without an answer.
    message("q3", None, "prompter", lang="de"),
    message("q3.a", "q3", "assistant", lang="de"),
    message("q4", None, "prompter"),
]


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("en", [turns("q1", "q1.good"), turns("q2", "q2.a", "q2.a.q", "q2.a.q.a")]),
        ("de", [turns("q3", "q3.a")]),
        (None, [turns("q1", "q1.good"), turns("q2", "q2.a", "q2.a.q", "q2.a.q.a"), turns("q3", "q3.a")]),
    ],
)
def test_best_path_of_each_tree(tmp_path, language, expected):
    assert read_conversations(str(write_lines(tmp_path / "d.jsonl", TREES)), language) == expected


def test_no_tree_in_the_language(tmp_path):
    with pytest.raises(InputError, match="holds no conversation with an answer in fr"):
        read_conversations(str(write_lines(tmp_path / "d.jsonl", TREES)), "fr")


@pytest.mark.parametrize(
    ("change", "reason"), [({"role": "robot"}, "the `role` prompter"), ({"text": None}, "`text`")]
)
def test_bad_message_of_a_tree(tmp_path, change, reason):
    path = write_lines(tmp_path / "d.jsonl", [TREES[0], {**TREES[1], **change}])
    with pytest.raises(InputError, match=f"line 2: .*{reason}"):
        read_conversations(str(path), None)


def test_split_is_a_partition_that_the_seed_decides():
    rows = [row["messages"] for row in conversations(20)]
    train, held_out = split_conversations(rows, 0.2, seed=1)
    assert (len(train), len(held_out)) == (16, 4)
    assert sorted(map(str, train + held_out)) == sorted(map(str, rows))
    assert split_conversations(rows, 0.2, seed=1) == (train, held_out)
    assert split_conversations(rows, 0.2, seed=2) != (train, held_out)
    assert len(split_conversations(rows, 1.0, seed=1)[0]) == 1
    with pytest.raises(InputError, match="one conversation, and two are needed"):
        split_conversations(rows[:1], 0.5, seed=1)


def message(name: str, role: str, rank: int | None = None, *replies: dict, **more) -> dict:
    return {
        "message_id": name,
        "role": role,
        "text": name,
        "lang": "en",
        "rank": rank,
        "replies": list(replies),
        **more,
    }


def test_whole_trees_give_the_conversations_of_their_messages(tmp_path):
    """The released files of trees, and the same messages row by row as on the hub."""
    worse, better = message("b", "assistant", 1), message("c", "assistant", 0, message("d", "prompter"))
    trees = [
        {
            "message_tree_id": "a",
            "tree_state": "ready_for_export",
            "prompt": message("a", "prompter", None, worse, better),
        },
        {"message_tree_id": "e", "prompt": message("e", "prompter", None, message("f", "assistant", None, lang="de"))},
        {"message_tree_id": "g", "prompt": message("g", "prompter", None, message("h", "assistant"))},
    ]
    found = read_conversations(str(write_lines(tmp_path / "trees.jsonl", trees)), "en")
    assert found == [turns("a", "c"), turns("g", "h")]

    def flat(node: dict, parent: str | None) -> list[dict]:
        return [{**node, "parent_id": parent}, *(m for r in node["replies"] for m in flat(r, node["message_id"]))]

    rows = [row for tree in trees for row in flat(tree["prompt"], None)]
    assert read_conversations(str(write_lines(tmp_path / "rows.jsonl", rows)), "en") == found


@pytest.mark.parametrize(
    "bad", [{"prompt": None}, {"prompt": {"text": "a"}}, {"prompt": {**message("a", "prompter"), "replies": 3}}]
)
def test_a_damaged_tree_is_named_by_file_and_line(tmp_path, bad):
    trees = [{"message_tree_id": "a", "prompt": message("a", "prompter")}, {"message_tree_id": "b", **bad}]
    with pytest.raises(InputError, match=r"trees\.jsonl, line 2: the (tree|message) has no"):
        read_conversations(str(write_lines(tmp_path / "trees.jsonl", trees)), None)
