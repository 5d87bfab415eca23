"""Experiments of this package in the layout of PEFT's `method_comparison/MetaMathQA`, and a runner for them."""
