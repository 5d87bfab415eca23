"""The warm-up: the first gradients are observed, and the transition matrices and supports found from them."""
