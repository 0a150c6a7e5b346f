"""The cross entropy of logits and its gradient, which takes their place."""
