"""A checkpoint folder for others: on the Hugging Face Hub, or as one file for deployment."""
