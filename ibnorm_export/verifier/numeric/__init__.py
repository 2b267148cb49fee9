"""The numeric verdict: its steps in order, and those that look at the file and its inputs as a whole."""
