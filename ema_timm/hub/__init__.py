"""A patient client of the Hugging Face Hub: every step limited in time and explained."""
