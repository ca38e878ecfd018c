"""Weights: checkpoint readers (Hugging Face, Meta, GGUF), the streaming loader, and quantised weights.

Knows files and the names of the model's tensors; does not know the engine.
"""
