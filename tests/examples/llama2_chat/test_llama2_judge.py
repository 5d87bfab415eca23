"""judge.py against a local server that speaks the protocol: grades, failures, a kill, and the estimate."""

from __future__ import annotations

import threading
from argparse import Namespace

import pytest
from judge_server import JudgeServer, rate_by_length
from llama2_chat_runs import kill_when, limited_files, questions, read_lines, run, write_lines

from examples.llama2_chat.judge import main
from examples.llama2_chat.judge_client import connect
from experiments.terminal import run_and_exit
from peft_sparsegrad.cli.errors import InputError


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = JudgeServer()
    thread = threading.Thread(target=judge.serve_forever)
    thread.start()
    yield judge
    judge.shutdown()
    thread.join()
    judge.server_close()


def answers(count):
    return [
        {"question_id": q["question_id"], "model_id": "tuned", "choices": [{"turns": [f"1{q['question_id']}", "2"]}]}
        for q in questions(count)
    ]


@pytest.fixture
def command(server, tmp_path):
    """The command line for the three questions, into `out.jsonl`."""

    def make(*further, count=3, out="out.jsonl"):
        asked = write_lines(tmp_path / "q.jsonl", questions(count))
        given = write_lines(tmp_path / "a.jsonl", answers(count))
        files = ["--questions", str(asked), "--answers", str(given), "--out", str(tmp_path / out)]
        return [*files, "--base-url", server.url, "--judge", "judge-1", "--yes", *further]

    return make


def test_judgments_in_fastchats_format(server, command, tmp_path, capsys):
    assert main(command()) == 0
    records = read_lines(tmp_path / "out.jsonl")
    assert [(record["question_id"], record["turn"]) for record in records] == [
        (81, 1), (81, 2), (82, 1), (82, 2), (83, 1), (83, 2),
    ]  # fmt: skip
    for record, request in zip(records, server.requests, strict=True):
        assert record.keys() == {
            "question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp",
        }  # fmt: skip
        assert record["model"] == "tuned"
        assert record["user_prompt"] == request["messages"][1]["content"]
        assert record["judgment"] == rate_by_length(request)
        assert record["score"] == len(record["user_prompt"]) % 10 + 1
        assert (request["model"], request["temperature"]) == ("judge-1", 0)
    assert [record["judge"][1] for record in records[:4]] == [
        "single-reference", "single-multi-turn", "single", "single-multi-turn",
    ]  # fmt: skip
    printed = capsys.readouterr().out.split("mean score")[1].splitlines()
    means = {
        line.split("  ")[1].strip(): line.split()[-3] for line in printed if "judgments" in line and "out" not in line
    }
    scores = [record["score"] for record in records]
    assert means["all"] == f"{sum(scores) / 6:.2f}"
    assert means["turn 1"] == f"{sum(scores[::2]) / 3:.2f}"
    assert means["math"] == f"{sum(scores[:2]) / 2:.2f}"


def test_overload_and_server_errors_are_tried_again(server, command, tmp_path):
    failures = iter([429, 500, 503, 429])
    server.reply = lambda request: next(failures, None) or rate_by_length(request)
    main(command())
    assert [record["score"] is None for record in read_lines(tmp_path / "out.jsonl")] == [False] * 6
    assert len(server.requests) == 6 + 4


def test_server_that_keeps_failing_ends_in_one_sentence_and_loses_nothing(server, command, tmp_path, capsys):
    server.reply = lambda request: 500 if len(server.requests) > 2 else rate_by_length(request)
    with pytest.raises(SystemExit) as ended:
        run_and_exit(lambda: main(command("--max-retries", "2")))
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: the judge at {server.url}/ did not answer: ")
    assert "try later" in last
    assert len(server.requests) == 2 + 3
    server.reply = rate_by_length
    main(command())
    assert len(read_lines(tmp_path / "out.jsonl")) == 6
    assert len(server.requests) == 5 + 4


def test_judgment_without_a_rating_is_asked_again_once_then_null(server, command, tmp_path, capsys):
    """The second answer is never rated, the third only when asked again."""
    replies = iter(["Rating: [[7]]", "I would rather not.", "", "Rating: [[11]]", "It is [[3]]", *["[[5]]"] * 9])
    server.reply = lambda request: next(replies)
    main(command())
    records = read_lines(tmp_path / "out.jsonl")
    assert [record["score"] for record in records] == [7, None, 3, 5, 5, 5]
    assert records[1]["judgment"] == ""
    printed = capsys.readouterr().out
    assert f"{'all':<26}{'5.00':>14}{'5 judgments':>14}" in printed
    assert f"{'without a rating':<26}1" in printed


@pytest.mark.parametrize("garbage", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": null}', b'{"choices": [{}]}'])
def test_server_that_speaks_something_else(server, command, garbage):
    server.reply = lambda request: garbage
    with pytest.raises(InputError, match="answered with no chat completion"):
        main(command("--max-retries", "1"))


def test_wrong_path_of_the_server(server, command):
    with pytest.raises(InputError, match="did not answer"):
        main([*command("--max-retries", "1"), "--base-url", server.url + "/nowhere"])


@pytest.mark.slow
def test_killed_run_goes_on_and_pays_for_nothing_twice(server, command, tmp_path):
    release = threading.Event()

    def reply(request):
        if len(server.requests) == 8:
            release.wait(60)  # until the program has been killed
        return rate_by_length(request)

    server.reply = reply
    given, out = command(count=8), tmp_path / "out.jsonl"
    kill_when(out, lambda path: path.exists() and path.read_bytes().count(b"\n") == 7, "judge", *given)
    release.set()
    with out.open("a") as file:
        file.write('{"question_id": 84, "tu')
    ended = run("judge", *given)
    assert ended.returncode == 0, ended.stderr
    assert "judged already            7" in ended.stdout
    records = read_lines(out)
    assert sorted((record["question_id"], record["turn"]) for record in records) == [
        (question, turn) for question in range(81, 89) for turn in (1, 2)
    ]
    main(command(count=8, out="through.jsonl"))
    assert [r["score"] for r in records] == [r["score"] for r in read_lines(tmp_path / "through.jsonl")]
    assert len(server.requests) <= 8 + 9 + 16


def test_estimate_is_said_before_anything_is_sent(server, command, tmp_path, capsys):
    given = command("--dry-run", "--max-tokens", "100", "--price-in", "10", "--price-out", "30")
    assert main(given) == 0
    assert not server.requests
    assert not (tmp_path / "out.jsonl").exists()
    printed = capsys.readouterr().out
    main(command("--max-tokens", "100"))
    characters = sum(len(message["content"]) for request in server.requests for message in request["messages"])
    assert f"6 requests, about {characters // 4:,} tokens in, at most 600 tokens out" in printed
    assert f"at most about {(characters // 4 * 10 + 600 * 30) / 1e6:.2f};" in printed


@pytest.mark.parametrize(("typed", "sends"), [("y\n", True), ("n\n", False), ("", False)])
def test_asks_before_it_sends(server, command, typed, sends, monkeypatch, tmp_path):
    stdin = tmp_path / "stdin"
    stdin.write_text(typed)
    given = [text for text in command() if text != "--yes"]
    with stdin.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        if sends:
            main(given)
        else:
            with pytest.raises(InputError, match="nothing was sent"):
                main(given)
    assert bool(server.requests) == sends
    assert (tmp_path / "out.jsonl").exists() == sends


def test_key_comes_from_the_environment(server, command, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    main(command("--api-key-env", "MY_KEY"))
    assert set(server.keys) == {"Bearer secret"}
    with pytest.raises(InputError, match="ANOTHER_KEY holds no key"):
        main(command("--api-key-env", "ANOTHER_KEY", out="other.jsonl"))
    given = command(out="other.jsonl")
    del given[given.index("--base-url") : given.index("--base-url") + 2]
    with pytest.raises(InputError, match="OPENAI_API_KEY holds no key"):
        main(given)


def test_openais_key_goes_to_no_other_server_unasked(server, command, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    main(command())
    assert set(server.keys) == {"Bearer none"}
    assert "none is sent to 127.0.0.1; --api-key-env OPENAI_API_KEY would" in capsys.readouterr().out
    given = command(out="other.jsonl")
    del given[given.index("--base-url") : given.index("--base-url") + 2]
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    main(given)
    assert set(server.keys) == {"Bearer none"}
    main(command("--api-key-env", "OPENAI_API_KEY", out="third.jsonl"))
    assert server.keys[-1] == "Bearer secret"


@pytest.mark.parametrize(
    ("url", "key"),
    [
        (None, "secret"),
        ("https://api.openai.com/v1", "secret"),
        ("https://eu.API.openai.com/v1", "secret"),
        ("http://api.openai.com/v1", "none"),
        ("https://api.openai.com.example.org/v1", "none"),
        ("https://api.openai.com@example.org/v1", "none"),
        ("https://notapi.openai.com/v1", "none"),
    ],
)
def test_the_host_decides_about_the_key(url, key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert connect(Namespace(base_url=url, api_key_env=None, max_retries=1)).api_key == key


def test_a_name_in_the_answers_leads_to_no_other_folder(server, command, tmp_path, monkeypatch):
    """The answers come from somebody else, and with them the name that the file of judgments would have."""
    given = command()
    del given[given.index("--out") : given.index("--out") + 2]
    write_lines(tmp_path / "a.jsonl", [{**record, "model_id": "../../../x"} for record in answers(3)])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"x' cannot be .* in outputs/judgments: give --out or --model-id"):
        main(given)
    assert set(tmp_path.rglob("*")) == before
    assert not server.requests
    main([*given, "--model-id", "x"])
    assert len(read_lines(tmp_path / "work" / "outputs" / "judgments" / "x.jsonl")) == 6


def test_changed_answers_do_not_mix_with_earlier_judgments(server, command, tmp_path):
    main(command())
    given = command()
    write_lines(tmp_path / "a.jsonl", [{**record, "choices": [{"turns": ["x", "y"]}]} for record in answers(3)])
    with pytest.raises(InputError, match="begun with the prompts' hash"):
        main(given)
    main([*given, "--overwrite"])
    records = read_lines(tmp_path / "out.jsonl")
    assert len(records) == 6
    assert all("x" in record["user_prompt"] for record in records)


def test_unusable_input(server, command, tmp_path):
    given = command()
    write_lines(tmp_path / "a.jsonl", answers(2))
    with pytest.raises(InputError, match="holds 0 of the 2 turns of question 83"):
        main(given)
    write_lines(tmp_path / "a.jsonl", [{"question_id": 81, "choices": []}])
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: a record needs"):
        main(given)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match="is empty"):
        main(given)
    assert not server.requests


def test_full_disk_is_said_in_one_sentence(command, tmp_path, capsys):
    with limited_files(1500), pytest.raises(SystemExit) as ended:
        run_and_exit(lambda: main(command()))
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the disk is full")
    main(command())
    assert len(read_lines(tmp_path / "out.jsonl")) == 6
