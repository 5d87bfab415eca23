"""Answer MT-Bench questions, each turn after the model's own earlier answers, in FastChat's file format.

    python -m examples.llama2_chat.generate --model outputs/llama2_chat --questions mt_bench_inf.jsonl

`--model` is a folder that finetune.py wrote, or any chat model. The same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import time
import uuid
import zlib
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import set_seed

from experiments.arguments import non_negative_float, positive_int
from experiments.json_files import Record
from experiments.results import append_json_line
from experiments.terminal import heading, run_and_exit, show
from experiments.text_files import file_in

from .answering import room_for_prompt, write_answer
from .chat_template import load_tokenizer
from .load_model import PRECISIONS, load_finetuned
from .questions import Question, conversation, read_questions
from .settings import begin_records, earlier_records, settings_of

# FastChat's, by the category of MT-Bench; the rest is answered at 0.7 too.
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
OTHER_TEMPERATURE = 0.7


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.model_id = args.model_id or Path(args.model).name or Path(args.model).resolve().name
    args.out = args.out or file_in("outputs/answers", args.model_id, ".jsonl", "--out or --model-id")
    questions = read_questions(args.questions)
    heading(f"{args.model_id} answers {len(questions)} questions")
    tokenizer = load_tokenizer(args.model)
    model = load_finetuned(args.model, args.base, args.merge)
    room_for_prompt(model, args.max_new_tokens)
    settings = settings_of(args, {"the adapter's hash": adapter_hash(Path(args.model))})
    finished = earlier_records(args.out, settings, args.overwrite)
    begin_records(args.out, settings, args.overwrite)
    show("answered already", f"{len(finished)}")
    answer_all(model, tokenizer, questions, {record["question_id"] for record in finished}, args)
    show("answers", str(args.out))
    return 0


def answer_all(
    model: Any, tokenizer: Any, questions: list[Question], finished: set[int | str], args: argparse.Namespace
) -> None:
    """Answer and write down, one by one, the questions that are not finished."""
    cut = 0
    for question in tqdm([q for q in questions if q.question_id not in finished], desc="questions", disable=None):
        turns, was_cut = answer(model, tokenizer, question, args)
        cut += was_cut
        append_json_line(args.out, answer_record(question, turns, args.model_id))
    if cut:
        show("cut", f"prompts of {cut} questions, which lost their beginning: the model has too few positions")


def answer(model: Any, tokenizer: Any, question: Question, args: argparse.Namespace) -> tuple[list[str], bool]:
    """The answer to each turn, and whether a prompt was cut.

    Each question has its own random state, so that a run that was killed draws what it would have drawn.
    """
    set_seed(zlib.crc32(f"{args.seed}/{question.question_id}".encode()))
    by_category = TEMPERATURES.get(question.category, OTHER_TEMPERATURE)
    heat = by_category if args.temperature is None else args.temperature
    answers: list[str] = []
    cut = False
    for _ in question.turns:
        messages = conversation(question.turns, answers)
        written = write_answer(model, tokenizer, messages, args.max_new_tokens, heat)
        answers.append(written.text)
        cut = cut or written.cut > 0
    return answers, cut


def answer_record(question: Question, turns: list[str], model_id: str) -> Record:
    """FastChat's record of an answer."""
    return {
        "question_id": question.question_id,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }


def adapter_hash(folder: Path) -> str | None:
    """Return a mark that tells an adapter from a later one in the same folder."""
    path = folder / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of finetune.py, another model's folder, or a hub id (needed)")
    add("--questions", type=Path, required=True, help="questions in FastChat's format, .jsonl (needed)")
    add("--out", type=Path, help="file of answers (default: outputs/answers/MODEL_ID.jsonl)")
    add("--model-id", help="the model's name in the answers (default: the last part of --model)")
    add("--base", choices=PRECISIONS, help="precision of the weights (default: as tuned, else bf16, on a CPU float32)")
    add("--merge", action="store_true", help="add the adapter to the weights first (default: keep it apart)")
    add("--max-new-tokens", type=positive_int, default=1024, help="longest answer to a turn (%(default)s)")
    add(
        "--temperature",
        type=non_negative_float,
        help="of sampling, 0 for the likeliest token (default: FastChat's by category: 0.7 for writing, roleplay and "
        "others, 0.1 for stem and humanities, 0 for extraction, math, coding and reasoning)",
    )
    add("--seed", type=int, default=0, help="of sampling (%(default)s)")
    add("--overwrite", action="store_true", help="delete earlier answers in --out (default: go on after them)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_and_exit(main)
