"""Tiny models and data for the frontier's tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tiny import bert, llama, tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ ' t3 ' if m.role == 'user' else ' t4 ' }}{{ m.content }}{{ ' </s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' t4 ' }}{% endif %}"
)


def write_files(folder: Path) -> Path:
    """Write the models `llama` and `bert`, CoLA and OpenAssistant in their own formats, and other text."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"t{rng.randrange(5, 64)}" for _ in range(count))

    llama(max_position_embeddings=512).save_pretrained(folder / "llama")
    bert().save_pretrained(folder / "bert")
    chat = tokenizer()
    chat.chat_template = TEMPLATE
    chat.save_pretrained(folder / "llama")
    tokenizer().save_pretrained(folder / "bert")
    for name in ("cola", "oasst", "ud"):
        (folder / name).mkdir()
    for split, count in (("train", 60), ("dev", 12)):
        rows = [f"x\t{row % 2}\t\t{words(3)} t{5 + row % 2}" for row in range(count)]
        (folder / "cola" / f"cola_{split}.tsv").write_text("\n".join(rows))
    trees = [json.dumps(_tree(number, words)) for number in range(10)]
    (folder / "oasst" / "en_100_tree.jsonl").write_text("\n".join(trees))
    (folder / "ud" / "en.dev.conllu").write_text("\n".join(f"# text = {words(9)}" for _ in range(60)))
    return folder


def _tree(number: int, words) -> dict:
    """A question with two answers, the first of which leads to another question and answer."""

    def message(name: str, role: str, *replies: dict) -> dict:
        return {
            "message_id": f"{number}{name}",
            "role": role,
            "text": f"t{5 + number} {words(4)}",
            "lang": "en",
            "replies": list(replies),
        }

    longer = message("b", "assistant", message("c", "prompter", message("d", "assistant")))
    return {
        "message_tree_id": str(number),
        "prompt": message("a", "prompter", longer, message("e", "assistant", message("f", "prompter"))),
    }
