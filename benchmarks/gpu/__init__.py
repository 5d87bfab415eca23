"""Time and memory of a training step on a GPU in bfloat16: `python -m benchmarks.gpu --help`.

Two models with random weights, of BERT base's and LLaMA 1B's shape, whose MLP layers every method trains: both linear
layers of BERT, `up_proj` and `down_proj` of LLaMA. Every step runs under bfloat16 autocast, as with the Trainer's
`bf16=True`; the weights are float32 (BERT) or bfloat16 (LLaMA), adapters float32. Nothing is fetched, and nothing but
torch, transformers, peft, accelerate and, for `--tests`, pytest is needed; a bare copy of the repository will do.
"""
