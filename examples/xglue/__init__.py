"""XGLUE: fine-tune an encoder on English and test it zero-shot on other languages."""
