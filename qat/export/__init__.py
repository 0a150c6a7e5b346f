"""Export: writing converted models for the engines that serve them."""
