"""The errors of a file's outputs: over all samples, over many decoded tokens, and as a language model's predictions."""
