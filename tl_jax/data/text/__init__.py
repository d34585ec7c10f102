"""Texts: what a source holds of them, tokenizers, and ragged rows of tokens."""
