"""The frontier of score against cost, ours beside PEFT's methods: `python -m benchmarks.frontier --help`.

Three tasks on two real models: CoLA and STS-B (all-mpnet-base-v2, a task head on top) and OpenAssistant's
conversations (SmolLM2-135M-Instruct). Every method of the table in `methods` trains the same linear layers on the same
batches, at its own best learning rate, which is searched with the first seed on rows that no final score uses. Budgets
are equal in backward passes: those of a warm-up are taken off the training steps. The learning rate rises over the
first 6% of the steps and falls to 0 along a cosine; gradients are clipped to a norm of 1; nothing decays.

`run` trains, and writes one JSON line per run; `costs` measures step time and memory of each method alone on the
machine; `table` and `plot` read both files.
"""
