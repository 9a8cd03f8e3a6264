"""Model cards, written only from results.json; cards that somebody has edited are recognised."""
