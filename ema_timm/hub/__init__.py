"""Uploads to and downloads from the Hugging Face Hub, with retries and time limits."""
