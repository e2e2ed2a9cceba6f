"""Embedding lookup from packed weights, so that tied embeddings are held once."""
