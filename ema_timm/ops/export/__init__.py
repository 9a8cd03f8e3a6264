"""The operator as exporters take it: arranged weights, and one dialect for each kind of runtime."""
