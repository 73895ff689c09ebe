"""The base of all other packages; it knows nothing of classifiers."""
