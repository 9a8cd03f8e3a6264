"""The cost of EMA attention: parity first, then time and memory, as JSON, tables and pictures."""
