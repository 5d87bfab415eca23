"""Have a judge grade answers to MT-Bench questions from 1 to 10, turn by turn, through any OpenAI-compatible server.

    python -m examples.llama2_chat.judge --questions mt_bench_inf.jsonl --answers outputs/answers/llama2_chat.jsonl

What it will cost is said first, and asked. The same command again goes on where it stopped. The judgments are in
FastChat's format for single-answer grading.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import openai
from tqdm import tqdm

from experiments.arguments import positive_float, positive_int
from experiments.json_files import Record, read_records
from experiments.results import append_json_line, read_json_lines
from experiments.terminal import heading, run_and_exit, show
from experiments.text_files import file_in
from peft_sparsegrad.cli.errors import InputError

from .judge_client import ATTEMPTS, ask_for_rating, connect
from .judge_prompt import build_prompt, template_name
from .questions import Question, Turns, read_answers, read_questions
from .scores import show_scores
from .settings import begin_records, earlier_records, fingerprint, settings_of

CHARACTERS_PER_TOKEN = 4  # of English, roughly


@dataclass(frozen=True)
class Request:
    """One turn of one answer to be graded, counted from 0."""

    question: Question
    turn: int
    system: str
    user: str


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    questions, answers = read_questions(args.questions), read_answers(args.answers)
    model = args.model_id or str(read_records(args.answers)[0][1].get("model_id", args.answers.stem))
    args.out = args.out or file_in("outputs/judgments", model, ".jsonl", "--out or --model-id")
    requests = make_requests(questions, answers, args)
    heading(f"{args.judge} grades the {len(requests)} turns that {model} answered")
    settings = settings_of(
        args, {"the model": model, "the prompts' hash": fingerprint([(r.system, r.user) for r in requests])}
    )
    earlier = earlier_records(args.out, settings, args.overwrite)
    finished = {(record["question_id"], record["turn"]) for record in earlier}
    missing = [r for r in requests if (r.question.question_id, r.turn + 1) not in finished]
    show("judged already", f"{len(requests) - len(missing)}")
    show_estimate(missing, args)
    if args.dry_run:
        return 0
    client = connect(args)
    if missing and not args.yes:
        confirm()
    begin_records(args.out, settings, args.overwrite)
    for request in tqdm(missing, desc="judgments", disable=None):
        append_json_line(args.out, judge(client, request, model, args))
    show_scores(read_json_lines(args.out), questions)
    show("judgments", str(args.out))
    return 0


def make_requests(
    questions: list[Question], answers: dict[int | str, Turns], args: argparse.Namespace
) -> list[Request]:
    """A request for each turn of each question; an InputError where answers are missing."""
    requests = []
    for question in questions:
        turns = answers.get(question.question_id, [])
        if len(turns) != len(question.turns):
            raise InputError(
                f"{args.answers} holds {len(turns)} of the {len(question.turns)} turns of question "
                f"{question.question_id}: let generate.py finish first"
            )
        requests += [Request(question, turn, *build_prompt(question, turns, turn)) for turn in range(len(turns))]
    return requests


def show_estimate(requests: list[Request], args: argparse.Namespace) -> None:
    """Say how many tokens the requests are, and their price if prices are given."""
    tokens_in = sum(len(r.system) + len(r.user) for r in requests) // CHARACTERS_PER_TOKEN
    most_out = len(requests) * args.max_tokens
    show("estimate", f"{len(requests)} requests, about {tokens_in:,} tokens in, at most {most_out:,} tokens out")
    if args.price_in is not None and args.price_out is not None:
        cost = (tokens_in * args.price_in + most_out * args.price_out) / 1e6
        show("estimated cost", f"at most about {cost:.2f}; {ATTEMPTS} times that if no judgment has a rating at once")
    else:
        show("estimated cost", "unknown: give --price-in and --price-out")


def confirm() -> None:
    """Ask on the terminal whether to go on; an InputError unless the answer is yes."""
    try:
        answer = input("  Send these requests? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise InputError("nothing was sent: answer y, or give --yes")


def judge(client: openai.OpenAI, request: Request, model: str, args: argparse.Namespace) -> Record:
    """FastChat's record of a judgment; its score is null where the judge gave none."""
    judgment, score = ask_for_rating(client, request.system, request.user, args)
    return {
        "question_id": request.question.question_id,
        "model": model,
        "judge": [args.judge, template_name(request.question, request.turn)],
        "user_prompt": request.user,
        "judgment": judgment,
        "score": score,
        "turn": request.turn + 1,
        "tstamp": time.time(),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--questions", type=Path, required=True, help="questions in FastChat's format, .jsonl (needed)")
    add("--answers", type=Path, required=True, help="answers in FastChat's format, .jsonl (needed)")
    add("--out", type=Path, help="file of judgments (default: outputs/judgments/MODEL_ID.jsonl)")
    add("--model-id", help="the answering model's name in the judgments (default: the one in the answers)")
    add("--judge", default="gpt-4", help="the judge's name on the server (%(default)s)")
    add("--base-url", help="the server, e.g. http://localhost:8000/v1 (default: $OPENAI_BASE_URL, else OpenAI's)")
    add(
        "--api-key-env",
        metavar="NAME",
        help="environment variable with the key to send to the server (default: OPENAI_API_KEY for OpenAI's own, and "
        "no key for another)",
    )
    add("--max-tokens", type=positive_int, default=1024, help="longest judgment (%(default)s)")
    add("--max-retries", type=positive_int, default=8, help="repetitions of a request that fails (%(default)s)")
    add("--price-in", type=positive_float, help="price of a million tokens of prompt (default: unknown)")
    add("--price-out", type=positive_float, help="price of a million tokens of judgment (default: unknown)")
    add("--dry-run", action="store_true", help="say what it would cost and stop (default: go on)")
    add("--yes", action="store_true", help="do not ask before the requests are sent (default: ask)")
    add("--overwrite", action="store_true", help="delete earlier judgments in --out (default: go on after them)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_and_exit(main)
