"""What EMA attention costs: parity first, then time and memory -> table, JSON, plot."""
