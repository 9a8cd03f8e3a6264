"""Tables and pictures of measurements: one file per kind, one line each in `kinds.KINDS`."""
