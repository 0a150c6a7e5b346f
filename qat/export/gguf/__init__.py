"""GGUF, the file of llama.cpp and of what is built on it."""
