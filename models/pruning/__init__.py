"""Token pruning of video transformers."""
