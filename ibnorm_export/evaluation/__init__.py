"""Does the exported model still do its task? Accuracy or perplexity of several candidates on the same samples."""
