"""Turn text into token ids and back: tokenizers, chat templates, tool calls.

Knows strings, ids and files; knows no tensors and never imports torch.
"""
