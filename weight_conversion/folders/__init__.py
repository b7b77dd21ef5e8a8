"""The two kinds of folder: a training checkpoint and a Hugging Face folder."""
