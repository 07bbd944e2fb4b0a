"""The bypass: a connect to a tcp listener that goes straight to an instance of this node (behaviour rules B1, B2)."""
