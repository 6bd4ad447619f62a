"""TOFU: finetune, unlearn and evaluate language models; the entry scripts beside this package run it."""
