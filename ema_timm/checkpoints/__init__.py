"""A checkpoint folder in timm's Hub format: read, converted, written, checked, described."""
