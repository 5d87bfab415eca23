"""Make an encoder with random weights, small enough to try the programs on the sample files without a network.

python -m examples.xglue.tiny_encoder --data examples/xglue/sample --out outputs/tiny-encoder
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

from experiments.terminal import run_and_exit, show
from peft_sparsegrad.cli.errors import InputError

BEGIN, PAD, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"  # in the order of XLM-R's vocabulary
VOCABULARY, LENGTH = 500, 128


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    texts = read_texts(args.data)
    tokenizer = train_tokenizer(texts)
    new_encoder(len(tokenizer)).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    show("encoder", f"{args.out}, {len(tokenizer)} tokens")
    return 0


def read_texts(folder: Path) -> list[str]:
    """The contents of all files in the folder.

    Raises:
        InputError: If there are none, or one is not text.
    """
    try:
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*")) if path.is_file()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the files in {folder}: {error}") from error
    if not texts:
        raise InputError(f"there are no files in {folder}")
    return texts


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Pieces of words, with XLM-R's special tokens around one text or two."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = [BEGIN, PAD, END, UNKNOWN]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=specials, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        pair=f"{BEGIN} $A {END} {END} $B {END}",
        special_tokens=[(BEGIN, 0), (END, 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        cls_token=BEGIN,
        eos_token=END,
        sep_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=LENGTH,
    )


def new_encoder(vocabulary: int) -> XLMRobertaModel:
    """An XLM-R of four narrow blocks, always the same."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH + 2,  # positions begin after that of the padding
        type_vocab_size=1,
    )
    return XLMRobertaModel(config, add_pooling_layer=False)


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.xglue.tiny_encoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("examples/xglue/sample"), help="texts for its tokenizer (%(default)s)")
    add("--out", type=Path, default=Path("outputs/tiny-encoder"), help="folder for the encoder (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_and_exit(main)
