"""The exact closed form: the formula that traces, and hand-written forms of it for the CPU."""
