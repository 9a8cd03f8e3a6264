"""One network with several attention layers, several seeds each: runs, and the table of them."""
