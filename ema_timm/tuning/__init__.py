"""Who computes EMA attention on a user's own GPU: measured there, once, when asked for."""
