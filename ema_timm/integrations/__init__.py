"""EMA attention with other libraries: detectors, FLOP counters, pruning, int8."""
