"""Talk to a chat model in a terminal.

    python -m examples.llama2_chat.chat --model outputs/llama2_chat

/reset forgets the conversation, /quit or Ctrl-D ends it. Ctrl-C while the model writes takes back the last question.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from transformers import TextStreamer, set_seed

from experiments.arguments import non_negative_float, positive_int
from experiments.terminal import run_and_exit

from .answering import room_for_prompt, write_answer
from .chat_template import load_tokenizer
from .load_model import PRECISIONS, load_finetuned
from .oasst import Conversation

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it"

EMPTY = (
    "The model ended its answer before the first word, as one does that was trained little or with another chat "
    "template; the question is taken back. Ask otherwise, /reset, or start with --temperature 0.7"
)


class ConsoleStreamer(TextStreamer):
    """Writes an answer to a rich console as it comes."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.console.print(text, end="\n" if stream_end else "", markup=False, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    console = Console()
    tokenizer = load_tokenizer(args.model)
    model = load_finetuned(args.model, args.base, args.merge)
    room_for_prompt(model, args.max_new_tokens)
    set_seed(args.seed)
    console.print(f"[bold]{args.model}[/bold]: {HELP}")
    talk(model, tokenizer, console, args)
    return 0


def talk(model: Any, tokenizer: Any, console: Console, args: argparse.Namespace) -> None:
    """Answer what is typed until the end of the input."""
    beginning: Conversation = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(beginning)
    while (typed := read_line(console)) is not None:
        if typed == "/reset":
            messages = list(beginning)
            console.print("The conversation is forgotten.")
        elif typed.startswith("/"):
            console.print(f"There is no command {typed}: {HELP}", markup=False)
        elif typed:
            messages = answer(model, tokenizer, console, [*messages, {"role": "user", "content": typed}], args)


def read_line(console: Console) -> str | None:
    """Return the line that the user typed, empty if interrupted; None at /quit and at the end of the input."""
    try:
        typed = console.input("[bold green]you:[/bold green] ").strip()
    except EOFError:
        console.print()
        return None
    except KeyboardInterrupt:
        console.print(f"\n{HELP}")
        return ""
    return None if typed == "/quit" else typed


def answer(
    model: Any, tokenizer: Any, console: Console, messages: Conversation, args: argparse.Namespace
) -> Conversation:
    """Write the answer to the last message.

    Returns:
        The conversation with it, or without either if the user interrupts it or it is empty.
    """
    console.print("[bold blue]model:[/bold blue] ", end="")
    streamer = ConsoleStreamer(tokenizer, console)
    try:
        written = write_answer(model, tokenizer, messages, args.max_new_tokens, args.temperature, streamer)
    except KeyboardInterrupt:
        console.print("\nInterrupted; the question is taken back.")
        return messages[:-1]
    if written.cut:
        console.print(f"({written.cut} tokens of the conversation's beginning did not fit into the model's positions)")
    if not written.text:
        console.print(f"({EMPTY})")
        return messages[:-1]
    return [*messages, {"role": "assistant", "content": written.text}]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of finetune.py, another model's folder, or a hub id (needed)")
    add("--base", choices=PRECISIONS, help="precision of the weights (default: as tuned, else bf16, on a CPU float32)")
    add("--merge", action="store_true", help="add the adapter to the weights first (default: keep it apart)")
    add("--system", help="system message at the beginning of the conversation (default: none)")
    add("--max-new-tokens", type=positive_int, default=512, help="longest answer (%(default)s)")
    add("--temperature", type=non_negative_float, default=0.0, help="of sampling (default: 0, the likeliest token)")
    add("--seed", type=int, default=0, help="of sampling (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_and_exit(main)
