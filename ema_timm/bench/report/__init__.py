"""A measurement -> tables and pictures: one file a kind of measurement, one line of `KINDS`."""
