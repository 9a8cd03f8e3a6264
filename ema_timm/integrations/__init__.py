"""EMA attention in other libraries' networks."""
