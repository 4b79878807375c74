"""Answers with the encoders that `vlm` trains: classification, embeddings and search over HTTP."""
