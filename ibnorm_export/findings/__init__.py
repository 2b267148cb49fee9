"""What a report can find wrong: one stable code for each kind of finding, and its explanation."""
