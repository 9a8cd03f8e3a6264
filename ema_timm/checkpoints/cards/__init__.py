"""Model cards: written from results.json alone, recognised when nobody has edited them."""
