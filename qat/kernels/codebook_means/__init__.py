"""One step of k-means on the members that the weights have now."""
