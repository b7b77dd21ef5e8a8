"""From a SentencePiece model to a tokenizer's files, without torch or transformers."""
