"""Checkpoint folders as Hugging Face Hub repositories."""
