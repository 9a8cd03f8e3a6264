"""Images and labels: files, folders, data sets by name, splits, and checks of them."""
