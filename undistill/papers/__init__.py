"""The experiments of the papers: each is a function from a scale to the figures that it measures."""
