"""The operator in the form that exporters take."""
